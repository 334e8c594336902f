"""`python -m loclin`: the command line, also where the script `loclin` is not on the path."""

from loclin.cli import main

if __name__ == "__main__":
    main()

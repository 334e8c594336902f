"""How the explanation of every layer looks."""

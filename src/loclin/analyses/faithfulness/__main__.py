"""`python -m loclin.analyses.faithfulness` is `loclin faithfulness`."""

import typer

from loclin.commands.faithfulness import faithfulness

typer.run(faithfulness)

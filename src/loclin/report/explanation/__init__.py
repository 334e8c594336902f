"""How an explanation looks."""

"""How an attribution looks."""

"""How an explanation looks: on a terminal, as a page, in a notebook."""

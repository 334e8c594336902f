"""One traced prompt, layer by layer: its frozen coefficients, and products with its linear maps."""

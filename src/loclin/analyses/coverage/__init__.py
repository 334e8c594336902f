"""Which families of transformers become exact maps."""

"""Which model families of transformers have exact maps."""

"""GGUF files: found, checked, converted once, and cached."""

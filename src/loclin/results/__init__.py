"""What is computed, saved, loaded and compared."""

"""Results: saved, loaded, exported, shown and compared."""

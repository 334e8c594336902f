"""Shared by all rooms: checks of arguments, sums in float64, and torch in its default state."""

"""Exact linear maps, their spectra and their certificate."""

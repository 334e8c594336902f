"""The exact linear maps that people hold, their spectra and their certificate."""

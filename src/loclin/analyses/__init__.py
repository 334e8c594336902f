"""One file or folder for each question about a prompt."""

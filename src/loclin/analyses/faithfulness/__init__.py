"""Do shares predict what removing tokens does to the model? A study on packaged prompts."""

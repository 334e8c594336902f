"""Do the shares say what matters to the model? Shares against what happens when tokens go, on packaged prompts."""

"""What a prediction is made of: exact shares of tokens, layers, heads, neurons and biases."""

"""Exact shares of a prediction by token, layer, head, neuron and bias."""

"""Models whose decoder layers stay on disk: each layer's weights are in memory only while they are used."""

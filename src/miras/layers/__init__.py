"""Functions used by layers, without parameters: attention and convolutions."""

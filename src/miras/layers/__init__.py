"""Tools of layers that own no parameter: attention and convolutions."""

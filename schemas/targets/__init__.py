"""What a stored number means: top-k, tail mass, draws and prior; hidden states; attention maps."""

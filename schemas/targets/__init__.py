"""The meaning of stored numbers: targets, tail draws, tail prior, hidden states, attention maps."""

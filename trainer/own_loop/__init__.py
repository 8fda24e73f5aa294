"""For a student and a training loop of one's own: batches, losses and judging, without `Train`."""

"""The decoder: attention, experts, the blocks made of them, and the whole model."""

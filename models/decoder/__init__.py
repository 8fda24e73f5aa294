"""The decoder itself: blocks, attention, experts."""

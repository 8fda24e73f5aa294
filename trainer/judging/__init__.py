"""What a student is worth on held-out rows."""

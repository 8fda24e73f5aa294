"""What a cache holds, for people."""

"""One update of the student."""

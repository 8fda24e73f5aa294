"""One update of the student: gradient, optimiser, and skipped updates."""

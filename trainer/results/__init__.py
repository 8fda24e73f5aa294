"""After a run: evaluate, export, generate, report, compare, sweep."""

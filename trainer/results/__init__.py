"""Commands on finished runs: evaluate, export, generate, report; and sweeps of runs."""

"""The teacher on a sample of rows: everything that is measured there and frozen before capture."""

"""zarr3 arrays of rows (hidden states, attention maps): their format, writing and reading."""

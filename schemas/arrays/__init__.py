"""zarr arrays of rows, for hidden states and attention maps: layout, writing, reading."""

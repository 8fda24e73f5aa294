"""The names of what a block may keep for the backward pass; settings read them without jax."""

from typing import Literal

Remat = Literal["none", "dots", "block"]
"""`none` keeps every product's operands; `dots` the block's input, queries, keys, values and the
gated MLP's two products; `block` only the input. The rest is computed again."""

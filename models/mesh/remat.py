"""How much of each block is kept for the backward pass. Apart, because settings import no jax."""

from typing import Literal

Remat = Literal["none", "dots", "block"]
"""`none` keeps every product's operands; `dots` the block's input, queries, keys, values and the
gated MLP's two products; `block` only the input. The rest is computed again."""

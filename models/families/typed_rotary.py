"""Rotations that differ between blocks with a window and blocks with full attention."""

from __future__ import annotations

from typing import Any

from decant.models.families.field_reader import FieldReader
from decant.models.families.rotary_fields import read_scaling
from decant.models.families.windows import FULL, SLIDING


def read_typed_rotary(
    reader: FieldReader, *, theta: float, window_theta: int | float
) -> dict[str, Any]:
    """The rotation of blocks with full attention, and the base of those with a window.

    Transformers 5 writes both in `rope_parameters`, by type of block. Transformers 4 writes
    `rope_theta` and `rope_scaling` for full attention. `theta` and `window_theta` are the bases
    where the file has none.
    """
    theta = reader.number("rope_theta", theta)
    longest = reader.size("max_position_embeddings", of="max_positions")
    scaling = read_scaling(reader.section("rope_scaling"), max_positions=longest)
    kinds = reader.section("rope_parameters")
    full, sliding = kinds.section(FULL), kinds.section(SLIDING)
    kinds.finish()
    theta, local = full.number("rope_theta", theta), sliding.number("rope_theta", window_theta)
    scaling = read_scaling(full, max_positions=longest) or scaling
    sliding.require("rope_type", "default")
    sliding.finish()
    return {
        "rope_theta": float(theta),
        "rope_scaling": scaling,
        "window_rope_theta": float(local),
    }

"""Scalings of rotary positions in config.json: `rope_scaling` of transformers 4, and
`rope_parameters` of transformers 5, which holds the same fields."""

from __future__ import annotations

import math
from typing import Any

from decant.models.families.field_reader import FieldReader
from decant.models.rotary import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    ProportionalScaling,
    Scaling,
    YarnScaling,
    usual_attention_factor,
)

_ORIGINAL = "original_max_position_embeddings"


def read_scaling(
    rope: FieldReader, *, max_positions: int, original: int | None = None
) -> Scaling | None:
    """How a rotation is scaled, None for not at all. Finishes `rope`, the rotation's fields.

    Args:
        rope: reads the fields of one rotation.
        max_positions: the model's longest sequence, after scaling.
        original: the longest sequence before scaling, if it is stated outside of `rope`. None:
            the rotation's own field, or else `max_positions`.
    """
    old_name = rope.take("type", "default")
    kind = rope.take("rope_type", old_name)
    before = original or max_positions
    if original is None and kind in ("llama3", "yarn", "longrope", "su"):
        before = rope.size(_ORIGINAL, max_positions, of="max_positions")
    scaling: Scaling | None = None
    if kind == "linear":
        scaling = LinearScaling(float(rope.number("factor")))
    elif kind == "dynamic":
        # Transformers stretches from max_position_embeddings, whatever the other field says.
        scaling = DynamicScaling(float(rope.number("factor")), max_positions)
    elif kind == "llama3":
        scaling = _read_llama3(rope, original=before)
    elif kind == "yarn":
        scaling = _read_yarn(rope, max_positions=max_positions, original=before)
    elif kind in ("longrope", "su"):  # the first Phi-3 called it su
        scaling = _read_longrope(rope, max_positions=max_positions, original=before)
    elif kind == "proportional":
        rope.require("factor", 1.0)
        share = float(rope.number("partial_rotary_factor", 1.0))
        scaling = ProportionalScaling(share) if share < 1 else None
    else:
        known = ("default", "linear", "dynamic", "llama3", "yarn", "longrope", "proportional")
        rope.require("rope_type", *known)
        rope.require("type", *known)
    # Ministral 3 repeats the one here, and others keep the other when they do not use it.
    rope.ignore("max_position_embeddings", _ORIGINAL)
    rope.finish()
    return scaling


def _read_llama3(rope: FieldReader, *, original: int) -> Llama3Scaling:
    scaling = Llama3Scaling(
        factor=float(rope.number("factor")),
        low_freq_factor=float(rope.number("low_freq_factor")),
        high_freq_factor=float(rope.number("high_freq_factor")),
        original_max_positions=original,
    )
    if scaling.low_freq_factor >= scaling.high_freq_factor:
        raise rope.error("high_freq_factor", scaling.high_freq_factor, "expected more than low")
    return scaling


def _read_yarn(rope: FieldReader, *, max_positions: int, original: int) -> YarnScaling:
    factor = float(rope.number("factor", max_positions / original))
    usual = usual_attention_factor(factor)
    names = ("mscale", "mscale_all_dim")
    # DeepSeek's two fields count only together; 0 is none. The second one's other meaning is read
    # in latent_attention.py.
    rope.ignore(*names)
    if all(rope.take(name, 0) != 0 for name in names):
        above, below = (usual_attention_factor(factor, float(rope.number(n))) for n in names)
        usual = above / below
    return YarnScaling(
        factor=factor,
        original_max_positions=original,
        beta_fast=float(rope.number("beta_fast", 32.0)),
        beta_slow=float(rope.number("beta_slow", 1.0)),
        truncate=rope.flag("truncate", True),
        attention_factor=float(rope.number("attention_factor", usual)),
    )


def _read_longrope(rope: FieldReader, *, max_positions: int, original: int) -> LongRopeScaling:
    factor = float(rope.number("factor", max_positions / original))
    if original < 2:
        raise rope.error(_ORIGINAL, original, "expected at least 2")
    usual = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return LongRopeScaling(
        short_factors=rope.numbers("short_factor"),
        long_factors=rope.numbers("long_factor"),
        original_max_positions=original,
        attention_factor=float(rope.number("attention_factor", usual)),
    )


def write_scaling(scaling: Scaling | None) -> dict[str, Any] | None:
    """Inverse of `read_scaling`, in the spelling that transformers 4 and 5 both read."""
    match scaling:
        case None:
            return None
        case LinearScaling(factor):
            return {"rope_type": "linear", "factor": factor}
        case DynamicScaling(factor):
            return {"rope_type": "dynamic", "factor": factor}
        case Llama3Scaling():
            return {
                "rope_type": "llama3",
                "factor": scaling.factor,
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
                _ORIGINAL: scaling.original_max_positions,
            }
        case YarnScaling():
            return {
                "rope_type": "yarn",
                "factor": scaling.factor,
                "beta_fast": scaling.beta_fast,
                "beta_slow": scaling.beta_slow,
                "truncate": scaling.truncate,
                "attention_factor": scaling.attention_factor,
                _ORIGINAL: scaling.original_max_positions,
            }
        case ProportionalScaling(share):
            return {"rope_type": "proportional", "partial_rotary_factor": share}
        case LongRopeScaling():
            return {
                "rope_type": "longrope",
                "short_factor": list(scaling.short_factors),
                "long_factor": list(scaling.long_factors),
                "attention_factor": scaling.attention_factor,
                _ORIGINAL: scaling.original_max_positions,
            }

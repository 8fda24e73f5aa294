"""Which blocks see a window: `layer_types` in config.json ↔ ModelConfig.windows."""

from __future__ import annotations

from collections.abc import Sequence

from decant.models.config import ModelConfig
from decant.models.families.family import FieldReader

FULL, SLIDING = "full_attention", "sliding_attention"


def windows(
    reader: FieldReader, *, window: int | None, otherwise: Sequence[str]
) -> tuple[int | None, ...]:
    """Windows by the file's `layer_types`, or by `otherwise` where it has none."""
    kinds = reader.take("layer_types", otherwise)
    layers = reader.take("num_hidden_layers")
    if set(kinds) - {FULL, SLIDING} or len(kinds) != layers:
        raise ValueError(
            f"{reader.where}: layer_types holds {len(kinds)} of {sorted(set(kinds))}; expected "
            f"{FULL} or {SLIDING} for each of num_hidden_layers = {layers} blocks."
        )
    if SLIDING in kinds and window is None:
        raise ValueError(
            f"{reader.where}: layer_types holds {SLIDING}, but there is no sliding_window."
        )
    return tuple(window if kind == SLIDING else None for kind in kinds)


def fields(config: ModelConfig) -> dict[str, object]:
    """Inverse of `windows`: `layer_types` and `sliding_window`. Files have one size of window."""
    kinds = [FULL if window is None else SLIDING for window in config.layer_windows]
    sizes = [window for window in config.layer_windows if window is not None]
    return {"layer_types": kinds, "sliding_window": sizes[0] if sizes else None}

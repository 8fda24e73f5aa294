"""Which blocks see a window: `layer_types` in config.json ↔ ModelConfig.windows."""

from __future__ import annotations

from collections.abc import Sequence

from models.config import ModelConfig, shortest_cycle
from models.families.family import FieldReader

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
    return shortest_cycle([window if kind == SLIDING else None for kind in kinds])


def fields(config: ModelConfig) -> dict[str, object]:
    """Inverse of `windows`: `layer_types` and `sliding_window`."""
    kinds = [FULL if window is None else SLIDING for window in config.layer_windows]
    return {"layer_types": kinds, "sliding_window": one_size(config)}


def one_size(config: ModelConfig) -> int | None:
    """The size that all windows have; None if there is none."""
    sizes = {window for window in config.layer_windows if window is not None}
    if len(sizes) > 1:
        raise ValueError(
            f"ModelConfig: windows of {sorted(sizes)} positions cannot be written to config.json, "
            "which has one sliding_window; use windows of one size."
        )
    return next(iter(sizes), None)


def same_everywhere(config: ModelConfig) -> int | None:
    """The window that every block has, for families whose blocks cannot differ."""
    if len(set(config.layer_windows)) > 1:
        raise ValueError(
            f"ModelConfig: windows {config.windows} differ from block to block, which config.json "
            f"of family '{config.family}' cannot say; use equal ones."
        )
    return config.layer_windows[0]

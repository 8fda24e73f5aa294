"""Which blocks have an attention window: `layer_types` in config.json ↔ ModelConfig.windows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from decant.models.config import ModelConfig
from decant.models.families.field_reader import FieldReader, shown

FULL, SLIDING = "full_attention", "sliding_attention"


def read_windows(
    reader: FieldReader, *, window: int | None, default_types: list[str]
) -> tuple[int | None, ...]:
    """The window of every block, None for full attention.

    Args:
        reader: reads config.json.
        window: size of the window of blocks whose type is `sliding_attention`.
        default_types: the type of every block if the file has no `layer_types`.
    """
    types = reader.take("layer_types", default_types)
    layers = reader.size("num_hidden_layers", of="num_layers")
    if not isinstance(types, list):
        raise reader.error("layer_types", types, "expected a list")
    unknown = [kind for kind in types if kind not in (FULL, SLIDING)]
    if unknown or len(types) != layers:
        raise ValueError(
            f"{reader.where}: layer_types holds {len(types)} types{_named(unknown)}; expected "
            f"{FULL} or {SLIDING} for each of num_hidden_layers = {layers} blocks."
        )
    if SLIDING in types and window is None:
        raise ValueError(
            f"{reader.where}: layer_types holds {SLIDING}, but there is no sliding_window."
        )
    return tuple(window if kind == SLIDING else None for kind in types)


def _named(unknown: Sequence[Any]) -> str:
    return f", one of them {shown(unknown[0])}" if unknown else ""


def period_of(period: int, *, layers: int) -> list[str]:
    """Types of blocks of which each `period`-th has full attention and the others a window."""
    return [SLIDING if (i + 1) % period else FULL for i in range(layers)]


def write_windows(config: ModelConfig) -> dict[str, Any]:
    """Inverse of `read_windows`: `layer_types` and `sliding_window`.

    A file can express one window size only; the first is written.
    """
    types = [FULL if window is None else SLIDING for window in config.layer_windows]
    sizes = [window for window in config.layer_windows if window is not None]
    return {"layer_types": types, "sliding_window": sizes[0] if sizes else None}


def read_switched_windows(reader: FieldReader) -> tuple[int | None, ...]:
    """Qwen's windows: `use_sliding_window` switches them on for the upper blocks."""
    on, window = reader.flag("use_sliding_window", False), reader.window("sliding_window", 4096)
    first = reader.take("max_window_layers", 28)  # may be 0
    count = reader.size("num_hidden_layers", of="num_layers")
    if type(first) is not int:
        raise reader.error("max_window_layers", first, "expected a whole number")
    types = [SLIDING if on and i >= first else FULL for i in range(count)]
    return read_windows(reader, window=window if on else None, default_types=types)


def write_switched_windows(config: ModelConfig) -> dict[str, Any]:
    """Inverse of `read_switched_windows`."""
    fields = write_windows(config)
    return fields | {"use_sliding_window": fields["sliding_window"] is not None}

"""Turns the settings of signals other than `logits` into signals of a given teacher."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from decant.models import ModelConfig
from decant.pipelines.config import Attention, Hidden, Logits, Signals
from decant.schemas.arrays.spec import shard_rows
from decant.schemas.disk.identity import signal_id
from decant.schemas.disk.layout import COUNTS, SKETCH
from decant.schemas.disk.sizes import size_text
from decant.schemas.signals import (
    MEAN,
    ArraySignal,
    AttentionSignal,
    CountsSignal,
    HiddenSignal,
    SketchSignal,
    attention_name,
    hidden_name,
)

_NO_ID = ""
"""Placeholder for signal_id, which depends on directions that calibration has yet to find."""


AddedSignal = CountsSignal | SketchSignal | ArraySignal
"""Signals that a sealed cache can gain: all but `logits`."""


def describe_signals(
    signals: Signals, model: ModelConfig, *, teacher_id: str, length: int, unit_rows: int
) -> dict[str, AddedSignal]:
    """All signals asked for but `logits`, by name. Arguments and errors as `describe_arrays`."""
    return {
        **_describe_companions(signals.logits, model, teacher_id=teacher_id),
        **describe_arrays(
            signals, model, teacher_id=teacher_id, length=length, unit_rows=unit_rows
        ),
    }


def _describe_companions(
    logits: Logits, model: ModelConfig, *, teacher_id: str
) -> dict[str, CountsSignal | SketchSignal]:
    described: dict[str, CountsSignal | SketchSignal] = {}
    if logits.counts:
        described[COUNTS] = CountsSignal(_NO_ID, teacher_id, logits.counts)
    if asked := logits.sketch.settings():
        width = model.hidden_size
        rank = width if asked["rank"] == "full" else asked["rank"]
        if rank > width:
            raise ValueError(
                f"signals.logits.sketch.rank is {rank}; this teacher's states are {width} wide: "
                f'choose at most {width}, or "full"'
            )
        described[SKETCH] = SketchSignal(
            _NO_ID,
            teacher_id,
            rank=rank,
            teacher_width=width,
            step=asked["step"],
            dither=asked["dither"],
            softcap=model.final_softcap,
        )
    return described


def describe_arrays(
    signals: Signals, model: ModelConfig, *, teacher_id: str, length: int, unit_rows: int
) -> dict[str, ArraySignal]:
    """The array signals asked for, by name; layers, blocks and heads are numbered from 0.

    `length` is the number of tokens in a row, `unit_rows` the rows of a full unit. ValueError that
    names the setting if the teacher lacks a layer, block or head. The signals have no signal_id
    until `with_signal_id`.
    """
    _check_width(signals.hidden, model)
    described: dict[str, ArraySignal] = {}
    for layer in _hidden_layers(signals.hidden, model):
        hidden = signals.hidden
        width = model.hidden_size if hidden.width == "full" else hidden.width
        described[hidden_name(layer)] = HiddenSignal(
            _NO_ID,
            teacher_id,
            layer=layer,
            dtype=hidden.dtype,
            width=width,
            teacher_width=model.hidden_size,
            shard_rows=shard_rows((length, width), hidden.dtype, unit_rows=unit_rows),
        )
    heads = _heads(signals.attention, model)
    for layer in _blocks(signals.attention, model):
        stored = (1 if heads == MEAN else len(heads), length, length)
        dtype = signals.attention.dtype
        described[attention_name(layer)] = AttentionSignal(
            _NO_ID,
            teacher_id,
            layer=layer,
            dtype=dtype,
            heads=heads,
            teacher_heads=model.num_heads,
            shard_rows=shard_rows(
                stored, "uint8" if dtype == "uint8-log" else dtype, unit_rows=unit_rows
            ),
        )
    return described


def head_size(signals: Mapping[str, AddedSignal], *, vocabulary: int) -> str:
    """A line on the size of the head of a sketch of all dimensions; empty without one."""
    sketch = signals.get(SKETCH)
    if not isinstance(sketch, SketchSignal) or sketch.rank < sketch.teacher_width:
        return ""
    size = size_text(4 * sketch.rank * (sketch.rank + vocabulary))
    return f'{SKETCH}: rank "full" takes {size} in each part for its head, besides its records'


def with_signal_id(
    signal: ArraySignal, *, rows_id: str, directions: str | None = None
) -> ArraySignal:
    """The signal with its signal_id. `directions`: sha256 of its principal directions, if any."""
    identity = signal_id(
        rows=rows_id,
        teacher=signal.teacher_id,
        settings=settings(signal),
        statistics={"directions": directions} if directions else {},
    )
    return dataclasses.replace(signal, signal_id=identity)


def settings(signal: AddedSignal) -> dict[str, Any]:
    """The settings that the stored values depend on, besides the rows and the teacher."""
    if isinstance(signal, CountsSignal):
        return {"draws": signal.draws}
    if isinstance(signal, SketchSignal):
        rank = signal.asked_rank or signal.rank
        return {"rank": rank, "step": signal.step, "dither": signal.dither}
    names = (
        ("layer", "dtype", "width")
        if isinstance(signal, HiddenSignal)
        else ("layer", "dtype", "heads")
    )
    return {name: getattr(signal, name) for name in names}


def least_bytes(signal: AddedSignal, *, length: int) -> int:
    """A lower bound on the compressed bytes of one row of `length` tokens.

    By measurement: bfloat16 states shrink by a quarter; half of a map is above the diagonal, and
    the other half shrinks to two thirds.
    """
    if isinstance(signal, CountsSignal):
        return length
    if isinstance(signal, SketchSignal):
        return length if signal.step else 3 * length * signal.rank
    if isinstance(signal, HiddenSignal):
        per_position = 1.4 * signal.width if signal.dtype == "bfloat16" else 0.7 * signal.width
        return int(length * per_position)
    per_key = 0.6 if signal.dtype == "bfloat16" else 0.2
    return int(signal.stored_heads * length**2 * per_key)


def _hidden_layers(hidden: Hidden, model: ModelConfig) -> list[int]:
    last = model.num_layers
    for layer in hidden.layers:
        if not -1 <= layer <= last:
            raise ValueError(
                f"signals.hidden.layers is {list(hidden.layers)}: there is no layer {layer}; this "
                f"teacher has 0 (the embedding) to {last} (after the final norm, also -1)"
            )
    return _unique(
        [last if layer == -1 else layer for layer in hidden.layers],
        what="signals.hidden.layers",
        asked=hidden.layers,
    )


def _check_width(hidden: Hidden, model: ModelConfig) -> None:
    if hidden.width != "full" and not 1 <= hidden.width < model.hidden_size:
        raise ValueError(
            f"signals.hidden.width is {hidden.width}; this teacher's states are "
            f'{model.hidden_size} wide: choose less, or "full"'
        )


def _blocks(attention: Attention, model: ModelConfig) -> list[int]:
    blocks = model.num_layers
    if attention.layers == "all":
        return list(model.blocks_with_maps)
    for layer in attention.layers:
        if not -blocks <= layer < blocks:
            raise ValueError(
                f"signals.attention.layers is {list(attention.layers)}: there is no block {layer}; "
                f"this teacher has 0 to {blocks - 1} (negative ones count from the last)"
            )
        if layer % blocks not in model.blocks_with_maps:
            raise ValueError(
                f"signals.attention.layers is {list(attention.layers)}: block {layer % blocks} "
                f"{model.why_no_maps(layer % blocks)}; those with maps are "
                f"{', '.join(map(str, model.blocks_with_maps)) or 'none'}"
            )
    return _unique(
        [layer % blocks for layer in attention.layers],
        what="signals.attention.layers",
        asked=attention.layers,
    )


def _heads(attention: Attention, model: ModelConfig) -> tuple[int, ...] | Literal["mean"]:
    if attention.heads == MEAN:
        return MEAN
    if attention.heads == "all":
        return tuple(range(model.num_heads))
    heads = attention.heads
    if not heads or any(not 0 <= head < model.num_heads for head in heads):
        raise ValueError(
            f"signals.attention.heads is {list(heads)}; this teacher has heads 0 to "
            f'{model.num_heads - 1}, "all" or "mean"'
        )
    return tuple(_unique(list(heads), what="signals.attention.heads", asked=heads))


def _unique(numbers: list[int], *, what: str, asked: tuple[int, ...]) -> list[int]:
    if len(set(numbers)) < len(numbers):
        raise ValueError(f"{what} is {list(asked)}: names one twice, {numbers}")
    return numbers

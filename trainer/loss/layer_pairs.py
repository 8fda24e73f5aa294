"""The pairs of layers that the loss's terms compare, determined before a run starts.

Layers become numbers ≥ 0, and defaults become lists. Each pair names the signal to read from the
cache and the map that the student's side passes. A mismatch is an error that names both sides.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

from decant.models import ModelConfig
from decant.schemas import Cache
from decant.schemas.signals import MEAN, AttentionSignal, HiddenSignal, attention_name, hidden_name
from decant.trainer.loss.settings import AttentionLoss, HiddenLoss, Loss

AnyTerm = TypeVar("AnyTerm", HiddenLoss, AttentionLoss)


class HiddenPair(NamedTuple):
    """One comparison of hidden states."""

    student: int
    """Hidden layer of the student."""
    signal: str
    """Name of the teacher's signal in the cache."""
    width: int
    """Numbers that the signal stores for each position."""
    projection: str | None = None
    """Name of the trained matrix that maps the student's states; None: no matrix."""
    directions: bool = False
    """Whether the student's states are projected onto the signal's principal directions."""


class AttentionPair(NamedTuple):
    """One comparison of attention maps."""

    student: int
    """Block of the student."""
    signal: str
    """Name of the teacher's signal in the cache."""
    heads: tuple[int, ...] | None = None
    """The student's heads that are compared; None: all."""


class Pairs(NamedTuple):
    """The pairs of each term of the loss. Hashable, because compiled programs depend on them."""

    hidden: tuple[tuple[HiddenPair, ...], ...] = ()
    attention: tuple[tuple[AttentionPair, ...], ...] = ()

    @property
    def signals(self) -> tuple[str, ...]:
        """The signals to read from the cache, without repeats."""
        pairs = [pair for term in (*self.hidden, *self.attention) for pair in term]
        return tuple(dict.fromkeys(pair.signal for pair in pairs))

    @property
    def hidden_layers(self) -> tuple[int, ...]:
        """The hidden layers that the student's forward pass must return.

        A pair of block i needs hidden layer i, which is the block's input.
        """
        pairs = [pair for term in (*self.hidden, *self.attention) for pair in term]
        return tuple(sorted({pair.student for pair in pairs}))


NO_PAIRS = Pairs()


def number_layers(
    loss: Loss,
    *,
    cache: Cache,
    teacher: ModelConfig,
    student: ModelConfig,
    cut_from: Sequence[int] | None = None,
) -> Loss:
    """The loss with every term's layers as numbers ≥ 0, and with defaults filled in.

    `cut_from` lists for each block of the student the teacher's block that it was cut from; None:
    the student was not cut from the teacher. ValueError for a layer that does not exist.
    """
    if not loss.terms:
        return loss
    ours, theirs = student.num_layers, teacher.num_layers
    maps = nearest_blocks(
        stored_blocks(cache) if student.blocks_with_maps else [],
        ours=ours,
        theirs=theirs,
        cut_from=cut_from,
        among=student.blocks_with_maps,
    )
    if not maps and any(not term.teacher_layers for term in loss.attention):
        raise ValueError(_missing(cache, "attention maps"))
    return dataclasses.replace(
        loss,
        # Hidden layer 0 is the embedding's output: there is one hidden layer more than blocks.
        hidden=tuple(
            _numbered(f"hidden[{i}]", term, [(-1, -1)], counts=(ours + 1, theirs + 1))
            for i, term in enumerate(loss.hidden)
        ),
        attention=tuple(
            _numbered(f"attention[{i}]", term, maps, counts=(ours, theirs))
            for i, term in enumerate(loss.attention)
        ),
    )


def stored_blocks(cache: Cache) -> list[int]:
    """The teacher's blocks whose attention maps the cache holds, in order."""
    signals = cache.manifest.signals.values()
    return sorted(signal.layer for signal in signals if isinstance(signal, AttentionSignal))


def nearest_blocks(
    layers: Sequence[int],
    *,
    ours: int,
    theirs: int,
    cut_from: Sequence[int] | None = None,
    among: Sequence[int] | None = None,
) -> list[tuple[int, int]]:
    """(student's block, teacher's block) for each teacher block of `layers`.

    The student's block is the one that was cut from the teacher's, or else the nearest in depth (of
    two, the earlier). If `cut_from` is None, the student's blocks count as spread evenly over the
    teacher's depth, from its first block to its last. `ours` and `theirs` are the numbers of blocks
    of student and teacher; `among` lists the student's blocks that may be chosen, None: all.

    >>> nearest_blocks([0, 3, 9], ours=4, theirs=10)
    [(0, 0), (1, 3), (3, 9)]
    """
    evenly = [block * (theirs - 1) / max(ours - 1, 1) for block in range(ours)]
    places = evenly if cut_from is None else cut_from
    return [
        (
            min(
                range(ours) if among is None else among,
                key=lambda block, at=layer: abs(places[block] - at),
            ),
            layer,
        )
        for layer in layers
    ]


def layer_pairs(loss: Loss, *, cache: Cache, student: ModelConfig) -> Pairs:
    """The pairs of a loss from `number_layers`. ValueError if the cache or student does not fit."""
    return Pairs(
        hidden=tuple(
            tuple(
                _hidden_pair(term, (i, j), cache=cache, student=student)
                for j in range(len(term.teacher_layers))
            )
            for i, term in enumerate(loss.hidden)
        ),
        attention=tuple(
            tuple(
                _attention_pair(term, (i, j), cache=cache, student=student)
                for j in range(len(term.teacher_layers))
            )
            for i, term in enumerate(loss.attention)
        ),
    )


def _hidden_pair(
    term: HiddenLoss, at: tuple[int, int], *, cache: Cache, student: ModelConfig
) -> HiddenPair:
    number, pair_number = at
    signal_name = hidden_name(term.teacher_layers[pair_number])
    signal = cache.manifest.signals.get(signal_name)
    if not isinstance(signal, HiddenSignal):
        raise ValueError(_missing(cache, signal_name))
    pair = HiddenPair(term.student_layers[pair_number], signal_name, signal.width)
    if term.projection:
        return pair._replace(projection=f"hidden-{number}-{pair_number}")
    if student.hidden_size != signal.teacher_width:
        stored = f"{signal.width} numbers a position"
        if signal.directions:
            stored += f", along directions of a teacher of width {signal.teacher_width}"
        raise ValueError(
            f"loss.hidden[{number}]: the student's hidden states have width "
            f"{student.hidden_size}, but {cache.path} holds {signal_name} with {stored}. To map "
            "them by a trained matrix, set projection = true in [[loss.hidden]]"
        )
    return pair._replace(directions=signal.directions is not None)


def _attention_pair(
    term: AttentionLoss, at: tuple[int, int], *, cache: Cache, student: ModelConfig
) -> AttentionPair:
    number, pair_number = at
    signal_name = attention_name(term.teacher_layers[pair_number])
    signal = cache.manifest.signals.get(signal_name)
    if not isinstance(signal, AttentionSignal):
        raise ValueError(_missing(cache, signal_name))
    pair = AttentionPair(term.student_layers[pair_number], signal_name)
    if pair.student not in student.blocks_with_maps:
        raise ValueError(
            f"loss.attention[{number}].student_layers: block {pair.student} "
            f"{student.why_no_maps(pair.student)}; the student's blocks with maps are "
            f"{', '.join(map(str, student.blocks_with_maps)) or 'none'}"
        )
    if signal.heads != MEAN and student.num_heads == signal.teacher_heads:
        pair = pair._replace(heads=signal.heads)
    compared = student.num_heads if pair.heads is None else len(pair.heads)
    stored = "the mean over the heads" if signal.heads == MEAN else f"{signal.stored_heads} heads"
    if not term.average_heads and (signal.heads == MEAN or compared != signal.stored_heads):
        raise ValueError(
            f"loss.attention[{number}]: the student has {student.num_heads} heads, but "
            f"{cache.path} holds {signal_name} as {stored} of a teacher with "
            f"{signal.teacher_heads}. To compare the means over each model's heads, set "
            "average_heads = true in [[loss.attention]]"
        )
    return pair


def _numbered(
    name: str, term: AnyTerm, default: Sequence[tuple[int, int]], *, counts: tuple[int, int]
) -> AnyTerm:
    """`term` with its layers, or the pairs of `default`, counted from 0.

    `counts` are the numbers of layers of student and teacher.
    """
    pairs = list(zip(term.student_layers, term.teacher_layers, strict=True)) or default
    sides = zip(("student", "teacher"), zip(*pairs, strict=True), counts, strict=True)
    return dataclasses.replace(
        term,
        **{
            f"{side}_layers": tuple(_number(layer, count, name=name, side=side) for layer in layers)
            for side, layers, count in sides
        },
    )


def _number(layer: int, count: int, *, name: str, side: str) -> int:
    """`layer` counted from 0. ValueError, which states the range, if it does not exist."""
    if not -count <= layer < count:
        raise ValueError(
            f"loss.{name}.{side}_layers: layer {layer} does not exist; the {side} has layers 0 to "
            f"{count - 1}, counted from the end −1 to −{count}"
        )
    return layer % count


def _missing(cache: Cache, what: str) -> str:
    return (
        f"{cache.path}: no {what} in this cache, which holds {', '.join(cache.manifest.signals)}. "
        "Choose from these with teacher_layers, or add signals by running `decant precompute` "
        "again with them"
    )

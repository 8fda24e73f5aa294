"""Which layer of the student is compared with which of the teacher, settled before anything runs.

Layers become numbers ≥ 0, defaults become lists, and each pair says what is read of the cache and
what is done to the student's side. Whatever does not fit is an error that names both sides.
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
    width: int
    """Numbers a position that the cache holds."""
    projection: str | None = None
    """Name of the trained matrix that the student's states pass."""
    directions: bool = False
    """Whether they pass the principal directions that the signal is stored along."""


class AttentionPair(NamedTuple):
    """One comparison of attention maps."""

    student: int
    """Block of the student."""
    signal: str
    heads: tuple[int, ...] | None = None
    """The student's heads that are compared, None: all."""


class Pairs(NamedTuple):
    """The pairs of each of the loss's terms. Hashable: it is compiled in."""

    hidden: tuple[tuple[HiddenPair, ...], ...] = ()
    attention: tuple[tuple[AttentionPair, ...], ...] = ()

    @property
    def signals(self) -> tuple[str, ...]:
        """What is read of the cache, each once."""
        pairs = [pair for term in (*self.hidden, *self.attention) for pair in term]
        return tuple(dict.fromkeys(pair.signal for pair in pairs))

    @property
    def hidden_layers(self) -> tuple[int, ...]:
        """The student's hidden layers that its forward pass must give: block i reads layer i."""
        pairs = [pair for term in (*self.hidden, *self.attention) for pair in term]
        return tuple(sorted({pair.student for pair in pairs}))


NO_PAIRS = Pairs()


def with_layers(
    loss: Loss,
    *,
    cache: Cache,
    teacher: ModelConfig,
    student: ModelConfig,
    cut_from: Sequence[int] | None = None,
) -> Loss:
    """The loss with every term's layers as numbers ≥ 0, defaults filled in.

    `cut_from` are the teacher's blocks that the student's were, if they were.
    """
    if not loss.terms:
        return loss
    ours, theirs = student.num_layers, teacher.num_layers
    maps = nearest(stored_blocks(cache), ours=ours, theirs=theirs, cut_from=cut_from)
    if not maps and any(not term.teacher_layers for term in loss.attention):
        raise ValueError(_missing(cache, "attention maps"))
    return dataclasses.replace(
        loss,
        # Hidden layer 0 comes before the first block: there is one more of them.
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
    held = cache.manifest.signals.values()
    return sorted(signal.layer for signal in held if isinstance(signal, AttentionSignal))


def nearest(
    layers: Sequence[int], *, ours: int, theirs: int, cut_from: Sequence[int] | None = None
) -> list[tuple[int, int]]:
    """(student's block, teacher's block) for each of these blocks of the teacher.

    The student's is the one that was cut from it, else the nearest in depth (of two, the earlier),
    where a student that was not cut lies evenly over the teacher, first on first, last on last.

    >>> nearest([0, 3, 9], ours=4, theirs=10)
    [(0, 0), (1, 3), (3, 9)]
    """
    evenly = [block * (theirs - 1) / max(ours - 1, 1) for block in range(ours)]
    places = evenly if cut_from is None else cut_from
    return [
        (min(range(ours), key=lambda block, at=layer: abs(places[block] - at)), layer)
        for layer in layers
    ]


def pairs(loss: Loss, *, cache: Cache, student: ModelConfig) -> Pairs:
    """The pairs of a loss from `with_layers`. ValueError if cache and student do not fit them."""
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
            f"{student.hidden_size}, but {cache.path} holds {signal_name} with {stored}. Compare "
            "a trained linear map of the student's: set projection = true in [[loss.hidden]]"
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
    if signal.heads != MEAN and student.num_heads == signal.teacher_heads:
        pair = pair._replace(heads=signal.heads)
    compared = student.num_heads if pair.heads is None else len(pair.heads)
    stored = "the mean over the heads" if signal.heads == MEAN else f"{signal.stored_heads} heads"
    if not term.average_heads and (signal.heads == MEAN or compared != signal.stored_heads):
        raise ValueError(
            f"loss.attention[{number}]: the student has {student.num_heads} heads, but "
            f"{cache.path} holds {signal_name} as {stored} of a teacher with "
            f"{signal.teacher_heads}. Compare means over the heads of each side: set "
            "average_heads = true in [[loss.attention]]"
        )
    return pair


def _numbered(
    name: str, term: AnyTerm, default: Sequence[tuple[int, int]], *, counts: tuple[int, int]
) -> AnyTerm:
    """The term with its layers, or the default ones, counted from 0."""
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
    """The layer counted from 0. ValueError with the range if there is none."""
    if not -count <= layer < count:
        raise ValueError(
            f"loss.{name}.{side}_layers: layer {layer} does not exist; the {side} has layers 0 to "
            f"{count - 1}, from the end −1 to −{count}"
        )
    return layer % count


def _missing(cache: Cache, what: str) -> str:
    return (
        f"{cache.path}: no {what} in this cache, which holds {', '.join(cache.manifest.signals)}. "
        "Choose among these with teacher_layers, or run `precompute` again with more signals: it "
        "adds them"
    )

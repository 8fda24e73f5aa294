"""Chooses first settings for a teacher and a corpus, each with its reason in a few words."""

import math
from dataclasses import dataclass
from typing import Generic, TypeVar

from decant.pipelines.config import K, Logits
from decant.pipelines.init.survey import CorpusFacts, TeacherFacts

_LONGEST = {"cpu": 1024}
_LONGEST_ON_ACCELERATORS = 4096
_FEWEST_ROWS = 64
"""Rows are shortened until the corpus fills so many."""
_HELDOUT_DOCUMENTS, _HELDOUT_ROWS = 8, 16
"""Held out if a small corpus allows; of fewer, figures of students are rough."""
_UPDATES = 300
"""A small corpus is read several times, until about this many updates are done."""
_MOST_EPOCHS = 8


Value = TypeVar("Value", int, float, str)


@dataclass(frozen=True)
class Choice(Generic[Value]):
    """A value, and why it was chosen."""

    value: Value
    why: str


@dataclass(frozen=True)
class Choices:
    """First settings of a capture and of a student."""

    sequence_length: Choice[int]
    heldout: Choice[float]
    dtype: Choice[str]
    k: Choice[int]
    counts: Choice[int]
    sketch_rank: Choice[int]
    student_layers: Choice[int]
    batch_rows: Choice[int]
    epochs: Choice[int]
    learning_rate: Choice[float]
    heldout_rows: Choice[int]
    updates: int
    """About how many updates the student is trained for."""


def choose(teacher: TeacherFacts, corpus: CorpusFacts, *, platform: str) -> Choices:
    """The choices for a machine whose jax runs on `platform`: cpu, gpu or tpu."""
    on_cpu = platform == "cpu"
    device = "a CPU" if on_cpu else f"this machine's {platform.upper()}"
    length = _sequence_length(teacher, corpus, platform)
    rows = max(1, corpus.tokens // length.value)
    heldout = _heldout(corpus, rows)
    batch = _batch_rows(rows, length.value, on_cpu=on_cpu)
    a_pass = max(1, int(rows * (1 - heldout.value)) // batch.value)
    epochs = max(1, min(_MOST_EPOCHS, round(_UPDATES / a_pass)))
    layers = max(1, round(teacher.layers / 4))
    stored = Logits(k=min(K, max(1, teacher.vocabulary // 2))).decided(width=teacher.width)
    return Choices(
        sequence_length=length,
        heldout=heldout,
        dtype=Choice("float32", "exact; bfloat16 is faster on CPUs with AMX")
        if on_cpu
        else Choice("bfloat16", f"half the memory, and fast on {device}"),
        k=Choice(stored.k, "the most probable tokens, with their probabilities"),
        counts=Choice(stored.counts or 0, "draws of the whole distribution, for students at T = 1"),
        sketch_rank=Choice(
            int(stored.sketch.rank or 0), "numbers for the shape of the tail, at any T"
        ),
        student_layers=Choice(layers, f"a quarter of the teacher's {teacher.layers}"),
        batch_rows=batch,
        epochs=Choice(epochs, f"{a_pass * epochs:,} updates, of {a_pass:,} in a pass"),
        learning_rate=Choice(
            1e-3 if teacher.width <= 1024 else 3e-4,
            f"a usual peak for a width of {teacher.width:,}",
        ),
        heldout_rows=Choice(64, "enough to tell students apart, and quick"),
        updates=a_pass * epochs,
    )


def _sequence_length(teacher: TeacherFacts, corpus: CorpusFacts, platform: str) -> Choice[int]:
    """The power of two that most documents fit, if the corpus fills enough rows of it."""
    usual = corpus.length_at(0.9)
    most = min(teacher.positions, _LONGEST.get(platform, _LONGEST_ON_ACCELERATORS))
    length = 1 << max(6, math.ceil(math.log2(max(2, usual + 1))))
    why = f"9 of 10 documents have at most {usual:,} tokens; longer ones go on in the next row"
    if length > most:
        length, why = (
            most,
            f"documents are longer ({usual:,} tokens), but rows of {most:,} "
            + ("are the teacher's longest" if most == teacher.positions else "are fast here"),
        )
    while length > 64 and corpus.tokens // length < _FEWEST_ROWS:
        length //= 2
        why = f"short, because the whole corpus has only about {corpus.tokens:,} tokens"
    return Choice(min(length, teacher.positions), why)


def _heldout(corpus: CorpusFacts, rows: int) -> Choice[float]:
    """The usual share, or a larger one if that would hold out too few documents or rows."""
    usual = min(max(round((1 << 20) / max(corpus.bytes, 1), 4), 0.005), 0.1)
    enough = max(usual, _HELDOUT_DOCUMENTS / corpus.documents, _HELDOUT_ROWS / rows)
    share = round(min(0.25, enough), 4)
    return Choice(share, f"students are judged on it: about {round(share * rows):,} rows")


def _batch_rows(rows: int, length: int, *, on_cpu: bool) -> Choice[int]:
    tokens = 2048 if on_cpu else 32768
    batch = max(1, tokens // length)
    while batch > 1 and rows // batch < 50:
        batch //= 2
    return Choice(batch, f"{batch * length:,} tokens an update")

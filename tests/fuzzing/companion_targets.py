"""Targets in a cache: records of counts and sketches."""

import dataclasses
from pathlib import Path

import numpy as np

from decant.schemas.codecs import Tables, counts_field
from decant.schemas.disk.frames import Kind
from decant.schemas.records.companion import (
    decode_counts,
    decode_sketch,
    encode_counts,
    encode_sketch,
    open_companion,
)
from decant.schemas.signals import SketchSignal
from decant.schemas.targets.counts import Counts
from decant.schemas.targets.targets import Targets
from tests.fuzzing.target import Target, right_crc
from tests.schemas.codecs.test_codecs import zipf_logits
from tests.schemas.codecs.test_counts import drawn

_N, _POSITIONS, _VOCABULARY, _RANK = 20, 24, 300, 9
_DEVIATIONS = np.geomspace(20, 0.05, _RANK)
_EXACT = SketchSignal("", "", _RANK, _RANK, 0.0, False)
_SIGNALS = {
    1: _EXACT,
    2: dataclasses.replace(_EXACT, step=1.0),
    6: dataclasses.replace(_EXACT, step=1.0, dither=True),
}
"""By codec."""


def _counts(n: int) -> tuple[Counts, Targets]:
    return drawn(zipf_logits(n, _VOCABULARY), draws=_N, k=4)


def _tables() -> Tables:
    sample, head = _counts(200)
    return counts_field.fit(sample, head=head, vocabulary=_VOCABULARY)


_TABLES = _tables()


def counts(_: Path) -> list[bytes]:
    made, head = _counts(_POSITIONS)
    how = {"row_key": bytes(16), "tables": _TABLES, "vocabulary": _VOCABULARY}
    return [encode_counts(made[at], head=head[at], **how) for at in (slice(None), slice(0))]


def read_counts(path: Path) -> None:
    data = right_crc(path.read_bytes())
    record = open_companion(data, kind=Kind.COUNTS, where="record", scored=_POSITIONS)
    if record.positions:
        read = decode_counts(
            [record],
            draws=_N,
            head=_counts(_POSITIONS)[1],
            tables=_TABLES,
            vocabulary=_VOCABULARY,
        )
        assert (read.counts.sum(1) == _N).all()
        assert read.ids.min() >= 0
        assert read.ids.max() < _VOCABULARY


def sketches(_: Path) -> list[bytes]:
    values = np.random.default_rng(0).normal(size=(_POSITIONS, _RANK)) * _DEVIATIONS
    values[0] *= 100
    return [
        encode_sketch(
            values.astype(np.float32),
            row_key=bytes(16),
            signal=signal,
            deviations=_DEVIATIONS,
            tables=Tables({}),
        )
        for signal in _SIGNALS.values()
    ]


def read_sketch(path: Path) -> None:
    data = right_crc(path.read_bytes())
    record = open_companion(data, kind=Kind.SKETCH, where="record", scored=_POSITIONS)
    if record.positions:
        signal = _SIGNALS.get(record.blocks[0].codec, _SIGNALS[6])
        read = decode_sketch(
            [record],
            signal=signal,
            deviations=_DEVIATIONS,
            tables=Tables({}),
            length=_POSITIONS,
        )
        assert np.isfinite(read).all()


COMPANION_TARGETS = {
    "counts": Target("counts", counts, read_counts),
    "sketch": Target("sketch", sketches, read_sketch),
}

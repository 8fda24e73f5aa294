"""Labels and sketches that released versions wrote still decode to the same numbers."""

import numpy as np
import pytest

from decant.schemas.codecs import labels_field, sketch_field
from decant.schemas.codecs.block import LABELS, SKETCH, Block, Tables
from tests.golden.fields.make import KEY, POSITIONS, RANK, SKETCHES, sketch
from tests.paths import GOLDEN

FIELDS = GOLDEN / "fields"


def golden(name: str) -> tuple[bytes, np.ndarray]:
    with np.load(FIELDS / f"{name}.npz") as file:
        return file["payload"].tobytes(), file["expected"]


@pytest.mark.parametrize("codec", [1, 2])
def test_labels_decode_as_when_they_were_written(codec):
    payload, expected = golden(f"labels-{codec}")
    stored = labels_field.decode([Block(LABELS, codec, payload)], positions=[POSITIONS])
    np.testing.assert_array_equal(stored, expected)


@pytest.mark.parametrize("name", SKETCHES)
def test_sketches_decode_as_when_they_were_written(name):
    payload, expected = golden(name)
    step, dither = SKETCHES[name]
    _, deviations = sketch()
    stored = sketch_field.decode(
        [Block(SKETCH, int(name.split("-")[1]), payload)],
        positions=[POSITIONS],
        rank=RANK,
        deviations=deviations,
        step=step,
        dither=dither,
        row_keys=[KEY],
        tables=Tables({}),
    )
    np.testing.assert_array_equal(stored, expected)


def test_there_is_a_golden_payload_of_every_codec():
    assert sorted(path.stem for path in FIELDS.glob("*.npz")) == ["labels-1", "labels-2", *SKETCHES]

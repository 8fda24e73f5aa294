"""Labels, counts and sketches that released versions wrote still decode to the same numbers."""

import numpy as np
import pytest

from decant.schemas.codecs import counts_field, labels_field, sizes_field, sketch_field
from decant.schemas.codecs.block import COUNTS, LABELS, SKETCH, Block, Tables
from decant.schemas.targets.targets import BETAS, Targets
from tests.golden.fields.make import CUT, KEPT, KEY, OTHER_KEY, POSITIONS, RANK, SKETCHES, sketch
from tests.paths import GOLDEN

FIELDS = GOLDEN / "fields"
COUNTED = ["counts-1", "counts-1-head"]


def golden(name: str) -> tuple[bytes, np.ndarray]:
    with np.load(FIELDS / f"{name}.npz") as file:
        return file["payload"].tobytes(), file["expected"]


@pytest.mark.parametrize("codec", [1, 2])
def test_labels_decode_as_when_they_were_written(codec):
    payload, expected = golden(f"labels-{codec}")
    stored = labels_field.decode([Block(LABELS, codec, payload)], positions=[POSITIONS])
    np.testing.assert_array_equal(stored, expected)


def test_sizes_decode_as_when_they_were_written():
    payload, expected = golden("sizes-2")
    np.testing.assert_array_equal(sizes_field.decode(payload, positions=POSITIONS), expected)


@pytest.mark.parametrize("name", [*SKETCHES, *CUT])
def test_sketches_decode_as_when_they_were_written(name):
    payload, expected = golden(name)
    step, dither = SKETCHES[CUT.get(name, name)]
    _, deviations = sketch()
    stored = sketch_field.decode(
        [Block(SKETCH, int(name.split("-")[1]), payload)],
        positions=[int(KEPT.sum()) if name in CUT else POSITIONS],
        rank=RANK,
        deviations=deviations,
        step=step,
        dither=dither,
        row_keys=[OTHER_KEY if name in CUT else KEY],
        tables=Tables({}),
    )
    np.testing.assert_array_equal(stored, expected)


@pytest.mark.parametrize(("name", "whole"), CUT.items())
def test_sketches_that_released_versions_wrote_can_be_cut(name, whole):
    payload, expected = golden(whole)
    _, deviations = sketch()
    step, dither = SKETCHES[whole]
    how = {"deviations": deviations, "step": step, "dither": dither, "tables": Tables({})}
    block = Block(SKETCH, int(whole.split("-")[1]), payload)
    block = sketch_field.cut(block, KEPT, row_key=KEY, **how)
    assert block.codec == int(name.split("-")[1])
    stored = sketch_field.decode(
        [block], positions=[int(KEPT.sum())], rank=RANK, row_keys=[OTHER_KEY], **how
    )
    np.testing.assert_array_equal(stored, expected[KEPT])
    # And once more, under another key.
    again = np.arange(int(KEPT.sum())) % 3 > 0
    block = sketch_field.cut(block, again, row_key=OTHER_KEY, **how)
    stored = sketch_field.decode(
        [block], positions=[int(again.sum())], rank=RANK, row_keys=[KEY], **how
    )
    np.testing.assert_array_equal(stored, expected[KEPT][again])


@pytest.mark.parametrize("name", COUNTED)
def test_counts_decode_as_when_they_were_written(name):
    with np.load(FIELDS / f"{name}.npz") as file:
        arrays = dict(file)
    tables = {n.removeprefix("table_"): a for n, a in arrays.items() if n.startswith("table_")}
    n, logprobs = len(arrays["ids"]), arrays["head_logprobs"]
    stored = counts_field.decode(
        [Block(COUNTS, int(name.split("-")[1]), arrays["payload"].tobytes())],
        positions=[n],
        draws=60,
        head=Targets(arrays["head_ids"], logprobs, np.zeros((n, len(BETAS)), np.float32)),
        tables=Tables(tables),
        vocabulary=1000,
    )
    width = stored.ids.shape[1]
    np.testing.assert_array_equal(stored.ids, arrays["ids"][:, :width])
    np.testing.assert_array_equal(stored.counts, arrays["counts"][:, :width])
    assert (stored.counts.sum(1) == 60).all()


def test_there_is_a_golden_payload_of_every_codec():
    expected = [*COUNTED, "labels-1", "labels-2", "sizes-2", *SKETCHES, *CUT]
    assert sorted(path.stem for path in FIELDS.glob("*.npz")) == sorted(expected)

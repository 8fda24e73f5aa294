"""The sketch codecs: what they keep, and that damaged payloads are errors."""

import contextlib
import math
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from decant.schemas.codecs import dithered_levels, sketch_field
from decant.schemas.codecs.block import SKETCH, Block, Tables
from decant.schemas.codecs.streams import split
from tests.golden.fields import make as golden_fields
from tests.paths import GOLDEN

KEYS = [bytes([i]) * 16 for i in range(4)]


def shared(deviations: np.ndarray, step: float, dither: bool) -> dict[str, Any]:
    return {"deviations": deviations, "step": step, "dither": dither, "tables": Tables({})}


def through(sketches: list[np.ndarray], **how: Any) -> np.ndarray:
    blocks = [
        sketch_field.encode(sketch, row_key=key, **how)
        for sketch, key in zip(sketches, KEYS, strict=False)
    ]
    return sketch_field.decode(
        blocks,
        positions=[len(sketch) for sketch in sketches],
        rank=sketches[0].shape[1],
        row_keys=KEYS[: len(sketches)],
        **how,
    )


@st.composite
def any_sketches(draw) -> tuple[list[np.ndarray], np.ndarray]:
    """Records of numbers of falling or any spread, some far outside it, and the deviations.

    Levels above 64 deviations of the widest column are clipped; none is so large here.
    """
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    rank = draw(st.sampled_from([1, 2, 7, 32, 130, 200]))
    deviations = np.exp(rng.normal(size=rank) * draw(st.sampled_from([0, 1, 3])))
    if draw(st.booleans()):
        deviations = np.sort(deviations)[::-1]
    records = []
    for n in draw(st.lists(st.sampled_from([1, 2, 17, 64]), min_size=1, max_size=4)):
        sketch = rng.normal(size=(n, rank)) * deviations
        sketch[rng.random((n, rank)) < 0.02] *= draw(st.sampled_from([1, 8, 12]))
        records.append(sketch.astype(np.float32))
    return records, deviations.copy()


@settings(deadline=None, max_examples=40)
@given(any_sketches())
def test_step_0_keeps_every_bit(case):
    records, deviations = case
    stored = through(records, **shared(deviations, 0.0, False))
    assert stored.tobytes() == np.concatenate(records).tobytes()


@settings(deadline=None, max_examples=60)
@given(any_sketches(), st.sampled_from([0.125, 1.0, 4.0, 30.0]), st.booleans())
def test_every_number_is_within_half_a_step(case, step, dither):
    records, deviations = case
    stored = through(records, **shared(deviations, step, dither))
    whole = np.concatenate(records)
    assert stored.dtype == np.float32
    assert stored.shape == whole.shape
    size = max(step * deviations[min(len(deviations), 128) - 1], deviations.max() * 2.0**-16)
    # float32 has 24 bits, so a number thousands of steps away is off by its own rounding too.
    assert (np.abs(stored - whole) <= size * 0.5005 + 1e-6 * np.abs(whole)).all()


@settings(deadline=None, max_examples=30)
@given(any_sketches(), st.booleans())
def test_records_decode_together_as_each_does_alone(case, dither):
    records, deviations = case
    how = shared(deviations, 1.0, dither)
    together = through(records, **how)
    at = 0
    for record, key in zip(records, KEYS, strict=False):
        block = sketch_field.encode(record, row_key=key, **how)
        (n, rank) = record.shape
        alone = sketch_field.decode([block], positions=[n], rank=rank, row_keys=[key], **how)
        np.testing.assert_array_equal(together[at : at + n], alone)
        at += n


def test_with_dither_rounding_is_right_on_average_and_independent_of_the_number():
    how = shared(np.ones(1), 1.0, True)
    sketch = np.full((1, 1), 0.3, np.float32)
    errors = []
    for number in range(1000):
        key = number.to_bytes(16, "little")
        block = sketch_field.encode(sketch, row_key=key, **how)
        stored = sketch_field.decode([block], positions=[1], rank=1, row_keys=[key], **how)
        errors.append(float(stored[0, 0]) - 0.3)
    # The error is uniform in (−1/2, 1/2): mean 0, variance 1/12.
    assert abs(np.mean(errors)) < 4 * np.sqrt(1 / 12 / 1000)
    assert np.var(errors) == pytest.approx(1 / 12, rel=0.1)


def test_the_dither_of_a_row_is_a_function_of_its_key():
    how = shared(np.ones(3), 1.0, True)
    sketch = np.zeros((5, 3), np.float32)
    blocks = [sketch_field.encode(sketch, row_key=key, **how) for key in (KEYS[0], *KEYS[:2])]
    assert blocks[0] == blocks[1]
    decoded = [
        sketch_field.decode([block], positions=[5], rank=3, row_keys=[key], **how)
        for block, key in zip(blocks[1:], KEYS, strict=False)
    ]
    assert not np.array_equal(*decoded)


def test_the_step_is_in_units_of_the_128th_deviation_or_of_the_last():
    assert sketch_field.step_size(np.arange(200.0, 0, -1), 0.5) == 0.5 * 73
    assert sketch_field.step_size(np.array([4.0, 2.0]), 0.5) == 1
    # A direction without any spread must not make it 0.
    assert sketch_field.step_size(np.array([4.0, 0.0]), 0.5) == 2.0**-14
    assert sketch_field.step_size(np.zeros(2), 0.5) > 0


@settings(deadline=None, max_examples=30)
@given(any_sketches(), st.sampled_from([0.0, 0.5, 8.0]), st.booleans(), st.integers(0, 99))
def test_positions_that_are_kept_have_the_same_bits_however_often_a_record_is_cut(
    case, step, dither, seed
):
    records, deviations = case
    how, key = shared(deviations, step, dither), KEYS[0]
    block = sketch_field.encode(records[0], row_key=key, **how)
    n, rank = records[0].shape
    expected = sketch_field.decode([block], positions=[n], rank=rank, row_keys=[key], **how)
    for other in KEYS[1:]:
        kept = np.random.default_rng(seed).random(len(expected)) < 0.7
        kept[-1] = True
        block, key = sketch_field.cut(block, kept, row_key=key, **how), other
        expected = expected[kept]
        got = sketch_field.decode(
            [block], positions=[len(expected)], rank=rank, row_keys=[key], **how
        )
        assert got.tobytes() == expected.tobytes()


def test_a_damaged_record_of_kept_positions_is_an_error():
    how = shared(np.geomspace(30, 1, 5), 1.0, True)
    sketch = np.ones((20, 5), np.float32)
    block = sketch_field.encode(sketch, row_key=KEYS[0], **how)
    block = sketch_field.cut(block, np.arange(20) < 12, row_key=KEYS[0], **how)
    read = {"rank": 5, "row_keys": KEYS[:1], **how}
    sketch_field.decode([block], positions=[12], length=20, **read)
    for positions, length in ((11, 20), (13, 20), (12, 19)):
        with pytest.raises(ValueError, match="positions"):
            sketch_field.decode([block], positions=[positions], length=length, **read)
    for payload in (block.payload[:10], block.payload[:21], b""):
        with pytest.raises(ValueError, match="bytes"):
            sketch_field.decode([Block(SKETCH, block.codec, payload)], positions=[12], **read)
    with pytest.raises(ValueError, match=r"codec 7; .* codec 2"):
        sketch_field.decode([block], positions=[12], **{**read, "dither": False})


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("step", [0.0, 1.0])
def test_numbers_that_are_not_finite_are_refused(value, step):
    sketch = np.full((2, 2), value, np.float32)
    with pytest.raises(ValueError, match="not finite"):
        sketch_field.encode(sketch, row_key=KEYS[0], **shared(np.ones(2), step, False))


@pytest.mark.parametrize(
    ("step", "dither"), [(0.0, False), (1.0, False), (20.0, False), (4.0, True), (60.0, True)]
)
def test_damaged_sketches_are_errors(step, dither):
    how = shared(np.geomspace(30, 1, 50), step, dither)
    rng = np.random.default_rng(0)
    sketch = (rng.normal(size=(30, 50)) * np.geomspace(30, 1, 50)).astype(np.float32)
    block = sketch_field.encode(sketch, row_key=KEYS[0], **how)
    read = {"positions": [30], "rank": 50, "row_keys": KEYS[:1], **how}
    for payload in (block.payload[:-1], block.payload + b"\0", b"", b"\xff" * 12):
        with pytest.raises(ValueError, match=r"\d"):
            sketch_field.decode([Block(SKETCH, block.codec, payload)], **read)
    for other in (3 - min(block.codec, 2), 9):
        with pytest.raises(ValueError, match=f"codec {other}"):
            sketch_field.decode([Block(SKETCH, other, block.payload)], **read)
    # Any byte: other numbers or a ValueError, nothing else.
    for at in range(len(block.payload)):
        damaged = bytearray(block.payload)
        damaged[at] ^= 1 + at % 255
        with contextlib.suppress(ValueError):
            stored = sketch_field.decode([Block(SKETCH, block.codec, bytes(damaged))], **read)
            assert np.isfinite(stored).all()


@pytest.mark.parametrize("name", golden_fields.OLDER)
def test_damaged_sketches_of_older_releases_are_errors(name):
    _, deviations = golden_fields.sketch()
    with np.load(GOLDEN / "fields" / f"{name}.npz") as file:
        payload, expected = file["payload"].tobytes(), file["expected"]
    codec, n = int(name.split("-")[1]), len(expected)
    read = {"positions": [n], "rank": len(deviations), **shared(deviations, 8.0, True)}
    read |= {"row_keys": [golden_fields.KEY], "length": golden_fields.POSITIONS}
    for damaged in (payload[:-1], payload + b"\0", b"", b"\xff" * 12):
        with pytest.raises(ValueError, match=r"\d"):
            sketch_field.decode([Block(SKETCH, codec, damaged)], **read)
    # Any byte: other numbers or a ValueError, nothing else.
    for at in range(len(payload)):
        changed = bytearray(payload)
        changed[at] ^= 1 + at % 255
        with contextlib.suppress(ValueError):
            stored = sketch_field.decode([Block(SKETCH, codec, bytes(changed))], **read)
            assert np.isfinite(stored).all()


@pytest.mark.parametrize(("rank", "step"), [(32, 1.0), (32, 2.0), (200, 2.0)])
def test_a_record_takes_little_more_than_the_entropies_of_its_columns(rank, step):
    deviations = np.geomspace(15, 1, rank)
    rng = np.random.default_rng(0)
    sketch = (rng.standard_t(8, size=(512, rank)) * deviations).astype(np.float32)
    how = shared(deviations, step, False)
    levels = np.rint(sketch / sketch_field.step_size(deviations, step))
    entropy = sum(entropy_of(column) for column in levels.T) / 8
    size = len(sketch_field.encode(sketch, row_key=KEYS[0], **how).payload) / 512
    assert size < 1.12 * entropy


@pytest.mark.parametrize("spread", [0.02, 0.1, 0.2, 0.5, 0.9])
def test_a_dithered_number_takes_little_more_than_the_dither_leaves_open(spread):
    """The entropy of a level given the dither u: of floor(x + u + 1/2), averaged over u."""
    n, rank = 1024, 128
    sketch = np.random.default_rng(0).normal(size=(n, rank)).astype(np.float32)
    size = len(
        sketch_field.encode(
            sketch, row_key=KEYS[0], **shared(np.ones(rank), 1 / spread, True)
        ).payload
    )
    edges = np.arange(-8, 9) - 0.5 - np.linspace(-0.5, 0.5, 2001)[:, None]
    below = np.vectorize(math.erf)(edges / spread / math.sqrt(2)) / 2
    p = np.diff(below, axis=1).clip(1e-300)
    left_open = -(p * np.log2(p)).sum(1).mean()
    # A byte of eight levels takes a bit at least.
    assert 8 * size / n / rank < 1.12 * left_open + 0.06


def test_numbers_beyond_their_digits_may_be_far_apart(monkeypatch):
    """A distance is below 2^24; here the limit is 30, and there are 6,000 numbers."""
    monkeypatch.setattr(dithered_levels, "_FURTHEST", 30)
    sketch = np.zeros((60, 100), np.float32)
    sketch[[0, 41, 41, 59], [3, 0, 99, 99]] = 5, -7, 9, 70
    how = shared(np.ones(100), 4.0, True)
    stored = through([sketch], **how)
    assert (np.abs(stored - sketch) <= 2.001).all()
    payload = sketch_field.encode(sketch, row_key=KEYS[0], **how).payload
    (entries,) = struct.unpack("<I", split(payload, count=11)[1])
    assert entries >= 6000 // 30


@pytest.mark.parametrize("name", ["sketch-2-dither", "sketch-4"])
def test_records_of_older_releases_decode_beside_new_ones(name):
    values, deviations = golden_fields.sketch()
    with np.load(GOLDEN / "fields" / f"{name}.npz") as file:
        older, expected = file["payload"].tobytes(), file["expected"]
    how = shared(deviations, 8.0, True)
    newer = sketch_field.encode(values, row_key=KEYS[1], **how)
    read = {"rank": len(deviations), **how}
    alone = sketch_field.decode([newer], positions=[40], row_keys=[KEYS[1]], **read)
    both = sketch_field.decode(
        [Block(SKETCH, int(name.split("-")[1]), older), newer],
        positions=[40, 40],
        row_keys=[golden_fields.KEY, KEYS[1]],
        **read,
    )
    np.testing.assert_array_equal(both, np.concatenate([expected, alone]))


def entropy_of(values: np.ndarray) -> float:
    _, counts = np.unique(values, return_counts=True)
    shares = counts / counts.sum()
    return float(-(shares * np.log2(shares)).sum())

"""Rows of rollouts: the writer's log-probabilities, their place, record and part in the key."""

import dataclasses

import numpy as np
import pytest

from decant.schemas.disk.frames import Block, Kind, unpack
from decant.schemas.records.rows import Row, Segment, build_row, decode_row, encode_row

NAN = float("nan")
OLD_KEY = "57c24318a92491f6c58ff8877ee0c3c0"
OLD_RECORD = (
    "44434e54010104000ca02b9057c24318a92491f6c58ff8877ee0c3c0040000000101110000000200"
    "0400000003000100000004001800000028b52ffd2008410000010002000300000003000000c00000"
    "00000000000000000000000000000000000000000000"
)


def segment(tokens: list[int], logprobs: list[float] | None, *, prompt: int = 0) -> Segment:
    counted = np.arange(len(tokens)) >= prompt
    written = None if logprobs is None else np.array(logprobs, np.float32)
    return Segment(np.array(tokens, np.int32), counted, 0, 0, 0, written)


def rollouts() -> Row:
    """A rollout, a text by nobody known, and a rollout whose first token has no target."""
    segments = [
        segment([5, 6, 7, 8], [NAN, NAN, -0.1, -7.123456], prompt=2),
        segment([9, 10], None),
        segment([11, 12], [-1.0, -2.0]),
    ]
    return build_row(segments, length=10)


def test_position_t_holds_the_log_probability_of_token_t_plus_1():
    expected = [NAN, -0.1, -7.123456, NAN, NAN, NAN, -2.0, NAN, NAN, NAN]
    np.testing.assert_array_equal(rollouts().writer_logprobs, np.array(expected, np.float32))


def test_a_record_gives_them_back_to_the_bit():
    row = rollouts()
    read, key = decode_row(encode_row(row), where="here", length=10)
    assert row.key == key == read.key
    assert read.writer_logprobs is not None
    assert row.writer_logprobs is not None
    assert read.writer_logprobs.tobytes() == row.writer_logprobs.tobytes()


def test_a_row_that_nobody_is_known_to_have_written_is_as_before():
    row = build_row([segment([1, 2, 3], None)], length=4)
    nothing = dataclasses.replace(row, writer_logprobs=np.full(4, np.nan, np.float32))
    assert row.writer_logprobs is None
    # Written by release 0.12.
    assert row.key == nothing.key == bytes.fromhex(OLD_KEY)
    assert encode_row(row) == encode_row(nothing) == bytes.fromhex(OLD_RECORD)


def test_another_log_probability_is_another_row():
    row = rollouts()
    assert row.writer_logprobs is not None
    other = row.writer_logprobs.copy()
    other[1] = np.nextafter(other[1], np.float32(-1))
    assert dataclasses.replace(row, writer_logprobs=other).key != row.key
    assert dataclasses.replace(row, writer_logprobs=None).key != row.key


def test_positions_without_a_target_are_not_stored():
    row = rollouts()
    erased = dataclasses.replace(row, loss_mask=row.loss_mask & (row.segment_ids != 1))
    read, _ = decode_row(encode_row(erased), where="here", length=10)
    assert read.writer_logprobs is not None
    assert np.flatnonzero(~np.isnan(read.writer_logprobs)).tolist() == [6]


@pytest.mark.parametrize("number", [0.5, -np.inf])
def test_a_number_that_is_no_log_probability_is_damage(number: float):
    row = rollouts()
    assert row.writer_logprobs is not None
    wrong = np.where(np.isnan(row.writer_logprobs), np.nan, np.float32(number))
    record = encode_row(dataclasses.replace(row, writer_logprobs=wrong))
    with pytest.raises(ValueError, match="here: log-probabilities of the writer hold"):
        decode_row(record, where="here", length=10)


def test_a_cut_block_or_a_codec_of_a_later_release_is_refused():
    frame = unpack(encode_row(rollouts()), kind=Kind.ROW, where="here")
    *others, written = frame.blocks
    short = unpack(
        encode_row(build_row([segment([1, 2], [NAN, -1.0])], length=10)),
        kind=Kind.ROW,
        where="here",
    ).blocks[-1]
    for block, message in (
        (short, "expected 16 bytes, got 4"),
        (Block(written.field, 99, written.payload), "use codec 99, which this release lacks"),
    ):
        record = dataclasses.replace(frame, blocks=(*others, block)).pack()
        with pytest.raises(ValueError, match=message):
            decode_row(record, where="here", length=10)

"""Record frames: any damage, other kind or other version is an error that names the record."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from decant.schemas.codecs import Tables
from decant.schemas.disk.frames import Block, Frame, Kind, unpack
from decant.schemas.records.logits import decode_logits, encode_logits, open_logits
from decant.schemas.signals import TargetSpec
from decant.schemas.targets.targets import Targets

FRAME = Frame(Kind.LOGITS, bytes(range(16)), 9, (Block(1, 2, b"abc"), Block(2, 1, b"")))


def test_what_is_packed_is_unpacked():
    assert unpack(FRAME.pack(), kind=Kind.LOGITS, where="r") == FRAME


@given(st.integers(0, len(FRAME.pack()) - 1), st.integers(1, 255))
def test_no_altered_byte_goes_unnoticed(at, change):
    data = bytearray(FRAME.pack())
    data[at] ^= change
    with pytest.raises(ValueError, match="unit 3 record 5"):
        unpack(bytes(data), kind=Kind.LOGITS, where="unit 3 record 5")


@given(st.integers(0, len(FRAME.pack()) - 1))
def test_no_truncation_goes_unnoticed(length):
    with pytest.raises(ValueError, match="unit 3 record 5"):
        unpack(FRAME.pack()[:length], kind=Kind.LOGITS, where="unit 3 record 5")


def test_a_newer_version_is_refused_by_number():
    data = bytearray(FRAME.pack())
    data[4] = 2
    with pytest.raises(ValueError, match="record version 2, but this release reads version 1"):
        unpack(bytes(data), kind=Kind.LOGITS, where="r")


def test_a_rows_record_is_not_a_logits_record():
    with pytest.raises(ValueError, match="expected a ROW record"):
        unpack(FRAME.pack(), kind=Kind.ROW, where="r")


@pytest.mark.parametrize("scored", [[0, 1, 1, 0, 1], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]])
def test_a_logits_record_holds_its_scored_positions_and_no_others(scored):
    mask = np.array(scored, bool)
    n = int(mask.sum())
    values = np.arange(n * 3, dtype=np.int32).reshape(n, 3)
    tail = np.full((n, 7), -np.inf, np.float32)
    tail[:, 0] = np.log(20 - 3)
    written = Targets(values, np.full((n, 3), -np.log(3), np.float32), tail)
    record = encode_logits(
        written,
        row_key=b"k" * 16,
        scored=mask,
        profile="lossless",
        tables=Tables.from_arrays({}),
        vocabulary=20,
    )
    opened = open_logits(record, where="r", length=5, spec=TargetSpec(k=3))
    read = decode_logits([opened], tables=Tables.from_arrays({}), vocabulary=20)
    assert opened.row_key == b"k" * 16
    np.testing.assert_array_equal(opened.scored, mask)
    np.testing.assert_array_equal(read.ids, written.ids)
    np.testing.assert_array_equal(read.logprobs, written.logprobs)

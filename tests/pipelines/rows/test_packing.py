"""Rows hold every transition of every document exactly once."""

import dataclasses

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from decant.pipelines.rows.packing import Packer, pieces
from decant.schemas.records.rows import Row, Segment


def document(length: int, *, number: int = 0) -> Segment:
    tokens = np.arange(length, dtype=np.int32) + 1000 * (number + 1)
    return Segment(tokens, np.ones(length, bool), source=0, document=number, start=0)


def pack(lengths: list[int], *, length: int, open_rows: int) -> list[Row]:
    packer = Packer(length, open_rows)
    rows = [row for n, size in enumerate(lengths) for row in packer.add(document(size, number=n))]
    return rows + list(packer.finish())


def test_a_long_document_goes_on_with_the_last_token_repeated():
    cut = list(pieces(document(10), length=4))
    assert [piece.tokens.tolist() for piece in cut] == [
        [1000, 1001, 1002, 1003],
        [1003, 1004, 1005, 1006],
        [1006, 1007, 1008, 1009],
    ]
    assert [piece.start for piece in cut] == [0, 3, 6]


def test_a_single_token_has_nothing_to_predict():
    assert list(pieces(document(1), length=4)) == []
    assert list(pieces(document(0), length=4)) == []


def test_first_fit_fills_the_first_row_with_room():
    rows = pack([5, 6, 3, 2], length=8, open_rows=4)
    starts = [sorted(row.origins[:, 1].tolist()) for row in rows]
    assert starts == [[0, 2], [1, 3]]


def test_when_too_many_rows_are_open_the_fullest_is_closed():
    rows = pack([5, 6, 7], length=8, open_rows=2)
    assert [row.origins[:, 1].tolist() for row in rows] == [
        [1],
        [2],
        [0],
    ]  # 7 leaves no room, so its row closes at once


@given(
    st.lists(st.integers(0, 40), max_size=30),
    st.integers(2, 12),
    st.integers(1, 5),
)
def test_every_transition_is_scored_once_whatever_the_lengths(lengths, length, open_rows):
    rows = pack(lengths, length=length, open_rows=open_rows)
    scored = [
        (int(row.tokens[t]), int(row.tokens[t + 1]))
        for row in rows
        for t in np.flatnonzero(row.loss_mask)
    ]
    expected = [
        (1000 * (n + 1) + t, 1000 * (n + 1) + t + 1)
        for n, size in enumerate(lengths)
        for t in range(size - 1)
    ]
    assert sorted(scored) == sorted(expected)


def test_a_piece_without_a_token_that_counts_gives_no_row():
    counted = np.zeros(10, bool)
    counted[[0, 3]] = True  # first tokens of the document and of a later piece
    assert list(pieces(dataclasses.replace(document(10), counted=counted), length=4)) != []
    cut = list(pieces(dataclasses.replace(document(10), counted=counted), length=4))
    assert [piece.start for piece in cut] == [0]
    counted[[0, 3]], counted[9] = False, True
    cut = list(pieces(dataclasses.replace(document(10), counted=counted), length=4))
    assert [(piece.start, piece.counted.tolist()) for piece in cut] == [
        (6, [False, False, False, True])
    ]
    nothing = dataclasses.replace(document(10), counted=np.zeros(10, bool))
    packer = Packer(4, 2)
    assert [*packer.add(nothing), *packer.finish()] == []

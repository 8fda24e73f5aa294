"""Tensors that hold several parameters: read in pieces, and written whole."""

import numpy as np
import pytest

from decant.models.families.tensor_name import Part, TensorName

DRAW = np.random.default_rng(0).standard_normal
WIDTH, HEADS, SHARED, HEAD = 6, 4, 2, 3
QUERY, KEY = DRAW((WIDTH, HEADS, HEAD)), DRAW((WIDTH, SHARED, HEAD))
EVERY_KEY = DRAW((WIDTH, HEADS, HEAD))
APART = (HEADS + SHARED) * HEAD
CASES = {
    "one after another": (
        {"part": Part(0, HEADS * HEAD, APART)},
        {"part": Part(HEADS * HEAD, APART, APART)},
        KEY,
        np.concatenate([QUERY.reshape(WIDTH, -1), KEY.reshape(WIDTH, -1)], axis=1).T,
    ),
    "one after another, input first": (
        {"part": Part(0, HEADS * HEAD, APART), "input_first": True},
        {"part": Part(HEADS * HEAD, APART, APART), "input_first": True},
        KEY,
        np.concatenate([QUERY.reshape(WIDTH, -1), KEY.reshape(WIDTH, -1)], axis=1),
    ),
    "head by head": (
        {"part": Part(0, HEAD, 2 * HEAD, HEADS)},
        {"part": Part(HEAD, 2 * HEAD, 2 * HEAD, HEADS)},
        EVERY_KEY,
        np.stack([QUERY, EVERY_KEY], axis=2).reshape(WIDTH, -1).T,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_parameters_that_share_a_tensor_are_read_in_pieces_and_written_whole(case):
    *fields, key, expected = CASES[case]
    names = [TensorName("fused", "", 1, **own) for own in fields]
    whole = None
    for name, parameter in zip(names, (QUERY, key), strict=True):
        assert name.file_shape(parameter.shape, "hf") == expected.shape
        whole = name.to_file(parameter, "hf", whole)
        every = tuple(slice(0, size) for size in parameter.shape)
        for index in (every, (slice(2, 5), slice(1, 2), every[2])):
            piece = expected[name.file_index(parameter.shape, index, "hf")]
            shape = tuple(at.stop - at.start for at in index)
            np.testing.assert_array_equal(
                name.from_file(piece, shape, "hf"), parameter[index], strict=True
            )
    np.testing.assert_array_equal(whole, expected)

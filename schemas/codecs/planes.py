"""Float32 numbers stored bit for bit, split into byte planes."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32

from decant.schemas.codecs.streams import (
    by_position,
    cells,
    compress,
    decompress,
    fill_columns,
    grid,
    join,
    split,
)


def encode_planes(values: Float32[np.ndarray, "n width"]) -> bytes:
    """The payload: a section for each byte of a number; a section is [width, n] in memory."""
    of_bytes = np.ascontiguousarray(values.T, "<f4").view(np.uint8).reshape(*values.T.shape, 4)
    return join([compress(np.ascontiguousarray(of_bytes[..., byte])) for byte in range(4)])


def decode_planes(
    payloads: Sequence[bytes], *, positions: Sequence[int], width: int
) -> Float32[np.ndarray, "total width"]:
    """The numbers that `encode_planes` was given, records one after another.

    ValueError for damaged payloads.
    """
    planes = grid(4 * width, positions)
    for cell, payload, n in zip(cells(positions), payloads, positions, strict=True):
        frames = split(payload, count=4)
        fill_columns(planes[:, cell], decompress(frames, sizes=4 * [width * n]), [n])
    of_number = by_position(planes, positions).reshape(-1, 4, width).transpose(0, 2, 1)
    return np.ascontiguousarray(of_number).view("<f4")[..., 0].astype(np.float32, copy=False)

"""Codec `lossless`: ids and float32 bits, split into byte planes. Top-k and exact draws use it."""

from collections.abc import Sequence

import numpy as np

from decant.schemas.codecs.streams import (
    by_position,
    cells,
    compress,
    decompress,
    fill_columns,
    grid,
    id_planes,
    join,
    split,
)


def encode(ids: np.ndarray, logprobs: np.ndarray, *, vocabulary: int) -> bytes:
    """The payload: one section per byte plane, ids first.

    A plane is [k, n] in memory: neighbours have equal rank and similar bytes.
    """
    id_bytes = np.ascontiguousarray(ids.T, "<i4").view(np.uint8).reshape(*ids.T.shape, 4)
    float_bytes = np.ascontiguousarray(logprobs.T, "<f4").view(np.uint8).reshape(*ids.T.shape, 4)
    planes = [id_bytes[..., byte] for byte in range(id_planes(vocabulary))]
    planes += [float_bytes[..., byte] for byte in range(4)]
    return join([compress(np.ascontiguousarray(plane)) for plane in planes])


def decode(
    payloads: Sequence[bytes],
    *,
    positions: Sequence[int],
    k: int,
    vocabulary: int,
    start: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Ids int32 and log-probabilities float32, [n, k], bit for bit; records one after another.

    The sections begin at byte `start` of each payload.
    """
    width = id_planes(vocabulary)
    planes = grid((width + 4) * k, positions)
    for cell, payload, n in zip(cells(positions), payloads, positions, strict=True):
        sections = split(payload, start=start, count=width + 4)
        fill_columns(planes[:, cell], decompress(sections, sizes=(width + 4) * [k * n]), [n])
    of_entry = by_position(planes, positions).reshape(-1, width + 4, k).transpose(0, 2, 1)
    ids = np.zeros((*of_entry.shape[:2], 4), np.uint8)
    ids[..., :width] = of_entry[..., :width]
    values = np.ascontiguousarray(of_entry[..., width:]).view("<f4")[..., 0]
    ids = ids.view("<i4")[..., 0]
    if ids.size and ids.max() >= vocabulary:
        raise ValueError(f"id {ids.max()} in a vocabulary of {vocabulary}")
    return ids.astype(np.int32, copy=False), values.astype(np.float32, copy=False)

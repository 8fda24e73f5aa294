"""Top-k exactly: ids and float32 bits by byte plane, rank by rank."""

from collections.abc import Sequence

import numpy as np

from schemas.codecs.streams import beside, expand, id_planes, join, split, squeeze


def encode(ids: np.ndarray, logprobs: np.ndarray, *, vocabulary: int) -> bytes:
    """A section a byte plane, ids first. Neighbours in a plane are of equal rank, so alike."""
    of_ids = np.ascontiguousarray(ids.T, "<i4").view(np.uint8).reshape(*ids.T.shape, 4)
    of_values = np.ascontiguousarray(logprobs.T, "<f4").view(np.uint8).reshape(*ids.T.shape, 4)
    wanted = of_ids[..., : id_planes(vocabulary)]
    planes = [np.ascontiguousarray(np.moveaxis(p, -1, 0)) for p in (wanted, of_values)]
    return join([squeeze(plane) for part in planes for plane in part])


def decode(
    payloads: Sequence[bytes], *, positions: Sequence[int], k: int, vocabulary: int
) -> tuple[np.ndarray, np.ndarray]:
    """Ids int32 and log-probs float32, [n, k], bit by bit as encoded; records one after another."""
    width = id_planes(vocabulary)
    planes = [
        expand(split(payload, count=width + 4), sizes=(width + 4) * [k * n])
        for payload, n in zip(payloads, positions, strict=True)
    ]
    of_all = beside(np.concatenate(planes), rows=(width + 4) * k, columns=positions)
    by_position = of_all.reshape(width + 4, k, -1).transpose(2, 1, 0)
    ids = np.zeros((*by_position.shape[:2], 4), np.uint8)
    ids[..., :width] = by_position[..., :width]
    values = np.ascontiguousarray(by_position[..., width:]).view("<f4")[..., 0]
    ids = ids.view("<i4")[..., 0]
    if ids.size and ids.max() >= vocabulary:
        raise ValueError(f"id {ids.max()} in a vocabulary of {vocabulary}")
    return ids.astype(np.int32, copy=False), values.astype(np.float32, copy=False)

"""Top-k exactly: ids and float32 bits by byte plane, rank by rank."""

import numpy as np

from schemas.codecs.streams import expand, id_planes, join, split, squeeze


def encode(ids: np.ndarray, logprobs: np.ndarray, *, vocabulary: int) -> bytes:
    """A section a byte plane, ids first. Neighbours in a plane are of equal rank, so alike."""
    of_ids = np.ascontiguousarray(ids.T, "<i4").view(np.uint8).reshape(*ids.T.shape, 4)
    of_values = np.ascontiguousarray(logprobs.T, "<f4").view(np.uint8).reshape(*ids.T.shape, 4)
    wanted = of_ids[..., : id_planes(vocabulary)]
    planes = [np.ascontiguousarray(np.moveaxis(p, -1, 0)) for p in (wanted, of_values)]
    return join([squeeze(plane) for part in planes for plane in part])


def decode(
    payload: bytes, *, positions: int, k: int, vocabulary: int
) -> tuple[np.ndarray, np.ndarray]:
    """Ids int32 and log-probs float32, [n, k], bit by bit as encoded."""
    width = id_planes(vocabulary)
    sections = split(payload, count=width + 4)
    planes = [expand(section, size=k * positions).reshape(k, positions) for section in sections]
    ids = np.zeros((positions, k, 4), np.uint8)
    values = np.empty((positions, k, 4), np.uint8)
    for byte, plane in enumerate(planes):
        target = ids[..., byte] if byte < width else values[..., byte - width]
        target[...] = plane.T
    ids, values = ids.view("<i4")[..., 0], values.view("<f4")[..., 0]
    if ids.size and ids.max() >= vocabulary:
        raise ValueError(f"id {ids.max()} in a vocabulary of {vocabulary}")
    return ids.astype(np.int32, copy=False), values.astype(np.float32, copy=False)

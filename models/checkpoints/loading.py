"""Reading parameters from a checkpoint's files onto devices, one device's share at a time.

Beside one tensor of a file, the host holds at most the largest share of one parameter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding

from decant.models.families.tensor_name import Naming, TensorName
from decant.models.prequantised.stored import Index


def read_share(
    read: Callable[[str, Index | None], np.ndarray],
    name: TensorName,
    shape: tuple[int, ...],
    index: Index,
    *,
    naming: Naming,
    dtype: Any,
    interleaved: bool = False,
) -> np.ndarray:
    """The elements at `index` of one parameter, converted to `dtype`.

    Args:
        read: gives one tensor of the files, or the elements at an index of it.
        name: where the parameter lies in the files.
        shape: the whole parameter's, with the stacked axes of layers and experts.
        index: which elements, in our layout.
        naming: which of the names the files use.
        dtype: of the result.
        interleaved: the files interleave the halves of rotary heads, as Llama's GGUF files do.
    """
    share = np.empty([at.stop - at.start for at in index], dtype)
    for tensor, place in name.file_tensors(naming, shape).items():
        stacked = index[: len(place)]
        if all(at.start <= number < at.stop for number, at in zip(place, stacked, strict=True)):
            here = tuple(number - at.start for number, at in zip(place, stacked, strict=True))
            inner, within = shape[len(place) :], index[len(place) :]
            lengths = tuple(at.stop - at.start for at in within)
            in_file = name.file_index(inner, within, naming)
            if interleaved and name.rotary:
                array = _undo_interleaving(read(tensor, None), heads=inner[-2])[in_file]
            else:
                array = read(tensor, in_file)
            share[here] = name.from_file(array, lengths, naming)
    return share


def _undo_interleaving(rows: np.ndarray, *, heads: int) -> np.ndarray:
    """The rows [heads · head_dim, …] of Llama's Q or K in the order of Hugging Face files.

    Within each head, GGUF files put row i of the first half next to row i of the second half.
    """
    half = rows.shape[0] // heads // 2
    return rows.reshape(heads, half, 2, -1).swapaxes(1, 2).reshape(rows.shape)


def place_shares(
    read: Callable[[Index], np.ndarray], shape: tuple[int, ...], sharding: Sharding
) -> jax.Array:
    """An array on devices, made of the shares that `read` returns.

    Each share is read once, for all devices of this process that hold it.
    """
    holders: dict[tuple[tuple[int, int], ...], list[Any]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        assert index is not None
        spans = (at.indices(length)[:2] for at, length in zip(index, shape, strict=True))
        holders.setdefault(tuple(spans), []).append(device)
    arrays = []
    for spans, devices in holders.items():
        share = read(tuple(slice(*span) for span in spans))
        arrays += [jax.device_put(share, device) for device in devices]
        # Wait for the copies, so that the host's share is freed before the next one is read.
        jax.block_until_ready(arrays[-len(devices) :])
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays)

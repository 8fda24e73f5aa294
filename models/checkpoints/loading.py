"""Parameters from a checkpoint's files to the devices, one device's share at a time.

A host never holds more of a parameter than the largest share of it, beside one tensor of a file.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding

from decant.models.checkpoints.gguf_file import GgufFile, undo_interleaving
from decant.models.checkpoints.safetensors_files import SafetensorsFiles
from decant.models.families import TensorName

# What a file format offers: naming, weight_files, config, shapes, read(name, index), tokenizer().
TensorFiles = SafetensorsFiles | GgufFile
Index = tuple[slice, ...]
"""A slice with start and stop for each axis."""


def whole(shape: tuple[int, ...]) -> Index:
    """The index of all of an array."""
    return tuple(slice(0, length) for length in shape)


def read_share(
    files: TensorFiles,
    name: TensorName,
    shape: tuple[int, ...],
    index: Index,
    *,
    dtype: Any,
    interleaved: bool = False,
) -> np.ndarray:
    """What lies at `index` of a parameter of `shape`, its layers and experts stacked.

    `interleaved`: the files interleave the halves of rotary heads (Llama's GGUF).
    """
    share = np.empty([at.stop - at.start for at in index], dtype)
    for stored, place in name.stored(files.naming, shape).items():
        stacked = index[: len(place)]
        if all(at.start <= number < at.stop for number, at in zip(place, stacked, strict=True)):
            here = tuple(number - at.start for number, at in zip(place, stacked, strict=True))
            inner, within = shape[len(place) :], index[len(place) :]
            lengths = tuple(at.stop - at.start for at in within)
            in_file = name.file_index(inner, within, files.naming)
            if interleaved and name.rotary:
                array = undo_interleaving(files.read(stored), heads=inner[1])[in_file]
            else:
                array = files.read(stored, in_file)
            share[here] = name.from_file(array, lengths)
    return share


def placed(
    read: Callable[[Index], np.ndarray], shape: tuple[int, ...], sharding: Sharding
) -> jax.Array:
    """An array whose shares `read` gives; each is read once for all devices that hold it."""
    holders: dict[tuple[tuple[int, int], ...], list[Any]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        assert index is not None
        spans = (at.indices(length)[:2] for at, length in zip(index, shape, strict=True))
        holders.setdefault(tuple(spans), []).append(device)
    arrays = []
    for spans, devices in holders.items():
        share = read(tuple(slice(*span) for span in spans))
        arrays += [jax.device_put(share, device) for device in devices]
        # The copies may still be under way; the host's goes before the next share is read.
        jax.block_until_ready(arrays[-len(devices) :])
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays)

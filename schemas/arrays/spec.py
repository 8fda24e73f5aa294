"""The zarr3 format of arrays of rows, which hold hidden states or attention maps.

Row `offset` of unit u is at array index u·U + offset, where U is the part's `unit_rows`. A unit may
be shorter than U; its remaining slots are never addressed. A file (a zarr3 shard) holds
`shard_rows` rows of one unit. `reader.py` and `writer.py` use TensorStore; this module does not
import it.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from decant.schemas.disk.atomic import write_bytes
from decant.schemas.disk.stand_in import bucket_of
from decant.schemas.signals import ArraySignal, HiddenSignal, scale_name

METADATA = "zarr.json"
SHARD_BYTES = 32 << 20
"""Most bytes in one file, uncompressed. A writer needs up to six times this memory."""
CHUNK_BYTES = 4 << 20
"""Most bytes in an inner chunk, the unit that is read and decoded at once."""


@dataclass(frozen=True)
class ArraySpec:
    """All settings that decide an array's bytes."""

    shape: tuple[int, ...]
    """[slots, *row]"""
    dtype: str
    """bfloat16, float32, int8 or uint8."""
    shard_rows: int
    """Rows per file."""

    @property
    def row(self) -> tuple[int, ...]:
        """Shape of one row."""
        return self.shape[1:]

    @property
    def numpy_dtype(self) -> np.dtype:
        """`dtype` as a numpy dtype."""
        return _numpy_dtype(self.dtype)

    @property
    def shard(self) -> tuple[int, ...]:
        """Shape of one file: whole rows, or a block of one row if a row is too large for a file."""
        if self.shard_rows > 1:
            return (self.shard_rows, *self.row)
        return (1, *_block(self.row, self.dtype, limit=SHARD_BYTES))

    @property
    def chunk(self) -> tuple[int, ...]:
        """Shape of an inner chunk: one row, or a block of one row."""
        return (1, *_block(self.shard[1:], self.dtype, limit=CHUNK_BYTES))

    @property
    def chunks_per_shard(self) -> int:
        """Number of inner chunks in a file."""
        return math.prod(self.shard) // math.prod(self.chunk)

    @property
    def blosc_bytes(self) -> int | None:
        """Bytes of an uncompressed inner chunk if Blosc compresses it, else None."""
        size = self.numpy_dtype.itemsize
        return math.prod(self.chunk) * size if size > 1 else None

    def shard_names(self, shard_row: int) -> list[str]:
        """Names of the files of the rows from `shard_row`·shard_rows on: one, or several blocks."""
        counts = [n // block for n, block in zip(self.row, self.shard[1:], strict=True)]
        return [".".join(map(str, ("c", shard_row, *at))) for at in np.ndindex(*counts)]


def shard_rows(row: tuple[int, ...], dtype: str, *, unit_rows: int) -> int:
    """Rows per file: the largest power of two that divides `unit_rows` and fits; at least one."""
    row_bytes = math.prod(row) * _numpy_dtype(dtype).itemsize
    fitting = max(SHARD_BYTES // row_bytes, 1)
    return min(1 << (fitting.bit_length() - 1), unit_rows & -unit_rows)


def specs_of(
    signal: ArraySignal, *, name: str, slots: int, sequence_length: int
) -> dict[str, ArraySpec]:
    """The arrays of the signal called `name`, by array name; int8 states also have scales."""
    if not isinstance(signal, HiddenSignal):
        dtype = "uint8" if signal.dtype == "uint8-log" else signal.dtype
        row = (signal.stored_heads, sequence_length, sequence_length)
        return {name: ArraySpec((slots, *row), dtype, signal.shard_rows)}
    shape = (slots, sequence_length, signal.width)
    specs = {name: ArraySpec(shape, signal.dtype, signal.shard_rows)}
    if signal.dtype == "int8":
        specs[scale_name(name)] = ArraySpec(shape[:2], "float32", signal.shard_rows)
    return specs


def create_array(path: Path, spec: ArraySpec) -> None:
    """Write an array's metadata to directory `path`. Several processes may do so at once."""
    data, file = metadata_bytes(spec), path / METADATA
    if bucket_of(file) or not file.exists() or file.read_bytes() != data:
        write_bytes(file, data)


def metadata_bytes(spec: ArraySpec) -> bytes:
    """The bytes of an array's `zarr.json`."""
    return json.dumps(metadata(spec), indent=1, sort_keys=True).encode()


def metadata(spec: ArraySpec) -> dict[str, Any]:
    """The contents of an array's `zarr.json`, as a JSON value."""
    little = {"name": "bytes", "configuration": {"endian": "little"}}
    crc = {"name": "crc32c"}
    sharding = {
        "chunk_shape": list(spec.chunk),
        # The checksum last, so that it covers the bytes on disk.
        "codecs": [little, _compressor(spec.numpy_dtype.itemsize), crc],
        "index_codecs": [little, crc],
        "index_location": "end",
    }
    floating = spec.dtype in ("bfloat16", "float32")
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(spec.shape),
        "data_type": spec.dtype,
        "fill_value": "NaN" if floating else 0,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(spec.shard)}},
        # With "/" each file would get two directories of its own.
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
    }


def _compressor(item_bytes: int) -> dict[str, Any]:
    """The compressor of inner chunks, by the size of a number.

    Chosen by compressed size (a share) and reading rate on one core. bfloat16 states (hidden layers
    12 and 30 of SmolLM2-135M): LZ4 of shuffled bits 0.84 at 1.6 GB/s, zstd:1 0.79 at 1.0, zstd:3 no
    smaller, uncompressed 1.00 at 2.2. The goal is 1 GB/s for random rows, decoding of logits
    included. int8 codes: zstd:1 0.59 at 1.2 GB/s, LZ4 1.00. Attention codes: zstd:1 0.38 at
    2.2 GB/s, LZ4 0.42.
    """
    if item_bytes == 1:
        return {"name": "zstd", "configuration": {"level": 1, "checksum": False}}
    shuffled = {"shuffle": "bitshuffle", "typesize": item_bytes, "blocksize": 0}
    return {"name": "blosc", "configuration": {"cname": "lz4", "clevel": 5, **shuffled}}


def _numpy_dtype(dtype: str) -> np.dtype:
    return np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)


def _block(shape: tuple[int, ...], dtype: str, *, limit: int) -> tuple[int, ...]:
    """The largest block of at most `limit` bytes that tiles `shape`. Leading axes are cut first."""
    block = list(shape)
    for axis, length in enumerate(shape):
        rest = math.prod(shape[axis + 1 :]) * _numpy_dtype(dtype).itemsize
        fitting = max(limit // rest, 1)
        block[axis] = max(n for n in range(1, min(fitting, length) + 1) if length % n == 0)
        if limit >= rest:
            break
    return tuple(block)

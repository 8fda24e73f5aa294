"""Write arrays of rows through TensorStore.

A file is encoded whole, in one write, and renamed into place atomically. Equal rows therefore give
equal bytes: by any writer, on every rerun, and over any earlier file.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import tensorstore

from decant.schemas.arrays.spec import ArraySpec
from decant.schemas.arrays.zarr3 import open_array, shared_context
from decant.schemas.disk.atomic import write_bytes
from decant.schemas.disk.shards import Shard, describe_shard


class ArrayWriter:
    """Writes one unit's rows of one array, in order.

    Memory: up to six times an uncompressed file, which is `SHARD_BYTES` at most unless one row is
    larger. One buffer is filled while the other is encoded, copied out of TensorStore and written.
    """

    def __init__(self, path: Path, spec: ArraySpec, *, first: int):
        """`first` is the array index of the unit's first row, unit·U."""
        assert first % spec.shard_rows == 0, "a file would hold rows of two units"
        self._path = path
        self._spec = spec
        # Encoded in memory: TensorStore's own lock files would have to be cleaned up. TensorStore
        # (0.1.86) also does not truncate a lock file that a killed writer left, so the old end
        # would become the end of our file.
        memory = tensorstore.Context({"memory_key_value_store": {}}, parent=shared_context())
        self._store = open_array({"driver": "memory"}, spec, context=memory)
        self._next = first
        self._filled = 0
        self._buffer, self._spare = (
            np.zeros((spec.shard_rows, *spec.row), spec.numpy_dtype) for _ in range(2)
        )
        self._pool = ThreadPoolExecutor(1)
        self._writing: Future[list[Shard]] | None = None
        self._shards: list[Shard] = []

    def append(self, row: np.ndarray) -> None:
        """Copy the next row into the buffer. Every `shard_rows`-th row starts writing a file.

        ValueError for a row of another shape or dtype.
        """
        if row.shape != self._spec.row or row.dtype != self._spec.numpy_dtype:
            raise ValueError(
                f"{self._path}: expected a row of {self._spec.dtype} {self._spec.row}, "
                f"got {row.dtype} {row.shape}"
            )
        self._buffer[self._filled] = row
        self._filled += 1
        if self._filled == self._spec.shard_rows:
            self._flush()

    def finish(self) -> tuple[Shard, ...]:
        """Write the rest, wait, and return the entries of all files written."""
        if self._filled:
            # Unused slots are written as zeros, so that no earlier file shows through.
            self._buffer[self._filled :] = 0
            self._flush()
        self._wait()
        self._pool.shutdown()
        return tuple(self._shards)

    def _flush(self) -> None:
        self._wait()
        self._writing = self._pool.submit(self._write, self._buffer, self._next)
        self._buffer, self._spare = self._spare, self._buffer
        self._next += self._spec.shard_rows
        self._filled = 0

    def _write(self, rows: np.ndarray, first: int) -> list[Shard]:
        writing = self._store[first : first + len(rows)].write(
            rows, can_reference_source_data_indefinitely=True
        )
        writing.result()
        return [self._write_file(name) for name in self._spec.shard_names(first // len(rows))]

    def _write_file(self, name: str) -> Shard:
        encoded = self._store.kvstore
        data = encoded.read(name).result().value
        encoded.write(name, None).result()
        write_bytes(self._path / name, data, kind="array")
        return describe_shard(name, data, chunks=self._spec.chunks_per_shard)

    def _wait(self) -> None:
        if self._writing:
            self._shards += self._writing.result()
            self._writing = None

"""Writing and reading arrays of rows through TensorStore.

A file is encoded whole, in one write, and put into place like every other file of a cache: equal
rows are equal bytes, whoever writes them, however often, and whatever was there before. Reading is
strict: rows of a file that is missing or not the committed one are an error, never a zero.

TensorStore aborts a process that forks after importing it: start processes with `spawn`.
"""

import functools
import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore

from schemas.arrays import METADATA, ArraySpec, metadata, metadata_bytes
from schemas.files import write_bytes
from schemas.shards import Shard, describe, require_shard

_INDEX_CACHE_BYTES = 64 << 20
_READ_BYTES = 128 << 20
"""At most this much of one array is being read at once, before compression."""


class ArrayWriter:
    """Writes one unit's rows of one array, in order.

    Memory: up to six times a file before compression, which is `SHARD_BYTES` at most unless one row
    is larger: one buffer fills while the other is encoded, copied out of TensorStore and written.
    """

    def __init__(self, path: Path, spec: ArraySpec, *, first: int):
        """`first` is the array index of the unit's first row, unit·U."""
        assert first % spec.shard_rows == 0, "a file would hold rows of two units"
        self._path = path
        self._spec = spec
        # Encoded in memory: TensorStore's own lock files would have to be cleaned up, and one
        # that a killed writer leaves is not truncated (0.1.86), so its end would become ours.
        memory = tensorstore.Context({"memory_key_value_store": {}}, parent=_context())
        self._store = _open({"driver": "memory"}, spec, context=memory)
        self._next = first
        self._filled = 0
        self._buffer, self._spare = (
            np.zeros((spec.shard_rows, *spec.row), spec.numpy_dtype) for _ in range(2)
        )
        self._pool = ThreadPoolExecutor(1)
        self._writing: Future[list[Shard]] | None = None
        self._shards: list[Shard] = []

    def append(self, row: np.ndarray) -> None:
        """Take a copy of the next row; every `shard_rows`-th one starts writing a file."""
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
        """Write what is left, wait, and say what the files are."""
        if self._filled:
            # Written too, so that the file is whole and never merged with what was there.
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
        return [self._put(name) for name in self._spec.shard_names(first // len(rows))]

    def _put(self, name: str) -> Shard:
        encoded = self._store.kvstore
        data = encoded.read(name).result().value
        encoded.write(name, None).result()
        write_bytes(self._path / name, data, kind="array")
        return describe(name, data, chunks=self._spec.chunks_per_shard)

    def _wait(self) -> None:
        if self._writing:
            self._shards += self._writing.result()
            self._writing = None


class ArrayReader:
    """Rows of one sealed array, in any order."""

    def __init__(
        self,
        path: Path,
        spec: ArraySpec,
        *,
        name: str,
        unit_rows: int,
        committed: Callable[[int], Iterable[Shard]],
    ):
        """`name` is the array's, for errors; `committed` gives the files of a unit's commit."""
        self._path = path
        self._spec = spec
        self._name = name
        self._unit_rows = unit_rows
        self._committed = committed
        self._checked: set[int] = set()
        self._store: Any = None

    def read(self, indices: np.ndarray | Sequence[int]) -> np.ndarray:
        """The rows at the array indices, in the order asked for: [n, *row].

        ValueError naming the array, the unit and the file if one is damaged, missing or another's.
        """
        out = np.empty((len(indices), *self._spec.row), self._spec.numpy_dtype)
        self.start(out, range(len(indices)), indices)()
        return out

    def start(
        self, out: np.ndarray, slots: Sequence[int], indices: np.ndarray | Sequence[int]
    ) -> Callable[[], None]:
        """Begin to read row `indices[i]` into `out[slots[i]]`, without a copy between.

        TensorStore's threads do it. What is returned waits until all is there; errors, at once or
        then, as `read`.
        """
        indices = np.asarray(indices, np.int64)
        if self._store is None:
            self._store = self._open()
        for shard_row in np.unique(indices // self._spec.shard_rows).tolist():
            if shard_row not in self._checked:
                self._check(shard_row)
        into, store = tensorstore.array(out), self._store
        row_bytes = math.prod(self._spec.row) * self._spec.numpy_dtype.itemsize
        rows = zip(map(int, slots), indices.tolist(), strict=True)
        reads = ((index, into[slot].write(store[index])) for slot, index in rows)
        started = deque(islice(reads, max(_READ_BYTES // row_bytes, 1)))

        def finish() -> None:
            while started:
                self._finish(*started.popleft())
                started.extend(islice(reads, 1))

        return finish

    def _finish(self, index: int, reading: Any) -> None:
        try:
            reading.result()
        except Exception as error:
            raise ValueError(
                f"{self._path}: {self._where(index)} cannot be read: {error}"
            ) from error

    def _check(self, shard_row: int) -> None:
        index = shard_row * self._spec.shard_rows
        committed = {shard.name: shard for shard in self._committed(index // self._unit_rows)}
        for file in self._spec.shard_names(shard_row):
            of = self._where(index)
            if file not in committed:
                raise ValueError(f"{self._path / file}: {of}: the commit knows no such file")
            require_shard(
                self._path / file, committed[file], chunks=self._spec.chunks_per_shard, of=of
            )
        self._checked.add(shard_row)

    def _open(self) -> Any:
        file = self._path / METADATA
        found = file.read_bytes() if file.exists() else b""
        if found != metadata_bytes(self._spec):
            raise ValueError(
                f"{file}: {self._name}: {'not what was written' if found else 'missing'}; "
                "the file was damaged or edited"
            )
        # Resolved: of a part in another cache the path has `..`, which TensorStore does not take.
        where = {"driver": "file", "path": f"{self._path.resolve()}/"}
        return _open(where, self._spec, context=_context())

    def _where(self, index: int) -> str:
        unit, offset = divmod(index, self._unit_rows)
        return f"{self._name}, unit {unit}, row {offset} of it"


def _open(kvstore: dict[str, str], spec: ArraySpec, *, context: Any) -> Any:
    """The TensorStore at `kvstore`. Metadata that is there is not asked: the spec decides."""
    return tensorstore.open(
        {
            "driver": "zarr3",
            "kvstore": kvstore,
            "metadata": metadata(spec),
            # Rows of zeros would otherwise not be written, and missing ones read as the fill.
            "store_data_equal_to_fill_value": True,
            "fill_missing_data_reads": False,
            # A sealed cache does not change: indices are read once.
            "recheck_cached_data": False,
            "recheck_cached_metadata": False,
            "metadata_cache_pool": "cache_pool#indices",
        },
        open=True,
        assume_metadata=True,
        context=context,
    ).result()


@functools.cache
def _context() -> Any:
    """Limits that all arrays of a process share."""
    processors = os.cpu_count() or 1
    return tensorstore.Context(
        {
            # Rows come back in another order each epoch: keeping them would help nothing, and
            # damage that happens meanwhile would go unseen.
            "cache_pool": {"total_bytes_limit": 0},
            # Without its shard's index each row costs two reads; 16 bytes an inner chunk.
            "cache_pool#indices": {"total_bytes_limit": _INDEX_CACHE_BYTES},
            "data_copy_concurrency": {"limit": max(processors, 2)},
            # Files are open only while they are read: this bounds their number.
            "file_io_concurrency": {"limit": min(max(2 * processors, 8), 64)},
        }
    )

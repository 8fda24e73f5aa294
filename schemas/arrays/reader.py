"""Read arrays of rows through TensorStore.

A file that is missing, or that is not the committed file, is an error. It never reads as zeros.
"""

import contextlib
import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore

from decant.schemas.arrays.spec import METADATA, ArraySpec, metadata_bytes
from decant.schemas.arrays.zarr3 import open_array, shared_context
from decant.schemas.disk.shards import Shard, require_shard
from decant.schemas.disk.stand_in import named_in
from decant.store.mirror import Mirror
from decant.store.mirrored_file import MirroredFile

_READ_BYTES = 128 << 20
"""Most bytes of one array that are being read at once, uncompressed."""


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
        mirror: Mirror | None = None,
    ):
        """`name` names the array in errors; `committed(unit)` gives a unit's committed files.

        `mirror` fetches whole files, if `path` lies in it.
        """
        self._path, self._mirror = path, mirror
        self._files: dict[int, list[Shard]] = {}
        self._spec = spec
        self._name = name
        self._unit_rows = unit_rows
        self._committed = committed
        self._checked: set[int] = set()
        self._store: Any = None

    def read(self, indices: np.ndarray | Sequence[int]) -> np.ndarray:
        """The rows at these array indices, in this order: [n, *row].

        ValueError naming the array, the unit and the file if a file is damaged, missing or not the
        committed one.
        """
        out = np.empty((len(indices), *self._spec.row), self._spec.numpy_dtype)
        self.start(out, range(len(indices)), indices)()
        return out

    def start(
        self, out: np.ndarray, slots: Sequence[int], indices: np.ndarray | Sequence[int]
    ) -> Callable[[], None]:
        """Begin to read row `indices[i]` into `out[slots[i]]` without an intermediate copy.

        TensorStore's threads read. The returned function waits for all rows. This call or that
        function raises as `read` does.
        """
        indices = np.asarray(indices, np.int64)
        if self._store is None:
            self._store = self._open()
        # TensorStore opens files by their paths, so they must stay until it has read them.
        holding = contextlib.ExitStack()
        for file in self._mirrored(indices):
            holding.enter_context(file.held())
            file.ensure([(0, file.size)])
        for shard_row in self._shard_rows(indices):
            if shard_row not in self._checked:
                self._check(shard_row)
        into, store = tensorstore.array(out), self._store
        row_bytes = math.prod(self._spec.row) * self._spec.numpy_dtype.itemsize
        rows = zip(map(int, slots), indices.tolist(), strict=True)
        reads = ((index, into[slot].write(store[index])) for slot, index in rows)
        started = deque(islice(reads, max(_READ_BYTES // row_bytes, 1)))

        def finish() -> None:
            with holding:
                while started:
                    self._finish(*started.popleft())
                    started.extend(islice(reads, 1))

        return finish

    def fetch(self, indices: np.ndarray) -> list[Future]:
        """Begin to fetch the files of these rows into the mirror; returns what to wait for."""
        starts = [file.start([(0, file.size)]) for file in self._mirrored(indices)]
        return [future for futures in starts for future in futures]

    def forget(self, indices: np.ndarray) -> None:
        """Fetch the files of these rows again when they are read next."""
        for file in self._mirrored(indices):
            file.forget()
        self._checked -= {*self._shard_rows(indices)}

    def _shard_rows(self, indices: np.ndarray) -> list[int]:
        return np.unique(indices // self._spec.shard_rows).tolist()

    def _mirrored(self, indices: np.ndarray) -> list[MirroredFile]:
        """The files of these rows; none if they are on this machine."""
        if self._mirror is None:
            return []
        files = []
        for shard_row in self._shard_rows(indices):
            if shard_row not in self._files:
                unit = shard_row * self._spec.shard_rows // self._unit_rows
                names = self._spec.shard_names(shard_row)
                self._files[shard_row] = [s for s in self._committed(unit) if s.name in names]
            for shard in self._files[shard_row]:
                path = self._path / shard.name
                named = named_in(self._mirror, path, shard.sha256)
                files.append(self._mirror.file(path, shard.bytes, named=named))
        return files

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
                self._path / file,
                committed[file],
                chunks=self._spec.chunks_per_shard,
                of=of,
                blosc_bytes=self._spec.blosc_bytes,
            )
        self._checked.add(shard_row)

    def _open(self) -> Any:
        file = self._path / METADATA
        if self._mirror:
            self._mirror.whole(file)
        stored = file.read_bytes() if file.exists() else b""
        if stored != metadata_bytes(self._spec):
            raise ValueError(
                f"{file}: {self._name}: {'not what was written' if stored else 'missing'}; "
                "the file was damaged or edited"
            )
        # Resolved, because TensorStore refuses `..`, which paths to another cache contain.
        where = {"driver": "file", "path": f"{self._path.resolve()}/"}
        return open_array(where, self._spec, context=shared_context())

    def _where(self, index: int) -> str:
        unit, offset = divmod(index, self._unit_rows)
        return f"{self._name}, unit {unit}, row {offset} of it"

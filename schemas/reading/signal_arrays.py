"""Read one signal's arrays by row over all parts: hidden states or attention maps."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path

import numpy as np

from decant.schemas.arrays.reader import ArrayReader
from decant.schemas.arrays.spec import ArraySpec, specs_of
from decant.schemas.disk.array_record import FileEntry
from decant.schemas.disk.inside import read_regular
from decant.schemas.disk.layout import PartLayout
from decant.schemas.disk.shards import Shard
from decant.schemas.manifest.commits import sealed_commit
from decant.schemas.manifest.manifest import Manifest, Part
from decant.schemas.signals import AttentionSignal, RecordSignal, scale_name
from decant.schemas.targets.attention import decode_log
from decant.schemas.targets.hidden import decode_int8
from decant.store.mirror import Mirror

_MOST = 1.1
"""Probabilities are at most 1, within bfloat16's rounding."""


class SignalArrays:
    """The arrays of one signal; a part's arrays are opened when a row of that part is read."""

    def __init__(self, cache: Path, manifest: Manifest, name: str, mirror: Mirror | None = None):
        signal = manifest.signals[name]
        assert not isinstance(signal, RecordSignal)
        self._cache, self._mirror = cache, mirror
        self._manifest = manifest
        self._name = name
        self._signal = signal
        # Units are numbered over all parts, as in `Cache`.
        counts = [len(part.units) for part in manifest.parts]
        self._first_unit = np.concatenate([[0], np.cumsum(counts)])
        self._numbers = [np.array(part.unit_numbers) for part in manifest.parts]
        self._of_part: dict[tuple, dict[str, ArrayReader]] = {}

    def start(
        self, units: np.ndarray, offsets: np.ndarray, *, decode: bool
    ) -> Callable[[], dict[str, np.ndarray]]:
        """Begin to read row `offsets[i]` of unit `units[i]` (numbered over all parts).

        The returned function waits for the reads and gives arrays [rows, …] by name: one, or two
        for int8 states with `decode` off (codes and scales).
        """
        out = {
            name: np.empty((len(units), *spec.row), spec.numpy_dtype)
            for name, spec in self._specs(self._manifest.parts[0]).items()
        }
        reading = [
            reader.start(out[name], slots.tolist(), indices)
            for name, reader, slots, indices in self._placed(units, offsets)
        ]

        def finish() -> dict[str, np.ndarray]:
            for wait in reading:
                wait()
            self._require_possible(out, units, offsets)
            return self._decoded(out) if decode else out

        return finish

    def fetch(self, units: np.ndarray, offsets: np.ndarray) -> list[Future]:
        """Begin to fetch what `start` reads into the mirror; returns what to wait for."""
        placed = self._placed(units, offsets)
        return [f for _, reader, _, indices in placed for f in reader.fetch(indices)]

    def forget(self, units: np.ndarray, offsets: np.ndarray) -> None:
        """Fetch the files of these rows again when they are read next."""
        for _, reader, _, indices in self._placed(units, offsets):
            reader.forget(indices)

    def _placed(
        self, units: np.ndarray, offsets: np.ndarray
    ) -> Iterator[tuple[str, ArrayReader, np.ndarray, np.ndarray]]:
        """(array, its reader, which of the rows are in it, their indices there)."""
        parts = np.searchsorted(self._first_unit, units, side="right") - 1
        for number in np.unique(parts):
            part, slots = self._manifest.parts[number], np.flatnonzero(parts == number)
            in_part = self._numbers[number][units[slots] - self._first_unit[number]]
            indices = in_part * part.unit_rows + offsets[slots]
            for name, reader in self._readers(part).items():
                yield name, reader, slots, indices

    def _require_possible(
        self, out: dict[str, np.ndarray], units: np.ndarray, offsets: np.ndarray
    ) -> None:
        """ValueError for NaN and infinity, for a scale below 0, for a probability above 1."""
        for name, array in out.items():
            if not self._possible(name, array):
                slot = next(i for i in range(len(array)) if not self._possible(name, array[i]))
                number = int(np.searchsorted(self._first_unit, units[slot], side="right")) - 1
                unit = self._numbers[number][units[slot] - self._first_unit[number]]
                raise ValueError(
                    f"{self._cache / self._manifest.parts[number].path}: {name}, unit {unit}, row "
                    f"{offsets[slot]} of it holds a value that is not finite or out of its range"
                )

    def _possible(self, name: str, array: np.ndarray) -> bool:
        if array.dtype.itemsize == 1 or not array.size:
            return True
        # Compared as integers: a pass over bfloat16 takes a tenth of the time of isfinite.
        size = array.dtype.itemsize
        largest = int(array.view(f"u{size}").max())
        infinity, most = (
            int(np.array(value, array.dtype).view(f"u{size}")) for value in (np.inf, _MOST)
        )
        if name != self._name:  # scales: the sign bit would make them larger than infinity
            return largest < infinity
        if isinstance(self._signal, AttentionSignal):
            return largest <= most
        highest = int(array.view(f"i{size}").max())
        return highest < infinity and largest < infinity | 1 << 8 * size - 1

    def _decoded(self, out: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        name, signal = self._name, self._signal
        if signal.dtype == "uint8-log":
            return {name: decode_log(out[name])}
        if signal.dtype == "int8":
            return {name: decode_int8(out[name], out[scale_name(name)])}
        return out

    def _readers(self, part: Part) -> dict[str, ArrayReader]:
        # Parts of one directory share its arrays but have different units and commits.
        key = (part.path, part.numbers)
        if key not in self._of_part:
            layout = PartLayout(self._cache / part.path)
            sealed = dict(part.numbered_units)
            self._of_part[key] = {
                name: ArrayReader(
                    layout.array(name),
                    spec,
                    name=name,
                    unit_rows=part.unit_rows,
                    committed=lambda unit, name=name: self._committed(
                        layout, unit, sealed[unit].files[self._name]
                    )[name],
                    mirror=self._mirror,
                )
                for name, spec in self._specs(part).items()
            }
        return self._of_part[key]

    def _specs(self, part: Part) -> dict[str, ArraySpec]:
        signal = part.signals[self._name]
        assert not isinstance(signal, RecordSignal)
        return specs_of(
            signal,
            name=self._name,
            slots=part.slots,
            sequence_length=self._manifest.sequence_length,
        )

    def _committed(
        self, layout: PartLayout, unit: int, sealed: FileEntry
    ) -> dict[str, Sequence[Shard]]:
        """The files of a unit, by array name. ValueError unless the manifest names its commit."""
        path = layout.commit(self._name, unit)
        by_content = self._manifest.by_content
        try:
            commit, *_ = sealed_commit(
                layout, self._name, unit, sealed, self._read, by_content=by_content
            )
        except FileNotFoundError:
            told = f"{path}: the commit of {self._name}, unit {unit}, is missing"
            raise ValueError(told) from None
        return dict(commit.shards)

    def _read(self, path: Path) -> bytes:
        return read_regular(self._mirror.whole(path) if self._mirror else path)

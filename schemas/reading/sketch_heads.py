"""The sketch heads of a cache's parts: each distinct one is loaded once, and has a number."""

from functools import cached_property
from pathlib import Path

import numpy as np

from decant.schemas.disk.layout import SKETCH, PartLayout
from decant.schemas.manifest.manifest import Manifest, Part
from decant.schemas.manifest.statistics import load_statistic
from decant.schemas.signals import SketchSignal
from decant.schemas.targets.sketch import BIAS, DEVIATIONS, HEAD, OFFSET_BETAS, OFFSETS, SketchHead
from decant.store.mirror import Mirror


class SketchHeads:
    """Numbered in the order of the parts that use them first; equal heads have one number."""

    def __init__(self, cache: Path, manifest: Manifest, mirror: Mirror | None = None):
        self._cache, self._mirror = cache, mirror
        self._manifest = manifest
        self._deviations: dict[str, np.ndarray] = {}
        parts = [part for part in manifest.parts if SKETCH in part.signals]
        first = {self._identity(part): part for part in reversed(parts)}
        self._of_number = sorted(first.values(), key=parts.index)
        self._number = {self._identity(part): i for i, part in enumerate(self._of_number)}

    @property
    def rank(self) -> int:
        """The largest rank of a part's sketch."""
        return max(_signal(part).rank for part in self._manifest.parts)

    def number(self, part: Part) -> int:
        """The number of a part's head: its index in `all`."""
        return self._number[self._identity(part)]

    @cached_property
    def all(self) -> list[SketchHead]:
        """All heads, each with `rank` rows; rows beyond a part's own rank are zero.

        ValueError naming the statistic that is missing or damaged.
        """
        return [self._load(part) for part in self._of_number]

    def deviations(self, part: Part) -> np.ndarray:
        """Standard deviations of a part's sketches on its calibration sample, float64 [r]."""
        if part.path not in self._deviations:
            shape = (_signal(part).rank,)
            values = self._statistic(part, DEVIATIONS, shape, (np.float64,))
            if (values < 0).any():
                raise ValueError(f"{self._file(part, DEVIATIONS)}: a number below 0")
            self._deviations[part.path] = values
        return self._deviations[part.path]

    def files_of_deviations(self, part: Part) -> dict[str, str]:
        """sha256 by name of the statistic that `deviations` reads."""
        file = f"{DEVIATIONS}.npy"
        return {file: part.statistics[file]} if file in part.statistics else {}

    def _load(self, part: Part) -> SketchHead:
        signal, vocabulary = _signal(part), self._manifest.vocabulary_size
        stored = self._statistic(part, HEAD, (signal.rank, vocabulary), (np.float16, np.float32))
        head = np.zeros((self.rank, vocabulary), np.float32)
        head[: signal.rank] = stored
        bias = self._statistic(part, BIAS, (vocabulary,), (np.float32,))
        return SketchHead(head, bias, signal.softcap, self._offsets(part))

    def _offsets(self, part: Part) -> np.ndarray | None:
        if f"{OFFSETS}.npy" not in part.statistics:
            return None
        shape = (len(OFFSET_BETAS), self._manifest.vocabulary_size)
        return self._statistic(part, OFFSETS, shape, (np.float32,))

    def _statistic(
        self, part: Part, name: str, shape: tuple[int, ...], dtypes: tuple[type, ...]
    ) -> np.ndarray:
        file = f"{name}.npy"
        if file not in part.statistics:
            raise ValueError(f"{self._cache / part.path}: the manifest has no hash of {file}")
        root, sha256 = self._cache / part.path, part.statistics[file]
        array = load_statistic(root, file, sha256=sha256, mirror=self._mirror)
        if array.shape != shape or array.dtype not in dtypes or not np.isfinite(array).all():
            expected = " or ".join(np.dtype(dtype).name for dtype in dtypes)
            raise ValueError(
                f"{self._file(part, name)}: expected finite {expected} numbers of shape {shape}, "
                f"got {array.dtype} of {array.shape}"
            )
        return array

    def _file(self, part: Part, name: str) -> Path:
        return PartLayout(self._cache / part.path).statistics / f"{name}.npy"

    def _identity(self, part: Part) -> tuple:
        hashes = [part.statistics.get(f"{name}.npy") for name in (HEAD, BIAS, OFFSETS)]
        return (*hashes, _signal(part).softcap)


def _signal(part: Part) -> SketchSignal:
    signal = part.signals[SKETCH]
    assert isinstance(signal, SketchSignal)
    return signal

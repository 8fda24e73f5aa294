"""What a new part reuses of an older part's calibration: directions, and the basis of sketches."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from decant.pipelines.calibration.directions import KnownDirections, known_directions
from decant.schemas.disk.layout import SKETCH
from decant.schemas.manifest.statistics import load_statistic
from decant.schemas.signals import Signal, SketchSignal
from decant.schemas.targets.sketch import (
    BIAS,
    DEVIATIONS,
    HEAD,
    MEAN,
    NAMES,
    OFFSETS,
    PROJECTION,
    SketchBasis,
    SketchHead,
)


@dataclass(frozen=True)
class KnownBasis:
    """Where the basis of an older part's sketches is stored."""

    part: Path
    sha256: Mapping[str, str]
    """By file name, of those of the statistics `NAMES` that it has."""
    signal: SketchSignal

    def load(self) -> SketchBasis:
        """The basis. ValueError if a file is not the sealed one."""
        arrays = {
            name: load_statistic(self.part, f"{name}.npy", sha256=self.sha256[f"{name}.npy"])
            for name in NAMES
            if f"{name}.npy" in self.sha256
        }
        head = SketchHead(arrays[HEAD], arrays[BIAS], self.signal.softcap, arrays.get(OFFSETS))
        return SketchBasis(arrays[MEAN], arrays[PROJECTION], head, arrays[DEVIATIONS])


Known = Mapping[str, KnownDirections | KnownBasis]
"""By signal name, what is reused for that signal."""


def known_statistics(
    cache: Path, signals: Mapping[str, Signal], statistics: Mapping[str, str], *, path: str
) -> dict[str, KnownDirections | KnownBasis]:
    """What the part at `path` below the cache offers to others, by signal name.

    `statistics` maps each of the part's statistics files to its sha256.
    """
    known: dict[str, KnownDirections | KnownBasis] = {
        **known_directions(cache, signals, statistics, path=path)
    }
    if isinstance(sketch := signals.get(SKETCH), SketchSignal):
        known[SKETCH] = KnownBasis((cache / path).absolute(), basis_hashes(statistics), sketch)
    return known


def own_basis(known: Known, statistics: Mapping[str, str]) -> str:
    """A line on a part, with these `statistics`, that did not reuse the known basis; else empty."""
    basis = known.get(SKETCH)
    file = f"{PROJECTION}.npy"
    if not isinstance(basis, KnownBasis) or file not in statistics:
        return ""
    if statistics[file] == basis.sha256[file]:
        return ""
    return (
        f"{SKETCH}: these texts differ too much from those of the cache's first part; they get a "
        "basis of their own. Students read both"
    )


def basis_hashes(statistics: Mapping[str, str]) -> dict[str, str]:
    """sha256 of the files of a part's basis, by file name."""
    files = [f"{name}.npy" for name in NAMES]
    return {file: statistics[file] for file in files if file in statistics}

"""Statistics that calibration froze: named float64 or integer arrays, one .npy file each."""

import math
import os
import shutil
from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from pathlib import Path

import numpy as np

from decant.schemas.codecs import Tables
from decant.schemas.codecs.check_tables import require_tables
from decant.schemas.disk.atomic import replacing
from decant.schemas.disk.identity import file_sha256
from decant.schemas.disk.layout import COUNTS, LOGITS, SKETCH, PartLayout
from decant.schemas.disk.stand_in import bucket_of, named_in
from decant.schemas.signals import HiddenSignal, Signal, SketchSignal
from decant.schemas.targets.sketch import NAMES
from decant.store.mirror import Mirror

_TABLE = {LOGITS: "logits-", COUNTS: "counts-table-", SKETCH: "sketch-table-"}
"""What the names of the codec tables of each signal begin with."""

MATCHED = "matched-ids.npy"
"""Statistic of a part with matched targets: which ids of its vocabulary the teacher has too."""


def statistics_of(name: str, signal: Signal, files: Iterable[str]) -> set[str]:
    """Those of a part's statistics `files` that only the signal called `name` needs.

    None of `logits`, which every cache keeps.
    """
    own: set[str | None] = set()
    if isinstance(signal, HiddenSignal):
        own = {signal.directions}
    elif isinstance(signal, SketchSignal):
        own = {f"{statistic}.npy" for statistic in NAMES}
    table = _TABLE[name] if name in (COUNTS, SKETCH) else None
    return {file for file in files if file in own or (table and file.startswith(table))}


def save_statistics(part: Path, arrays: Mapping[str, np.ndarray]) -> dict[str, str]:
    """Write arrays, by name, under the part's `statistics/`. Returns sha256 by file name."""
    directory = PartLayout(part).statistics
    digests = {}
    for name, array in sorted(arrays.items()):
        path = directory / f"{name}.npy"
        with replacing(path) as temporary:
            with temporary.open("wb") as file:
                np.save(file, array, allow_pickle=False)
            digests[path.name] = file_sha256(temporary)
    return digests


def share_statistics(part: Path, older: Path, files: Mapping[str, str]) -> None:
    """Give a part the statistics `files` (sha256 by file name) of the part `older`.

    They are links to the same files where the disk has such links, because statistics are never
    changed in place; else copies. ValueError as `load_statistic`.
    """
    for name, sha256 in files.items():
        source, _ = _checked(older, name, sha256=sha256)
        with replacing(PartLayout(part).statistics / name) as temporary:
            try:
                os.link(source, temporary)
            except OSError:
                shutil.copyfile(source, temporary)


def load_statistic(
    part: Path, name: str, *, sha256: str, mirror: Mirror | None = None
) -> np.ndarray:
    """The array in file `name`, fetched into the `mirror` in which the part lies, if any.

    ValueError if the file is missing or its hash is not `sha256`.
    """
    _, array = _checked(part, name, sha256=sha256, mirror=mirror)
    return array


def _checked(
    part: Path, name: str, *, sha256: str, mirror: Mirror | None = None
) -> tuple[Path, np.ndarray]:
    """The statistic's file on this machine, and the array in it; raises as `load_statistic`."""
    path = PartLayout(part).statistics / name
    if mirror:
        path = mirror.whole(path, sha256=sha256, named=named_in(mirror, path, sha256))
    elif bucket := bucket_of(path):
        path = bucket.whole(path, sha256=sha256)
    if not path.is_file():
        raise ValueError(f"{path}: the manifest names this file, but it is missing")
    if file_sha256(path) != sha256:
        raise ValueError(f"{path}: checksum mismatch, the file is damaged")
    try:
        return path, _read_npy(path)
    except (ValueError, EOFError, SyntaxError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: not an array: {error}") from None


def fetch_statistics(part: Path, files: Mapping[str, str], *, mirror: Mirror) -> list[Future]:
    """Begin to fetch statistics (sha256 by file name) into the mirror; what to wait for."""
    futures = []
    for name, sha256 in files.items():
        path = PartLayout(part).statistics / name
        named = named_in(mirror, path, sha256)
        futures.append(mirror.opening.submit(mirror.whole, path, sha256=sha256, named=named))
    return futures


def _read_npy(path: Path) -> np.ndarray:
    """The array in a file, which may claim no more than the file holds: numpy allocates first."""
    with path.open("rb") as file:
        version = np.lib.format.read_magic(file)
        if version != (1, 0):
            raise ValueError(f"numpy's format version {version}, expected (1, 0)")
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        held = path.stat().st_size - file.tell()
        if dtype.hasobject or math.prod(shape) * dtype.itemsize != held:
            raise ValueError(f"{dtype} of shape {shape} in {held} bytes")
    return np.load(path, allow_pickle=False)


def table_arrays(tables: Tables, *, signal: str = LOGITS) -> dict[str, np.ndarray]:
    """The tables of the signal's codec by statistic name."""
    return {_TABLE[signal] + name: array for name, array in tables.arrays().items()}


def table_hashes(statistics: Mapping[str, str], *, signal: str = LOGITS) -> dict[str, str]:
    """Those of the `statistics` (sha256 by file name) that are tables of the signal's codec."""
    return {name: sha for name, sha in statistics.items() if name.startswith(_TABLE[signal])}


def load_tables(
    part: Path,
    statistics: Mapping[str, str],
    *,
    vocabulary: int,
    signal: str = LOGITS,
    mirror: Mirror | None = None,
) -> Tables:
    """The tables of the signal's codec, read from a part's statistics (sha256 by file name).

    `mirror` as for `load_statistic`.
    ValueError for a damaged file, or a table that does not fit `vocabulary` ids.
    """
    arrays = {
        name.removeprefix(_TABLE[signal]).removesuffix(".npy"): load_statistic(
            part, name, sha256=sha, mirror=mirror
        )
        for name, sha in table_hashes(statistics, signal=signal).items()
    }
    try:
        require_tables(arrays, vocabulary=vocabulary)
    except ValueError as error:
        raise ValueError(f"{PartLayout(part).statistics}: {error}") from None
    return Tables.from_arrays(arrays)

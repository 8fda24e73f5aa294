"""Refuses, before a worker starts, a capture that cannot fit on the disk."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from decant.pipelines.calibration.signal_specs import AddedSignal, least_bytes
from decant.schemas.disk.sizes import size_text
from decant.schemas.disk.stand_in import bucket_of
from decant.schemas.manifest.manifest import Unit


def require_space(
    signals: Mapping[str, AddedSignal], *, cache: Path, units: Sequence[Unit], length: int
) -> None:
    """ValueError if the disk of `cache` cannot hold the `signals` of `units`, however compressible.

    A bucket holds anything. Only positions with a target are counted: the others compress to
    nothing. `length` is the number of tokens in a row.
    """
    if bucket_of(cache):
        return
    rows, scored = (sum(getattr(unit, name) for unit in units) for name in ("rows", "scored"))
    least = {
        name: scored * least_bytes(signal, length=length) // length
        for name, signal in signals.items()
    }
    free = free_bytes(cache)
    if sum(least.values()) > free:
        sizes = ", ".join(f"{name} {size_text(size)}" for name, size in least.items())
        raise ValueError(
            f"{cache}: {size_text(free)} free, but {rows:,} rows of {length} tokens take at least "
            f"{size_text(sum(least.values()))} ({sizes}); ask for fewer layers or heads, "
            "for narrower numbers (signals.hidden.dtype, signals.hidden.width), or for less text"
        )


def free_bytes(path: Path) -> int:
    """Free bytes on the disk that `path` is on, or will be on once it is created."""
    path = path.absolute()
    existing = next(parent for parent in (path, *path.parents) if parent.exists())
    return shutil.disk_usage(existing).free

"""`gc`: deletes what a cache's manifest does not name, and overwrites what it forgot.

It holds the cache's change lock, so that nothing is sealed meanwhile. Part directories in which a
capture is under way are left as they are.
"""

import contextlib
import datetime
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from decant.pipelines.upkeep.bucket_garbage import delete_objects, unnamed_objects
from decant.pipelines.upkeep.garbage import own_directories, unnamed
from decant.pipelines.upkeep.journal import settle
from decant.pipelines.upkeep.overwrite import overwrite_forgotten
from decant.schemas.disk import inside
from decant.schemas.disk.locks import changing, uncaptured
from decant.schemas.disk.stand_in import bucket_of
from decant.schemas.manifest.manifest import read_manifest, until_agreed


@dataclass
class Collected:
    """What a `gc` deleted and overwrote; of a dry run, what it would."""

    units: int = 0
    """Units written again without forgotten documents."""
    deleted: Counter[Path] = field(default_factory=Counter)
    """Bytes by directory: the deleted one, or the one in which files were deleted."""
    busy: list[str] = field(default_factory=list)
    """Paths of parts that were left out, because a capture of them is under way."""
    dropped: str | None = None
    """What the user should know of an earlier `gc` that could not be finished."""
    later: str | None = None
    """Of a bucket: why nothing was deleted now."""

    def add(self, path: Path, size: int) -> None:
        """Count a file or directory that is there and goes."""
        # There is one commit file a unit, so their directory is counted, not each file.
        self.deleted[path if path.is_dir() else path.parent] += size


def collect(
    cache: Path,
    *,
    dry_run: bool = False,
    grace_hours: float = 24.0,
    console: Console | None = None,
) -> Collected:
    """Finish an earlier `gc` that was stopped, then do what is left; or only list it (`dry_run`).

    Waits for other commands that change the cache. Progress goes to `console`. `grace_hours` is for
    buckets (`bucket_garbage.py`). ValueError if it is no sealed cache, if a directory in it is a
    link, or if an earlier `gc` can neither be finished nor undone.
    """
    if bucket_of(cache):
        return until_agreed(cache, lambda: _collect_in_bucket(cache, dry_run, grace_hours, console))
    if dry_run:
        result = Collected(overwrite_forgotten(cache, dry_run=True))
        for path, size in unnamed(cache):
            result.add(path, size)
        return result
    read_manifest(cache, during_gc=True)  # so that no other directory gets a lock file
    with changing(cache), contextlib.ExitStack() as claims:
        manifest = read_manifest(cache, during_gc=True)
        result = Collected()
        for path in own_directories(manifest):
            if not claims.enter_context(uncaptured(cache / path)):
                result.busy.append(path)
        result.dropped = settle(cache)
        _delete(cache, result)  # unfinished additions first: their rows may change below
        result.units = overwrite_forgotten(cache, busy=result.busy, console=console)
        _delete(cache, result)
        return result


def _collect_in_bucket(
    cache: Path, dry_run: bool, grace_hours: float, console: Console | None
) -> Collected:
    read_manifest(cache)
    result = Collected(overwrite_forgotten(cache, dry_run=dry_run, console=console))
    manifest = read_manifest(cache)
    unnamed = unnamed_objects(cache, manifest)
    result.busy, now = unnamed.busy, datetime.datetime.now(datetime.UTC)
    grace = datetime.timedelta(hours=grace_hours)
    if unnamed.since and grace and now < unnamed.since + grace and not dry_run:
        when = (unnamed.since + grace).astimezone().strftime("%Y-%m-%d %H:%M")
        result.later = (
            f"{len(unnamed.sizes):,} objects that the manifest does not name were written, or used "
            f"by the manifest before it, within {grace_hours:g} hours: run `gc` again after {when}"
        )
    if result.later or (result.busy and not dry_run):
        return result
    for key, size in unnamed.sizes.items():
        result.add(cache / key, size)
    if not dry_run:
        delete_objects(cache, manifest, list(unnamed.sizes))
    return result


def _delete(cache: Path, result: Collected) -> None:
    for path, size in unnamed(cache, busy=result.busy):
        result.add(path, size)
        inside.remove(cache, path.relative_to(cache))

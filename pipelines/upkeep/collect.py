"""`gc`: deletes what a cache's manifest does not name, and overwrites what it forgot.

It holds the cache's change lock, so that nothing is sealed meanwhile. Part directories in which a
capture is under way are left as they are.
"""

import contextlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from decant.pipelines.upkeep.garbage import own_directories, unnamed
from decant.pipelines.upkeep.journal import settle
from decant.pipelines.upkeep.overwrite import overwrite_forgotten
from decant.schemas.disk import inside
from decant.schemas.disk.locks import changing, uncaptured
from decant.schemas.manifest.manifest import read_manifest


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

    def add(self, path: Path, size: int) -> None:
        """Count a file or directory that is there and goes."""
        # There is one commit file a unit, so their directory is counted, not each file.
        self.deleted[path if path.is_dir() else path.parent] += size


def collect(cache: Path, *, dry_run: bool = False, console: Console | None = None) -> Collected:
    """Finish an earlier `gc` that was stopped, then do what is left; or only list it (`dry_run`).

    Waits for other commands that change the cache. Progress goes to `console`. ValueError if it is
    no sealed cache, if a directory in it is a link, or if an earlier `gc` can neither be finished
    nor undone.
    """
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


def _delete(cache: Path, result: Collected) -> None:
    for path, size in unnamed(cache, busy=result.busy):
        result.add(path, size)
        inside.remove(cache, path.relative_to(cache))

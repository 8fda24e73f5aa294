"""How far tokenising, a calibration or a capture is, from what all workers have done.

For display only; the commits decide what is done.
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console

from decant.pipelines.rows.shard import TokeniseJob, shard_commit
from decant.pipelines.rows.sources import cut_shards
from decant.pipelines.teacher.rows_done import rows_done, rows_of_others
from decant.progress import progress
from decant.schemas.disk.stand_in import names_in


@contextlib.contextmanager
def row_progress(
    what: str,
    *,
    rows: int,
    tokens: int,
    console: Console,
    before: int = 0,
    committed: Callable[[], int] = lambda: 0,
    part: Path | None = None,
) -> Iterator[None]:
    """Show on `console` how far a teacher is with `rows` rows, which have `tokens` tokens in all.

    `what` names the step. An earlier run has done `before` of the rows. `committed()` returns the
    number of rows in committed units, `before` included. Workers in other processes tell their rows
    in files below `part`.
    """

    def counted() -> int:
        return rows_done.rows + (rows_of_others(part) if part else 0)

    start = counted()

    def rows_now() -> int:
        return max(before + counted() - start, committed())

    each = tokens / max(rows, 1)
    shown = progress(
        what,
        total=rows,
        unit="rows",
        console=console,
        before=before,
        count=rows_now,
        tokens_each=each,
    )
    with rows_done.watched(), shown:
        yield


@contextlib.contextmanager
def tokenise_progress(job: TokeniseJob, *, console: Console) -> Iterator[None]:
    """Show on `console` how much of the job's text is in shards that are tokenised."""
    shards = cut_shards(job.sources, shard_bytes=job.shard_bytes)
    sizes = {
        shard_commit(job, shard.number).name: sum(span.end - span.start for span in shard.spans)
        for shard in shards
    }
    folder = shard_commit(job, 0).parent

    total = sum(sizes.values())
    scale, unit = (1e6, "MB") if total >= 1e7 else (1e3, "kB")

    def done() -> float:
        # One listing, because a corpus may have 10,000 shards.
        present = names_in(folder, ".json")
        return sum(size for name, size in sizes.items() if name in present) / scale

    with progress(
        "tokenise", total=total / scale, unit=unit, console=console, before=done(), count=done
    ):
        yield

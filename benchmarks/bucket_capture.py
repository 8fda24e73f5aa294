"""Time of a unit's capture to a bucket on this machine against one to the disk.

    python -m benchmarks.bucket_capture [--model embedded] [--files 8] [--words 4000]
        [--sequence-length 512] [--rounds 9]

A made-up corpus is captured once to both places, with the default signals. Then unit 0 is computed,
encoded, written and committed again, to one and the other in turns. The ratio is the disk's time
divided by the bucket's, so 1 means that the bucket is no slower. The server (SeaweedFS) runs on the
same cores: its processor time is beside it, and `without it` is the ratio if its share of the cores
is taken off. A capture on a cluster has its server elsewhere.
"""

import os
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import tyro
from rich.console import Console
from rich.table import Table

from benchmarks.mirror import processor_seconds, with_interval
from decant.pipelines.capture import unit
from decant.pipelines.capture.job import precompute
from decant.pipelines.config import Corpus, Precompute, Teacher
from decant.schemas.disk.layout import part_layout
from decant.schemas.disk.stand_in import working_folder
from decant.schemas.host import cores
from decant.schemas.manifest.plan import read_plan
from tests.making.bucket_server import BUCKET, bucket_server
from tests.making.caches import write_corpus


@dataclass(frozen=True)
class Options:
    """Settings of the benchmark."""

    model: str = "embedded"
    dtype: str = "bfloat16"
    files: int = 8
    words: int = 4000
    """Of each file."""
    sequence_length: int = 512
    rounds: int = 9


@dataclass(frozen=True)
class Taken:
    """Seconds of one unit."""

    wall: float
    own: float
    """Processor time of this process."""
    server: float
    """Processor time of the server."""


def main() -> None:
    """Measure and print."""
    options = tyro.cli(Options)
    with tempfile.TemporaryDirectory(prefix="bucket-capture-") as folder:
        root = Path(folder)
        (root / "server").mkdir()
        write_corpus(root / "corpus", files=options.files, words=options.words)
        with (
            bucket_server(root / "server") as server,
            mock.patch.dict(os.environ, server.environment(), DECANT_MIRROR=str(root / "mirror")),
        ):
            places = {"disk": str(root / "cache"), "bucket": f"s3://{BUCKET}/cache"}
            Console().print(_measured(options, root, places, server.process))


def _measured(options: Options, root: Path, places: dict[str, str], server: int) -> Table:
    for place in places.values():
        precompute(
            Precompute(
                corpus=Corpus(
                    files=(f"{root}/corpus/*.txt",), sequence_length=options.sequence_length
                ),
                teacher=Teacher(model=options.model, dtype=options.dtype),
                output=Path(place),
            )
        )
    done: dict[str, list[Taken]] = {name: [] for name in places}
    for number in range(options.rounds):
        names = list(places) if number % 2 else list(places)[::-1]
        for name in names:
            done[name].append(_unit(places[name], server))
    planned = read_plan(part_layout(Path(places["disk"]), 0).plan).rows.units[0]
    table = Table(title=f"{planned.rows} rows, {planned.tokens:,} tokens; {options.rounds} rounds")
    for column in ("to", "÷ disk", "without it", "s", "CPU s", "server's CPU s"):
        table.add_column(column, justify="left" if column == "to" else "right")
    for name, taken in done.items():
        alone = [one.wall - one.server / cores() for one in taken]
        disk = [one.wall for one in done["disk"]]
        table.add_row(
            name,
            with_interval([a / b.wall for a, b in zip(disk, taken, strict=True)]),
            with_interval([a / b for a, b in zip(disk, alone, strict=True)]),
            *(
                f"{statistics.median(getattr(one, field) for one in taken):.2f}"
                for field in ("wall", "own", "server")
            ),
        )
    return table


def _unit(place: str, server: int) -> Taken:
    layout = part_layout(working_folder(place), 0)
    unit.worker_for(layout.root, layout.plan)  # the canary rows are not a unit's
    theirs, own, begin = processor_seconds((server,)), time.process_time(), time.perf_counter()
    unit._capture_unit(0, layout.root, layout.plan)
    return Taken(
        time.perf_counter() - begin,
        time.process_time() - own,
        processor_seconds((server,)) - theirs,
    )


if __name__ == "__main__":
    main()

"""Speed of tokenising with one and with more processes.

    python -m benchmarks.tokenising [--megabytes 48] [--processes 1 2] [--turns 1]

The time is that of the whole step: reading, hashing, finding duplicates, tokenising, packing and
writing. One process runs the step in Beam; several run it in a pool without Beam. Each
process has one tokenizer thread (TOKENIZERS_PARALLELISM=false). The text is Python's standard
library, repeated with a number before each file so that no file is a duplicate.
"""

import os

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import argparse
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table

from decant.models import open_checkpoint
from decant.pipelines.config import Corpus
from decant.pipelines.rows.rules import choose_unit_rows
from decant.pipelines.rows.shard import TokeniseJob
from decant.pipelines.rows.sources import find_sources, resolve_defaults
from decant.pipelines.rows.tokenise import tokenise
from decant.pipelines.runners.run_pipeline import run_pipeline
from decant.schemas.disk.atomic import write_bytes


def main() -> None:
    options = _arguments()
    table = Table("processes", "seconds", "MB/s", "÷ one", title=f"{options.megabytes} MB of text")
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        write_text(root / "text", megabytes=options.megabytes)
        tokenizer = open_checkpoint("embedded").tokenizer()
        for name, content in tokenizer.files().items():
            write_bytes(root / "tokenizer" / name, content)
        seconds: dict[int, list[float]] = {count: [] for count in options.processes}
        for turn in range(options.turns):
            for count in options.processes:
                place = root / f"{count}-{turn}"
                seconds[count].append(tokenised(root, place, processes=count))
    first = statistics.median(next(iter(seconds.values())))
    for count, times in seconds.items():
        median = statistics.median(times)
        rate = f"{options.megabytes / median:.2f}"
        table.add_row(str(count), f"{median:.1f}", rate, f"{first / median:.2f}")
    Console().print(table)


def tokenised(root: Path, place: Path, *, processes: int) -> float:
    """Seconds of the step, including the start of its processes."""
    sources = find_sources(
        [str(root / "text" / "*.txt")], max_bytes=None, memory=root / "digests.json"
    )
    job = TokeniseJob(
        part=place,
        tokenizer=root / "tokenizer",
        sources=tuple(sources),
        corpus=resolve_defaults(Corpus(), sources),
        unit_rows=choose_unit_rows(sources, length=Corpus().sequence_length),
        vocabulary=open_checkpoint("embedded").config.vocab_size,
    )
    run = partial(run_pipeline, runner="FnApiRunner", options=())
    started = time.monotonic()
    tokenise(job, rows_id="", run=run, processes=processes)
    return time.monotonic() - started


def write_text(directory: Path, *, megabytes: int) -> None:
    directory.mkdir()
    files = find_sources(["embedded"], max_bytes=None, memory=directory / "none.json")
    texts = [Path(source.path).read_text("utf-8") for source in files]
    written = number = 0
    while written < megabytes * 1_000_000:
        text = f"# {number}\n" + texts[number % len(texts)] * 4
        (directory / f"{number:06d}.txt").write_text(text)
        written, number = written + len(text.encode()), number + 1
    (directory / "none.json").unlink(missing_ok=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=48)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--turns", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    main()

"""`plan`: how many bytes, files and hours a capture will take, from a trial on a sample of it.

A few of the corpus's shards are tokenised and a few of their rows captured (`trial_capture.py`), in
a temporary directory; the results are scaled up. Nothing is written to the output.
"""

import dataclasses
import functools
import math
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jax
import numpy as np
from rich.console import Console

from decant.models import Checkpoint
from decant.pipelines.calibration.companions import fewer_numbers
from decant.pipelines.calibration.sample import sample_tokens
from decant.pipelines.capture.bucket_cost import BucketCost, capture_requests, epoch_requests
from decant.pipelines.capture.disk_space import free_bytes
from decant.pipelines.capture.document_kinds import DocumentKind, documents_by_kind
from decant.pipelines.capture.job import Capture
from decant.pipelines.capture.split_warning import split_warning
from decant.pipelines.capture.step_inputs import (
    added_signals,
    decided_corpus,
    expected_batch_rows,
    tokenise_job,
)
from decant.pipelines.capture.trial_capture import TrialCapture
from decant.pipelines.config import Precompute
from decant.pipelines.rows.remote_files import place_of
from decant.pipelines.rows.shard import TokeniseJob
from decant.pipelines.rows.sources import InputShard, SourceFile, cut_shards
from decant.pipelines.rows.tokenise import tokenise_here
from decant.pipelines.rows.unwritten import notices
from decant.pipelines.teacher.batch_size import bytes_needed, device_bytes
from decant.pipelines.teacher.outputs import OutputSpec
from decant.schemas.disk.layout import (
    COUNTS,
    LOGITS,
    RECORDS,
    ROWS,
    SKETCH,
    PartLayout,
    part_layout,
)
from decant.schemas.disk.sizes import size_text
from decant.schemas.disk.stand_in import by_address, working_folder
from decant.schemas.host import memory_bytes
from decant.schemas.manifest.manifest import Unit
from decant.schemas.manifest.plan import PlannedRows
from decant.schemas.signals import CountsSignal, LogitsSignal, RecordSignal
from decant.store import is_url, url_of
from decant.store.clients import region_of
from decant.store.urls import bucket_url

_TOKENISED_BYTES = 8 << 20
"""Whole shards are tokenised until they hold this many bytes, or the corpus ends."""
_WRITER_SHARDS = 6
"""Memory of an ArrayWriter, in shard files before compression."""


@dataclass(frozen=True)
class SignalCost:
    """Files and bytes of one signal, without its commits."""

    files: int
    bytes: int


@dataclass
class RemoteCost:
    """Files and bytes at an address that the capture reads."""

    files: int = 0
    bytes: int = 0


@dataclass
class Estimate:
    """Size, time and memory of a capture; the JSON document of `plan --json`."""

    sources: int
    """Source files."""
    source_bytes: int
    tokenised_bytes: int
    """Bytes of the sources that were tokenised; rows and tokens are scaled up from them."""
    rows: int
    heldout_rows: int
    tokens: int
    scored: int
    """Positions with a target."""
    units: int
    unit_rows: int
    """Rows of a full unit."""
    documents: dict[str, DocumentKind] = field(default_factory=dict)
    """The documents by kind: `text`, `chat`, `completion` or `rollout`."""
    remote: dict[str, RemoteCost] = field(default_factory=dict)
    """Source files by bucket or dataset; they are read twice, and once more to hash what a server
    lists without its sha256. The teacher's files by its address; every worker reads its share."""
    signals: dict[str, SignalCost] = field(default_factory=dict)
    """By signal name; `rows` is one of them."""
    files: int = 0
    """All files of the cache, with commits, statistics and manifest."""
    bytes: int = 0
    measured_rows: int = 0
    """Rows that the trial captured."""
    tokens_a_second: float = 0.0
    """Speed of the trial on this machine, including encoding and writing."""
    tokenise_hours: float = 0.0
    capture_hours: float = 0.0
    batch_rows: int = 0
    device_bytes: int = 0
    """Memory that a batch takes on each device, as the compiler counts it."""
    device_has: int = 0
    """Memory of each device, bytes."""
    host_bytes: int = 0
    """Largest resident size of this process during the trial, plus the buffers of a full unit."""
    host_has: int = 0
    """Memory of this host, or of the container that this process runs in, bytes."""
    bucket: BucketCost | None = None
    """If the output is in a bucket."""
    disk_free: int = 0
    """Free bytes on the output's disk; 0 if the output is in a bucket."""
    warnings: list[str] = field(default_factory=list)
    """What will be missed later, such as held-out rows, or tools that the chat template leaves
    out."""
    problems: list[str] = field(default_factory=list)
    """Why the capture will not fit; empty if it will."""


def estimate(config: Precompute, *, console: Console) -> Estimate:
    """Tokenise a sample of the corpus, capture a few rows and scale up.

    Wrong settings, and files that differ from those of the output's cache, raise the same errors as
    `precompute`.
    """
    with tempfile.TemporaryDirectory(prefix="decant-plan-") as scratch:
        cache = Path(scratch) / "cache"
        working = dataclasses.replace(config, output=working_folder(config.output))
        with by_address(working.output):
            capture = Capture(working, console)
            capture.check()
        job = _uncaptured_job(capture, cache)
        capture.teacher.write_tokenizer_and_config(cache)
        result, rows = _tokenise_sample(job)
        result.remote = remote_costs(job.sources, capture.teacher.checkpoint)
        part = PartLayout(cache / "measured")
        trial = TrialCapture(capture.config, capture.teacher, rows, rows_at=job.part, part=part)
        if notice := capture.teacher.checkpoint.left_out:
            console.print(f"plan: {notice}", markup=False)
        console.print(
            f"plan: {capture.teacher.checkpoint.title} reads a few rows of about {result.rows:,}"
        )
        trial.run()
        _add_costs(result, trial, rows.units, capture)
        _add_limits(result, config.output)
        if url := url_of(config.output):
            shards = cut_shards(job.sources, shard_bytes=job.shard_bytes)
            _add_bucket(result, url, shards=len(shards))
        if not capture.manifest:
            _add_warning(result, share=job.corpus.heldout or 0.0)
        return result


def _uncaptured_job(capture: Capture, cache: Path) -> TokeniseJob:
    """The job for all files that are not captured yet, as one part of `cache`.

    It takes all files if there are none left.
    """
    left = [part for part in capture.parts if not part.directory.complete] or capture.parts
    for part in left:
        _ = part.rows_id  # refuses chats without a chat template, as `precompute` does
    sources = [source for part in left for source in part.sources if not source.forgotten]
    first = None if left[0] is capture.parts[0] else capture.parts[0].corpus
    corpus = decided_corpus(capture.config.corpus, sources, first=first)
    vocabulary = capture.teacher.vocabulary
    return tokenise_job(
        cache,
        part_layout(cache, 0),
        corpus,
        sources,
        vocabulary=vocabulary,
        batch_rows=expected_batch_rows(capture.config.teacher, length=corpus.sequence_length),
        rules=left[0].rules,
    )


def remote_costs(sources: Sequence[SourceFile], teacher: Checkpoint) -> dict[str, RemoteCost]:
    """What lies at addresses, by bucket or dataset; the teacher by its address."""
    costs: dict[str, RemoteCost] = {}
    for source in sources:
        if is_url(source.path):
            cost = costs.setdefault(place_of(source.path), RemoteCost())
            cost.files += 1
            cost.bytes += source.bytes
    if is_url(teacher.name):
        files = teacher.files
        costs[teacher.name] = RemoteCost(len(files.weight_files), files.weight_bytes)
    return costs


def _tokenise_sample(job: TokeniseJob) -> tuple[Estimate, PlannedRows]:
    """Tokenise some shards of the job; counts scaled up to all of them, and the rows made."""
    began = time.monotonic()
    shards = cut_shards(job.sources, shard_bytes=job.shard_bytes)
    chosen = _sample_shards(shards)
    rows = tokenise_here(job, chosen)
    seconds = time.monotonic() - began
    total, share = sum(map(_shard_bytes, shards)), sum(map(_shard_bytes, chosen))
    scale, units = total / share, rows.units
    result = Estimate(
        sources=len(job.sources),
        source_bytes=total,
        tokenised_bytes=share,
        rows=round(scale * sum(unit.rows for unit in units)),
        heldout_rows=round(scale * sum(u.rows for u in units if u.split == "heldout")),
        tokens=round(scale * sum(unit.tokens for unit in units)),
        scored=round(scale * sum(unit.scored for unit in units)),
        units=round(len(units) * len(shards) / len(chosen)),
        unit_rows=rows.unit_rows,
        tokenise_hours=seconds * scale / 3600,
        documents={**documents_by_kind(job, chosen, scale=scale)},
        warnings=[*notices(PartLayout(job.part).work)],
    )
    return result, rows


def _sample_shards(shards: Sequence[InputShard]) -> list[InputShard]:
    """A fixed pseudo-random choice: a corpus's files are often in an order that matters."""
    chosen, total = [], 0
    for number in np.random.default_rng(0).permutation(len(shards)).tolist():
        if chosen and total >= _TOKENISED_BYTES:
            break
        chosen.append(shards[number])
        total += _shard_bytes(shards[number])
    return sorted(chosen, key=lambda shard: shard.number)


def _shard_bytes(shard: InputShard) -> int:
    return sum(span.end - span.start for span in shard.spans)


def _add_costs(
    result: Estimate, trial: TrialCapture, units: Sequence[Unit], capture: Capture
) -> None:
    """Scale the trial's sizes and speed up to the corpus, of which `units` were tokenised."""
    scale = result.rows / sum(unit.rows for unit in units)
    described = added_signals(capture.config, capture.teacher, unit_rows=result.unit_rows)
    records = [ROWS, *(name for name in RECORDS if name in trial.plan.signals)]
    for name in records:
        size = trial.record_files_bytes(name, [unit.rows for unit in units])
        result.signals[name] = SignalCost(result.units, round(size * scale))
    buffers = 0
    scored = sum(unit.scored for unit in units)
    arrays = {n: s for n, s in described.items() if not isinstance(s, RecordSignal)}
    for name, specs in trial.specs(arrays, unit_rows=result.unit_rows).items():
        files = sum(
            math.ceil(unit.rows / spec.shard_rows) * len(spec.shard_names(0))
            for spec in specs.values()
            for unit in units
        )
        size = trial.array_bytes_a_target(name) * scored * scale
        result.signals[name] = SignalCost(round(files * scale), round(size))
        buffers += sum(
            _WRITER_SHARDS * math.prod(s.shard) * s.numpy_dtype.itemsize for s in specs.values()
        )
    commits = result.units * len(trial.plan.signals)
    others = len(trial.plan.statistics) + 8
    of_sample = fewer_numbers(described, _sampled_positions(result))
    for notice in (capture.rank_line, capture.head_size(), of_sample):
        if notice:
            result.warnings.append(notice)
    statistics = sum(file.stat().st_size for file in trial.part.statistics.iterdir())
    result.files = sum(cost.files for cost in result.signals.values()) + commits + others
    stored = sum(cost.bytes for cost in result.signals.values())
    result.bytes = stored + 1024 * commits + statistics
    result.measured_rows = trial.rows
    result.tokens_a_second = trial.tokens / trial.seconds
    result.capture_hours = result.tokens / result.tokens_a_second / 3600
    of_records = sum(result.signals[name].bytes for name in records)
    unit_bytes = buffers + of_records * result.unit_rows // result.rows
    _add_memory(result, trial, unit_bytes=unit_bytes)


def _add_bucket(result: Estimate, url: str, *, shards: int) -> None:
    """Add what the cache takes at an address."""
    costs = result.signals
    files, train = sum(cost.files for cost in costs.values()), result.rows - result.heldout_rows
    arrays = [cost for name, cost in costs.items() if name not in (ROWS, *RECORDS)]
    # A run reads counts or a sketch, not both.
    read = [name for name in (ROWS, LOGITS, SKETCH, COUNTS) if name in costs][:3]
    size = sum(cost.bytes for cost in (*arrays, *(costs[name] for name in read)))
    epoch = functools.partial(
        epoch_requests,
        rows=train,
        units=result.units,
        rows_bytes=round(costs[ROWS].bytes * train / result.rows),
        records=len(read) - 1,
        array_files=sum(cost.files for cost in arrays),
        bytes=round(size * train / result.rows),
    )
    result.bucket = BucketCost(
        address=url,
        region=region_of(bucket_url(url)),
        objects=result.files + shards,
        capture=capture_requests(
            units=result.units,
            shards=shards,
            files=files,
            signals=len(costs) - 1,
            bytes=result.bytes,
        ),
        epoch=epoch(in_blocks=False),
        epoch_in_blocks=epoch(in_blocks=True),
    )


def _sampled_positions(result: Estimate) -> int:
    """Positions with a target in the calibration sample of the whole corpus, about."""
    train = result.tokens * (1 - result.heldout_rows / result.rows) or result.tokens
    return round(min(sample_tokens(result.tokens), train) * result.scored / result.tokens)


def _add_memory(result: Estimate, trial: TrialCapture, *, unit_bytes: int) -> None:
    """`unit_bytes` is the memory of a full unit's records and array buffers."""
    teacher, logits = trial.plan.teacher, trial.plan.signals[LOGITS]
    assert isinstance(logits, LogitsSignal)
    # Read before `bytes_needed` compiles: the memory of compiling is not that of capturing.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    resident = peak if sys.platform == "darwin" else peak * 1024  # bytes there, KiB elsewhere
    result.batch_rows = teacher.batch_rows
    counts = trial.plan.signals.get(COUNTS)
    draws = counts.draws if isinstance(counts, CountsSignal) else 0
    spec = OutputSpec(logits.target_spec, trial.plan.arrays, counts=draws)
    result.device_bytes = bytes_needed(teacher, spec)
    on_host = result.device_bytes if jax.default_backend() == "cpu" else 0
    result.host_bytes = max(resident, on_host) + unit_bytes


def _add_warning(result: Estimate, *, share: float) -> None:
    train = result.rows - result.heldout_rows
    if warning := split_warning(train, result.heldout_rows, share=share):
        result.warnings.append(warning)


def _add_limits(result: Estimate, output: Path) -> None:
    """Add the memory and disk that there is, and a problem for each that is too small."""
    in_bucket = is_url(output)
    result.disk_free = 0 if in_bucket else free_bytes(output)
    result.device_has = device_bytes()
    result.host_has = memory_bytes()
    for what, needed, has in (
        (f"free on the disk of {output}", 0 if in_bucket else result.bytes, result.disk_free),
        ("each device's memory", result.device_bytes, result.device_has),
        ("the memory of this host or container", result.host_bytes, result.host_has),
    ):
        if needed > has:
            sizes = f"{size_text(has)}, the capture takes about {size_text(needed)}"
            result.problems.append(f"{what}: {sizes}")

"""Time of a capture divided by that of the bare teacher: the cost of targets, codec and files.

    python -m benchmarks.capture [--model embedded] [--dtypes float32 bfloat16]
    python -m benchmarks.capture --k 32 --draws 16 --counts 0 --rank 0

By default it stores what `decant precompute` stores.

The bare teacher is the same model on the same batches through the same chunked head, reduced by a
max. Both are timed alternately in one run, so that a busy machine slows both: rely on the ratio.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx
from jax import lax
from rich.console import Console
from rich.table import Table

from decant.models import open_checkpoint
from decant.models.numerics import logits as head
from decant.pipelines.config import COUNTS, DRAWS, RANK, STEP, K
from decant.pipelines.rows.packing import Packer
from decant.pipelines.rows.sources import find_sources
from decant.pipelines.teacher.batch_size import default_batch_rows
from decant.pipelines.teacher.loaded import LoadedTeacher
from decant.pipelines.teacher.outputs import OutputSpec, Projection, RowOutput
from decant.pipelines.teacher.targets import CHUNK_TOKENS
from decant.schemas import codecs
from decant.schemas.codecs import Profile, counts_field
from decant.schemas.disk.array_record import write_records
from decant.schemas.manifest.plan import PlannedTeacher, TeacherMesh
from decant.schemas.records.companion import encode_counts, encode_sketch
from decant.schemas.records.logits import decode_logits, encode_logits, open_logits
from decant.schemas.records.rows import Row, Segment
from decant.schemas.signals import SketchSignal, TargetSpec


@dataclass(frozen=True)
class Options:
    """Settings of the benchmark."""

    model: str = "embedded"
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    profile: Profile = "compact"
    sequence_length: int = 512
    k: int = K
    draws: int = DRAWS
    counts: int = COUNTS
    """N, draws of the counts; 0: none."""
    rank: int = RANK
    """Numbers of the sketch; 0: none. Their directions are random: the work is the same."""
    step: float = STEP
    """Of the sketch, with dither."""
    batches: int = 3
    """Batches in a turn; a capture encodes one batch while the next is computed."""
    turns: int = 5


def main(options: Options) -> None:
    table = Table("dtype", "bare tok/s", "capture tok/s", "capture ÷ bare", title=_title(options))
    for dtype in options.dtypes:
        bare, captured = measure(options, dtype)
        # The ratio is taken within a turn, so that a busy machine slows both.
        ratio = statistics.median(b / c for b, c in zip(bare, captured, strict=True))
        tokens = (
            default_batch_rows(options.sequence_length, mesh=TeacherMesh())
            * options.sequence_length
        )
        rates = [tokens * options.batches / statistics.median(t) for t in (bare, captured)]
        table.add_row(dtype, f"{rates[0]:,.0f}", f"{rates[1]:,.0f}", f"{ratio:.3f}")
    Console().print(table)


def measure(options: Options, dtype: str) -> tuple[list[float], list[float]]:
    """Seconds of each turn, of the bare teacher and of the capture."""
    checkpoint = open_checkpoint(options.model)
    vocabulary = checkpoint.tokenizer().size
    batch = default_batch_rows(options.sequence_length, mesh=TeacherMesh())
    rows = real_rows(options.model, length=options.sequence_length, count=batch * options.batches)
    bare = BareTeacher(options.model, dtype, batch_rows=batch)
    planned = PlannedTeacher(options.model, "", dtype, vocabulary, options.sequence_length, batch)
    asked = _asked(options, width=checkpoint.config.hidden_size)
    teacher = LoadedTeacher(planned)
    with teacher.run(rows, asked) as outputs:
        encoder = Encoder(options, list(outputs), vocabulary=vocabulary)

    def capture() -> None:
        with teacher.run(rows, asked) as outputs:
            pairs = zip(rows, outputs, strict=True)
            encoded = [encoder.records(row, output) for row, output in pairs]
        with tempfile.TemporaryDirectory() as scratch:
            for number, records in enumerate(zip(*encoded, strict=True)):
                write_records(Path(scratch) / f"signal-{number}", list(records))

    bare.run(rows)
    capture()
    times = [(_timed(lambda: bare.run(rows)), _timed(capture)) for _ in range(options.turns)]
    return [b for b, _ in times], [c for _, c in times]


def _asked(options: Options, *, width: int) -> OutputSpec:
    directions = np.random.default_rng(0).normal(size=(width, options.rank)).astype(np.float32)
    betas = (1.0,) if options.draws else ()
    return OutputSpec(
        TargetSpec(options.k, options.draws, betas, labels=True),
        counts=options.counts,
        sketch=Projection(np.zeros(width, np.float32), directions) if options.rank else None,
    )


class Encoder:
    """Makes the records of one row, as `pipelines/capture/unit.py` does."""

    def __init__(self, options: Options, sample: list[RowOutput], *, vocabulary: int):
        self._vocabulary, self._profile = vocabulary, options.profile
        targets = [output.targets for output in sample if output.targets is not None]
        self._spec = TargetSpec(options.k, options.draws, labels=True)
        self._tables = codecs.fit(options.profile, targets[0], vocabulary=vocabulary)
        counts = [output.counts for output in sample if output.counts is not None]
        sketches = [output.sketch for output in sample if output.sketch is not None]
        self._of_counts = None
        if counts:
            self._of_counts = counts_field.fit(counts[0], head=targets[0], vocabulary=vocabulary)
        self._deviations = np.sort(sketches[0].std(0).astype(np.float64))[::-1] if sketches else ()
        self._signal = SketchSignal(
            "", "", options.rank, options.rank, step=options.step, dither=options.step > 0
        )

    def records(self, row: Row, output: RowOutput) -> list[bytes]:
        """The record of each signal."""
        assert output.targets is not None
        shared = {"tables": self._tables, "vocabulary": self._vocabulary}
        record = encode_logits(
            output.targets,
            row_key=row.key,
            scored=row.loss_mask,
            profile=self._profile,
            **shared,
        )
        records, length = [record], len(row.tokens)
        if output.counts is not None and self._of_counts:
            opened = open_logits(record, where="", length=length, spec=self._spec)
            head = decode_logits([opened], **shared)
            shared["tables"] = self._of_counts
            records.append(encode_counts(output.counts, row_key=row.key, head=head, **shared))
        if output.sketch is not None:
            records.append(
                encode_sketch(
                    output.sketch,
                    row_key=row.key,
                    signal=self._signal,
                    deviations=np.asarray(self._deviations),
                    tables=codecs.Tables({}),
                )
            )
        return records


class BareTeacher:
    """The model and its chunked head, reduced by a max."""

    def __init__(self, model: str, dtype: str, *, batch_rows: int):
        loaded = open_checkpoint(model).load(dtype=dtype)
        softcap = loaded.config.final_softcap
        graph, self.weights = nnx.split(loaded)
        self.unembedding = jax.jit(lambda w: nnx.merge(graph, w).unembedding())(self.weights)
        self.batch_rows = batch_rows

        def forward(weights, unembedding, tokens, segment_ids, positions):
            hidden, _ = nnx.merge(graph, weights)(tokens, segment_ids, positions)
            chunks = hidden.reshape(-1, CHUNK_TOKENS, hidden.shape[-1])
            logits = partial(head, unembedding=unembedding, softcap=softcap)
            return lax.map(lambda chunk: jnp.max(logits(chunk), axis=-1), chunks)

        self.forward = jax.jit(forward)

    def run(self, rows: list[Row]) -> None:
        """Run all rows; each batch is dispatched without waiting for the one before."""
        results = []
        for start in range(0, len(rows), self.batch_rows):
            batch = rows[start : start + self.batch_rows]
            arrays = (
                np.stack([getattr(row, name) for row in batch])
                for name in ("tokens", "segment_ids", "positions")
            )
            results.append(self.forward(self.weights, self.unembedding, *arrays))
        jax.block_until_ready(results)


def real_rows(model: str, *, length: int, count: int) -> list[Row]:
    """`count` packed rows of `length` tokens from the source text of Python's standard library."""
    tokenizer = open_checkpoint(model).tokenizer()
    packer = Packer(length, open_rows=64)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        sources = find_sources(["embedded"], max_bytes=None, memory=Path(scratch) / "digests")
    for number, source in enumerate(sources):
        (ids,) = tokenizer.encode_batch([Path(source.path).read_text(encoding="utf-8")])
        rows += packer.add(Segment(ids, np.ones(len(ids), bool), number, 0, 0))
        if len(rows) >= count:
            break
    return rows[:count]


def _timed(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _title(options: Options) -> str:
    device = jax.local_devices()[0]
    return (
        f"{options.model} on {jax.local_device_count()} × {device.device_kind}, "
        f"S = {options.sequence_length}, k = {options.k}, m = {options.draws}, "
        f"N = {options.counts}, r = {options.rank}, {options.profile}"
    )


if __name__ == "__main__":
    main(tyro.cli(Options))

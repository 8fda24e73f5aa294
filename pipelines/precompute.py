"""The whole job: sources → rows → plan → captured units → sealed cache. Rerun to go on."""

import dataclasses
import json
from functools import partial
from pathlib import Path

import apache_beam as beam
from rich.console import Console

from models import Checkpoint, hub, open_checkpoint
from models.accelerator import unused_accelerator
from models.chat_template import ChatTemplate
from models.tokenizer import Tokenizer
from pipelines.add import add_signals, not_held, require_space
from pipelines.array_signals import describe
from pipelines.beam_runner import Build, run_pipeline
from pipelines.calibrate import CalibrateJob, calibrate
from pipelines.capture_plan import capture_plan, totals
from pipelines.config import Precompute
from pipelines.documents import recognised
from pipelines.host import with_teacher
from pipelines.identity import digest_memory, identity_of
from pipelines.seal import clean, seal
from pipelines.sources import SourceFile, find_sources, settled
from pipelines.tokenise import (
    TokeniseJob,
    choose_unit_rows,
    row_rules,
    tokenise,
    tokenise_workers,
)
from schemas.files import require_file, write_bytes
from schemas.identity import rows_id
from schemas.layout import MANIFEST, TOKENIZER, PartLayout, part_layout
from schemas.manifest import Manifest, Source, read_manifest
from schemas.plan import Plan, PlannedRows, claim, read_plan, with_teacher_at
from schemas.signals import ArraySignal


def precompute(config: Precompute, *, console: Console | None = None) -> Manifest:
    """Capture what `config` asks for and seal it; obey the plan of an earlier run if there is one.

    Errors of input are ValueError or FileNotFoundError before a worker starts, WorkerError after.
    """
    return Capture(config, console or Console(soft_wrap=True, highlight=False)).run()


class Capture:
    """One run of the job: what was asked for, looked up once, and the steps in order."""

    def __init__(self, config: Precompute, console: Console):
        self.config = config
        self.console = console
        self.cache = config.output
        self.layout: PartLayout = part_layout(self.cache, 0)
        self.checkpoint = open_checkpoint(_pinned(config.teacher.model, self.layout.plan))
        self.tokenizer = self.checkpoint.tokenizer()
        self.vocabulary = min(self.tokenizer.size, self.checkpoint.config.vocab_size)
        check_fits(config, self.checkpoint, vocabulary=self.vocabulary)
        memory = digest_memory()
        found = find_sources(config.corpus.files, max_bytes=config.corpus.max_bytes, memory=memory)
        self.sources = recognised(found, text_field=config.corpus.text_field)
        self.template = chat_template(config, self.tokenizer, self.sources)
        self.corpus = settled(config.corpus, self.sources)
        self.rows_id = self._rows_id()
        self.teacher_id = self._teacher_id(memory)

    @property
    def model(self) -> str:
        """What opens the teacher, wherever a worker runs."""
        name, path = self.checkpoint.name, self.checkpoint.path
        return str(path.absolute()) if Path(name) == path else name

    def run(self) -> Manifest:
        """The steps, each of which does only what no earlier run has done."""
        sealed = (self.cache / MANIFEST).exists()
        request = self._request() | ({} if sealed else self._request_arrays())
        sources = [Source(source.name, source.sha256) for source in self.sources]
        claim(self.layout.root / "request.json", request, sources=sources, cache=self.cache)
        if notice := unused_accelerator():
            self.console.print(notice)
        if sealed:
            return self._add_to(read_manifest(self.cache))
        self.write_reading_aids()
        plan = self._plan()
        capture_plan(
            plan, self.layout.plan, part=self.layout.root, run=self._run_beam, console=self.console
        )
        return seal(self.cache, plan)

    def _add_to(self, manifest: Manifest) -> Manifest:
        asked = self.arrays(unit_rows=manifest.parts[0].unit_rows)
        new = not_held(asked, manifest, cache=self.cache)
        if new:
            return add_signals(
                new,
                cache=self.cache,
                manifest=manifest,
                model=self.model,
                on_error=self.config.corpus.on_error,
                run=self._run_beam,
                console=self.console,
            )
        clean(self.layout, sealed=manifest)
        self.console.print(f"{self.cache}: sealed already, nothing to do")
        return manifest

    def _plan(self) -> Plan:
        """The frozen plan; makes it, and the rows it plans, if an earlier run has not."""
        if self.layout.plan.exists():
            plan = with_teacher_at(self.model, self.layout.plan)
            if self._has_rows(plan.rows):
                return plan
        rows = self._tokenise()
        if not self.layout.plan.exists():
            arrays = self.arrays(unit_rows=rows.unit_rows)
            length = self.config.corpus.sequence_length
            require_space(arrays, cache=self.cache, units=rows.units, length=length)
            self._calibrate(rows)
        return read_plan(self.layout.plan)

    def _has_rows(self, rows: PlannedRows) -> bool:
        try:
            for number, unit in enumerate(rows.units):
                require_file(self.layout.records("rows", number), unit.files["rows"])
        except ValueError:
            return False
        return True

    def arrays(self, *, unit_rows: int) -> dict[str, ArraySignal]:
        """The array signals asked for, by name; their signal_id is not known yet."""
        return describe(
            self.config.signals,
            self.checkpoint.config,
            teacher_id=self.teacher_id,
            length=self.config.corpus.sequence_length,
            unit_rows=unit_rows,
        )

    def tokenise_job(self) -> TokeniseJob:
        """What tokenising is told."""
        # Absolute, here and below: workers may have another working directory.
        return TokeniseJob(
            part=self.layout.root.absolute(),
            tokenizer=(self.cache / TOKENIZER).absolute(),
            sources=tuple(self.sources),
            corpus=self.corpus,
            unit_rows=choose_unit_rows(self.sources, length=self.config.corpus.sequence_length),
        )

    def _tokenise(self) -> PlannedRows:
        workers = tokenise_workers(self.config.tokenise_workers, self.sources)
        run = partial(self._run_beam, processes=workers)
        rows = tokenise(self.tokenise_job(), rows_id=self.rows_id, run=run)
        count, tokens = totals(rows.units)
        heldout = sum(unit.rows for unit in rows.units if unit.split == "heldout")
        self.console.print(
            f"rows: {count:,} of {self.config.corpus.sequence_length} tokens ({tokens:,} in all, "
            f"{heldout} rows held out) in {len(rows.units)} units, from {len(self.sources)} files"
            f"{_left_out(rows)}"
        )
        return rows

    def _calibrate(self, rows: PlannedRows) -> None:
        self.console.print(f"calibrate: running {self.checkpoint.name} on a sample")
        job = self.calibrate_job(rows)
        self._run_beam(
            lambda pipeline: (
                pipeline | beam.Create([job]) | "Calibrate" >> beam.Map(with_teacher, calibrate)
            )
        )

    def calibrate_job(self, rows: PlannedRows) -> CalibrateJob:
        """What calibration is told of these rows."""
        return CalibrateJob(
            part=self.layout.root.absolute(),
            tokenizer=self.tokenizer.digest,
            rows=rows,
            teacher=dataclasses.replace(self.config.teacher, model=self.model),
            model=self.checkpoint.config,
            signals=self.config.signals,
            teacher_id=self.teacher_id,
            vocabulary_size=self.vocabulary,
            sequence_length=self.config.corpus.sequence_length,
            on_error=self.config.corpus.on_error,
        )

    def _run_beam(self, build: Build, *, processes: int = 1) -> None:
        runner, options = self.config.runner, self.config.runner_options
        run_pipeline(build, runner=runner, options=options, processes=processes)

    def write_reading_aids(self) -> None:
        """Tokenizer and teacher config: the cache is readable on a machine without the teacher."""
        config = json.dumps(self.checkpoint.config.to_hf(), indent=2, sort_keys=True)
        for name, content in {**self.tokenizer.files(), "config.json": config.encode()}.items():
            write_bytes(self.cache / TOKENIZER / name, content)

    def _rows_id(self) -> str:
        return rows_id(
            tokenizer=self.tokenizer.digest,
            rules=row_rules(self.corpus, self.sources, template=self.template),
            sources=[(source.name, source.sha256) for source in self.sources],
        )

    def _teacher_id(self, memory: Path) -> str:
        return identity_of(
            self.checkpoint,
            dtype=self.config.teacher.dtype,
            quantize=self.config.teacher.quantize,
            vocabulary=self.vocabulary,
            memory=memory,
        )

    def _request(self) -> dict:
        """What decides the cache's content, in words that an error can show."""
        return {
            "corpus": f"{len(self.sources)} files, {_bytes(self.sources):,} bytes, rows of "
            f"{self.config.corpus.sequence_length} (rows_id {self.rows_id[:12]})",
            "teacher": f"{self.checkpoint.title}, {self.config.teacher.dtype} "
            f"(teacher_id {self.teacher_id[:12]})",
            "logits": self.config.signals.logits.settings(),
        }

    def _request_arrays(self) -> dict:
        """Signals beside the logits: only a capture that is not sealed is bound to them."""
        signals = self.config.signals
        return {
            name: dataclasses.asdict(asked) if asked.layers else None
            for name, asked in (("hidden", signals.hidden), ("attention", signals.attention))
        }


def check_fits(config: Precompute, checkpoint: Checkpoint, *, vocabulary: int) -> None:
    """ValueError for settings that this teacher cannot serve."""
    length, wanted = config.corpus.sequence_length, config.signals.logits.wanted()
    if not 2 <= length <= checkpoint.config.max_positions:
        raise ValueError(
            f"corpus.sequence_length is {length}, but {checkpoint.title} was trained for 2 to "
            f"{checkpoint.config.max_positions} positions; choose a length in between"
        )
    if not 1 <= wanted.k <= vocabulary - (wanted.draws > 0):
        if wanted.draws:
            raise ValueError(
                f"signals.logits asks for {wanted.k} ids and draws from the rest, but "
                f"{checkpoint.title} has {vocabulary} tokens; without draws k may be all of "
                "them, with draws it must leave a tail"
            )
        raise ValueError(
            f"signals.logits.k is {wanted.k}, but {checkpoint.title} has {vocabulary} tokens; "
            f"choose 1 to {vocabulary}"
        )
    describe(config.signals, checkpoint.config, teacher_id="", length=length, unit_rows=1)
    if not 0 <= (config.corpus.heldout or 0.0) < 1:
        raise ValueError(f"corpus.heldout is {config.corpus.heldout}; expected a share in [0, 1)")


def chat_template(
    config: Precompute, tokenizer: Tokenizer, sources: list[SourceFile]
) -> ChatTemplate | None:
    """The teacher's template if there are chats to render. ValueError if it has none."""
    chats = [source.path for source in sources if source.kind == "chat"]
    template = tokenizer.chat_template(date=config.corpus.chat_date) if chats else None
    if chats and not template:
        raise ValueError(
            f"{chats[0]} holds chats, but {config.teacher.model} has no chat template. Use a "
            "teacher that was trained to chat, put its chat_template.jinja beside its "
            "tokenizer.json, or give the documents as prompt and completion"
        )
    return template


def _pinned(model: str, plan: Path) -> str:
    """The hub id with the commit that an earlier run's plan has, if that is of the same one."""
    planned = read_plan(plan).teacher.model if plan.exists() else ""
    return planned if hub.unpinned(planned) == model and not Path(model).exists() else model


def _bytes(sources: list[SourceFile]) -> int:
    return sum(source.bytes for source in sources)


def _left_out(rows: PlannedRows) -> str:
    duplicates = f"; {rows.duplicates} duplicate documents left out" if rows.duplicates else ""
    skipped = f"; {len(rows.skipped)} unreadable documents skipped" if rows.skipped else ""
    return duplicates + skipped

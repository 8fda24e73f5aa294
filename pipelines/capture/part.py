"""One directory of a cache, from its files to its sealed part; a rerun does what is missing."""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import cached_property

import apache_beam as beam
from rich.console import Console

from decant.models.text.chat_template import ChatTemplate
from decant.models.text.tokenizer import Tokenizer
from decant.pipelines.calibration.calibrate import CalibrateJob, Known, calibrate
from decant.pipelines.calibration.signal_specs import describe
from decant.pipelines.capture.addition import require_space
from decant.pipelines.capture.lease import with_teacher
from decant.pipelines.capture.portions import Portion
from decant.pipelines.capture.schedule import capture_plan, totals
from decant.pipelines.capture.seal import seal
from decant.pipelines.config import Corpus, Precompute
from decant.pipelines.rows.rules import choose_unit_rows, row_rules
from decant.pipelines.rows.shard import TokeniseJob
from decant.pipelines.rows.sources import SourceFile, resolve_defaults
from decant.pipelines.rows.tokenise import local_processes, tokenise
from decant.pipelines.runners.run_pipeline import Build, run_pipeline
from decant.pipelines.teacher.opened import OpenedTeacher
from decant.schemas.disk.array_record import require_file
from decant.schemas.disk.identity import rows_id
from decant.schemas.disk.layout import ROWS, TOKENIZER, PartLayout
from decant.schemas.manifest.manifest import Manifest, Source
from decant.schemas.manifest.plan import Plan, PlannedRows, read_plan, set_teacher_model
from decant.schemas.manifest.request import claim
from decant.schemas.signals import ArraySignal


class PartCapture:
    """The steps, each of which does only what no earlier run has done."""

    def __init__(
        self,
        config: Precompute,
        portion: Portion,
        *,
        teacher: OpenedTeacher,
        before: Sequence["PartCapture"] = (),
        console: Console,
    ):
        """`before` are the directories before it."""
        self.config = config
        self.portion = portion
        self.teacher = teacher
        self.before = tuple(before)
        self.console = console
        self.cache = config.output

    @property
    def layout(self) -> PartLayout:
        """Where it lies."""
        return self.portion.layout

    @property
    def sources(self) -> tuple[SourceFile, ...]:
        """Its files."""
        return self.portion.sources

    @cached_property
    def corpus(self) -> Corpus:
        """The settings with everything decided. A document is held out in whichever part it
        comes: the share is that of the first."""
        corpus = resolve_defaults(self.config.corpus, self.sources)
        if self.before:
            corpus = dataclasses.replace(corpus, heldout=self.before[0].corpus.heldout)
        return corpus

    @cached_property
    def rows_id(self) -> str:
        """Identity of the rows that all of its files give."""
        template = chat_template(self.config, self.teacher.tokenizer, self.sources)
        rules = row_rules(self.corpus, self.sources, template=template)
        if self.before:
            # What these hold is left out here.
            rules["after"] = [earlier.rows_id for earlier in self.before]
        return rows_id(
            tokenizer=self.teacher.tokenizer.digest,
            rules=rules,
            sources=[(source.name, source.sha256) for source in self.sources],
        )

    def claim(self, *, sealed: bool) -> None:
        """Bind the directory to what is asked for. ValueError if it is bound to something else.

        `sealed` of it may be a part: more signals may then be asked for.
        """
        request = self._request() | ({} if sealed else self._request_arrays())
        sources = [Source(source.name, source.sha256) for source in self.sources]
        claim(self.layout.request, request, sources=sources, cache=self.cache)

    def run(self, known: Mapping[str, Known]) -> Manifest:
        """Capture what is missing and seal it. `known` as CalibrateJob has them."""
        plan = self._plan(known)
        capture_plan(
            plan, self.layout.plan, part=self.layout.root, run=self.run_beam, console=self.console
        )
        return seal(self.cache, self.layout, plan)

    def _plan(self, known: Mapping[str, Known]) -> Plan:
        """The frozen plan; makes it, and the rows it plans, if an earlier run has not."""
        if self.layout.plan.exists():
            plan = set_teacher_model(self.teacher.model, self.layout.plan)
            if self._has_rows(plan.rows):
                return plan
        rows = self._tokenise()
        if not self.layout.plan.exists():
            arrays = self.arrays(unit_rows=rows.unit_rows)
            length = self.config.corpus.sequence_length
            require_space(arrays, cache=self.cache, units=rows.units, length=length)
            self._calibrate(rows, known)
        return read_plan(self.layout.plan)

    def _has_rows(self, rows: PlannedRows) -> bool:
        try:
            for number, unit in enumerate(rows.units):
                require_file(self.layout.records(ROWS, number), unit.files[ROWS])
        except ValueError:
            return False
        return True

    def arrays(self, *, unit_rows: int) -> dict[str, ArraySignal]:
        """The array signals asked for, by name; their signal_id is not known yet."""
        return describe(
            self.config.signals,
            self.teacher.checkpoint.config,
            teacher_id=self.teacher.teacher_id,
            length=self.config.corpus.sequence_length,
            unit_rows=unit_rows,
        )

    def tokenise_job(self) -> TokeniseJob:
        """What tokenising is told."""
        # Absolute, here and below: workers may have another working directory.
        return TokeniseJob(
            part=self.layout.root.absolute(),
            tokenizer=(self.cache / TOKENIZER).absolute(),
            sources=self.sources,
            corpus=self.corpus,
            unit_rows=choose_unit_rows(self.sources, length=self.config.corpus.sequence_length),
            older=self.portion.older,
        )

    def _tokenise(self) -> PlannedRows:
        config = self.config
        rows = tokenise(
            self.tokenise_job(),
            rows_id=self.rows_id,
            run=self.run_beam,
            processes=local_processes(config.tokenise_workers, self.sources, runner=config.runner),
        )
        count, tokens = totals(rows.units)
        heldout = sum(unit.rows for unit in rows.units if unit.split == "heldout")
        more = "more " if self.before else ""
        self.console.print(
            f"rows: {count:,} {more}of {self.config.corpus.sequence_length} tokens ({tokens:,} in "
            f"all, {heldout} rows held out) in {len(rows.units)} units, from {len(self.sources)} "
            f"files{_left_out(rows)}"
        )
        return rows

    def _calibrate(self, rows: PlannedRows, known: Mapping[str, Known]) -> None:
        self.console.print(f"calibrate: running {self.teacher.checkpoint.name} on a sample")
        job = dataclasses.replace(self.calibrate_job(rows), known=known)
        self.run_beam(
            lambda pipeline: (
                pipeline | beam.Create([job]) | "Calibrate" >> beam.Map(with_teacher, calibrate)
            )
        )

    def calibrate_job(self, rows: PlannedRows) -> CalibrateJob:
        """What calibration is told of these rows."""
        return CalibrateJob(
            part=self.layout.root.absolute(),
            tokenizer=self.teacher.tokenizer.digest,
            rows=rows,
            teacher=dataclasses.replace(self.config.teacher, model=self.teacher.model),
            model=self.teacher.checkpoint.config,
            signals=self.config.signals,
            teacher_id=self.teacher.teacher_id,
            vocabulary_size=self.teacher.vocabulary,
            sequence_length=self.config.corpus.sequence_length,
            on_error=self.config.corpus.on_error,
        )

    def run_beam(self, build: Build) -> None:
        """Run a pipeline as the settings say."""
        runner, options = self.config.runner, self.config.runner_options
        run_pipeline(build, runner=runner, options=options)

    def _request(self) -> dict:
        """What decides the part's content, in words that an error can show."""
        return {
            "corpus": f"{len(self.sources)} files, {_bytes(self.sources):,} bytes, rows of "
            f"{self.config.corpus.sequence_length} (rows_id {self.rows_id[:12]})",
            "teacher": f"{self.teacher.checkpoint.title}, {self.config.teacher.dtype} "
            f"(teacher_id {self.teacher.teacher_id[:12]})",
            "logits": self.config.signals.logits.settings(),
        }

    def _request_arrays(self) -> dict:
        """Signals beside the logits: only a capture that is not sealed is bound to them."""
        signals = self.config.signals
        return {
            name: dataclasses.asdict(asked) if asked.layers else None
            for name, asked in (("hidden", signals.hidden), ("attention", signals.attention))
        }


def chat_template(
    config: Precompute, tokenizer: Tokenizer, sources: Sequence[SourceFile]
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


def _bytes(sources: Sequence[SourceFile]) -> int:
    return sum(source.bytes for source in sources)


def _left_out(rows: PlannedRows) -> str:
    duplicates = f"; {rows.duplicates} duplicate documents left out" if rows.duplicates else ""
    skipped = f"; {len(rows.skipped)} unreadable documents skipped" if rows.skipped else ""
    return duplicates + skipped

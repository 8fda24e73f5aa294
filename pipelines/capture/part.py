"""One part directory: claimed, tokenised, calibrated, captured, sealed.

Each step does only what no earlier run has done, so a rerun goes on where the last one stopped.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import apache_beam as beam
from rich.console import Console

from decant.models.text.chat_template import ChatTemplate
from decant.models.text.tokenizer import Tokenizer
from decant.pipelines.calibration.calibrate import calibrate
from decant.pipelines.calibration.known import Known, own_basis
from decant.pipelines.calibration.sample import sample_places
from decant.pipelines.calibration.signal_specs import AddedSignal
from decant.pipelines.capture.disk_space import require_space
from decant.pipelines.capture.part_directories import PartDirectory, is_complete, sealed_manifest
from decant.pipelines.capture.progress import row_progress, tokenise_progress
from decant.pipelines.capture.remaining_units import capture_remaining, totals
from decant.pipelines.capture.remote_corpus import remote_digests
from decant.pipelines.capture.seal import seal
from decant.pipelines.capture.split_warning import split_warning
from decant.pipelines.capture.step_inputs import (
    added_signals,
    calibrate_job,
    chat_template,
    decided_corpus,
    expected_batch_rows,
    identify_rows,
    tokenise_job,
)
from decant.pipelines.capture.teacher_lease import with_teacher
from decant.pipelines.config import Corpus, Precompute
from decant.pipelines.rows.heldout_pieces import needs_pieces
from decant.pipelines.rows.marking import VERSION as MARKING
from decant.pipelines.rows.rules import (
    RowRules,
    row_rules,
    rules_of_releases,
    settings_of_rows,
)
from decant.pipelines.rows.sources import SourceFile
from decant.pipelines.rows.tokenise import local_processes, tokenise
from decant.pipelines.rows.unwritten import notices
from decant.pipelines.runners.run_pipeline import Build, run_pipeline
from decant.pipelines.teacher.opened import OpenedTeacher
from decant.schemas.disk.array_record import require_file
from decant.schemas.disk.atomic import read_json
from decant.schemas.disk.layout import COUNTS, ROWS, SKETCH, PartLayout
from decant.schemas.disk.locks import capturing, changing
from decant.schemas.disk.stand_in import each_of, exists
from decant.schemas.manifest.manifest import Manifest, Part, Skipped, Source
from decant.schemas.manifest.plan import (
    Plan,
    PlannedRows,
    read_plan,
    set_overwritten_rows,
    set_teacher_model,
)
from decant.schemas.manifest.request import Remote, claim
from decant.schemas.manifest.tokenizer_files import tokenizer_folder


class PartCapture:
    """The steps of one part directory, in order."""

    def __init__(
        self,
        config: Precompute,
        directory: PartDirectory,
        *,
        teacher: OpenedTeacher,
        tokenizer: str,
        before: Sequence["PartCapture"] = (),
        skipped: Sequence[Skipped] = (),
        revisions: Mapping[str, str],
        console: Console,
    ):
        """`tokenizer` is the digest by which the cache knows the teacher's. `before` are the
        captures of the cache's earlier part directories, in order. `skipped` are paths of the
        corpus that cannot be read. `revisions` as `pinned_corpus` returns them."""
        self.config = config
        self.directory = directory
        self.teacher = teacher
        self.tokenizer = tokenizer
        self.before = tuple(before)
        self.skipped = tuple(skipped)
        self.revisions = revisions
        self.console = console
        self.cache = config.output

    @property
    def layout(self) -> PartLayout:
        """Paths inside the directory."""
        return self.directory.layout

    @property
    def sources(self) -> tuple[SourceFile, ...]:
        """The files that the part is made from."""
        return self.directory.sources

    @cached_property
    def corpus(self) -> Corpus:
        """The corpus settings with every default filled in."""
        first = self.before[0].corpus if self.before else None
        return decided_corpus(self.config.corpus, self.sources, first=first)

    @cached_property
    def _template(self) -> ChatTemplate | None:
        return chat_template(
            self.config.corpus,
            self.teacher.tokenizer,
            self.sources,
            missing=f"{self.config.teacher.model} has no chat template. Use a teacher that was "
            "trained to chat, put its chat_template.jinja beside its tokenizer.json, set "
            "corpus.chat_template, or give the documents as prompt and completion",
        )

    @cached_property
    def rows_id(self) -> str:
        """Identity of the rows of all the part's files."""
        return self._rows_id(self.rules)

    @cached_property
    def rules(self) -> RowRules:
        """The rules that the directory was begun with; for a new one the newest that fit it."""
        request = self.layout.request
        if exists(request):
            bound = read_json(request).get("corpus")
            for rules in rules_of_releases():
                if bound == self._described(self._rows_id(rules)):
                    return rules
        # Last, because it reads documents: it takes time, and replaced ones are there no more.
        if self.before:
            return RowRules(pieces=self.before[0].rules.pieces)
        return RowRules(pieces=needs_pieces(self.sources, self.corpus))

    def _rows_id(self, rules: RowRules) -> str:
        return identify_rows(
            self.corpus,
            self.sources,
            tokenizer=self.tokenizer,
            template=self._template,
            after=[earlier.rows_id for earlier in self.before],
            rules=rules,
        )

    def _require_same_marking(self) -> None:
        """ValueError if rows made now would not be marked as those that the part has."""
        if self.rules.marking != MARKING:
            raise ValueError(
                f"{self.cache}: begun by a release before 0.8, which decided by other rules which "
                "tokens of chats and completions are learned, and its rows are not all there. "
                "Finish it with that release, or capture into another output"
            )
        kept = Tokenizer.from_files(tokenizer_folder(self.cache))
        corpus, ours = self.config.corpus, self._template
        theirs = kept.chat_template(date=corpus.chat_date, variables=corpus.chat_variables)
        if ours and (not theirs or theirs.digest != ours.digest):
            raise ValueError(
                f"{self.cache}: its tokenizer has another chat template than corpus.chat_template "
                "or the teacher. Use the one in its tokenizer/, or capture into another output"
            )

    def added_signals(self, *, unit_rows: int) -> dict[str, AddedSignal]:
        """The signals asked for besides `logits`, by name, still without a signal_id."""
        return added_signals(self.config, self.teacher, unit_rows=unit_rows)

    @property
    def has_claim(self) -> bool:
        """Whether the directory is bound to the rows of these settings."""
        request = self.layout.request
        return exists(request) and read_json(request).get("corpus") == self._request_rows()

    def claim(self, *, sealed: bool) -> None:
        """Bind the directory to the settings. ValueError if it is bound to other ones.

        `sealed`: at least one part of the directory is sealed; more signals may then be asked for.
        """
        request = self._whole_request(sealed=sealed)  # may refuse, before a lock file is made
        with changing(self.cache):  # of two captures that begin it at once, one is refused
            self._bind(request)

    def require_claim(self, *, sealed: bool) -> None:
        """As `claim`, but writes nothing: a directory that is not bound yet stays so."""
        if exists(self.layout.request):
            self._bind(self._whole_request(sealed=sealed))

    def _whole_request(self, *, sealed: bool) -> dict[str, str]:
        return self._request() | ({} if sealed else self._request_added())

    def _bind(self, request: dict[str, str]) -> None:
        sources = [Source(source.name, source.sha256) for source in self.sources]
        claim(
            self.layout.request,
            request,
            sources=sources,
            settings=self._settings(),
            cache=self.cache,
            remote=Remote(self.revisions, remote_digests(self.sources)),
        )

    def run(self, known: Known) -> Manifest:
        """Do the steps that are missing and seal. `known` is what the part reuses of older ones."""
        with capturing(self.layout.root):
            # Read after the claim: another process may have sealed or overwritten units meanwhile.
            manifest = sealed_manifest(self.cache)
            if manifest and is_complete(self.layout, self.cache, manifest):
                return manifest
            plan = self._plan(known, sealed=manifest.parts if manifest else ())
            if notice := own_basis(known, plan.statistics):
                self.console.print(notice)
            capture_remaining(
                plan,
                self.layout.plan,
                part=self.layout.root,
                run=self.run_beam,
                console=self.console,
            )
            return seal(self.cache, self.layout, plan)

    def _plan(self, known: Known, *, sealed: Sequence[Part]) -> Plan:
        """The frozen plan. Tokenises and calibrates first, unless an earlier run has.

        `sealed` are the cache's parts.
        """
        if exists(self.layout.plan):
            plan = set_teacher_model(self.teacher.model, self.layout.plan)
            own = [part for part in sealed if self.cache / part.path == self.layout.root]
            plan = set_overwritten_rows(own, plan, self.layout.plan)
            if self._has_rows(plan.rows):
                return plan
        rows = self._tokenise()
        if not exists(self.layout.plan):
            asked = self.added_signals(unit_rows=rows.unit_rows)
            length = self.config.corpus.sequence_length
            require_space(asked, cache=self.cache, units=rows.units, length=length)
            self._calibrate(rows, known)
        return read_plan(self.layout.plan)

    def _has_rows(self, rows: PlannedRows) -> bool:
        def require(number: int) -> None:
            require_file(self.layout.records(ROWS, number), rows.units[number].files[ROWS])

        try:
            each_of(require, range(len(rows.units)), cache=self.cache)
        except ValueError:
            return False
        return True

    def _tokenise(self) -> PlannedRows:
        config, older, plan = self.config, self.directory.older, self.layout.plan
        self._require_same_marking()
        job = tokenise_job(
            self.cache,
            self.layout,
            self.corpus,
            self.sources,
            vocabulary=self.teacher.vocabulary,
            batch_rows=expected_batch_rows(config.teacher, length=config.corpus.sequence_length),
            # Rows that are made again must lie in the units of the plan.
            unit_rows=read_plan(plan).rows.unit_rows if exists(plan) else None,
            rules=self.rules,
            older=older,
        )
        with tokenise_progress(job, console=self.console):
            rows = tokenise(
                job,
                rows_id=self.rows_id,
                run=self.run_beam,
                processes=local_processes(
                    config.tokenise_workers, self.sources, runner=config.runner
                ),
                skipped=self.skipped,
            )
        count, tokens = totals(rows.units)
        heldout = sum(unit.rows for unit in rows.units if unit.split == "heldout")
        more = "more " if self.before else ""
        held = f"{heldout} rows {'of pieces of texts ' if self.rules.pieces else ''}held out"
        self.console.print(
            f"rows: {count:,} {more}of {self.config.corpus.sequence_length} tokens ({tokens:,} in "
            f"all, {held}) in {len(rows.units)} units, from {len(self.sources)} "
            f"files{_left_out(rows)}"
        )
        for notice in notices(self.layout.work):
            self.console.print(notice)
        if not self.before:
            train = count - heldout
            if warning := split_warning(train, heldout, share=self.corpus.heldout or 0.0):
                self.console.print(warning)
        return rows

    def _calibrate(self, rows: PlannedRows, known: Known) -> None:
        self.console.print(f"calibrate: running {self.teacher.checkpoint.name} on a sample")
        job = calibrate_job(
            self.config,
            self.teacher,
            rows,
            tokenizer=self.tokenizer,
            part=self.layout,
            known=known,
        )
        length = self.config.corpus.sequence_length
        sample = sample_places(rows, length=length)
        tokens = len(sample) * length
        with row_progress("calibrate", rows=len(sample), tokens=tokens, console=self.console):
            self.run_beam(
                lambda pipeline: (
                    pipeline | beam.Create([job]) | "Calibrate" >> beam.Map(with_teacher, calibrate)
                )
            )

    def run_beam(self, build: Build) -> None:
        """Run the pipeline that `build` builds on the runner that the settings name."""
        runner, options = self.config.runner, self.config.runner_options
        run_pipeline(build, runner=runner, options=options)

    def _request(self) -> dict:
        """The settings that decide the part's content, worded for the error that shows them."""
        return {
            "corpus": self._request_rows(),
            "teacher": f"{self.teacher.checkpoint.title}, {self.config.teacher.dtype} "
            f"(teacher_id {self.teacher.teacher_id[:12]})",
            "logits": self.config.signals.logits.settings(),
        }

    def _settings(self) -> dict[str, Any]:
        """The single settings behind rows_id and teacher_id, for the error if they differ."""
        rules = row_rules(
            self.corpus,
            self.sources,
            template=self._template,
            rules=self.rules,
        )
        return settings_of_rows(rules, tokenizer=self.tokenizer) | {
            "teacher.quantize": self.config.teacher.quantize,
        }

    def _request_rows(self) -> str:
        return self._described(self.rows_id)

    def _described(self, rows_id: str) -> str:
        size = sum(source.bytes for source in self.sources)
        return (
            f"{len(self.sources)} files, {size:,} bytes, rows of "
            f"{self.config.corpus.sequence_length} (rows_id {rows_id[:12]})"
        )

    def _request_added(self) -> dict:
        """Settings of the other signals; they bind the directory only until it is sealed."""
        signals = self.config.signals
        arrays = {
            name: dataclasses.asdict(asked) if asked.layers else None
            for name, asked in (("hidden", signals.hidden), ("attention", signals.attention))
        }
        logits = signals.logits
        return {**arrays, COUNTS: logits.counts or None, SKETCH: logits.sketch.settings()}


def _left_out(rows: PlannedRows) -> str:
    duplicates = f"; {rows.duplicates} duplicate documents left out" if rows.duplicates else ""
    skipped = f"; {len(rows.skipped)} unreadable documents skipped" if rows.skipped else ""
    return duplicates + skipped

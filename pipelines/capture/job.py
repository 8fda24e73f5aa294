"""`precompute`, from settings to sealed cache: which parts to capture, extend or leave as they are.

The steps of one part directory are in `part.py`; signals for sealed parts are in `addition.py`. A
rerun goes on where the last run stopped.
"""

import contextlib
import dataclasses
from pathlib import Path

from rich.console import Console

from decant.models import Checkpoint
from decant.models.mesh.accelerator import unused_accelerator
from decant.pipelines.calibration.directions import KnownDirections
from decant.pipelines.calibration.known import Known, KnownBasis, known_statistics
from decant.pipelines.calibration.signal_specs import AddedSignal, describe_signals, head_size
from decant.pipelines.capture.addition import Adding, add_signals, lacking_signals
from decant.pipelines.capture.part import PartCapture
from decant.pipelines.capture.part_directories import (
    assign_files,
    changed_files,
    sealed_manifest,
)
from decant.pipelines.capture.recorded_tokenizer import recorded_digest
from decant.pipelines.capture.remote_corpus import kept_remote, pinned_corpus
from decant.pipelines.capture.seal import clean, seal
from decant.pipelines.capture.step_inputs import corpus_sources, with_template_file
from decant.pipelines.capture.unset_signals import decide_signals
from decant.pipelines.config import Corpus, Precompute
from decant.pipelines.rows.sources import weights_by_name
from decant.pipelines.teacher.opened import open_teacher
from decant.pipelines.upkeep.forget import forget_files
from decant.progress import notices
from decant.schemas.disk.layout import LOGITS, part_layout
from decant.schemas.disk.locks import capturing
from decant.schemas.disk.stand_in import address_of, by_address, exists, working_folder
from decant.schemas.manifest.manifest import Manifest, Part, Source
from decant.schemas.manifest.plan import read_plan


def precompute(config: Precompute, *, console: Console | None = None) -> Manifest:
    """Capture everything that `config` asks for and the cache lacks, and seal it.

    A plan of an earlier run is obeyed. Wrong settings and files raise ValueError or
    FileNotFoundError before a worker starts; a failing worker raises WorkerError.
    """
    config = dataclasses.replace(config, output=working_folder(config.output, writing=True))
    with by_address(config.output):
        return Capture(config, console or notices(quiet=config.quiet)).run()


class Capture:
    """One run of `precompute`: the settings, the opened teacher and the part directories."""

    def __init__(self, config: Precompute, console: Console):
        self.console = console
        self.cache = config.output
        self.manifest = sealed_manifest(self.cache)
        teacher = open_teacher(config.teacher, plan=part_layout(self.cache, 0).plan)
        width = teacher.checkpoint.config.hidden_size
        config, self.rank_line = decide_signals(config, width=width, manifest=self.manifest)
        self.config = config
        tokenizer = with_template_file(teacher.tokenizer, config.corpus)
        self.teacher = dataclasses.replace(teacher, tokenizer=tokenizer)
        check_settings(config, self.teacher.checkpoint, vocabulary=self.teacher.vocabulary)
        kept = kept_remote(self.cache)
        corpus, revisions = pinned_corpus(config.corpus, kept.revisions, tell=console.print)
        sources, skipped = corpus_sources(corpus, digests=kept.digests, tell=console.print)
        changed = changed_files(self.cache, self.manifest, sources)
        self.replaced = changed if config.replace_changed else []
        directories = assign_files(self.cache, self.manifest, sources, replaced=self.replaced)

        def parts_by(tokenizer: str) -> list[PartCapture]:
            parts: list[PartCapture] = []
            for directory in directories:
                part = PartCapture(
                    config,
                    directory,
                    teacher=self.teacher,
                    tokenizer=tokenizer,
                    before=parts,
                    skipped=skipped,
                    revisions=revisions,
                    console=console,
                )
                parts.append(part)
            return parts

        self.parts = parts_by(recorded_digest(self.cache, self.manifest, tokenizer))
        first = self.parts[0]
        if first.directory.begun and not (self.manifest or exists(first.layout.plan)):
            # Not calibrated yet, so that only the request tells which release began the cache.
            older = parts_by(tokenizer.digest_before_0_8)
            self.parts = older if older[0].has_claim else self.parts

    def check(self) -> None:
        """Raise the ValueError with which `run` would refuse the settings; write nothing."""
        for part in self._begun():
            part.require_claim(sealed=self._is_sealed(part))
        for part in self.parts:
            if not self._is_sealed(part):
                self._require_held_signals(part)
        self._lacking()

    def run(self) -> Manifest:
        """Finish begun parts, add the signals that sealed parts lack, then capture new files."""
        before = self.manifest
        begun = self._begun()
        for part in begun:
            part.claim(sealed=self._is_sealed(part))
        for part in self.parts:
            if not self._is_sealed(part):
                self._require_held_signals(part)
        if notice := unused_accelerator():
            self.console.print(notice)
        for notice in (self.teacher.checkpoint.left_out, self.rank_line, self.head_size()):
            if notice:
                self.console.print(notice)
        self._forget_replaced()
        if not before:
            self.teacher.write_tokenizer_and_config(self.cache)
        if self.config.seal_partial:
            return self._seal_partial()
        for part in begun:
            if not part.directory.complete:
                self.manifest = part.run(self._known())
        self._add_signals()
        for part in self.parts[len(begun) :]:
            part.claim(sealed=False)
            self.console.print(
                f"{address_of(self.cache)}: new files: {len(part.sources)}; they become part "
                f"{part.directory.number}, counted from 0"
            )
            self.manifest = part.run(self._known())
        assert self.manifest, "the first part was captured now or before"
        if notice := kept_weights(self.manifest, self.config.corpus, cache=self.cache):
            self.console.print(notice, markup=False)
        if self.manifest == before:
            self.console.print(f"{address_of(self.cache)}: sealed already, nothing to do")
        for part in self.parts:
            clean(self.cache, part.layout)
        return self.manifest

    def head_size(self) -> str:
        """A line on the size of a full sketch's head, if a part is still to get one; else empty."""
        done = self.manifest and all(part.directory.complete for part in self.parts)
        if done and not self._lacking():
            return ""
        asked = self.parts[0].added_signals(unit_rows=1)
        return head_size(asked, vocabulary=self.teacher.vocabulary)

    def _begun(self) -> list[PartCapture]:
        """The parts that an earlier run has begun, or the first one."""
        return [part for part in self.parts if part.directory.begun or not part.before]

    def _forget_replaced(self) -> None:
        """Forget the old versions of changed files; their new versions are files of a new part.

        If this run is killed behind it, the next one captures them, with the flag or without.
        """
        if not self.replaced:
            return
        self.manifest, gone = forget_files(self.cache, [Source(*key) for key in self.replaced])
        more = f" and {len(self.replaced) - 1:,} more" if len(self.replaced) > 1 else ""
        self.console.print(
            f"{self.replaced[0][0]}{more} changed: forgot {gone.tokens:,} tokens of what was there "
            f"before, in {gone.rows:,} rows. `decant gc` overwrites them on the disk"
        )

    def _seal_partial(self) -> Manifest:
        for part in self.parts:
            if not part.directory.complete:
                if not exists(part.layout.plan):
                    break
                return seal(self.cache, part.layout, read_plan(part.layout.plan), partial=True)
        raise ValueError(
            f"{self.cache}: no capture is unfinished, so there is nothing to seal in part; run "
            "without --seal-partial"
        )

    def _add_signals(self) -> None:
        """Give every sealed part the signals that the settings ask for and it lacks."""
        if not self._lacking():
            return
        with contextlib.ExitStack() as claims:
            for part in filter(self._is_sealed, self.parts):
                claims.enter_context(capturing(part.layout.root))
            # Read after the claims: another process may have sealed or overwritten units meanwhile.
            self.manifest = sealed_manifest(self.cache)
            assert self.manifest, "the first part was captured now or before"
            if not (new := self._lacking()):
                return
            adding = Adding(
                cache=self.cache,
                model=self.teacher.model,
                on_error=self.config.corpus.on_error,
                run=self.parts[0].run_beam,
                console=self.console,
            )
            known = self._known()
            self.manifest = add_signals(new, manifest=self.manifest, known=known, adding=adding)

    def _lacking(self) -> dict[str, dict[str, AddedSignal]]:
        """Signals that are asked for and sealed parts lack, by the path of the directory."""
        new = {}
        for part in self.parts:
            if sealed := self._sealed(part):
                asked = part.added_signals(unit_rows=sealed[0].unit_rows)
                if lacking := lacking_signals(asked, sealed, cache=self.cache):
                    new[self._path(part)] = lacking
        return new

    def _known(self) -> Known:
        """What new parts reuse, by signal, from the first part that has the signal."""
        known: dict[str, KnownDirections | KnownBasis] = {}
        for part in reversed(self.manifest.parts if self.manifest else ()):
            known |= known_statistics(self.cache, part.signals, part.statistics, path=part.path)
        return known

    def _require_held_signals(self, part: PartCapture) -> None:
        """ValueError if the new part would lack a signal that all sealed parts have.

        A cache offers only the signals that all its parts have.
        """
        held = self.manifest.signals if self.manifest else {}
        asked = part.added_signals(unit_rows=1)
        if missing := [name for name in held if name != LOGITS and name not in asked]:
            raise ValueError(
                f"{self.cache}: holds {', '.join(missing)}, which the config does not ask for: the "
                "new part would lack it, and the cache could no longer offer it. Ask for it, or "
                f"take it out first: `decant remove {self.cache} {missing[0]}`"
            )
        lacking_signals(asked, self.manifest.parts if self.manifest else (), cache=self.cache)

    def _path(self, part: PartCapture) -> str:
        return part.layout.root.relative_to(self.cache).as_posix()

    def _sealed(self, part: PartCapture) -> list[Part]:
        """The sealed parts of this directory."""
        parts = self.manifest.parts if self.manifest else ()
        return [sealed for sealed in parts if sealed.path == self._path(part)]

    def _is_sealed(self, part: PartCapture) -> bool:
        """Whether at least one part of the directory is sealed."""
        return bool(self._sealed(part))


def kept_weights(manifest: Manifest, corpus: Corpus, *, cache: Path) -> str:
    """A notice that the cache has other weights of groups than the settings; empty if the same."""
    kept, asked = manifest.source_weights, weights_by_name(corpus)
    if not kept or not asked or all(asked.get(name) == kept[name] for name in kept):
        return ""
    shown = ", ".join(f"{name} = {weight:g}" for name, weight in kept.items())
    return (
        f"{cache}: keeps the groups and weights that it was captured with ({shown}). To train with "
        "others, set data.source_weights"
    )


def check_settings(config: Precompute, checkpoint: Checkpoint, *, vocabulary: int) -> None:
    """ValueError for settings that this teacher does not allow; `vocabulary` is its token count."""
    length, spec = config.corpus.sequence_length, config.signals.logits.target_spec()
    if not 2 <= length <= checkpoint.config.longest_row:
        raise ValueError(
            f"corpus.sequence_length is {length}, but {checkpoint.title} was trained for 2 to "
            f"{checkpoint.config.longest_row} positions; choose a length in between"
        )
    if spec.k > vocabulary - (spec.draws > 0):
        if spec.draws:
            raise ValueError(
                f"signals.logits asks for {spec.k} ids and draws from the rest, but "
                f"{checkpoint.title} has {vocabulary} tokens; without draws k may be all of "
                "them, with draws it must leave a tail"
            )
        raise ValueError(
            f"signals.logits.k is {spec.k}, but {checkpoint.title} has {vocabulary} tokens; "
            f"choose 1 to {vocabulary}"
        )
    describe_signals(config.signals, checkpoint.config, teacher_id="", length=length, unit_rows=1)

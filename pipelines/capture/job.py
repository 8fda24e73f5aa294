"""The whole job: sources → rows → plan → captured units → sealed cache. Rerun to go on."""

from rich.console import Console

from decant.models import Checkpoint
from decant.models.mesh.accelerator import unused_accelerator
from decant.pipelines.calibration.calibrate import Known, known_directions
from decant.pipelines.calibration.signal_specs import describe
from decant.pipelines.capture.addition import Adding, add_signals, not_held
from decant.pipelines.capture.part import PartCapture
from decant.pipelines.capture.portions import divide, sealed_manifest
from decant.pipelines.capture.seal import clean, seal
from decant.pipelines.config import Precompute
from decant.pipelines.rows.documents import recognised
from decant.pipelines.rows.sources import find_sources
from decant.pipelines.teacher.identity import digest_memory
from decant.pipelines.teacher.opened import open_teacher
from decant.schemas.disk.layout import LOGITS, part_layout
from decant.schemas.manifest.manifest import Manifest, Part
from decant.schemas.manifest.plan import read_plan


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
        self.manifest = sealed_manifest(self.cache)
        self.teacher = open_teacher(config.teacher, plan=part_layout(self.cache, 0).plan)
        check_fits(config, self.teacher.checkpoint, vocabulary=self.teacher.vocabulary)
        corpus, memory = config.corpus, digest_memory()
        found = find_sources(corpus.files, max_bytes=corpus.max_bytes, memory=memory)
        sources = recognised(found, text_field=corpus.text_field)
        self.parts: list[PartCapture] = []
        for portion in divide(self.cache, self.manifest, sources):
            part = PartCapture(
                config, portion, teacher=self.teacher, before=self.parts, console=console
            )
            self.parts.append(part)

    def run(self) -> Manifest:
        """Finish what was begun, add what the sealed parts lack, then capture new files."""
        before = self.manifest
        begun = [part for part in self.parts if part.portion.begun or not part.before]
        for part in begun:
            part.claim(sealed=self._is_sealed(part))
        for part in self.parts:
            if not self._is_sealed(part):
                self._require_held_signals(part)
        if notice := unused_accelerator():
            self.console.print(notice)
        if self.config.seal_partial:
            return self._seal_partial()
        if not before:
            self.teacher.write_reading_aids(self.cache)
        for part in begun:
            if not part.portion.complete:
                self.manifest = part.run(self._known())
        self._add()
        for part in self.parts[len(begun) :]:
            part.claim(sealed=False)
            self.console.print(
                f"{self.cache}: {len(part.sources)} new files make part {part.portion.number}"
            )
            self.manifest = part.run(self._known())
        assert self.manifest, "something was captured or there already"
        if self.manifest == before:
            for part in begun:
                clean(part.layout, sealed=self.manifest, path=self._path(part))
            self.console.print(f"{self.cache}: sealed already, nothing to do")
        return self.manifest

    def _seal_partial(self) -> Manifest:
        for part in self.parts:
            if not part.portion.complete:
                if not part.layout.plan.exists():
                    break
                return seal(self.cache, part.layout, read_plan(part.layout.plan), partial=True)
        raise ValueError(
            f"{self.cache}: no capture is under way, so there is nothing to seal in part; run "
            "without --seal-partial"
        )

    def _add(self) -> None:
        """Give all sealed parts the signals that are asked for."""
        assert self.manifest, "the first part is captured"
        new = {}
        for part in self.parts:
            sealed = self._sealed(part)
            if not sealed:
                continue
            asked = part.arrays(unit_rows=sealed[0].unit_rows)
            if lacking := not_held(asked, sealed, cache=self.cache):
                new[self._path(part)] = lacking
        if new:
            adding = Adding(
                cache=self.cache,
                model=self.teacher.model,
                on_error=self.config.corpus.on_error,
                run=self.parts[0].run_beam,
                console=self.console,
            )
            self.manifest = add_signals(
                new, manifest=self.manifest, known=self._known(), adding=adding
            )

    def _known(self) -> dict[str, Known]:
        """Directions that the first part which has them was captured with."""
        known: dict[str, Known] = {}
        for part in reversed(self.manifest.parts if self.manifest else ()):
            known |= known_directions(self.cache, part.signals, part.statistics, path=part.path)
        return known

    def _require_held_signals(self, part: PartCapture) -> None:
        """ValueError if the part would lack a signal that all others have: so would the cache."""
        held = self.manifest.signals if self.manifest else {}
        asked = part.arrays(unit_rows=1)
        if missing := [name for name in held if name != LOGITS and name not in asked]:
            raise ValueError(
                f"{self.cache}: holds {', '.join(missing)}, which the config does not ask for: the "
                "new part would lack it, and nobody could learn from it any more. Ask for it, or "
                f"take it out first: `decant remove {self.cache} {missing[0]}`"
            )
        not_held(asked, self.manifest.parts if self.manifest else (), cache=self.cache)

    def _path(self, part: PartCapture) -> str:
        return part.layout.root.relative_to(self.cache).as_posix()

    def _sealed(self, part: PartCapture) -> list[Part]:
        parts = self.manifest.parts if self.manifest else ()
        return [sealed for sealed in parts if sealed.path == self._path(part)]

    def _is_sealed(self, part: PartCapture) -> bool:
        """Whether some of it is."""
        return bool(self._sealed(part))


def check_fits(config: Precompute, checkpoint: Checkpoint, *, vocabulary: int) -> None:
    """ValueError for settings that this teacher cannot serve."""
    length, spec = config.corpus.sequence_length, config.signals.logits.target_spec()
    if not 2 <= length <= checkpoint.config.max_positions:
        raise ValueError(
            f"corpus.sequence_length is {length}, but {checkpoint.title} was trained for 2 to "
            f"{checkpoint.config.max_positions} positions; choose a length in between"
        )
    if not 1 <= spec.k <= vocabulary - (spec.draws > 0):
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
    describe(config.signals, checkpoint.config, teacher_id="", length=length, unit_rows=1)
    if not 0 <= (config.corpus.heldout or 0.0) < 1:
        raise ValueError(f"corpus.heldout is {config.corpus.heldout}; expected a share in [0, 1)")

"""`align`, from settings to a sealed cache: rows, plan, targets, seal. A rerun goes on."""

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import apache_beam as beam
from rich.console import Console

from decant.models import open_checkpoint
from decant.models.checkpoints.hf_layout import CONFIG
from decant.models.text.tokenizer import DEFINITION, Tokenizer
from decant.pipelines.alignment.planning import PlanJob, make_plan
from decant.pipelines.alignment.rows import OPEN_ROWS, VERSION, Aligner, Other
from decant.pipelines.alignment.rows_step import RowsJob, RowsWritten, write_rows
from decant.pipelines.alignment.signals import decided_logits
from decant.pipelines.alignment.unit import AlignUnits
from decant.pipelines.capture.progress import row_progress
from decant.pipelines.capture.remaining_units import capture_remaining, totals
from decant.pipelines.capture.seal import clean, seal
from decant.pipelines.config import Align
from decant.pipelines.runners.run_pipeline import run_pipeline
from decant.progress import notices
from decant.schemas import Cache, open_cache
from decant.schemas.disk.identity import digest
from decant.schemas.disk.layout import COUNTS, LOGITS, MANIFEST, SKETCH, part_layout
from decant.schemas.disk.locks import capturing, changing
from decant.schemas.disk.stand_in import address_of, by_address, exists, working_folder
from decant.schemas.manifest.manifest import Aligned, Manifest, read_manifest
from decant.schemas.manifest.plan import read_plan
from decant.schemas.manifest.request import claim
from decant.schemas.manifest.tokenizer_files import write_tokenizer_files

_LITTLE_OVERLAP = 1 / 3
_MADE_FROM = (LOGITS, COUNTS, SKETCH)


def align(config: Align, *, console: Console | None = None) -> Manifest:
    """Make and seal the cache that `config` asks for.

    ValueError or FileNotFoundError before a worker starts if the cache or the tokenizer cannot
    serve; WorkerError for text that the tokenizer cannot spell.
    """
    output = working_folder(config.output, writing=True)
    config = dataclasses.replace(config, output=output)
    with by_address(output):
        return _Alignment(config, console or notices(quiet=config.quiet)).run()


class _Alignment:
    """One run of `align`."""

    def __init__(self, config: Align, console: Console):
        self.config, self.console = config, console
        self.cache = open_cache(address_of(working_folder(config.cache)))
        self.layout = part_layout(config.output, 0)
        _require_apart(self.cache, config)
        _require_targets(self.cache)
        self.special_tokens = special_tokens(config.special_tokens)
        self.tokenizer = open_tokenizer(config.tokenizer)
        self.length = config.sequence_length or self.cache.manifest.sequence_length
        self.aligner = Aligner(
            self.cache, self.tokenizer, length=self.length, special_tokens=self.special_tokens
        )
        require_other(self.aligner)
        self.logits, self.draws = decided_logits(
            self.cache, config, size=self.tokenizer.size, teacher_size=len(self.aligner.first)
        )
        self.rows_id = self._rows_id()

    def run(self) -> Manifest:
        output = self.config.output
        with changing(output):
            self._claim()
        if exists(output / MANIFEST):
            self.console.print(f"{address_of(output)}: sealed already, nothing to do")
            return read_manifest(output)
        for line in _notes(self.aligner):
            self.console.print(line, markup=False)
        write_tokenizer_files(output, self._tokenizer_files())
        with capturing(self.layout.root):
            made = self._rows()
            self._plan(made)
            plan = read_plan(self.layout.plan)
            capture_remaining(
                plan,
                self.layout.plan,
                part=self.layout.root,
                run=self._run,
                console=self.console,
                what="align",
                worker=AlignUnits(
                    self.layout.root.absolute(), self.layout.plan.absolute(), self._other
                ),
            )
            manifest = seal(output, self.layout, plan)
        clean(output, self.layout)
        return manifest

    @property
    def _run(self):
        config = self.config
        return functools.partial(run_pipeline, runner=config.runner, options=config.runner_options)

    @functools.cached_property
    def _other(self) -> Other:
        # Absolute, because workers may have another working directory.
        cache = working_folder(self.config.cache).absolute()
        output = self.config.output.absolute()
        return Other(cache, output, self.length, self.special_tokens)

    def _rows(self) -> RowsWritten:
        units = self.cache.units()
        rows = sum(len(numbers) for *_, numbers in units)
        tokens = sum(unit.tokens for _, unit, _ in units)
        job = RowsJob(self.layout.root.absolute(), self._other)
        with row_progress(
            "rows", rows=rows, tokens=tokens, console=self.console, part=self.layout.root
        ):
            made = write_rows(job, rows_id=self.rows_id, run=self._run)
        count, tokens = totals(made.rows.units)
        self.console.print(
            f"rows: {count:,} of {self.length} tokens ({tokens:,} in all), from {rows:,} rows"
        )
        return made

    def _plan(self, made: RowsWritten) -> None:
        if exists(self.layout.plan):
            return
        job = PlanJob(
            part=self.layout.root.absolute(),
            other=self._other,
            made=made,
            logits=self.logits,
            draws=self.draws,
            tokenizer=self.tokenizer.digest,
            aligned=self._aligned(),
            aligned_with=str(working_folder(self.config.cache).absolute())
            if self.cache.mirror is None
            else self.cache.address,
        )
        self._run(lambda pipeline: pipeline | beam.Create([job]) | "Plan" >> beam.Map(make_plan))

    def _aligned(self) -> Aligned:
        manifest = self.cache.manifest
        return Aligned(
            rows_id=manifest.rows_id,
            cache_id=manifest.cache_id,
            tokenizer=manifest.tokenizer,
            vocabulary=manifest.vocabulary_size,
            signals={
                name: digest([part.signals[name].signal_id for part in manifest.parts])
                for name in _MADE_FROM
                if name in manifest.signals
            },
            targets=self.config.targets,
            special_tokens=self.special_tokens,
        )

    def _rows_id(self) -> str:
        made_from = self._aligned()
        return digest(
            {
                "version": VERSION,
                "rows": made_from.rows_id,
                "forgotten": self.cache.manifest.forgotten_id,
                "signals": dict(made_from.signals),
                "tokenizer": self.tokenizer.digest,
                "special_tokens": dict(self.special_tokens),
                "length": self.length,
                "open_rows": OPEN_ROWS,
            }
        )

    def _claim(self) -> None:
        manifest, logits = self.cache.manifest, self.logits
        request = {
            "cache": f"rows of {self.length} from {len(manifest.parts)} parts, "
            f"rows_id {manifest.rows_id[:12]}, in tokens of {self.tokenizer.digest[:12]} "
            f"(rows_id {self.rows_id[:12]})",
            "targets": self.config.targets,
            "k": logits.k,
            "draws": [logits.draws, *logits.draw_betas],
            "counts": self.draws,
        }
        claim(
            self.layout.request,
            request,
            sources=self.aligner.sources,
            settings={
                "cache": manifest.rows_id,
                "tokenizer": self.tokenizer.digest,
                "special_tokens": dict(self.special_tokens),
                "sequence_length": self.length,
            },
            cache=self.config.output,
        )

    def _tokenizer_files(self) -> dict[str, bytes]:
        """The student's tokenizer, and the teacher's config with the student's vocabulary."""
        files = self.tokenizer.files()
        config = self.cache.tokenizer_files().get(CONFIG)
        if config is None:
            return files
        return files | {CONFIG: _with_vocabulary(config, size=self.tokenizer.size)}


def open_tokenizer(place: str) -> Tokenizer:
    """The tokenizer of a directory, or of a checkpoint anywhere."""
    if (Path(place) / DEFINITION).is_file():
        return Tokenizer.from_files(place)
    return open_checkpoint(place).tokenizer()


def special_tokens(settings: Sequence[str]) -> dict[str, str]:
    """The table of special tokens from name=value; a value may be a JSON text. ValueError."""
    table: dict[str, str] = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not (name and equals and value):
            raise ValueError(
                f"special_tokens: {setting!r} is not token=token, such as "
                "'<|im_start|>=<start_of_turn>'"
            )
        table[name] = json.loads(value) if value.startswith('"') else value
    return dict(sorted(table.items()))


def require_other(aligner: Aligner) -> None:
    """ValueError if the two tokenizers give all texts the same ids."""
    if aligner.teacher.difference(aligner.student) is None:
        raise ValueError(
            f"{aligner.cache.address}: its tokenizer gives every text the same ids as --tokenizer, "
            "so no align is needed: students with that tokenizer use this cache as it is"
        )


def _require_apart(cache: Cache, config: Align) -> None:
    """ValueError if one of the caches would lie in the other."""
    if cache.mirror is not None:
        inside = str(config.output).startswith(f"{cache.address}/")
    else:
        ours, theirs = config.output.resolve(), cache.path.resolve()
        inside = ours.is_relative_to(theirs) or theirs.is_relative_to(ours)
    if inside or address_of(config.output) == cache.address:
        raise ValueError(
            f"output is {address_of(config.output)}, and the cache that it is made from is "
            f"{cache.address}: one lies in the other. Choose another --output"
        )


def _require_targets(cache: Cache) -> None:
    manifest = cache.manifest
    if LOGITS not in manifest.signals:
        raise ValueError(
            f"{cache.address}: holds rows without a teacher's targets (made by `decant tokenise`). "
            "For another tokenizer run `decant tokenise` with --like an aligned cache"
        )
    if any(part.aligned for part in manifest.parts):
        raise ValueError(
            f"{cache.address}: was made by `decant align` itself; align the cache that it was made "
            "from"
        )


def _notes(aligner: Aligner) -> list[str]:
    """What users should know of these two tokenizers."""
    lines, projection = [], aligner.projection
    if projection.overlap < _LITTLE_OVERLAP:
        lines.append(
            f"warning: only {projection.overlap:.0%} of the student's tokens are also tokens of "
            "the teacher's; the more they share, the more of what the teacher says survives"
        )
    if not aligner.cache.manifest.logits.labels:
        lines.append(
            f"{aligner.cache.address}: was captured before release 0.10 and stores no "
            "probabilities of its text's tokens. So a student's token that spans several of the "
            "teacher's gets no probability, and its positions are learned from their label alone"
        )
    return lines


def _with_vocabulary(config: bytes, *, size: int) -> bytes:
    value: dict[str, Any] = json.loads(config)
    sizes = ("vocab_size", "vocab_size_per_layer_input")

    def changed(table: Mapping[str, Any]) -> dict[str, Any]:
        return {
            name: size
            if name in sizes
            else changed(inner)
            if name == "text_config" and isinstance(inner, dict)
            else inner
            for name, inner in table.items()
        }

    return json.dumps(changed(value), indent=2).encode()

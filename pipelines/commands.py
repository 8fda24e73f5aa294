"""The commands of `decant.pipelines`: their arguments, and what they print."""

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from decant.command_line.arguments import sorted_arguments
from decant.command_line.checks import COUNT, Bounds, Command
from decant.command_line.local_paths import (
    IN_BUCKETS,
    IS_CACHE,
    IS_CORPUS,
    IS_MODEL,
    IS_OUTPUT,
    IS_RUN,
)
from decant.command_line.result import LongCommand, Result, show
from decant.command_line.settings import SWITCHES, parse
from decant.foreign import tell
from decant.pipelines.config import Align, Precompute, Teacher, Tokenise
from decant.progress import notices
from decant.schemas.disk.sizes import size_text
from decant.store.urls import url_of

if TYPE_CHECKING:
    from rich.console import Console

    from decant.schemas import Cache

# Every function here imports its job itself, so that --help and a typo in a config file do not
# wait for jax and Beam.

OpenStudent = Callable[..., tuple[Callable[..., Any], str]]
"""(run, cache, checkpoint=, top=) gives a run's predictions of rows, and the student's name."""
TRAIN = "train.toml"
"""Name of the file for `decant train` that `init` writes beside that for `precompute`."""


@dataclass(frozen=True)
class Init(LongCommand):
    """Look at a teacher and a corpus; write commented settings that suit both.

    Two files are written: one for `decant precompute`, and beside it `train.toml` for a student cut
    from the teacher. No weight is read, and no file is overwritten. The files of a hub id are
    fetched first, weights too, as `precompute` needs them.
    """

    teacher: str = field(metadata=IS_MODEL)
    """A Hugging Face directory or a `.gguf` file, here or in a bucket; a hub id or `embedded`."""
    corpus: tuple[str, ...] = field(metadata=IS_CORPUS)
    """Files, folders or globs, as `corpus.files` of `precompute`; or `embedded`."""
    out: Path = field(default=Path("precompute.toml"), metadata=IS_OUTPUT)
    """The file for `decant precompute`."""


@dataclass(frozen=True)
class Plan(Precompute):
    """Estimate a capture's bytes, hours and files. Takes the settings of `precompute`.

    `decant plan MODEL` says what a model is instead: its family, parameters and bytes.
    """


@dataclass(frozen=True)
class PlanModel(LongCommand):
    """Say what a model is: its family, parameters, and bytes on disk and in memory.

    No weight is read. The files of a hub id are fetched first, weights too.
    """

    model: str = field(metadata=IS_MODEL)
    """A Hugging Face directory or a `.gguf` file, here or in a bucket; a hub id or `embedded`."""


@dataclass(frozen=True)
class Verify(LongCommand):
    """Check every file of a sealed cache, then its targets.

    Each file is compared with its commit and the manifest. Then the teacher reads some rows again,
    one document at a time, without packing, top-k or codec, and the stored signals are compared
    with its outputs. Exit status: 0 all is right, 1 something is wrong, 2 the check
    could not be made.
    """

    cache: Path = field(metadata=IS_CACHE | IN_BUCKETS)
    """The sealed cache: a directory or an address."""
    rows: Annotated[int, Bounds(0)] = 16
    """Rows that the teacher reads again, spread over the cache. 0 checks files only."""
    teacher: str | None = field(default=None, metadata=IS_MODEL)
    """Where the teacher is now, or for a cache of `decant align` the cache that it was made from.
    Unset: where the cache's plan says."""
    fetch: bool = False
    """Fetch the teacher if the plan names a hub id that is not on this machine, or a bucket. A
    cache that somebody else made decides what that is."""
    repair: bool = False
    """Capture the units with damaged or missing files again."""


@dataclass(frozen=True)
class Inspect(Command):
    """Show what a sealed cache holds: teacher, rows, bytes, how sure the teacher was; or one row.

    With --html as pages for a browser, which need no server.
    """

    cache: Path = field(metadata=IS_CACHE | IN_BUCKETS)
    """The sealed cache: a path, or an address such as `s3://bucket/cache`."""
    row: Annotated[int | None, Bounds(0)] = None
    """Show this row, token by token, instead of the whole cache."""
    html: Path | None = field(default=None, metadata=IS_OUTPUT)
    """Write pages: a directory gets index.html and a page for each of some rows. A name that ends
    in .html is the overview's file, with the rows beside it; with --row it is that row's page
    alone."""
    run: Path | None = field(default=None, metadata=IS_RUN)
    """Show the predictions of this run's student beside the teacher's; with --row or --html."""
    checkpoint: str = "last"
    """Of that run: `last`, `best`, `best-ce` or a number of updates."""
    rows: Annotated[int | None, Bounds(0)] = None
    """Rows that get a page. Unset: as many as hold 100,000 tokens, at least 8, at most 200."""
    top: Annotated[int, Bounds(0)] = 5
    """Alternatives to show for each token of a row."""
    sample: Annotated[int | None, COUNT] = None
    """Rows to read for statistics. Unset: as many as hold 262,144 tokens, at most 8,192."""


@dataclass(frozen=True)
class Merge(LongCommand):
    """Make OUTPUT a cache of all parts of other caches of the same teacher and tokenizer.

    Nothing is copied: OUTPUT refers to the parts by relative paths, so the caches can be moved
    together. All may be in one bucket. Opening OUTPUT is an error if one of them is gone. OUTPUT
    forgets the documents that they forget; to take in parts that they gain, merge into the same
    OUTPUT again. Documents that several caches hold are not looked for.
    """

    output: Path = field(metadata=IS_OUTPUT | IS_CACHE | IN_BUCKETS)
    """Directory or address of the merged cache."""
    caches: tuple[Path, ...] = field(metadata=IS_CACHE | IN_BUCKETS)
    """The caches to merge: directories, or addresses in the bucket of OUTPUT."""


@dataclass(frozen=True)
class Copy(LongCommand):
    """Copy a sealed cache to another directory, into a bucket (`s3://`, `gs://`) or out of one.

    Every file is compared with the hash that the manifest has of it. The manifest is written last,
    so a copy that was stopped is no cache; the same command goes on with what is missing. An older
    state of the same cache at TARGET is brought up to date.
    """

    source: Path = field(metadata=IS_CACHE | IN_BUCKETS)
    """The sealed cache: a directory, or an address such as `s3://bucket/cache`."""
    target: Path = field(metadata=IS_CACHE | IS_OUTPUT | IN_BUCKETS)
    """Where it goes: the same."""


@dataclass(frozen=True)
class Forget(LongCommand):
    """Take documents out of a sealed cache for good.

    Readers that open the cache from then on get padding in the documents' places: no tokens,
    targets, hidden states or attention maps. Rows that held nothing else are left out. Other
    documents keep their rows, and readers that have the cache open go on as before. The bytes stay
    on disk until `gc` overwrites them. A training run that began before is refused: start it anew.
    """

    cache: Path = field(metadata=IS_CACHE | IN_BUCKETS)
    """The sealed cache: a directory or an address."""
    source: str
    """Name of the corpus file in the manifest, relative to the corpus's directory, or the beginning
    of its sha256."""
    document: Annotated[tuple[int, ...], Bounds(0)] = ()
    """Documents of that file: the byte offset of a JSON line, or the record number in a table, from
    0. `inspect --row` shows them. Unset: every document of the file."""


@dataclass(frozen=True)
class Remove(LongCommand):
    """Unlink signals from a sealed cache. Their files stay until `gc`."""

    cache: Path = field(metadata=IS_CACHE | IN_BUCKETS)
    """The sealed cache: a directory or an address."""
    signals: tuple[str, ...]
    """Names such as hidden/12."""


@dataclass(frozen=True)
class CollectGarbage(LongCommand):
    """Delete the files that a sealed cache's manifest does not name, and overwrite the forgotten.

    Files of removed signals and of unfinished additions are deleted. Units that hold forgotten
    documents are written again without them. Parts that are being captured are left alone. Other
    commands that change the cache wait for it. Nobody may read the cache by an older manifest at
    the same time. If it is stopped, run it again.
    """

    cache: Path = field(metadata=IS_CACHE | IN_BUCKETS)
    """The sealed cache: a directory or an address."""
    dry_run: bool = False
    """Only say what would be deleted."""
    grace_hours: Annotated[float, Bounds(0, 87_600)] = 24.0
    """For a bucket, where no lock tells who reads or captures: delete nothing until the manifest
    and all that it does not name are as old as this."""


def _init(arguments: list[str]) -> int:
    config = parse(
        Init, arguments, program="decant init", about=("teacher", "corpus"), with_file=False
    )
    from decant.pipelines.init.first_settings import first_settings

    told = notices(quiet=config.quiet)
    settings = first_settings(config.teacher, config.corpus, out=config.out, console=told)
    return show(settings, config)


def _is_model(word: str) -> bool:
    """Whether a word of `plan` names a model: it is no flag and no config file."""
    other_file = Path(word).is_file() and not word.endswith(".gguf")
    return not (word.startswith("-") or word.lower().endswith(".toml") or other_file)


def _plan_model(arguments: list[str]) -> int:
    config = parse(PlanModel, arguments, program="decant plan", about=("model",), with_file=False)
    from decant.pipelines.init.model_facts import look_at_model

    facts = look_at_model(config.model)
    return show(Result(facts.line, dataclasses.asdict(facts)), config)


def _plan(arguments: list[str]) -> int:
    words = [word for word in arguments if word not in SWITCHES]
    if words and _is_model(words[0]):
        return _plan_model(arguments)
    config = parse(Plan, arguments, program="decant plan")

    from decant.pipelines.capture.estimate import estimate
    from decant.pipelines.capture.estimate_report import one_line, print_estimate

    given = {f.name: getattr(config, f.name) for f in dataclasses.fields(Precompute)}
    same = [word for word in arguments if word not in SWITCHES]
    estimated = estimate(Precompute(**given), console=notices(quiet=config.quiet))
    result = Result(
        one_line(estimated),
        dataclasses.asdict(estimated),
        details=lambda console: print_estimate(estimated, console),
        next=() if estimated.problems else [["decant", "precompute", *same]],
        status=1 if estimated.problems else 0,
    )
    return show(result, config)


def _precompute(arguments: list[str]) -> int:
    config = parse(Precompute, arguments, program="decant precompute")
    from decant.pipelines.capture.job import precompute
    from decant.schemas import open_cache

    precompute(config)
    output = url_of(config.output) or config.output
    cache = open_cache(output)
    document = _contents(cache)
    partly = " (part of a capture: go on without --seal-partial)" if config.seal_partial else ""
    line = (
        f"sealed {output}: {document['rows']:,} rows, {document['heldout_rows']:,} of them "
        f"held out, {document['scored']:,} positions with targets, "
        f"{size_text(document['bytes'])}, cache_id {cache.manifest.cache_id}{partly}"
    )
    following = [["decant", "inspect", output], _train_command(config, arguments)]
    return show(Result(line, document, next=following), config)


def _train_command(config: Precompute, arguments: list[str]) -> list[str | Path]:
    """How to train a student on the cache: by the file that `init` wrote beside the config's."""
    given = sorted_arguments(Precompute, arguments, program="decant precompute")
    files = [given.config] if given.config else []
    for beside in [file.with_name(TRAIN) for file in files]:
        if beside.exists():
            return ["decant", "train", beside]
    source = ["--student.source", config.teacher.model]
    default = config.teacher.model == Teacher().model
    output = url_of(config.output) or config.output
    return ["decant", "train", "--cache", output, *([] if default else source)]


def _tokenise(arguments: list[str]) -> int:
    config = parse(Tokenise, arguments, program="decant tokenise")
    from decant.pipelines.capture.rows_only import tokenise_only

    manifest = tokenise_only(config)
    output = url_of(config.output) or config.output
    rows = sum(unit.rows for part in manifest.parts for unit in part.units)
    line = (
        f"sealed {output}, for [[data.caches]] of a training run: {rows:,} rows, cache_id "
        f"{manifest.cache_id}"
    )
    document = {"output": output, "cache_id": manifest.cache_id, "rows": rows}
    following = [["decant", "inspect", output]]
    return show(Result(line, document, next=following), config)


def _align(arguments: list[str]) -> int:
    config = parse(Align, arguments, program="decant align", about=("cache",))
    from decant.pipelines.alignment.job import align
    from decant.pipelines.alignment.share import taught_share
    from decant.schemas import open_cache

    align(config)
    output = url_of(config.output) or config.output
    cache = open_cache(output)
    share = taught_share(cache)
    document = _contents(cache)
    line = (
        f"sealed {output}: {document['rows']:,} rows, {document['heldout_rows']:,} of them held "
        f"out, {document['scored']:,} scored positions, about {share:.0%} of them with a "
        f"teacher's target, {size_text(document['bytes'])}, cache_id {cache.manifest.cache_id}"
    )
    following = [
        ["decant", "inspect", output],
        ["decant", "train", "--cache", output, "--student.init", "scratch"],
    ]
    return show(Result(line, document | {"taught_share": share}, next=following), config)


def _verify(arguments: list[str]) -> int:
    try:
        config = parse(
            Verify, arguments, program="decant verify", about=("cache",), with_file=False
        )
    except ValueError as error:
        tell(f"error: {error}", file=sys.stderr)
        return 2  # 1 would say that the cache is wrong
    from decant.pipelines.verification.report import verify_and_report

    result = verify_and_report(
        config.cache,
        rows=config.rows,
        teacher=config.teacher,
        fetch=config.fetch,
        with_repair=config.repair,
        console=notices(quiet=config.quiet),
    )
    if "error" in result.document and not config.json:
        tell(result.line, file=sys.stderr)
        return result.status
    return show(result, config)


def inspect(arguments: list[str], open_student: OpenStudent | None = None) -> int:
    """`inspect`; `open_student` opens the run that --run names, which this package cannot."""
    config = parse(Inspect, arguments, program="decant inspect", about=("cache",), with_file=False)
    if config.run and not open_student:
        raise ValueError("--run: only `decant inspect` reads runs")

    from decant.pipelines.inspection.show import inspect_cache
    from decant.schemas import open_cache

    cache = open_cache(config.cache)
    student, name = None, ""
    if config.run and open_student:
        if config.row is None and not config.html:
            raise ValueError("--run: add --row N, or --html OUT for pages")
        student, name = open_student(
            config.run, cache, checkpoint=config.checkpoint, top=config.top
        )
    inspect_cache(
        cache,
        row=config.row,
        html=config.html,
        pages=config.rows,
        top=config.top,
        sampled=config.sample,
        student=student,
        student_name=name,
    )
    return 0


def _merge(arguments: list[str]) -> int:
    config = parse(
        Merge, arguments, program="decant merge", about=("output", "caches"), with_file=False
    )
    from decant.pipelines.upkeep.merge import merge
    from decant.schemas import open_cache

    merged = merge(config.output, config.caches)
    output = url_of(config.output) or config.output
    told = notices(quiet=config.quiet)
    for cache in merged.left_out:
        told.print(f"left out: {cache}")
    for name, why in merged.lost.items():
        told.print(f"{name} is not in {output}: {why}")
    document = _contents(open_cache(output)) | {
        "left_out": [str(cache) for cache in merged.left_out],
        "lost": merged.lost,
    }
    line = (
        f"merged into {output}: {document['rows']:,} rows in "
        f"{len(merged.manifest.parts)} parts, cache_id {merged.manifest.cache_id}"
    )
    return show(Result(line, document, next=[["decant", "inspect", output]]), config)


def _copy(arguments: list[str]) -> int:
    config = parse(
        Copy, arguments, program="decant copy", about=("source", "target"), with_file=False
    )
    from decant.pipelines.upkeep.copy import copy

    source, target = (str(url_of(path) or path) for path in (config.source, config.target))
    copied = copy(source, target, console=notices(quiet=config.quiet))
    document = {
        "source": source,
        "target": target,
        "cache_id": copied.manifest.cache_id,
        "files": copied.files,
        "sent": copied.sent,
        "bytes_sent": copied.bytes_sent,
    }
    line = (
        f"copied {source} to {target}: {copied.sent:,} of {copied.files:,} files sent, "
        f"{size_text(copied.bytes_sent)}; cache_id {copied.manifest.cache_id}"
    )
    following = [] if url_of(target) else [["decant", "verify", "--rows", "0", target]]
    return show(Result(line, document, next=following), config)


def _forget(arguments: list[str]) -> int:
    config = parse(Forget, arguments, program="decant forget", about=("cache",), with_file=False)
    if "--document" in arguments and not config.document:
        # Not the same as no flag, which forgets the whole file.
        tell("error: --document needs at least one number", file=sys.stderr)
        return 2
    from decant.pipelines.upkeep.forget import forget

    with _changing(config.cache) as (cache, called):
        manifest, forgot = forget(cache, source=config.source, documents=config.document)
    line = (
        f"{called}: forgot {len(forgot.documents):,} documents of {config.source}, "
        f"{forgot.tokens:,} tokens in {forgot.rows:,} rows; {forgot.empty_rows:,} of the rows held "
        f"nothing else. cache_id {manifest.cache_id}. The bytes stay there until "
        f"`decant gc {called}`"
    )
    document = {
        "cache": called,
        "cache_id": manifest.cache_id,
        "documents": len(forgot.documents),
        "tokens": forgot.tokens,
        "rows": forgot.rows,
        "empty_rows": forgot.empty_rows,
    }
    return show(Result(line, document), config)


def _remove(arguments: list[str]) -> int:
    config = parse(
        Remove, arguments, program="decant remove", about=("cache", "signals"), with_file=False
    )
    from decant.pipelines.upkeep.remove import remove_signals

    with _changing(config.cache) as (cache, called):
        manifest = remove_signals(cache, config.signals)
    line = (
        f"{called} now holds {', '.join(manifest.signals)}, cache_id {manifest.cache_id}; "
        f"to delete the files: decant gc {called}"
    )
    document = {
        "cache": called,
        "cache_id": manifest.cache_id,
        "signals": list(manifest.signals),
    }
    return show(Result(line, document), config)


def _gc(arguments: list[str]) -> int:
    config = parse(
        CollectGarbage, arguments, program="decant gc", about=("cache",), with_file=False
    )
    from decant.pipelines.upkeep.collect import collect

    with _changing(config.cache) as (cache, called):
        collected = collect(
            cache,
            dry_run=config.dry_run,
            grace_hours=config.grace_hours,
            console=notices(quiet=config.quiet),
        )

    def details(console: "Console") -> None:
        if collected.units:
            done = "hold forgotten documents" if config.dry_run else "written again without them"
            console.print(f"{collected.units:12,} units {done}")
        for path, size in collected.deleted.items():
            console.print(f"{size_text(size):>12}  in {path.relative_to(cache)}")

    told = notices(quiet=config.quiet)
    if collected.dropped:
        told.print(collected.dropped)
    if collected.later:
        told.print(collected.later)
    for path in collected.busy:
        told.print(f"{path} is being captured: left as it is, run `gc` again after that")
    size = collected.deleted.total()
    could = "could be deleted" if config.dry_run else "deleted"
    document = {
        "cache": called,
        "dry_run": config.dry_run,
        "units": collected.units,
        "deleted": {path.relative_to(cache): n for path, n in collected.deleted.items()},
        "bytes": size,
        "busy": collected.busy,
        "dropped": collected.dropped,
        "later": collected.later,
    }
    line = f"{called}: {size_text(size)} {could}, {collected.units:,} units overwritten"
    if config.dry_run:
        line = f"{called}: {size_text(size)} {could}, {collected.units:,} units to overwrite"
    return show(Result(line, document, details=details), config)


@contextlib.contextmanager
def _changing(place: Path) -> Iterator[tuple[Path, str | Path]]:
    """The folder of a cache that the block changes, and what its user calls it."""
    from decant.schemas.disk.stand_in import by_address, working_folder

    called = url_of(place) or place
    cache = working_folder(called, writing=True)
    with by_address(cache):
        yield cache, called


def _contents(cache: "Cache") -> dict[str, Any]:
    """What a sealed cache holds, for `--json`."""
    units = [unit for part in cache.manifest.parts for unit in part.units]
    return {
        "output": cache.address,
        "cache_id": cache.manifest.cache_id,
        "rows": len(cache),
        "heldout_rows": len(cache.rows(split="heldout")),
        "scored": sum(unit.scored for unit in units),
        "bytes": sum(entry.bytes for unit in units for entry in unit.files.values()),
        "parts": len(cache.manifest.parts),
        **({"writers": cache.manifest.writers} if cache.manifest.writers else {}),
        "signals": list(cache.manifest.signals),
    }


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "init": _init,
    "plan": _plan,
    "precompute": _precompute,
    "tokenise": _tokenise,
    "align": _align,
    "verify": _verify,
    "inspect": inspect,
    "merge": _merge,
    "copy": _copy,
    "forget": _forget,
    "remove": _remove,
    "gc": _gc,
}
"""By name: a function of the arguments after the name, which returns the exit status."""

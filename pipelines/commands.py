"""The commands of `decant.pipelines`: their arguments, and what they print."""

import dataclasses
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from decant.command_line.checks import COUNT, Bounds, Command
from decant.command_line.local_paths import IS_PATH
from decant.command_line.settings import parse, parse_flags
from decant.foreign import tell, terminal
from decant.pipelines.config import Precompute, Tokenise

# Every function here imports its job itself, so that --help and a typo in a config file do not
# wait for jax and Beam.

CacheArgument = Annotated[Path, Positional, arg(metavar="CACHE")]


@dataclass(frozen=True)
class Plan(Precompute):
    """Estimate a capture's bytes, hours and files. Takes the settings of `precompute`."""

    json: bool = False
    """Print one JSON document instead of a table."""


@dataclass(frozen=True)
class Verify(Command):
    """Check every file of a sealed cache, then its targets.

    Each file is compared with its commit and the manifest. Then the teacher reads some rows again,
    one document at a time, without packing, top-k or codec, and the stored signals are compared
    with its outputs. Exit status: 0 all is right, 1 something is wrong, 2 the check
    could not be made.
    """

    cache: CacheArgument
    """The sealed cache."""
    rows: Annotated[int, Bounds(0)] = 16
    """Rows that the teacher reads again, spread over the cache. 0 checks files only."""
    teacher: str | None = field(default=None, metadata=IS_PATH)
    """Where the teacher is now. Unset: where the cache's plan says."""
    fetch: bool = False
    """Fetch the teacher from the hub if the plan names a hub id that is not on this machine. A
    cache that somebody else made decides what that is."""
    json: bool = False
    """Print one JSON document instead of a table."""
    repair: bool = False
    """Capture the units with damaged or missing files again."""


@dataclass(frozen=True)
class Inspect(Command):
    """Show a sealed cache's contents, bytes by signal and the teacher's entropy; or one row."""

    cache: CacheArgument
    """The sealed cache."""
    row: Annotated[int | None, Bounds(0)] = None
    """Show this row, token by token, instead of the whole cache."""
    html: Path | None = None
    """Write the row as a web page to this file. Without --row: row 0."""
    top: Annotated[int, Bounds(0)] = 5
    """Alternatives to show for each token of a row."""
    sample: Annotated[int, COUNT] = 64
    """Rows to read for the histograms."""


@dataclass(frozen=True)
class Merge(Command):
    """Make OUTPUT a cache of all parts of other caches of the same teacher and tokenizer.

    Nothing is copied: OUTPUT refers to the parts by relative paths, so the caches can be moved
    together. Opening OUTPUT is an error if one of them is gone. OUTPUT forgets the documents that
    they forget; to take in parts that they gain, merge into the same OUTPUT again. Documents that
    several caches hold are not looked for.
    """

    output: Annotated[Path, Positional, arg(metavar="OUTPUT")]
    """Directory of the merged cache."""
    caches: Annotated[tuple[Path, ...], Positional, arg(metavar="CACHE…")]
    """The caches to merge."""


@dataclass(frozen=True)
class Forget(Command):
    """Take documents out of a sealed cache for good.

    Readers that open the cache from then on get padding in the documents' places: no tokens,
    targets, hidden states or attention maps. Rows that held nothing else are left out. Other
    documents keep their rows, and readers that have the cache open go on as before. The bytes stay
    on disk until `gc` overwrites them. A training run that began before is refused: start it anew.
    """

    cache: CacheArgument
    """The sealed cache."""
    source: str
    """Name of the corpus file in the manifest, relative to the corpus's directory, or the beginning
    of its sha256."""
    document: Annotated[tuple[int, ...], Bounds(0)] = ()
    """Documents of that file: the byte offset of a JSON line, or the record number in a table, from
    0. `inspect --row` shows them. Unset: every document of the file."""


@dataclass(frozen=True)
class Remove(Command):
    """Unlink signals from a sealed cache. Their files stay until `gc`."""

    cache: CacheArgument
    """The sealed cache."""
    signals: Annotated[tuple[str, ...], Positional, arg(metavar="SIGNAL…")]
    """Names such as hidden/12."""


@dataclass(frozen=True)
class CollectGarbage(Command):
    """Delete the files that a sealed cache's manifest does not name, and overwrite the forgotten.

    Files of removed signals and of unfinished additions are deleted. Units that hold forgotten
    documents are written again without them. Parts that are being captured are left alone. Other
    commands that change the cache wait for it. Nobody may read the cache by an older manifest at
    the same time. If it is stopped, run it again.
    """

    cache: CacheArgument
    """The sealed cache."""
    dry_run: bool = False
    """Only say what would be deleted."""


def _plan(arguments: list[str]) -> int:
    if arguments[:1] == ["--json"]:
        arguments = [*arguments[1:], "--json"]  # `parse` takes a config file only as the first
    config = parse(Plan, arguments, program="decant plan")

    from decant.pipelines.capture.estimate import estimate
    from decant.pipelines.capture.estimate_report import print_estimate

    given = {f.name: getattr(config, f.name) for f in dataclasses.fields(Precompute)}
    # Progress goes to standard error, so that standard output holds the document alone.
    progress = terminal(stderr=True, soft_wrap=True, highlight=False)
    estimated = estimate(Precompute(**given), console=progress)
    if config.json:
        tell(json.dumps(dataclasses.asdict(estimated), indent=1))
    else:
        print_estimate(estimated, terminal(soft_wrap=True, highlight=False))
    return 1 if estimated.problems else 0


def _precompute(arguments: list[str]) -> int:
    config = parse(Precompute, arguments, program="decant precompute")
    from decant.pipelines.capture.job import precompute
    from decant.schemas import open_cache

    precompute(config)
    cache = open_cache(config.output)
    units = [unit for part in cache.manifest.parts for unit in part.units]
    size = sum(entry.bytes for unit in units for entry in unit.files.values())
    scored = sum(unit.scored for unit in units)
    tell(
        f"sealed {config.output}: {len(cache):,} rows, {scored:,} positions with targets, "
        f"{size / 1e6:.1f} MB, cache_id {cache.manifest.cache_id}"
    )
    if config.seal_partial:
        tell("part of a capture: the same command without --seal-partial captures the rest")
    return 0


def _tokenise(arguments: list[str]) -> int:
    config = parse(Tokenise, arguments, program="decant tokenise")
    from decant.pipelines.capture.rows_only import tokenise_only

    manifest = tokenise_only(config)
    rows = sum(unit.rows for part in manifest.parts for unit in part.units)
    tell(
        f"sealed {config.output}, for [[data.caches]] of a training run: {rows:,} rows, cache_id "
        f"{manifest.cache_id}"
    )
    return 0


def _verify(arguments: list[str]) -> int:
    try:
        config = parse_flags(Verify, arguments, program="decant verify")
    except ValueError as error:
        tell(f"error: {error}", file=sys.stderr)
        return 2  # 1 would say that the cache is wrong
    from decant.pipelines.verification.report import verify_and_report

    return verify_and_report(
        config.cache,
        rows=config.rows,
        teacher=config.teacher,
        fetch=config.fetch,
        with_repair=config.repair,
        as_json=config.json,
    )


def _inspect(arguments: list[str]) -> int:
    config = parse_flags(Inspect, arguments, program="decant inspect")

    from decant.models.text.tokenizer import tokenizer_of
    from decant.pipelines.inspection import contents
    from decant.pipelines.inspection.row import document_origins, row_table, row_tokens
    from decant.pipelines.inspection.row_page import row_page
    from decant.schemas import open_cache

    cache, console = open_cache(config.cache), terminal(highlight=False)
    if "logits" not in cache.manifest.signals:
        if config.row is not None or config.html:
            raise ValueError(
                f"{config.cache}: holds rows without targets; leave out --row and --html"
            )
        console.print(contents.splits_table(cache))
        console.print("rows without targets: no teacher read them")
        return 0
    if config.row is None and not config.html:
        rows = cache.rows()
        sample = rows[:: max(1, len(rows) // max(1, config.sample))][: config.sample]
        console.print(contents.splits_table(cache), contents.sizes_table(cache, sample), sep="\n")
        console.print(contents.histograms(cache, sample), markup=False)
        if gone := contents.forgotten_summary(cache):
            console.print(gone, markup=False)
        return 0
    row = config.row or 0
    if not 0 <= row < len(cache):
        raise ValueError(f"{config.cache}: row {row} asked for; it has 0 to {len(cache) - 1}")
    tokens = row_tokens(cache, row, tokenizer_of(cache), top=config.top)
    if config.html:
        config.html.write_text(row_page(cache, row, tokens), "utf-8")
        tell(f"{config.html}: row {row}, {config.html.stat().st_size / 1e6:.1f} MB")
    else:
        console.print(row_table(tokens))
        for line in document_origins(cache, row):
            tell(line)
    return 0


def _merge(arguments: list[str]) -> int:
    config = parse_flags(Merge, arguments, program="decant merge")
    if not config.caches:
        tell("error: merge: name the caches to merge after the output directory", file=sys.stderr)
        return 2
    from decant.pipelines.upkeep.merge import merge
    from decant.schemas import open_cache

    merged = merge(config.output, config.caches)
    for cache in merged.left_out:
        tell(f"left out: {cache}")
    for name, why in merged.lost.items():
        tell(f"{name} is not in {config.output}: {why}")
    tell(
        f"{config.output}: {len(open_cache(config.output)):,} rows in "
        f"{len(merged.manifest.parts)} parts, cache_id {merged.manifest.cache_id}"
    )
    return 0


def _forget(arguments: list[str]) -> int:
    config = parse_flags(Forget, arguments, program="decant forget")
    if "--document" in arguments and not config.document:
        # Not the same as no flag, which forgets the whole file.
        tell("error: --document needs at least one number", file=sys.stderr)
        return 2
    from decant.pipelines.upkeep.forget import forget

    manifest, forgot = forget(config.cache, source=config.source, documents=config.document)
    tell(
        f"{config.cache}: forgot {len(forgot.documents):,} documents of {config.source}, "
        f"{forgot.tokens:,} tokens in {forgot.rows:,} rows; {forgot.empty_rows:,} of the rows held "
        f"nothing else. cache_id {manifest.cache_id}. The bytes stay on disk until "
        f"`decant gc {config.cache}`"
    )
    return 0


def _remove(arguments: list[str]) -> int:
    config = parse_flags(Remove, arguments, program="decant remove")
    if not config.signals:
        tell("error: remove: name the signals to unlink, such as hidden/12", file=sys.stderr)
        return 2
    from decant.pipelines.upkeep.remove import remove_signals

    manifest = remove_signals(config.cache, config.signals)
    tell(
        f"{config.cache} now holds {', '.join(manifest.signals)}, cache_id {manifest.cache_id}; "
        f"to delete the files: decant gc {config.cache}"
    )
    return 0


def _gc(arguments: list[str]) -> int:
    config = parse_flags(CollectGarbage, arguments, program="decant gc")
    from decant.pipelines.upkeep.collect import collect

    collected = collect(config.cache, dry_run=config.dry_run)
    if collected.dropped:
        tell(collected.dropped)
    if collected.units:
        done = "hold forgotten documents" if config.dry_run else "written again without them"
        tell(f"{collected.units:12,} units {done}")
    for path in collected.busy:
        tell(f"{path} is being captured: left as it is, run `gc` again after that")
    for path, size in collected.deleted.items():
        tell(f"{size / 1e6:12,.1f} MB  in {path.relative_to(config.cache)}")
    total = collected.deleted.total() / 1e6
    tell(f"{total:12,.1f} MB  {'could go' if config.dry_run else 'deleted'}")
    return 0


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "plan": _plan,
    "precompute": _precompute,
    "tokenise": _tokenise,
    "verify": _verify,
    "inspect": _inspect,
    "merge": _merge,
    "forget": _forget,
    "remove": _remove,
    "gc": _gc,
}
"""By name: a function of the arguments after the name, which returns the exit status."""

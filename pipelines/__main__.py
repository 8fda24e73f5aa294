"""`decant precompute [CONFIG.toml] [--flag value …]`, `plan` before it with the same;
after it `verify CACHE`, `inspect CACHE`, `merge OUTPUT CACHE…`, `forget CACHE --source NAME`,
`remove CACHE SIGNAL…` and `gc CACHE`; `tokenise` for rows without a teacher."""

import _thread
import argparse
import contextlib
import dataclasses
import json
import logging
import signal
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from decant.pipelines.config import Precompute, Tokenise
from decant.pipelines.upkeep.garbage import delete, unnamed
from decant.pipelines.upkeep.remove import remove_signals
from decant.settings import parse

_AGAIN_SECONDS = 0.05


def main(arguments: list[str]) -> int:
    """Run a command; errors of input are printed without a traceback. Returns the exit status."""
    if not arguments or arguments[0] not in COMMANDS:
        asked_for = arguments[:1] in (["-h"], ["--help"])
        usage = f"usage: decant {{{','.join(COMMANDS)}}} …"
        print(usage, file=sys.stdout if asked_for else sys.stderr)
        return 0 if asked_for else 2
    # A worker's error is printed once, as it was meant, not also as Beam's own traceback, and
    # nobody needs to hear which of Beam's optional clouds are not installed.
    logging.basicConfig(level=logging.ERROR)
    logging.getLogger("apache_beam").setLevel(logging.CRITICAL)
    stopped_by: list[int] = []
    try:
        with _stopping(stopped_by):
            return COMMANDS[arguments[0]](arguments[1:])
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        if "No space left" in str(error):
            print("Free some space and run again: what is committed stays.", file=sys.stderr)
        return 1
    except KeyboardInterrupt as stop:
        done = f": {stop}" if str(stop) else ""
        print(
            f"\nstopped{done}; run the same command again and it goes on from here", file=sys.stderr
        )
        return 128 + (stopped_by or [signal.SIGINT])[0]


@contextlib.contextmanager
def _stopping(stopped_by: list[int]) -> Iterator[None]:
    """Have SIGTERM, which a batch scheduler sends, do what Ctrl-C does, and say that it came."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may ask for signals
        return

    def stop(number: int, _: object) -> None:
        stopped_by.append(number)
        raise KeyboardInterrupt

    def ignored(what: "sys.UnraisableHookArgs") -> None:
        if not issubclass(what.exc_type, KeyboardInterrupt):
            hook_before(what)
            return
        # Raised where Python lets nothing out (a finaliser, a weak reference's callback), so nobody
        # stopped: once more, and not from here, which is still inside.
        number = stopped_by[0] if stopped_by else signal.SIGINT
        threading.Timer(_AGAIN_SECONDS, _thread.interrupt_main, [number]).start()

    before, hook_before = signal.signal(signal.SIGTERM, stop), sys.unraisablehook
    sys.unraisablehook = ignored
    try:
        yield
    finally:
        sys.unraisablehook = hook_before
        signal.signal(signal.SIGTERM, before)


def _precompute(arguments: list[str]) -> int:
    config = parse(Precompute, arguments, program="decant precompute")
    # Imported here, so that --help and a config typo do not wait for jax and Beam.
    from decant.pipelines.capture.job import precompute
    from decant.schemas import open_cache

    precompute(config)
    cache = open_cache(config.output)
    parts = cache.manifest.parts
    units = [unit for part in parts for unit in part.units]
    size = sum(entry.bytes for unit in units for entry in unit.files.values())
    scored = sum(unit.scored for unit in units)
    print(
        f"sealed {config.output}: {len(cache):,} rows, {scored:,} positions with targets, "
        f"{size / 1e6:.1f} MB, cache_id {cache.manifest.cache_id}"
    )
    if config.seal_partial:
        print("part of a capture: the same command without --seal-partial captures the rest")
    return 0


def _tokenise(arguments: list[str]) -> int:
    config = parse(Tokenise, arguments, program="decant tokenise")
    from decant.pipelines.capture.rows_only import tokenise_only

    manifest = tokenise_only(config)
    print(
        f"sealed {config.output}, for [[data.caches]] of a training run: "
        f"{sum(unit.rows for part in manifest.parts for unit in part.units):,} rows, cache_id "
        f"{manifest.cache_id}"
    )
    return 0


def _remove(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="decant remove",
        description="Unlink signals from a sealed cache. Their files stay until `gc`.",
    )
    parser.add_argument("cache", type=Path)
    parser.add_argument("signals", nargs="+", metavar="SIGNAL", help="such as hidden/12")
    options = parser.parse_args(arguments)
    manifest = remove_signals(options.cache, options.signals)
    print(
        f"{options.cache} holds {', '.join(manifest.signals)} now, cache_id {manifest.cache_id}; "
        f"to delete the files: decant gc {options.cache}"
    )
    return 0


def _gc(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="decant gc",
        description="Delete what a sealed cache's manifest does not name: removed signals and "
        "additions that were never finished; captures under way are left alone. Overwrite what was "
        "forgotten: units that hold some of it are written again without. Nobody may be adding to "
        "it or reading an older manifest meanwhile. Stopped anywhere, the next `gc` goes on.",
    )
    parser.add_argument("cache", type=Path)
    parser.add_argument("--dry-run", action="store_true", help="only say what would go")
    options = parser.parse_args(arguments)
    from decant.pipelines.upkeep.overwrite import purge

    written = purge(options.cache, dry_run=options.dry_run)
    if written:
        said = "hold forgotten documents" if options.dry_run else "written again without them"
        print(f"{written:12,} units {said}")
    sizes: Counter[Path] = Counter()
    for path, size in unnamed(options.cache):
        # Commits are one file a unit: their directory is told, not each of them.
        sizes[path if path.is_dir() else path.parent] += size
        if not options.dry_run:
            delete(path)
    for path, size in sizes.items():
        print(f"{size / 1e6:12,.1f} MB  in {path.relative_to(options.cache)}")
    print(f"{sizes.total() / 1e6:12,.1f} MB  {'could go' if options.dry_run else 'deleted'}")
    return 0


def _inspect(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="decant inspect",
        description="What a sealed cache holds, where its bytes go, and how sure its teacher was; "
        "or one row, token by token.",
    )
    parser.add_argument("cache", type=Path)
    parser.add_argument("--row", type=int, help="show this row instead")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the row as a web page")
    parser.add_argument("--top", type=int, default=5, help="alternatives a token (default: 5)")
    parser.add_argument("--sample", type=int, default=64, help="rows for the histograms")
    options = parser.parse_args(arguments)
    # Imported here, so that --help does not wait for jax.
    from rich.console import Console

    from decant.models.text.tokenizer import tokenizer_of
    from decant.pipelines.inspection import contents as inspection
    from decant.pipelines.inspection.row_page import row_page
    from decant.schemas import open_cache

    cache, console = open_cache(options.cache), Console(highlight=False)
    if "logits" not in cache.manifest.signals:
        if options.row is not None or options.html:
            raise ValueError(
                f"{options.cache}: rows alone, without targets to show; leave out --row and --html"
            )
        console.print(inspection.contents(cache))
        console.print("rows alone: no teacher said anything of them")
        return 0
    if options.row is None and not options.html:
        rows = cache.rows()
        sample = rows[:: max(1, len(rows) // max(1, options.sample))][: options.sample]
        console.print(inspection.contents(cache), inspection.sizes(cache, sample), sep="\n")
        console.print(inspection.distributions(cache, sample), markup=False)
        if gone := inspection.forgotten(cache):
            console.print(gone, markup=False)
        return 0
    row = options.row or 0
    if not 0 <= row < len(cache):
        raise ValueError(f"{options.cache}: row {row} asked for; it has 0 to {len(cache) - 1}")
    tokenizer = tokenizer_of(cache)
    tokens = inspection.tokens_of(cache, row, tokenizer, top=options.top)
    if options.html:
        options.html.write_text(row_page(cache, row, tokens), "utf-8")
        print(f"{options.html}: row {row}, {options.html.stat().st_size / 1e6:.1f} MB")
    else:
        console.print(inspection.row_table(tokens))
        for line in inspection.origins(cache, row):
            print(line)
    return 0


def _plan(arguments: list[str]) -> int:
    as_json = "--json" in arguments
    arguments = [argument for argument in arguments if argument != "--json"]
    config = parse(Precompute, arguments, program="decant plan [--json]")
    from rich.console import Console

    from decant.pipelines.capture.estimate import estimate, show

    # What it says on the way is not part of the document.
    found = estimate(config, console=Console(stderr=True, soft_wrap=True, highlight=False))
    if as_json:
        print(json.dumps(dataclasses.asdict(found), indent=1))
    else:
        show(found, Console(soft_wrap=True, highlight=False))
    return 1 if found.problems else 0


def _verify(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="decant verify",
        description="Hold every file of a sealed cache to what was committed, then have the "
        "teacher read some rows again, plainly, and compare. Exit status: 0 fine, 1 something is "
        "wrong, 2 it could not be told.",
    )
    parser.add_argument("cache", type=Path)
    parser.add_argument("--rows", type=int, default=16, help="rows to read again; 0: files only")
    parser.add_argument("--teacher", help="where the teacher lies now, if not where it lay")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument(
        "--repair", action="store_true", help="capture again the units whose files are damaged"
    )
    options = parser.parse_args(arguments)
    if options.rows < 0:
        parser.error(f"--rows is {options.rows}; 0 or more")
    from decant.pipelines.verification.verify import verify_and_tell

    return verify_and_tell(
        options.cache,
        rows=options.rows,
        teacher=options.teacher,
        mend=options.repair,
        as_json=options.json,
    )


def _merge(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="decant merge",
        description="Make OUTPUT a cache of all parts of other caches of the same teacher and "
        "tokenizer. Nothing is copied: OUTPUT refers to the parts by relative paths, so that the "
        "caches can move together, and is an error to open once one of them is gone. What such a "
        "cache forgets, OUTPUT forgets; parts that it gains need another `merge` to the same "
        "OUTPUT. Documents that are in several of them are not looked for.",
    )
    parser.add_argument("output", type=Path)
    parser.add_argument("caches", type=Path, nargs="+", metavar="CACHE")
    options = parser.parse_args(arguments)
    from decant.pipelines.upkeep.merge import merge
    from decant.schemas import open_cache

    merged = merge(options.output, options.caches)
    for what in merged.left_out:
        print(f"left out: {what}")
    for name, why in merged.lost.items():
        print(f"{name} is not in {options.output}: {why}")
    print(
        f"{options.output}: {len(open_cache(options.output)):,} rows in "
        f"{len(merged.manifest.parts)} parts, cache_id {merged.manifest.cache_id}"
    )
    return 0


def _forget(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="decant forget",
        description="Take documents out of a sealed cache for good. Whoever opens it from then on "
        "gets padding in their place, without tokens, targets, states or maps, and no row that "
        "held nothing else; other documents keep their rows. Who has it open reads on as before. "
        "The bytes on disk stay until `gc`, which overwrites them. A training run that began "
        "before is refused: start it anew.",
    )
    parser.add_argument("cache", type=Path)
    parser.add_argument(
        "--source",
        required=True,
        metavar="NAME",
        help="the file's name in the "
        "manifest, below the corpus's directory, or the beginning of its sha256",
    )
    parser.add_argument(
        "--document",
        type=int,
        nargs="+",
        default=[],
        metavar="N",
        help="byte "
        "offset of the document's line in the file, or in a table its number from 0; `inspect "
        "--row` shows them (default: every document of the file)",
    )
    options = parser.parse_args(arguments)
    from decant.pipelines.upkeep.forget import forget

    manifest, forgot = forget(options.cache, source=options.source, documents=options.document)
    print(
        f"{options.cache}: forgotten {len(forgot.documents):,} documents of {options.source}, "
        f"{forgot.tokens:,} tokens in {forgot.rows:,} rows, {forgot.empty_rows:,} of which held "
        f"nothing else; cache_id {manifest.cache_id}. Their bytes stay until "
        f"`decant gc {options.cache}`"
    )
    return 0


COMMANDS = {
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

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

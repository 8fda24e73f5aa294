"""The tokenise job: all documents of a corpus to rows on disk, each distinct document once."""

import contextlib
import dataclasses
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

import apache_beam as beam

from decant.pipelines.rows.records import Place
from decant.pipelines.rows.rollouts import MOST_WRITERS
from decant.pipelines.rows.shard import (
    SAMPLE_ROWS,
    DocumentHash,
    TokeniseJob,
    document_hashes,
    older_document_hashes,
    shard_commit,
    staged_unit,
    tokenise_shard,
)
from decant.pipelines.rows.sources import InputShard, SourceFile, cut_shards, weights_by_name
from decant.pipelines.runners.process_pool import process_pool
from decant.pipelines.runners.run_pipeline import IN_PROCESS, Build
from decant.schemas.disk import inside, steps
from decant.schemas.disk.array_record import as_json
from decant.schemas.disk.atomic import read_json, write_json
from decant.schemas.disk.layout import ROWS, PartLayout, cache_of
from decant.schemas.disk.stand_in import each_of, exists
from decant.schemas.disk.steps import Step
from decant.schemas.host import cores
from decant.schemas.manifest.manifest import SPLITS, Skipped, Source, Unit, unit_from_json
from decant.schemas.manifest.plan import PlannedRows, planned_rows_from_json

_BYTES_A_PROCESS = 32 << 20  # starting a process takes as long as tokenising this much text


def local_processes(asked: int | None, sources: Sequence[SourceFile], *, runner: str) -> int:
    """Number of processes of this machine that tokenise; 1 if the Beam runner has its own workers.

    `asked` is the setting `tokenise_workers`. If it is None, there is one process per core that
    the host or container allows, but at most one per 32 MiB of text.
    """
    if runner != IN_PROCESS:
        return 1
    size = sum(source.bytes for source in sources)
    return asked or max(1, min(cores(), size // _BYTES_A_PROCESS))


def tokenise(
    job: TokeniseJob,
    *,
    rows_id: str,
    run: Callable[[Build], None],
    processes: int = 1,
    skipped: Sequence[Skipped] = (),
) -> PlannedRows:
    """Write all rows of the part under their final names; return the list of their units.

    Skips the shards that an earlier run finished. If `processes` is 1, `run` is called to run a
    Beam pipeline; otherwise that many processes of this machine do the work. `skipped` are listed
    before the documents that are skipped here. ValueError if no document has a token to predict.
    """
    layout = PartLayout(job.part)
    done = layout.work / "rows.json"
    if exists(done):
        return planned_rows_from_json(read_json(done))
    shards = cut_shards(job.sources, shard_bytes=job.shard_bytes)
    commits = [shard_commit(job, shard.number) for shard in shards]
    if not all(each_of(exists, commits, cache=job.part)):
        if processes > 1:
            with process_pool(processes, shared=job) as pool:
                _tokenise_shards(shards, job, each=pool.map)
        else:
            run(lambda pipeline: _build(pipeline, job, shards))
    rows = _gather(job, shards, rows_id=rows_id, skipped=skipped)
    steps.reached(Step.ROWS_GATHERED)
    write_json(done, as_json(rows), first=True)
    return rows


def tokenise_here(job: TokeniseJob, shards: Sequence[InputShard]) -> PlannedRows:
    """Rows of `shards` alone, as if they were the whole corpus, made in this process."""

    def each(function: Callable[..., Any], *arguments: Iterable[Any]) -> Iterator[Any]:
        return (function(*values, job) for values in zip(*arguments, strict=True))

    _tokenise_shards(shards, job, each=each)
    return _gather(job, shards, rows_id="0" * 64)  # a sample has no identity


def _tokenise_shards(
    shards: Sequence[InputShard], job: TokeniseJob, *, each: Callable[..., Iterator[Any]]
) -> None:
    """Do the work of `_build` without Beam.

    `each(function, *arguments)` is like `map`, and calls `function` with the job as one more
    argument at the end.
    """
    older = each(older_document_hashes, cut_shards(job.older, shard_bytes=job.shard_bytes))
    hashes = chain(older, each(document_hashes, shards))
    repeated = _repeated(chain.from_iterable(hashes))
    for _ in each(tokenise_shard, shards, [frozenset(repeated[s.number]) for s in shards]):
        pass


def _repeated(hashes: Iterable[DocumentHash]) -> dict[int, set[Place]]:
    """Places of the documents whose content occurs earlier in `hashes`, by shard number."""
    seen: set[bytes] = set()
    repeated: dict[int, set[Place]] = defaultdict(set)
    for content, (shard, place) in hashes:
        if content in seen and shard is not None:
            repeated[shard].add(place)
        seen.add(content)
    return repeated


def _build(pipeline: beam.Pipeline, job: TokeniseJob, shards: list[InputShard]) -> None:
    """Add the steps to `pipeline`. Only hashes, places and shard descriptions pass through Beam;
    workers read the text twice instead, once to hash it and once to tokenise it."""
    cut = pipeline | "Shards" >> beam.Create(shards) | "Spread" >> beam.Reshuffle()
    hashes = cut | "Hash documents" >> beam.FlatMap(document_hashes, job)
    if job.older:
        # Older files are read again, because caches store no hashes of documents.
        older_shards = cut_shards(job.older, shard_bytes=job.shard_bytes)
        older = pipeline | "Older shards" >> beam.Create(older_shards) | beam.Reshuffle()
        kept = older | "Hash older documents" >> beam.FlatMap(older_document_hashes, job)
        hashes = (hashes, kept) | "Of all parts" >> beam.Flatten()
    repeated = (
        hashes
        | "Same content" >> beam.GroupByKey()
        | "All but the first" >> beam.FlatMap(_all_but_first)
    )
    keyed = cut | "By number" >> beam.Map(lambda shard: (shard.number, shard))
    _ = (
        {"shard": keyed, "repeated": repeated}
        | "With their duplicates" >> beam.CoGroupByKey()
        | "Tokenise" >> beam.Map(_tokenise_grouped, job)
    )


def _all_but_first(
    group: tuple[bytes, Iterable[tuple[int | None, Place]]],
) -> Iterator[tuple[int, Place]]:
    _, places = group
    # Documents of older parts come first: their source number is the lowest.
    ordered = sorted(places, key=lambda item: (item[1].source, item[1].offset))
    yield from ((shard, place) for shard, place in ordered[1:] if shard is not None)


def _tokenise_grouped(group: tuple[int, dict[str, Iterable]], job: TokeniseJob) -> None:
    _, values = group
    (shard,) = values["shard"]
    tokenise_shard(shard, frozenset(values["repeated"]), job)


def _gather(
    job: TokeniseJob,
    shards: Sequence[InputShard],
    *,
    rows_id: str,
    skipped: Sequence[Skipped] = (),
) -> PlannedRows:
    """Number the units of all shards and give their files their final names.

    If it is interrupted, it can be called again.
    """
    layout = PartLayout(job.part)
    weights = weights_by_name(job.corpus)
    units: list[Unit] = []
    skipped = list(skipped)
    sample: list[tuple[str, int, int]] = []
    duplicates = 0
    lost: Counter[str] = Counter()
    writers: Counter[str] = Counter()
    commits = each_of(read_json, [shard_commit(job, s.number) for s in shards], cache=job.part)
    for shard, commit in zip(shards, commits, strict=True):
        first, counts = len(units), dict.fromkeys(SPLITS, 0)
        group = _group(job, shard, list(weights))
        for unit in map(unit_from_json, commit["units"]):
            staged = staged_unit(job, shard.number, unit.split, counts[unit.split])
            counts[unit.split] += 1
            final = layout.records(ROWS, len(units))
            root = cache_of(final) or job.part
            # It is missing if an earlier run, or another process, has moved it; and in a bucket,
            # where rows have the name of their content.
            with contextlib.suppress(FileNotFoundError):
                inside.move(root, staged.relative_to(root), final.relative_to(root))
            units.append(dataclasses.replace(unit, group=group))
        # A shard's train units come first, so their numbers in the writer only need the offset.
        sample += [(key, first + unit, offset) for key, unit, offset in commit["sample"]]
        skipped += [Skipped(**item) for item in commit["skipped"]]
        duplicates += commit["duplicates"]
        lost.update({name: count for name, (count, _) in commit.get("unwritten", {}).items()})
        writers.update(commit.get("writers", {}))
    if not any(unit.scored for unit in units):
        raise ValueError(
            f"the corpus of {len(job.sources)} files gave no row: no document has a token to "
            "predict"
        )
    if len(writers) > MOST_WRITERS:
        raise ValueError(
            f"the rollouts name {len(writers):,} writers; expected at most {MOST_WRITERS:,}. "
            "`writer` names the model that wrote a rollout, and many rollouts have the same"
        )
    return PlannedRows(
        rows_id=rows_id,
        unit_rows=_unit_rows(job, units),
        units=tuple(units),
        sources=tuple(Source(source.name, source.sha256) for source in job.sources),
        skipped=tuple(skipped),
        duplicates=duplicates,
        sample=tuple((unit, offset) for _, unit, offset in sorted(sample)[:SAMPLE_ROWS]),
        unwritten=dict(sorted(lost.items())),
        writers=dict(sorted(writers.items())),
        weights=weights,
    )


def _group(job: TokeniseJob, shard: InputShard, names: Sequence[str]) -> str:
    """Name of the source group of a shard's rows; empty without `corpus.sources`.

    Only empty files of other groups may lie before the last file.
    """
    return names[job.sources[shard.spans[-1].source].group] if names else ""


def _unit_rows(job: TokeniseJob, units: Sequence[Unit]) -> int:
    """U of the units, some of which an earlier run may have made with a larger U."""
    largest = max(unit.rows for unit in units)
    return max(job.unit_rows, 1 << (largest - 1).bit_length())

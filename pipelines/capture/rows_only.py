"""A cache of rows alone: text for students to read beside a cache that holds a teacher's targets.

No teacher runs. The rows are those that `precompute` would make of the same corpus, so that they
can be mixed with a capture's (`[[data.caches]]` of a training run).
"""

import dataclasses
import functools
from pathlib import Path

from rich.console import Console

from decant.models.text.chat_template import ChatTemplate
from decant.models.text.tokenizer import Tokenizer, tokenizer_of
from decant.pipelines.capture.schedule import totals
from decant.pipelines.capture.seal import clean
from decant.pipelines.config import Corpus, Tokenise
from decant.pipelines.rows.documents import recognised
from decant.pipelines.rows.rules import choose_unit_rows, row_rules
from decant.pipelines.rows.shard import TokeniseJob
from decant.pipelines.rows.sources import SourceFile, find_sources, resolve_defaults
from decant.pipelines.rows.tokenise import local_processes, tokenise
from decant.pipelines.runners.run_pipeline import run_pipeline
from decant.pipelines.teacher.identity import digest_memory
from decant.schemas import Cache, open_cache
from decant.schemas.disk.atomic import write_bytes
from decant.schemas.disk.identity import rows_id
from decant.schemas.disk.layout import MANIFEST, TOKENIZER, part_layout
from decant.schemas.manifest.manifest import Manifest, Part, Source, read_manifest, write_manifest
from decant.schemas.manifest.plan import PlannedRows
from decant.schemas.manifest.request import claim


def tokenise_only(config: Tokenise, *, console: Console | None = None) -> Manifest:
    """Make the rows that `config` asks for and seal them; go on where an earlier run stopped."""
    console = console or Console(soft_wrap=True, highlight=False)
    like, layout = open_cache(config.like), part_layout(config.output, 0)
    tokenizer = tokenizer_of(like)
    asked = _as_long(config.corpus, like)
    found = find_sources(asked.files, max_bytes=asked.max_bytes, memory=digest_memory())
    sources = recognised(found, text_field=asked.text_field)
    corpus = resolve_defaults(asked, sources)
    template = _chat_template(corpus, tokenizer, sources, like=like)
    named = [Source(source.name, source.sha256) for source in sources]
    identity = rows_id(
        tokenizer=tokenizer.digest,
        rules=row_rules(corpus, sources, template=template),
        sources=[(source.name, source.sha256) for source in named],
    )
    request = {
        "corpus": f"{len(sources)} files, rows of {corpus.sequence_length} without a teacher "
        f"(rows_id {identity[:12]})"
    }
    claim(layout.request, request, sources=named, cache=config.output)
    if (config.output / MANIFEST).exists():
        console.print(f"{config.output}: sealed already, nothing to do")
        return read_manifest(config.output)
    for file in sorted(like.tokenizer_path.iterdir()):
        write_bytes(config.output / TOKENIZER / file.name, file.read_bytes())
    job = TokeniseJob(
        # Absolute: workers may have another working directory.
        part=layout.root.absolute(),
        tokenizer=(config.output / TOKENIZER).absolute(),
        sources=tuple(sources),
        corpus=corpus,
        unit_rows=choose_unit_rows(sources, length=corpus.sequence_length),
    )
    rows = tokenise(
        job,
        rows_id=identity,
        run=functools.partial(
            run_pipeline,
            runner=config.runner,
            options=config.runner_options,
        ),
        processes=local_processes(config.tokenise_workers, sources, runner=config.runner),
    )
    sealed = _seal(config.output, rows, like=like.manifest)
    count, tokens = totals(rows.units)
    console.print(f"rows: {count:,} of {corpus.sequence_length} tokens ({tokens:,} in all)")
    return sealed


def _seal(cache: Path, rows: PlannedRows, *, like: Manifest) -> Manifest:
    layout = part_layout(cache, 0)
    part = Part(
        path=layout.root.relative_to(cache).as_posix(),
        rows_id=rows.rows_id,
        unit_rows=rows.unit_rows,
        units=rows.units,
        signals={},
        statistics={},
        sources=rows.sources,
        skipped=rows.skipped,
        duplicates=rows.duplicates,
    )
    manifest = Manifest(
        sequence_length=like.sequence_length,
        vocabulary_size=like.vocabulary_size,
        tokenizer=like.tokenizer,
        parts=(part,),
    )
    sealed = write_manifest(cache, manifest, replaces=None)
    clean(layout, sealed=sealed, path=part.path)
    return sealed


def _as_long(corpus: Corpus, like: Cache) -> Corpus:
    """The corpus in rows of the other cache's length. ValueError if it asks for another."""
    length = like.manifest.sequence_length
    if corpus.sequence_length not in (length, Corpus().sequence_length):
        raise ValueError(
            f"corpus.sequence_length is {corpus.sequence_length}, but {like.path} has rows of "
            f"{length}, and one batch cannot hold both; leave it out"
        )
    return dataclasses.replace(corpus, sequence_length=length)


def _chat_template(
    corpus: Corpus, tokenizer: Tokenizer, sources: list[SourceFile], *, like: Cache
) -> ChatTemplate | None:
    chats = [source.path for source in sources if source.kind == "chat"]
    template = tokenizer.chat_template(date=corpus.chat_date) if chats else None
    if chats and not template:
        raise ValueError(
            f"{chats[0]} holds chats, but there is no chat template in {like.tokenizer_path}; "
            "give the documents as prompt and completion"
        )
    return template

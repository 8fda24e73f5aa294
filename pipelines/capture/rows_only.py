"""`tokenise`: a cache of rows without a teacher, for students to mix with a capture's rows.

The rows are the ones that `precompute` would make of the same corpus. `[[data.caches]]` of a
training run names both caches.
"""

import dataclasses
import functools

from rich.console import Console

from decant.models.text.tokenizer import tokenizer_of
from decant.pipelines.capture.progress import tokenise_progress
from decant.pipelines.capture.remaining_units import totals
from decant.pipelines.capture.remote_corpus import kept_remote, pinned_corpus, remote_digests
from decant.pipelines.capture.seal import clean, seal_rows
from decant.pipelines.capture.step_inputs import (
    chat_template,
    corpus_sources,
    decided_corpus,
    expected_batch_rows,
    identify_rows,
    tokenise_job,
    with_template_file,
)
from decant.pipelines.config import Corpus, Teacher, Tokenise
from decant.pipelines.rows import unwritten
from decant.pipelines.rows.heldout_pieces import needs_pieces
from decant.pipelines.rows.rules import RowRules, row_rules, rules_of_releases, settings_of_rows
from decant.pipelines.rows.tokenise import local_processes, tokenise
from decant.pipelines.runners.run_pipeline import run_pipeline
from decant.progress import notices
from decant.schemas import Cache, open_cache
from decant.schemas.disk.atomic import read_json
from decant.schemas.disk.layout import MANIFEST, part_layout
from decant.schemas.disk.locks import capturing, changing
from decant.schemas.disk.stand_in import address_of, by_address, exists, working_folder
from decant.schemas.manifest.manifest import Manifest, Source, read_manifest
from decant.schemas.manifest.request import Remote, claim
from decant.schemas.manifest.tokenizer_files import write_tokenizer_files


def tokenise_only(config: Tokenise, *, console: Console | None = None) -> Manifest:
    """Make and seal the rows that `config` asks for; a rerun goes on where the last one stopped."""
    config = dataclasses.replace(config, output=working_folder(config.output, writing=True))
    with by_address(config.output):
        return _tokenise(config, console or notices(quiet=config.quiet))


def _tokenise(config: Tokenise, console: Console) -> Manifest:
    like, layout = open_cache(config.like), part_layout(config.output, 0)
    tokenizer = with_template_file(tokenizer_of(like), config.corpus)
    asked = _with_row_length(config.corpus, like)
    kept = kept_remote(config.output)
    asked, revisions = pinned_corpus(asked, kept.revisions, tell=console.print)
    sources, skipped = corpus_sources(asked, digests=kept.digests, tell=console.print)
    corpus = decided_corpus(asked, sources)
    template = chat_template(
        corpus,
        tokenizer,
        sources,
        missing=f"there is no chat template in {like.tokenizer_path}; give the documents as prompt "
        "and completion",
    )
    newest = RowRules(pieces=needs_pieces(sources, corpus))
    older = (rules for rules in rules_of_releases() if rules.marking == newest.marking)
    rows_ids = {
        rules: identify_rows(
            corpus, sources, tokenizer=like.manifest.tokenizer, template=template, rules=rules
        )
        for rules in (newest, *older)
    }

    def request(rules: RowRules) -> dict[str, str]:
        return {
            "corpus": f"{len(sources)} files, rows of {corpus.sequence_length} without a teacher "
            f"(rows_id {rows_ids[rules][:12]})"
        }

    begun = read_json(layout.request) if exists(layout.request) else {}
    before = (rules for rules in rows_ids if begun.get("corpus") == request(rules)["corpus"])
    rules = next(before, newest)
    named = row_rules(corpus, sources, template=template, rules=rules)
    settings = settings_of_rows(named, tokenizer=like.manifest.tokenizer)
    bound = [Source(source.name, source.sha256) for source in sources]
    with changing(config.output):
        claim(
            layout.request,
            request(rules),
            sources=bound,
            settings=settings,
            cache=config.output,
            remote=Remote(revisions, remote_digests(sources)),
        )
    if exists(config.output / MANIFEST):
        console.print(f"{address_of(config.output)}: sealed already, nothing to do")
        return read_manifest(config.output)
    config_file = {n: d for n, d in like.tokenizer_files().items() if n == "config.json"}
    write_tokenizer_files(config.output, tokenizer.files() | config_file)
    job = tokenise_job(
        config.output,
        layout,
        corpus,
        sources,
        vocabulary=like.manifest.vocabulary_size,
        batch_rows=expected_batch_rows(Teacher(), length=corpus.sequence_length),
        rules=rules,
    )
    with capturing(layout.root), tokenise_progress(job, console=console):
        rows = tokenise(
            job,
            rows_id=rows_ids[rules],
            run=functools.partial(
                run_pipeline, runner=config.runner, options=config.runner_options
            ),
            processes=local_processes(config.tokenise_workers, sources, runner=config.runner),
            skipped=skipped,
        )
        sealed = seal_rows(config.output, layout, rows, like=like.manifest)
    for notice in unwritten.notices(layout.work):
        console.print(notice)
    clean(config.output, layout)
    count, tokens = totals(rows.units)
    console.print(f"rows: {count:,} of {corpus.sequence_length} tokens ({tokens:,} in all)")
    return sealed


def _with_row_length(corpus: Corpus, like: Cache) -> Corpus:
    """The corpus in rows as long as those of `like`. ValueError if it asks for another length."""
    length = like.manifest.sequence_length
    if corpus.sequence_length not in (length, Corpus().sequence_length):
        raise ValueError(
            f"corpus.sequence_length is {corpus.sequence_length}, but {like.address} has rows of "
            f"{length}, and one batch cannot hold both; leave it out"
        )
    return dataclasses.replace(corpus, sequence_length=length)

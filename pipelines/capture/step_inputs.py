"""The settings turned into inputs of each step: source files, rows_id, jobs, signals.

The capture of a part, `tokenise` without a teacher and `plan` all build their steps from these.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from decant.models.text.chat_template import ChatTemplate
from decant.models.text.tokenizer import Tokenizer
from decant.pipelines.calibration.calibrate import CalibrateJob
from decant.pipelines.calibration.known import Known
from decant.pipelines.calibration.signal_specs import AddedSignal, describe_signals
from decant.pipelines.config import Corpus, Precompute, SourceGroup, Teacher
from decant.pipelines.rows.documents import with_kinds
from decant.pipelines.rows.matching import fail
from decant.pipelines.rows.rules import NEWEST, RowRules, choose_unit_rows, row_rules
from decant.pipelines.rows.shard import TokeniseJob
from decant.pipelines.rows.sources import (
    SourceFile,
    find_sources,
    resolve_defaults,
    weights_by_name,
)
from decant.pipelines.teacher.batch_size import CPU_BATCH_TOKENS, rows_of_tokens
from decant.pipelines.teacher.opened import OpenedTeacher
from decant.schemas.disk.identity import digest_memory, rows_id
from decant.schemas.disk.layout import TOKENIZER, PartLayout
from decant.schemas.manifest.manifest import Skipped
from decant.schemas.manifest.plan import PlannedRows

_NAMED = 5
"""Files that a line names."""


def corpus_sources(
    corpus: Corpus,
    *,
    digests: Mapping[str, str] | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> tuple[tuple[SourceFile, ...], tuple[Skipped, ...]]:
    """The files that `corpus` names, hashed, each with the kind of its documents; and the paths
    left out because they cannot be read.

    `digests` are the hashes that the capture's directory keeps of files at addresses. `tell` gets a
    line about files in folders that are passed over, and one if files must be read to hash them.
    Errors as `find_sources` and, for addresses, `matching_remote`; ValueError for a path that
    cannot be read if `on_error` is "fail".
    """
    skipped: list[Skipped] = []
    passed_over: list[str] = []

    def skip(path: str, problem: str) -> None:
        skipped.append(Skipped(path, problem))

    def pass_over(path: str, _: str) -> None:
        passed_over.append(path)

    files = find_sources(
        _groups(corpus),
        max_bytes=corpus.max_bytes,
        memory=digest_memory(),
        known=digests,
        tell=tell,
        refuse=skip if corpus.on_error == "skip" else fail,
        passed_over=pass_over,
    )
    if passed_over:
        more = f" and {len(passed_over) - _NAMED} more" if len(passed_over) > _NAMED else ""
        shown = ", ".join(passed_over[:_NAMED])
        tell(f"note: passed over in folders, because hidden or not text: {shown}{more}")
    return tuple(with_kinds(files, text_field=corpus.text_field)), tuple(skipped)


def _groups(corpus: Corpus) -> Sequence[str | SourceGroup]:
    """The groups of the corpus's files. ValueError if the settings name none, or files twice."""
    if not corpus.sources:
        return [SourceGroup(files=corpus.files)]
    if corpus.files != Corpus().files:
        raise ValueError(
            "corpus.files and [[corpus.sources]] both name files; move corpus.files into a "
            "[[corpus.sources]] of its own"
        )
    for number, group in enumerate(corpus.sources):
        if not group.files:
            raise ValueError(f"corpus.sources[{number}].files is empty; name its files")
    weights_by_name(corpus)  # refuses two groups of one name
    return corpus.sources


def decided_corpus(
    corpus: Corpus, sources: Sequence[SourceFile], *, first: Corpus | None = None
) -> Corpus:
    """The settings with every default filled in for these sources.

    `first` is the decided corpus of the cache's first part. Later parts keep its held-out share, so
    that a document is held out or not whichever part it comes in.
    """
    corpus = resolve_defaults(corpus, sources)
    return dataclasses.replace(corpus, heldout=first.heldout) if first else corpus


def with_template_file(tokenizer: Tokenizer, corpus: Corpus) -> Tokenizer:
    """The tokenizer with the template in the file `corpus.chat_template`, if that is set."""
    if corpus.chat_template is None:
        return tokenizer
    path = Path(corpus.chat_template)
    if not path.is_file():
        raise FileNotFoundError(f"corpus.chat_template: {path} is no file (from {Path.cwd()})")
    try:
        return tokenizer.with_chat_template(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"corpus.chat_template: {path} is not UTF-8 text: {error}") from error


def chat_template(
    corpus: Corpus, tokenizer: Tokenizer, sources: Sequence[SourceFile], *, missing: str
) -> ChatTemplate | None:
    """The template that renders chats; None if no source holds chats.

    ValueError if the tokenizer has no template. `missing` is the end of that error: who lacks the
    template, and what to do.
    """
    chats = [source.path for source in sources if source.kind == "chat"]
    asked = {"date": corpus.chat_date, "variables": corpus.chat_variables}
    template = tokenizer.chat_template(**asked) if chats else None
    if chats and not template:
        raise ValueError(f"{chats[0]} holds chats, but {missing}")
    return template


def identify_rows(
    corpus: Corpus,
    sources: Sequence[SourceFile],
    *,
    tokenizer: str,
    template: ChatTemplate | None,
    after: Sequence[str] = (),
    rules: RowRules = NEWEST,
) -> str:
    """rows_id of all rows of `sources`; `corpus` is decided, `tokenizer` is a digest.

    `after` holds the rows_ids of earlier parts, whose documents are left out of this one.
    """
    named = row_rules(corpus, sources, template=template, rules=rules)
    if after:
        named["after"] = list(after)
    return rows_id(
        tokenizer=tokenizer,
        rules=named,
        sources=[(source.name, source.sha256) for source in sources],
    )


def expected_batch_rows(teacher: Teacher, *, length: int) -> int:
    """Rows of the teacher's batch as far as the driver knows, which may have no accelerator: the
    setting, or what a CPU gets. A larger batch of an accelerator costs little more on padding."""
    asked = teacher.batch_rows
    return asked if isinstance(asked, int) else rows_of_tokens(CPU_BATCH_TOKENS, length)


def tokenise_job(
    cache: Path,
    layout: PartLayout,
    corpus: Corpus,
    sources: Sequence[SourceFile],
    *,
    vocabulary: int,
    batch_rows: int,
    unit_rows: int | None = None,
    rules: RowRules = NEWEST,
    older: Sequence[SourceFile] = (),
) -> TokeniseJob:
    """The job that writes the rows of `sources` below `layout`; `corpus` is decided.

    `vocabulary` is the number of ids that the teacher predicts; `batch_rows` from
    `expected_batch_rows`; `unit_rows` is U if an earlier run has fixed it; `older` are the sources
    of earlier parts. The cache must have its tokenizer when the job runs.
    """
    length = corpus.sequence_length
    # Absolute, because workers may have another working directory.
    return TokeniseJob(
        part=layout.root.absolute(),
        tokenizer=(cache / TOKENIZER).absolute(),
        sources=tuple(sources),
        corpus=corpus,
        unit_rows=unit_rows or choose_unit_rows(sources, length=length, batch_rows=batch_rows),
        vocabulary=vocabulary,
        pieces=rules.pieces,
        by_prompt=rules.by_prompt,
        older=tuple(older),
    )


def calibrate_job(
    config: Precompute,
    teacher: OpenedTeacher,
    rows: PlannedRows,
    *,
    tokenizer: str,
    part: PartLayout,
    known: Known,
) -> CalibrateJob:
    """The job that calibrates `teacher` on `rows` and writes the plan of `part`.

    `tokenizer` is the digest that the plan records.
    """
    return CalibrateJob(
        part=part.root.absolute(),
        tokenizer=tokenizer,
        rows=rows,
        teacher=dataclasses.replace(config.teacher, model=teacher.model),
        model=teacher.checkpoint.config,
        signals=config.signals,
        teacher_id=teacher.teacher_id,
        vocabulary_size=teacher.vocabulary,
        sequence_length=config.corpus.sequence_length,
        on_error=config.corpus.on_error,
        known=known,
    )


def added_signals(
    config: Precompute, teacher: OpenedTeacher, *, unit_rows: int
) -> dict[str, AddedSignal]:
    """The signals asked for besides `logits`, by name, still without a signal_id."""
    return describe_signals(
        config.signals,
        teacher.checkpoint.config,
        teacher_id=teacher.teacher_id,
        length=config.corpus.sequence_length,
        unit_rows=unit_rows,
    )

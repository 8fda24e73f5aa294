"""What `inspect` prints and writes: a cache or a row, in the terminal or as pages."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from decant.foreign import tell, terminal
from decant.models.text.tokenizer import tokenizer_of
from decant.pipelines.inspection import contents
from decant.pipelines.inspection.overview import next_commands
from decant.pipelines.inspection.row import Student, row_origins, row_tokens
from decant.pipelines.inspection.row_page import row_page
from decant.pipelines.inspection.row_table import is_written, legend, origin_lines, row_table
from decant.pipelines.inspection.sampling import sample_rows
from decant.pipelines.inspection.site import SUFFIX, split_of, write_site
from decant.pipelines.inspection.statistics import statistics_of
from decant.pipelines.inspection.teacher import teacher_words
from decant.schemas import Cache
from decant.schemas.disk.sizes import size_text


def inspect_cache(
    cache: Cache,
    *,
    row: int | None,
    html: Path | None,
    pages: int | None,
    top: int,
    sampled: int | None,
    student: Student | None,
    student_name: str,
) -> None:
    """Print the cache, or `row`; with `html` write pages instead.

    `pages` rows get a page and `sampled` rows are read for statistics (None: by the row's length).
    `student` predicts rows, and `student_name` says whose predictions these are. ValueError for a
    row that is not there, or if the cache holds no targets.
    """
    console = terminal(highlight=False)
    if "logits" not in cache.manifest.signals:
        _show_without_targets(cache, console, asked=row is not None or html is not None)
    elif row is not None and row >= len(cache):
        raise ValueError(f"{cache.path}: row {row} asked for; it has 0 to {len(cache) - 1}")
    elif html and (row is None or html.suffix != SUFFIX):
        written = write_site(
            cache,
            html,
            sample=sample_rows(cache, rows=sampled),
            top=top,
            pages=pages,
            row=row,
            student=student,
            student_name=student_name,
        )
        tell(
            f"{written.home}: open it in a browser. {written.pages:,} of {written.of:,} rows have "
            f"a page; {size_text(written.bytes)} in all"
        )
    elif row is not None:
        _show_row(
            cache, row, console, html=html, top=top, student=student, student_name=student_name
        )
    else:
        _show_cache(cache, console, sampled=sampled)


def _show_cache(cache: Cache, console: Console, *, sampled: int | None) -> None:
    sample = sample_rows(cache, rows=sampled)
    units = [unit for part in cache.manifest.parts for unit in part.units]
    size = sum(entry.bytes for unit in units for entry in unit.files.values())
    tell(f"{cache.address}: {size_text(size)}, cache_id {cache.manifest.cache_id[:16]}")
    console.print(f"teacher: {teacher_words(cache)}", markup=False)
    tell(f"rows of {cache.manifest.sequence_length:,} tokens, from {_sources(cache)}")
    for line in (*contents.group_lines(cache), *contents.writer_lines(cache)):
        tell(line)
    console.print(contents.splits_table(cache), contents.sizes_table(cache, sample), sep="")
    console.print(contents.histograms(statistics_of(cache, sample)), markup=False)
    for line in contents.left_out(cache):
        console.print(line, markup=False)
    tell("\nnext:")
    for line in next_commands(cache):
        tell(f"  {line}")


def _sources(cache: Cache) -> str:
    names = {source.name for part in cache.manifest.parts for source in part.sources}
    return f"{len(names):,} file{'s' * (len(names) != 1)}"


def _show_row(
    cache: Cache,
    row: int,
    console: Console,
    *,
    html: Path | None,
    top: int,
    student: Student | None,
    student_name: str,
) -> None:
    tokens = row_tokens(cache, row, tokenizer_of(cache), top=top, student=student)
    origins = row_origins(cache, row)
    if html:
        page = row_page(cache, row, tokens, origins=origins, student=student_name)
        html.write_text(page, "utf-8")
        tell(f"{html}: row {row}, {size_text(html.stat().st_size)}")
        return
    tell(f"{cache.address}: row {row} of {len(cache):,}, {split_of(cache, row)}")
    if student_name:
        tell(student_name)
    for line in origin_lines(origins):
        tell(line)
    console.print(row_table(tokens))
    tell(legend(beside=student is not None, written=is_written(tokens)))


def _show_without_targets(cache: Cache, console: Console, *, asked: bool) -> None:
    if asked:
        raise ValueError(
            f"{cache.path}: holds rows without targets; leave out --row, --html and --run"
        )
    for line in (*contents.group_lines(cache), *contents.writer_lines(cache)):
        tell(line)
    console.print(contents.splits_table(cache))
    console.print("rows without targets: no teacher read them")

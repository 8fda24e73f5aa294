"""Writes the pages of a cache: the overview and a page for each of some rows. No server needed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import numpy as np

from decant.models.text.tokenizer import Tokenizer, tokenizer_of
from decant.pipelines.inspection.overview import Overview, RowEntry, overview_page
from decant.pipelines.inspection.row import Student, Token, row_origins, row_tokens
from decant.pipelines.inspection.row_page import Neighbours, row_page
from decant.pipelines.inspection.sampling import Sample, sample_rows
from decant.pipelines.inspection.sources import count_sources
from decant.pipelines.inspection.statistics import Statistics, statistics_of
from decant.pipelines.inspection.teacher import teacher_facts
from decant.progress import notices, track
from decant.schemas import Cache
from decant.schemas.records.rows import PADDING

_PAGES, _PAGE_POSITIONS, _FEWEST = 200, 100_000, 8
"""By default at most so many rows have pages, with at most so many positions, but at least 8."""
_EXTREMES = 10
SUFFIX = ".html"


@dataclass(frozen=True)
class Site:
    """Where the pages go: `pages` means pages/index.html and pages/rows/."""

    home: Path
    """File of the overview."""
    rows: Path
    """Directory of the rows' pages, below the directory of `home`."""

    @classmethod
    def at(cls, output: Path) -> Site:
        """The site that `--html OUTPUT` names: a directory, or the overview's file."""
        if output.suffix == SUFFIX:
            return cls(output, output.with_name(f"{output.stem}_rows"))
        return cls(output / f"index{SUFFIX}", output / "rows")

    def page(self, row: int) -> Path:
        """File of a row's page."""
        return self.rows / f"{row:09d}{SUFFIX}"

    def address(self, row: int) -> str:
        """Address of a row's page, from the overview."""
        return quote(f"{self.rows.name}/{self.page(row).name}")


@dataclass(frozen=True)
class Written:
    """What `write_site` wrote."""

    home: Path
    pages: int
    of: int
    """Rows of the cache."""
    bytes: int


def write_site(
    cache: Cache,
    output: Path,
    *,
    sample: Sample,
    top: int,
    pages: int | None = None,
    row: int | None = None,
    student: Student | None = None,
    student_name: str = "",
) -> Written:
    """Write the overview, and pages of at most `pages` rows, that of `row` among them.

    ValueError if `output` lies in the cache.
    """
    if cache.path.resolve() in [output.resolve(), *output.resolve().parents]:
        raise ValueError(f"{output}: lies in the cache {cache.path}; write pages to another place")
    site, tokenizer = Site.at(output), tokenizer_of(cache)
    statistics = statistics_of(cache, sample)
    numbers = _browsable(cache, statistics, pages=pages, asked=row)
    site.home.parent.mkdir(parents=True, exist_ok=True)
    site.rows.mkdir(exist_ok=True)
    entries, size = [], 0
    with track(numbers, "pages", total=len(numbers), unit="pages", console=notices()) as told:
        for at, number in enumerate(told):
            tokens = row_tokens(cache, number, tokenizer, top=top, student=student)
            entry = _entry(cache, number, tokens, tokenizer, address=site.address(number))
            html = row_page(
                cache,
                number,
                tokens,
                origins=entry.origins,
                neighbours=_neighbours(site, numbers, at),
                student=student_name,
                maps=False,
            )
            size += _write(site.page(number), html)
            entries.append(entry)
    sources, counted = count_sources(cache)
    shown = Overview(
        cache, teacher_facts(cache), statistics, sources, counted, entries, student_name
    )
    size += _write(site.home, overview_page(shown))
    return Written(site.home, len(numbers), sample.of, size)


def _browsable(
    cache: Cache, statistics: Statistics, *, pages: int | None, asked: int | None
) -> list[int]:
    """Numbers of the rows with a page: all, or the hardest, the easiest and an even sample."""
    fit = _PAGE_POSITIONS // cache.manifest.sequence_length
    most = min(_PAGES, max(_FEWEST, fit)) if pages is None else pages
    first = [] if asked is None else [asked]
    extremes = [statistics.by_entropy(_EXTREMES, hardest=hard) for hard in (True, False)]
    wanted = [
        *first,
        *statistics.sample.rows[np.concatenate(extremes)].tolist(),
        *(sample_rows(cache, rows=most).rows.tolist() if most else []),
    ]
    return sorted(list(dict.fromkeys(wanted))[: max(most, len(first))])


def _neighbours(site: Site, numbers: list[int], at: int) -> Neighbours:
    def link(place: int) -> tuple[int, str] | None:
        if not 0 <= place < len(numbers):
            return None
        return numbers[place], site.page(numbers[place]).name

    return Neighbours(link(at - 1), link(at + 1), f"../{quote(site.home.name)}")


def _entry(
    cache: Cache, number: int, tokens: list[Token], tokenizer: Tokenizer, *, address: str
) -> RowEntry:
    predictions = [token.prediction for token in tokens if token.prediction]
    kls = [one.kl for one in predictions if one.kl is not None]

    def mean(values: list[float]) -> float:
        return float(np.mean(values)) if values else float("nan")

    return RowEntry(
        row=number,
        split=split_of(cache, number),
        address=address,
        tokens=len(tokens),
        entropy=mean([one.entropy for one in predictions]),
        surprise=mean([one.surprise for one in predictions]),
        kl=mean(kls) if kls else None,
        origins=tuple(row_origins(cache, number)),
        text="\n\n".join(_segment_texts(cache, number, tokenizer)),
    )


def _segment_texts(cache: Cache, row: int, tokenizer: Tokenizer) -> Iterator[str]:
    batch = cache.read([row], signals=())
    tokens, ids = batch["tokens"][0], batch["segment_ids"][0]
    for segment in np.unique(ids[ids != PADDING]):
        yield tokenizer.decode(tokens[ids == segment].tolist())


def split_of(cache: Cache, row: int) -> str:
    """The split that a row belongs to."""
    units = [unit for part in cache.manifest.parts for unit in part.units]
    ends = np.cumsum([unit.rows for unit in units])
    return units[int(np.searchsorted(ends, row, side="right"))].split


def _write(path: Path, html: str) -> int:
    path.write_text(html, "utf-8")
    return path.stat().st_size

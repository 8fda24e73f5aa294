"""The pages of a cache: every link leads to a page, and the numbers are those of the cache."""

import dataclasses
import re
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest

from decant.pipelines.__main__ import main
from decant.pipelines.inspection.sampling import sample_rows
from decant.pipelines.inspection.sources import count_sources
from decant.pipelines.inspection.statistics import statistics_of
from decant.schemas import Cache
from tests.pipelines.inspection.pages import Page


@pytest.fixture(scope="module")
def site(cache, tmp_path_factory):
    output = tmp_path_factory.mktemp("pages") / "site"
    assert main(["inspect", str(cache.path), "--html", str(output), "--top", "2"]) == 0
    return output


def linked(start: Path) -> set[Path]:
    """Every page that links lead to; fails at a link to a file that is not there."""
    seen, waiting = set(), [start.resolve()]
    while waiting:
        page = waiting.pop()
        if page not in seen:
            seen.add(page)
            links = Page(page.read_text()).links
            waiting += [(page.parent / link).resolve() for link in links]
    return seen


def test_all_pages_can_be_reached_without_a_server(site, cache):
    pages = linked(site / "index.html")
    assert pages == {path.resolve() for path in site.rglob("*.html")}
    assert len(pages) == len(cache) + 1
    for page in pages:
        text = page.read_text()
        assert not re.search(r"https?:|src=|@import|<link|url\(|{{", text)
        assert "default-src 'none'; script-src 'sha256-" in text


def test_a_name_with_signs_that_mean_something_in_addresses_breaks_no_link(cache, tmp_path):
    home = tmp_path / "50% of #1?.html"
    assert main(["inspect", str(cache.path), "--html", str(home)]) == 0
    for page in (home, *tmp_path.rglob("0*.html")):
        links = Page(page.read_text()).links
        assert links
        for link in links:
            assert not set("#?") & set(link)
            assert (page.parent / unquote(link)).is_file(), link


def test_the_overview_says_what_the_cache_is(site, cache):
    text = " ".join(Page((site / "index.html").read_text()).texts)
    units = [unit for part in cache.manifest.parts for unit in part.units]
    size = sum(entry.bytes for unit in units for entry in unit.files.values())
    assert f"{size / 1e6:.1f} MB" in text
    for fact in ("llama", "float32", "35 thousand", cache.manifest.logits.teacher_id[:16]):
        assert fact in text
    assert f"From all {len(cache)} rows" in text
    for part in cache.manifest.parts:
        for source in part.sources:
            assert source.name in text


def test_a_whole_cache_is_measured_exactly(cache):
    statistics = statistics_of(cache, sample_rows(cache))
    assert statistics.sample.whole
    batch = cache.read(cache.rows())
    mask = batch["loss_mask"]
    assert len(statistics.entropy) == mask.sum()
    tail = np.exp(batch["tail_logmass"][..., -1].astype(np.float64))
    np.testing.assert_allclose(statistics.tail, tail[mask])
    for row in (0, len(cache) - 1):
        surprises = -batch["label_logprobs"][row][mask[row]]
        assert statistics.row_surprise[row] == pytest.approx(surprises.mean(), abs=1e-5)
    hard, easy = (statistics.by_entropy(3, hardest=hard) for hard in (True, False))
    assert statistics.row_entropy[hard].min() > statistics.row_entropy[easy].max()


def test_a_large_cache_is_sampled_in_few_places_and_always_the_same(cache):
    parts = cache.manifest.parts * 500
    many = Cache(cache.path, dataclasses.replace(cache.manifest, parts=parts))
    first, again = sample_rows(many), sample_rows(many)
    assert first.rows.tolist() == again.rows.tolist()
    assert len(first.rows) * cache.manifest.sequence_length == 1 << 18
    assert f"a sample of 4,096 of the {len(many):,} rows" in first.words
    assert (np.diff(first.rows) > 1).sum() < 128
    assert np.abs(first.rows.mean() / len(many) - 0.5) < 0.02


def test_sources_have_their_documents_rows_and_positions(cache):
    counts, sample = count_sources(cache)
    assert sample.whole
    segments = cache.read(cache.rows(), signals=())["segment_ids"]
    assert sum(one.positions for one in counts) == (segments > 0).sum()
    assert len(counts) == 12
    assert all(one.documents == 1 for one in counts)  # a text file is one document
    by_name = {one.name: one for one in counts}
    rows = [{name for name, *_ in cache.origins(int(row))} for row in cache.rows()]
    for name, one in by_name.items():
        assert one.rows == sum(name in names for names in rows)


def test_only_some_rows_of_a_large_cache_have_a_page_and_it_says_so(cache, tmp_path, capsys):
    output = tmp_path / "few"
    assert (
        main(["inspect", str(cache.path), "--html", str(output), "--rows", "3", "--row", "7"]) == 0
    )
    assert f"3 of {len(cache)} rows have a page" in capsys.readouterr().out
    pages = linked(output / "index.html")
    assert len(pages) == 4
    assert (output / "rows/000000007.html").resolve() in pages
    assert f"3 of {len(cache)} rows have a page" in (output / "index.html").read_text()


def test_a_name_that_ends_in_html_is_the_overview_with_the_rows_beside_it(cache, tmp_path):
    assert (
        main(["inspect", str(cache.path), "--html", str(tmp_path / "a.html"), "--rows", "2"]) == 0
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.html", "a_rows"]
    assert len(linked(tmp_path / "a.html")) == 3


def test_pages_are_not_written_into_the_cache(cache, capsys):
    assert main(["inspect", str(cache.path), "--html", str(cache.path / "pages")]) == 1
    assert "lies in the cache" in capsys.readouterr().err
    assert not (cache.path / "pages").exists()


def test_a_run_is_only_read_by_the_whole_command(cache, capsys):
    assert main(["inspect", str(cache.path), "--row", "0", "--run", "run"]) == 1
    assert "only `decant inspect` reads runs" in capsys.readouterr().err

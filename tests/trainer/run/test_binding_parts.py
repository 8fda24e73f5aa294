"""Runs on a cache that gained parts, or forgot rows, after they began."""

import dataclasses

import pytest

from decant.schemas import Cache
from decant.schemas.disk.atomic import write_json
from decant.schemas.manifest.manifest import Forgotten, Manifest, Part, Unit
from decant.trainer.config import Train
from decant.trainer.run.binding import BINDING, bind, cache_at_start, read_run_changes


def cache_of(path, *names: str, forgotten: tuple[Forgotten, ...] = ()) -> Cache:
    unit = Unit("train", rows=3, tokens=9, scored=6, files={})
    parts = [
        Part(f"parts/{n}", name, 4, (unit,), {}, {}, (), forgotten=forgotten)
        for n, name in enumerate(names)
    ]
    return Cache(path, Manifest(8, 9, "t", tuple(parts)))


def begin(run, cache: Cache) -> None:
    run.mkdir()
    loss = {"loss.alpha": 0.9, "loss.temperature": 1.0, "loss.tail": "sampled"}
    write_json(run / BINDING, {"rows_id": cache.manifest.rows_id, **loss})


@pytest.mark.parametrize("names", [("a",), ("a", "b")])
def test_a_run_continues_with_the_parts_that_it_began_with(tmp_path, names):
    begun = cache_of(tmp_path, *names)
    begin(tmp_path / "run", begun)
    grown = cache_of(tmp_path, "a", "b", "c")
    continued = cache_at_start(grown, run=tmp_path / "run")
    assert continued.manifest == begun.manifest
    assert len(continued) == 3 * len(names)


def test_a_new_run_gets_all_parts_and_so_does_a_run_of_other_rows(tmp_path):
    grown = cache_of(tmp_path, "a", "b")
    assert cache_at_start(grown, run=tmp_path / "new") is grown
    begin(tmp_path / "run", cache_of(tmp_path, "x"))
    assert cache_at_start(grown, run=tmp_path / "run") is grown


def test_a_run_whose_rows_were_forgotten_continues_only_if_allowed(tmp_path):
    config = Train(run=tmp_path / "run")
    bind(config, cache=cache_of(tmp_path, "a"), steps=3)
    smaller = cache_of(tmp_path, "a", forgotten=(Forgotten(0),))
    with pytest.raises(ValueError, match=r"forgotten: this run has None.*\n.*--allow cache"):
        bind(config, cache=smaller, steps=3)
    bind(dataclasses.replace(config, allow=("cache",)), cache=smaller, steps=3)
    assert [change["name"] for change in read_run_changes(config.run)] == ["forgotten"]


def test_only_rows_forgotten_in_the_run_s_own_parts_matter(tmp_path):
    first = cache_of(tmp_path, "a").manifest
    begin(tmp_path / "run", Cache(tmp_path, first))
    grown = cache_of(tmp_path, "a", "b").manifest
    gone = [dataclasses.replace(p, forgotten=(Forgotten(0),)) for p in grown.parts]
    for parts, seen in (((grown.parts[0], gone[1]), ""), ((gone[0], grown.parts[1]), None)):
        cache = Cache(tmp_path, dataclasses.replace(grown, parts=parts))
        forgotten_id = cache_at_start(cache, run=tmp_path / "run").manifest.forgotten_id
        assert forgotten_id == seen if seen == "" else forgotten_id

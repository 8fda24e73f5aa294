"""Groups of a corpus's files with weights: from the settings to the rows of an epoch."""

import dataclasses
import json
from collections import Counter

import numpy as np
import pytest

from decant.command_line.python_values import override
from decant.pipelines.capture.job import precompute
from decant.pipelines.config import Corpus, Precompute, SourceGroup
from decant.pipelines.inspection.contents import group_lines
from decant.pipelines.rows.sources import weights_by_name
from decant.schemas import Cache, open_cache
from decant.trainer.config import Data, MixedCache, Train
from decant.trainer.data.batches import Batches, number_of_updates
from decant.trainer.run.binding import bind, binding_values
from tests.making.caches import tiny_settings, write_corpus


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> Precompute:
    """Three groups: `code` of weight 2, one without a name or weight, and `rare` of 0.5."""
    root = tmp_path_factory.mktemp("weights")
    config = tiny_settings(root)
    files = sorted(write_corpus(root / "corpus").glob("*.txt"))
    groups = (
        SourceGroup(files=tuple(map(str, files[:3])), name="code", weight=2.0),
        SourceGroup(files=tuple(map(str, files[3:8]))),
        SourceGroup(files=tuple(map(str, files[8:])), name="rare", weight=0.5),
    )
    corpus = dataclasses.replace(config.corpus, files=Corpus().files, sources=groups)
    return dataclasses.replace(config, corpus=corpus)


@pytest.fixture(scope="module")
def cache(settings) -> Cache:
    precompute(settings)
    return open_cache(settings.output)


def train_rows(cache: Cache) -> dict[str, np.ndarray]:
    return {name: cache.rows("train", group=name) for name in ("code", "1", "rare")}


def take(batches: Batches, count: int) -> list[list]:
    return [batches.next()["rows"].tolist() for _ in range(count)]


def test_units_hold_rows_of_one_group_each(cache):
    (part,) = cache.manifest.parts
    assert part.weights == {"code": 2.0, "1": 1.0, "rare": 0.5}
    names = {name: set() for name in part.weights}
    for name, held in names.items():
        for row in cache.rows(group=name).tolist():
            held |= {source for source, *_ in cache.origins(row)}
    assert all(names.values())
    assert sum(map(len, names.values())) == len(part.sources) == len(set.union(*names.values()))
    assert sum(len(cache.rows(group=name)) for name in names) == len(cache)


def test_an_epoch_takes_each_row_as_often_as_its_group_weighs(cache):
    rows, config = train_rows(cache), Data(batch_rows=1)
    expected = {name: len(rows[name]) * w for name, w in cache.manifest.source_weights.items()}
    updates = number_of_updates(cache, config=config)
    assert updates == int(sum(expected.values()))
    batches = Batches(cache, config=config)
    taken = Counter(row for (row,) in take(batches, updates))
    batches.close()
    for name, numbers in rows.items():
        assert sum(taken[row] for row in numbers.tolist()) == pytest.approx(expected[name], abs=2)
    assert {taken[row] for row in rows["rare"].tolist()} <= {0, 1}
    assert {taken[row] for row in rows["1"].tolist()} <= {0, 1, 2}
    assert min(taken[row] for row in rows["code"].tolist()) >= 1


def test_equal_weights_of_one_are_the_order_without_weights(cache):
    even = Data(batch_rows=2, source_weights=("code=1", "rare=1"))
    plain = dataclasses.replace(cache.manifest.parts[0], weights={})
    unweighted = Cache(cache.path, dataclasses.replace(cache.manifest, parts=(plain,)))
    orders = []
    for one, config in ((cache, even), (unweighted, Data(batch_rows=2)), (cache, Data())):
        batches = Batches(one, config=config)
        orders.append((take(batches, 9), "source_weights" in batches.fingerprint))
        batches.close()
    assert orders[0] == orders[1]
    assert orders[0] != orders[2]
    assert [weighted for _, weighted in orders] == [False, False, True]


def test_a_weighted_order_is_continued_exactly_and_by_any_number_of_processes(cache):
    config = Data(batch_rows=4, source_weights=("rare=3",))
    whole = Batches(cache, config=config)
    states, rows = [], []
    for _ in range(8):
        states.append(json.loads(json.dumps(whole.state())))
        rows += take(whole, 1)
    for position in (0, 3, 7):
        again = Batches(cache, config=config, here=np.array([1, 3]))
        again.restore(states[position])
        batch = again.next()
        again.close()
        assert batch["rows"].tolist() == rows[position]
        expected = cache.read(batch["rows"][[1, 3]], decode=False)["tokens"]
        np.testing.assert_array_equal(batch["tokens"], expected)
    smaller = Batches(cache, config=dataclasses.replace(config, batch_rows=2))
    smaller.restore(states[3], allows=lambda name: name == "data.batch_rows")
    assert [row for batch in take(smaller, 2) for row in batch] == rows[3]
    for one in (whole, smaller):
        one.close()


@pytest.mark.parametrize("now", [(), ("code=1", "rare=1")])
def test_other_weights_do_not_continue_a_position_unless_allowed(cache, now):
    before = Batches(cache, config=Data(source_weights=("code=3",)))
    take(before, 2)
    state = json.loads(json.dumps(before.state()))
    after = Batches(cache, config=Data(source_weights=now))
    with pytest.raises(ValueError, match="source_weights: saved"):
        after.restore(state)
    first = Batches(cache, config=Data(source_weights=now))
    after.restore(state, allows=lambda name: name == "data.source_weights")
    assert take(after, 3) == take(first, 3)
    for one in (before, after, first):
        one.close()


def test_a_weighted_cache_keeps_its_share_in_a_mixture(cache, tmp_path):
    """Half a row of the other cache for each of the main one, and in each the groups' weights."""
    other = Cache(tmp_path / "other", cache.manifest)
    other.path.symlink_to(cache.path)
    config = Data(batch_rows=2, caches=(MixedCache(other.path, 0.5),), source_weights=("rare=1",))
    batches = Batches(cache, config=config, others=[other])
    names = [row.split(":") for batch in take(batches, 150) for row in batch]
    batches.close()
    for one, weights, count in ((cache, (2, 1, 1), 200), (other, (2, 1, 0.5), 100)):
        numbers = np.array([int(number) for path, number in names if path == str(one.path)])
        assert len(numbers) == pytest.approx(count, abs=2)
        rows = train_rows(one)
        masses = {name: len(rows[name]) * w for name, w in zip(rows, weights, strict=True)}
        for name, mass in masses.items():
            share = np.isin(numbers, rows[name]).mean()
            assert share == pytest.approx(mass / sum(masses.values()), abs=0.03)
    assert batches.fingerprint["source_weights"]["rare"] == 1
    assert batches.fingerprint["caches"][0]["source_weights"]["rare"] == 0.5


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("coed=1", r"no group 'coed'; its groups are code, 1, rare"),
        ("code=0", "'code=0' is not NAME=WEIGHT with a weight above 0"),
        ("code=nan", "'code=nan' is not NAME=WEIGHT"),
        ("code", "'code' is not NAME=WEIGHT"),
    ],
)
def test_wrong_names_and_weights_are_refused(cache, asked, message):
    with pytest.raises(ValueError, match=rf"data.source_weights: .*{message}"):
        number_of_updates(cache, config=Data(source_weights=(asked,), steps=3))


def test_a_run_is_bound_to_the_weights_in_effect(cache, tmp_path):
    config = Train(cache=cache.path, run=tmp_path)
    values = bind(config, cache=cache, steps=3).values
    assert values["data.source_weights.code"] == 2.0
    other = override(config, {"data": {"source_weights": {"rare": 4}}})
    assert other.data.source_weights == ("rare=4",)
    with pytest.raises(
        ValueError, match=r"rare: this run has 0.5.*\n.*--allow data.source_weights,"
    ):
        bind(other, cache=cache, steps=3)
    even = {"source_weights": {"code": 1, "rare": 1}}
    plain = override(config, {"data": even, "allow": ("data.source_weights",)})
    assert not any("source_weights" in name for name in bind(plain, cache=cache, steps=9).values)
    assert binding_values(plain, cache=cache, steps=9)["rows_id"] == cache.manifest.rows_id


def test_another_weight_captures_nothing_again_and_is_told(cache, settings, capfd):
    before = (cache.path / "manifest.json").read_bytes()
    first, *others = settings.corpus.sources
    changed = (dataclasses.replace(first, weight=3.0), *others)
    corpus = dataclasses.replace(settings.corpus, sources=changed)
    precompute(dataclasses.replace(settings, corpus=corpus))
    told = "".join(capfd.readouterr().err.split())
    assert "(code=2,1=1,rare=0.5)" in told
    assert "data.source_weights" in told
    precompute(settings)
    assert "data.source_weights" not in "".join(capfd.readouterr().err.split())
    assert (cache.path / "manifest.json").read_bytes() == before


def test_inspection_has_a_line_on_each_group(cache):
    lines = group_lines(cache)
    count = len(cache.rows("train", group="code"))
    assert lines[0].startswith(f"group code: {count:,} rows to train on, ")
    assert [line.rpartition(" ")[2] for line in lines] == ["2", "1", "0.5"]


def test_two_groups_of_one_name_are_refused():
    named = SourceGroup(files=("b",), name="0")
    with pytest.raises(ValueError, match=r"corpus.sources\[1\].name: '0' is the name of another"):
        weights_by_name(Corpus(sources=(SourceGroup(files=("a",)), named)))

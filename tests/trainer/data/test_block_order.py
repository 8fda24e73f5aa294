"""The order `data.shuffle = "blocks"`: complete, resumable, dealt to processes, in few blocks."""

import collections
import itertools
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from decant.schemas import Cache
from decant.trainer.config import Data, MixedCache
from decant.trainer.data.batches import Batches
from decant.trainer.data.block_order import BlockOrder, sorted_by_group


class FakeCache(Cache):
    """Train rows with numbers from 1000; a row's token is its number."""

    def __init__(self, rows=200, *, name="fake"):
        self.path, self._count = Path(name), rows
        self.manifest = SimpleNamespace(
            rows_id=name, forgotten_id="", source_weights={}, signals={}
        )

    def rows(self, split=None):
        return np.arange(1000, 1000 + self._count)

    def read(self, numbers, signals=("logits",), decode=True, targets=None):
        return {"tokens": np.asarray(numbers)[:, None]}


def batches_of(cache=None, *others, here=None, **settings):
    mixed = tuple(MixedCache(other.path) for other in others)
    config = Data(**{"batch_rows": 8, "shuffle": "blocks", "caches": mixed, **settings})
    return Batches(FakeCache() if cache is None else cache, config=config, others=others, here=here)


def take(batches, count):
    with_rows = [batches.next()["rows"].tolist() for _ in range(count)]
    batches.close()
    return with_rows


@pytest.mark.parametrize("rows", [1, 2, 23, 64, 65, 1000, 16384, 16385, 40000])
def test_every_row_comes_once_an_epoch_in_another_order_each_time(rows):
    order = BlockOrder(np.arange(100, 100 + rows), seed=3)
    epochs = [[order[epoch * rows + i][1] for i in range(rows)] for epoch in (0, 1)]
    for numbers in epochs:
        assert sorted(numbers) == list(range(100, 100 + rows))
    if rows > 20:
        assert epochs[0] != epochs[1]
        assert epochs[0] != sorted(epochs[0])


def test_the_order_is_this_one_in_every_release():
    order = BlockOrder(np.arange(300), seed=7)
    assert [order[i][1] for i in range(12)] == [
        258,
        220,
        109,
        181,
        282,
        160,
        199,
        59,
        276,
        250,
        108,
        63,
    ]
    assert [order[i][0] for i in range(8)] == [0, 32, 16, 48, 8, 40, 24, 56]


def test_the_seed_decides_the_order():
    orders = [[BlockOrder(np.arange(300), seed=s)[i] for i in range(50)] for s in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]


def test_16_384_successive_positions_read_from_256_blocks_and_no_more_than_twice_as_many():
    order = BlockOrder(np.arange(100_000), seed=0)
    for start, most in ((0, 256), (16_384, 256), (8_192, 512), (95_000, 514)):
        blocks = {order[i][1] // 64 for i in range(start, start + 16_384)}
        assert len(blocks) <= most


def test_a_batch_mixes_rows_of_blocks_that_lie_far_apart():
    order = BlockOrder(np.arange(100_000), seed=0)
    for start in (0, 6400, 50_000):
        blocks = [order[i][1] // 64 for i in range(start, start + 64)]
        assert len(set(blocks)) > 55
        assert np.std(blocks) > 300  # uniform over 1,563 blocks: 451


@pytest.mark.parametrize("rows", [150, 1000, 20_000])
def test_each_row_is_as_likely_early_as_late(rows):
    """The mean position of a row over many seeds is the middle, within five standard errors."""
    seeds, watched = 60, [0, 63, rows // 2, rows - 1]
    places = np.zeros((seeds, len(watched)))
    for seed in range(seeds):
        order = BlockOrder(np.arange(rows), seed=seed)
        at = {order[i][1]: i for i in range(rows)} if rows < 5000 else None
        if at is None:  # by window, as a loop over all positions takes long
            numbers = np.concatenate([order._window(0, w) for w in range(-(-rows // 16_384))])
            at = dict(zip(numbers.tolist(), range(rows), strict=True))
        places[seed] = [at[row] for row in watched]
    error = rows / math.sqrt(12 * seeds)
    np.testing.assert_allclose(places.mean(0), (rows - 1) / 2, atol=5 * error)


@pytest.mark.parametrize("processes", [2, 4, 8])
@pytest.mark.parametrize("batch_rows", [8, 24, 64])
def test_processes_read_all_rows_and_each_its_own(processes, batch_rows):
    """Also in later epochs, and of at most a block at each edge is read by two processes."""
    rows = 64 * 300 + 17
    order, share = BlockOrder(np.arange(rows), seed=1), batch_rows // processes
    owners: dict[int, int] = {}
    blocks: dict[int, set[int]] = {}
    for first in range(0, rows, batch_rows):
        at = [order[i] for i in range(first, min(first + batch_rows, rows))]
        (numbers,) = sorted_by_group(tuple(np.array(at).T))
        if len(numbers) < batch_rows:
            break  # goes on in the next epoch
        for slot, number in enumerate(numbers.tolist()):
            assert number not in owners
            owners[number] = slot // share
            if first < 16_384:
                blocks.setdefault(number // 64, set()).add(slot // share)
    assert len(owners) == rows // batch_rows * batch_rows
    assert sum(len(readers) > 1 for readers in blocks.values()) <= processes


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_the_order_does_not_depend_on_the_number_of_processes(processes):
    whole = take(batches_of(), 40)
    shares = np.arange(8).reshape(processes, -1)
    tokens = []
    for here in shares:
        batches = batches_of(here=here)
        tokens.append([batches.next()["tokens"][:, 0].tolist() for _ in range(40)])
        batches.close()
    joined = [[*itertools.chain(*parts)] for parts in zip(*tokens, strict=True)]
    assert joined == whole


def test_batches_restored_at_any_position_continue_with_the_same_rows():
    batches, states, sequence = batches_of(), [], []
    for _ in range(60):  # into the third epoch
        states.append(json.loads(json.dumps(batches.state())))
        sequence.append(batches.next()["rows"].tolist())
    batches.close()
    for position in (0, 1, 24, 25, 26, 59):
        again = batches_of()
        again.restore(states[position])
        assert take(again, 60 - position) == sequence[position:]


def test_in_batches_of_another_size_the_run_goes_on_with_rows_that_it_has_not_had():
    batches = batches_of()
    had = [row for _ in range(3) for row in batches.next()["rows"].tolist()]
    then = batches_of(batch_rows=4)
    then.restore(batches.state(), allows=lambda name: name == "data.batch_rows")
    batches.close()
    rest = [row for rows in take(then, 44) for row in rows]
    assert sorted(had + rest) == list(range(1000, 1200))


@pytest.mark.parametrize("saved", ["global", "blocks"])
def test_a_position_in_the_other_order_is_refused_by_name(saved):
    (other,) = {"global", "blocks"} - {saved}
    batches, now = batches_of(shuffle=saved), batches_of(shuffle=other)
    with pytest.raises(ValueError, match="shuffle: saved"):
        now.restore(batches.state())
    now.restore(batches.state(), allows=lambda name: name == "data.shuffle")
    batches.close()
    now.close()


def test_rows_of_several_caches_come_once_before_any_comes_again():
    batches = batches_of(FakeCache(name="main"), FakeCache(80, name="other"))
    taken: collections.Counter = collections.Counter()
    for rows in take(batches, 55):
        taken.update(rows)
    for name, count in (("main", 200), ("other", 80)):
        times = [taken[f"{name}:{1000 + i}"] for i in range(count)]
        assert max(times) - min(times) <= 1
        assert 218 <= sum(times) <= 222

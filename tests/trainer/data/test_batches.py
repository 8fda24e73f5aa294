"""The order of rows: shuffled, complete, and continued exactly from any position."""

import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from decant.schemas import Cache
from decant.trainer.config import Data
from decant.trainer.data.batches import Batches, updates


class FakeCache(Cache):
    """23 train rows numbered from 100; reading returns ten times the numbers."""

    def __init__(self, rows_id="rows-a"):
        self.path = Path("fake")
        self.manifest = SimpleNamespace(rows_id=rows_id, forgotten_id="")

    def rows(self, split=None):
        assert split == "train"
        return np.arange(100, 123)

    def read(self, numbers, signals=("logits",), decode=True):
        return {"tokens": np.asarray(numbers) * 10}


def taken(batches, count):
    return [batches.next()["rows"].tolist() for _ in range(count)]


def make(cache=None, **settings):
    return Batches(
        FakeCache() if cache is None else cache, config=Data(**{"batch_rows": 4, **settings})
    )


def test_every_row_comes_once_an_epoch_in_another_order_each_time():
    batches = make(batch_rows=1)
    numbers = [rows[0] for rows in taken(batches, 46)]
    batches.close()
    assert sorted(numbers[:23]) == sorted(numbers[23:]) == list(range(100, 123))
    assert numbers[:23] != numbers[23:] != sorted(numbers[23:])


def test_a_batch_holds_what_the_cache_reads_for_its_rows():
    batches = make()
    batch = batches.next()
    batches.close()
    assert batch["tokens"].tolist() == [10 * row for row in batch["rows"].tolist()]


def test_the_seed_decides_the_order():
    orders = []
    for seed in (0, 0, 1):
        batches = make(seed=seed)
        orders.append(taken(batches, 4))
        batches.close()
    assert orders[0] == orders[1] != orders[2]


def test_restored_at_every_position_the_same_rows_follow():
    batches = make()
    states, sequence = [], []
    for _ in range(13):
        states.append(json.loads(json.dumps(batches.state())))  # as a checkpoint keeps it
        sequence += taken(batches, 1)
    batches.close()
    for position, state in enumerate(states):
        again = make()
        again.restore(state)
        assert taken(again, 13 - position) == sequence[position:]
        again.close()


@pytest.mark.parametrize(
    ("name", "settings"), [("seed", {"seed": 5}), ("batch_rows", {"batch_rows": 2})]
)
def test_a_position_in_another_order_is_refused_by_name(name, settings):
    batches, other = make(), make(**settings)
    with pytest.raises(ValueError, match=rf"other data .*{name}: saved"):
        other.restore(batches.state())
    batches.close()
    other.close()


def test_a_position_in_another_cache_is_refused_by_name():
    batches, other = make(), make(FakeCache("rows-b"))
    with pytest.raises(ValueError, match="rows_id: saved 'rows-a', now 'rows-b'"):
        other.restore(batches.state())
    batches.close()
    other.close()


def test_fewer_rows_than_a_batch_is_an_error_with_both_numbers():
    with pytest.raises(ValueError, match=r"23 train rows .* data.batch_rows = 24"):
        make(batch_rows=24)


def test_updates_are_whole_batches_of_all_epochs_unless_set():
    assert updates(FakeCache(), config=Data(batch_rows=4, epochs=1, steps=None)) == 5
    assert updates(FakeCache(), config=Data(batch_rows=4, epochs=3, steps=None)) == 17
    assert updates(FakeCache(), config=Data(batch_rows=4, steps=7)) == 7


def test_a_cache_goes_to_another_process_and_opens_its_own_files(cache):
    """As torch's DataLoader sends it to its workers; after it was read from here."""
    rows = cache.rows()[:3]
    expected = cache.read(rows)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        found = pool.submit(cache.read, rows).result(timeout=120)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)

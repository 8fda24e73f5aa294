"""The order of rows: shuffled, complete, and continued exactly from every position."""

import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from decant.schemas import Cache
from decant.trainer.config import Data
from decant.trainer.data.batches import Batches, number_of_updates


class FakeCache(Cache):
    """23 train rows with numbers from 100; a row's token is ten times its number."""

    def __init__(self, rows_id="rows-a"):
        self.path = Path("fake")
        self.manifest = SimpleNamespace(rows_id=rows_id, forgotten_id="", source_weights={})

    def rows(self, split=None):
        assert split == "train"
        return np.arange(100, 123)

    def read(self, numbers, signals=("logits",), decode=True, targets=None):
        return {"tokens": np.asarray(numbers) * 10}


def take_rows(batches, count):
    return [batches.next()["rows"].tolist() for _ in range(count)]


def make_batches(cache=None, **settings):
    return Batches(
        FakeCache() if cache is None else cache, config=Data(**{"batch_rows": 4, **settings})
    )


def test_every_row_comes_once_an_epoch_in_another_order_each_time():
    batches = make_batches(batch_rows=1)
    numbers = [rows[0] for rows in take_rows(batches, 46)]
    batches.close()
    assert sorted(numbers[:23]) == sorted(numbers[23:]) == list(range(100, 123))
    assert numbers[:23] != numbers[23:] != sorted(numbers[23:])


def test_a_batch_holds_the_arrays_of_its_rows():
    batches = make_batches()
    batch = batches.next()
    batches.close()
    assert batch["tokens"].tolist() == [10 * row for row in batch["rows"].tolist()]


def test_the_seed_decides_the_order():
    orders = []
    for seed in (0, 0, 1):
        batches = make_batches(seed=seed)
        orders.append(take_rows(batches, 4))
        batches.close()
    assert orders[0] == orders[1] != orders[2]


def test_batches_restored_at_any_position_continue_with_the_same_rows():
    batches = make_batches()
    states, sequence = [], []
    for _ in range(13):
        states.append(json.loads(json.dumps(batches.state())))  # as a checkpoint keeps it
        sequence += take_rows(batches, 1)
    batches.close()
    for position, state in enumerate(states):
        again = make_batches()
        again.restore(state)
        assert take_rows(again, 13 - position) == sequence[position:]
        again.close()


@pytest.mark.parametrize(
    ("name", "settings"), [("seed", {"seed": 5}), ("batch_rows", {"batch_rows": 2})]
)
def test_a_position_in_another_order_is_refused_by_name(name, settings):
    batches, other = make_batches(), make_batches(**settings)
    with pytest.raises(ValueError, match=rf"other data, .*{name}: saved"):
        other.restore(batches.state())
    batches.close()
    other.close()


def test_a_position_in_another_cache_is_refused_by_name():
    batches, other = make_batches(), make_batches(FakeCache("rows-b"))
    with pytest.raises(ValueError, match="rows_id: saved 'rows-a', now 'rows-b'"):
        other.restore(batches.state())
    batches.close()
    other.close()


def test_fewer_rows_than_a_batch_is_an_error_with_both_numbers():
    with pytest.raises(ValueError, match=r"23 train rows .* data.batch_rows = 24"):
        make_batches(batch_rows=24)


def test_updates_are_whole_batches_of_all_epochs_unless_set():
    assert number_of_updates(FakeCache(), config=Data(batch_rows=4, epochs=1, steps=None)) == 5
    assert number_of_updates(FakeCache(), config=Data(batch_rows=4, epochs=3, steps=None)) == 17
    assert number_of_updates(FakeCache(), config=Data(batch_rows=4, steps=7)) == 7


def test_a_cache_goes_to_another_process_and_opens_its_own_files(cache):
    """As torch's DataLoader sends a cache to its workers, here after a read in this process."""
    rows = cache.rows()[:3]
    expected = cache.read(rows)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        arrays = pool.submit(cache.read, rows).result(timeout=120)
    assert arrays.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(arrays[name], array)

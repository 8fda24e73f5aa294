"""Batches for a loop of one's own: the trainer's rows and order, resumed at every position."""

import json

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import decant
from decant.schemas import Cache, open_cache
from decant.trainer.config import Data
from decant.trainer.data.batches import Batches, number_of_updates

KEYS = {"tokens", "labels", "loss_mask", "segment_ids", "positions"}
TARGETS = {"topk_ids", "topk_logprobs", "tail_logmass"}


def tokens_of(batches):
    with batches:
        return [np.asarray(batch["tokens"]) for batch in batches]


def test_rows_come_in_the_order_of_the_trainer(cache):
    config = Data(batch_rows=3, seed=5, epochs=2)
    trainer = Batches(open_cache(cache.path), config=config)
    expected = [trainer.next()["tokens"] for _ in range(number_of_updates(cache, config=config))]
    trainer.close()
    ours = decant.batches(cache, batch_rows=3, seed=5, epochs=2)
    assert len(ours) == len(expected)
    np.testing.assert_array_equal(tokens_of(ours), expected)


def test_a_batch_holds_what_the_losses_read_with_labels_shifted_by_one(cache):
    with decant.batches(str(cache.path), batch_rows=2) as batches:
        batch = next(batches)
    assert {
        *KEYS,
        *TARGETS,
        "tail_ids",
        "tail_logprobs",
        "tail_logweights",
        "label_logprobs",
    } == set(batch)
    assert all(isinstance(array, jax.Array) for array in batch.values())
    np.testing.assert_array_equal(batch["labels"][:, :-1], batch["tokens"][:, 1:])
    assert batch.vocabulary == 512
    assert batch.highest_temperature == 2.0


def test_the_position_after_every_batch_can_be_saved_and_given_back(cache):
    whole = tokens_of(decant.batches(cache, batch_rows=16, epochs=2))
    with decant.batches(cache, batch_rows=16, epochs=2) as batches:
        for taken in range(len(whole)):
            position = json.loads(json.dumps(batches.state()))
            rest = tokens_of(decant.batches(cache, batch_rows=16, epochs=2, position=position))
            np.testing.assert_array_equal(rest, whole[taken:])
            next(batches)


def test_a_position_of_other_batches_is_refused(cache):
    with decant.batches(cache, batch_rows=4) as batches:
        position = batches.state()
    with pytest.raises(ValueError, match="batch_rows: saved 4, now 2"):
        decant.batches(cache, batch_rows=2, position=position)
    with pytest.raises(ValueError, match="seed: saved 0, now 1"):
        decant.batches(cache, batch_rows=4, seed=1, position=position)


def test_without_epochs_they_never_end(cache):
    with decant.batches(cache, batch_rows=8, epochs=None) as batches:
        rows = len(cache.rows(split="train"))
        seen = [next(batches)["tokens"] for _ in range(2 * rows // 8 + 1)]
        assert len(seen) * 8 > 2 * rows
        with pytest.raises(TypeError, match="never end"):
            len(batches)


@pytest.mark.parametrize("name", ["hidden/1", "attention/0"])
def test_layers_come_decoded(cache, name):
    with decant.batches(cache, batch_rows=2, signals=name) as batches:
        got = next(batches)
    rows = {tuple(row): n for n, row in enumerate(cache.read(cache.rows())["tokens"].tolist())}
    numbers = [rows[tuple(row)] for row in got["tokens"].tolist()]
    expected = cache.read(numbers, signals=(name,))[name]
    np.testing.assert_allclose(got[name], expected, rtol=1e-5, atol=1e-5)


def test_a_sharding_places_the_rows(cache):
    mesh = Mesh(np.array(jax.devices()[:1]), ("rows",))
    split = NamedSharding(mesh, PartitionSpec("rows"))
    with decant.batches(cache, batch_rows=2, sharding=split) as batches:
        sharded = next(batches)
    with decant.batches(cache, batch_rows=2) as batches:
        plain = next(batches)
    assert all(array.sharding == split for array in sharded.values())
    jax.tree.map(np.testing.assert_array_equal, sharded, plain)


def test_wrong_requests_are_refused_by_name(cache):
    with pytest.raises(ValueError, match=r"no signal 'hidden/9'; this cache holds .*hidden/1"):
        decant.batches(cache, signals=("hidden/9",))
    with pytest.raises(ValueError, match="batch_rows is 0; expected a whole number, 1 to"):
        decant.batches(cache, batch_rows=0)
    with pytest.raises(ValueError, match="train rows do not fill one batch"):
        decant.batches(cache, batch_rows=1000)
    with decant.batches(cache) as batches, pytest.raises(KeyError, match="no array 'hidden/1'"):
        _ = next(batches)["hidden/1"]


def test_the_callers_cache_is_not_shared_with_the_thread(cache, monkeypatch):
    """A cache's open files belong to one thread."""
    mine = open_cache(cache.path)
    monkeypatch.setattr(mine, "read", None)
    with decant.batches(mine, batch_rows=2) as batches:
        assert next(batches)["tokens"].shape == (2, 64)
    assert isinstance(mine, Cache)

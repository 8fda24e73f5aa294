"""Rows of a cache in PyTorch: the same numbers, in worker processes, shuffled, shared, resumed."""

import itertools
import multiprocessing
import subprocess
import sys

import numpy as np
import pytest

from decant.pipelines.config import Attention, Hidden
from tests.making.caches import tiny_cache
from tests.paths import ROOT, environment

torch = pytest.importorskip("torch")
decant_torch = pytest.importorskip("decant.torch")

pytestmark = pytest.mark.reference
SIGNALS = ("hidden/1", "hidden/2", "attention/1")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tiny_cache(
        tmp_path_factory.mktemp("torch"),
        draws=4,
        hidden=Hidden(layers=(1, 2), dtype="bfloat16"),
        attention=Attention(layers=(1,)),
    )


def numbers(batches):
    """Which rows the batches hold, by their tokens."""
    return [tuple(row) for batch in batches for row in batch["tokens"].tolist()]


def expected(cache, rows):
    return [tuple(row) for row in cache.read(rows)["tokens"].tolist()]


def test_rows_are_those_of_the_cache_with_labels(cache):
    rows = decant_torch.Rows(cache, signals=SIGNALS)
    batch = rows[[5, 0]]
    read = cache.read(cache.rows("train")[[5, 0]], signals=("logits", *SIGNALS))
    assert batch.keys() - {"labels"} == read.keys()
    for name, array in read.items():
        got = batch[name].float() if array.dtype.name == "bfloat16" else batch[name]
        np.testing.assert_array_equal(got.numpy(), array.astype(got.numpy().dtype), err_msg=name)
    assert torch.equal(batch["labels"][:, :-1], batch["tokens"][:, 1:])
    assert batch["tokens"].dtype == batch["labels"].dtype == torch.int64
    assert torch.equal(rows[5]["topk_ids"], batch["topk_ids"][0])
    assert (batch.vocabulary, batch.highest_temperature) == (512, 1.0)
    assert (batch.to("cpu").vocabulary, rows[5].vocabulary) == (512, 512)


def test_held_out_rows_are_a_dataset_of_their_own(cache):
    rows = decant_torch.Rows(cache.path, split="heldout")
    assert len(rows) == len(cache.rows("heldout"))
    assert numbers([rows[range(len(rows))]]) == expected(cache, cache.rows("heldout"))


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_worker_processes_read_the_same(cache, method):
    loader = torch.utils.data.DataLoader(
        decant_torch.Rows(cache, signals="hidden/2"),
        batch_size=7,
        num_workers=2,
        multiprocessing_context=multiprocessing.get_context(method),
    )
    batches = list(loader)
    assert numbers(batches) == expected(cache, cache.rows("train"))
    assert batches[0].vocabulary == 512


FORKED = """
import sys, torch
import decant.torch
rows = decant.torch.Rows(sys.argv[1], signals=sys.argv[2:])
first = rows[[0, 1]] if len(sys.argv) == 2 else None   # opens files that a fork would share
assert "tensorstore" not in sys.modules
loader = torch.utils.data.DataLoader(
    rows, batch_size=5, num_workers=2, multiprocessing_context="fork"
)
got = torch.cat([batch["tokens"] for batch in loader])
assert torch.equal(got, rows[range(len(rows))]["tokens"])
assert not {"jax", "flax", "apache_beam", "optax", "grain", "tyro"} & sys.modules.keys()
"""


@pytest.mark.parametrize("signals", [(), ("hidden/2",)])
def test_forked_workers_open_files_of_their_own_and_nothing_needs_jax(cache, signals):
    command = [sys.executable, "-c", FORKED, str(cache.path), *signals]
    subprocess.run(command, check=True, cwd=ROOT, env=environment(), timeout=120)


def test_every_pass_has_each_row_once_in_an_order_of_the_seed(cache):
    count = len(cache.rows("train"))
    every = sorted(expected(cache, cache.rows("train")))

    def two_passes(seed):
        return numbers(decant_torch.batches(cache, batch_rows=1, epochs=2, seed=seed))

    first, again, other = two_passes(0), two_passes(0), two_passes(1)
    assert first == again
    assert first != other
    assert sorted(first[:count]) == sorted(first[count:]) == every
    assert first[:count] != first[count:]


def test_the_order_of_a_seed_stays_over_releases(cache):
    rows = decant_torch.batches(cache, batch_rows=4, epochs=None, seed=7)
    bits = np.random.PCG64([7, 0]).random_raw(len(rows.rows))
    first = next(iter(rows))
    assert numbers([first]) == expected(cache, cache.rows("train")[np.argsort(bits)[:4]])


def test_saved_anywhere_and_restored_the_batches_go_on(cache):
    every = numbers(decant_torch.batches(cache, batch_rows=4, epochs=2))
    for taken in range(0, 38, 5):
        batches = decant_torch.batches(cache, batch_rows=4, epochs=2)
        first = numbers(itertools.islice(batches, taken))
        restored = decant_torch.batches(cache, batch_rows=4, epochs=2)
        restored.load_state_dict(batches.state_dict())
        assert first + numbers(restored) == every


def test_a_place_in_other_data_is_refused_by_name(cache):
    state = decant_torch.batches(cache, seed=0).state_dict()
    with pytest.raises(ValueError, match="seed was 0 and is 1"):
        decant_torch.batches(cache, seed=1).load_state_dict(state)


def test_processes_share_every_batch_and_workers_change_nothing(cache):
    whole = [set(numbers([batch])) for batch in decant_torch.batches(cache, batch_rows=4, epochs=1)]
    shares = [
        list(
            decant_torch.batches(
                cache, batch_rows=4, epochs=1, rank=rank, world_size=2, workers=rank
            )
        )
        for rank in range(2)
    ]
    together = [set(numbers(pair)) for pair in zip(*shares, strict=True)]
    assert together == whole
    assert all(len(batch["tokens"]) == 2 for batch in shares[1])
    assert len(decant_torch.batches(cache, batch_rows=4, epochs=1)) == len(whole)


def test_a_distributed_sampler_deals_the_rows(cache):
    rows = decant_torch.Rows(cache)
    seen = []
    for rank in range(2):
        sampler = torch.utils.data.DistributedSampler(rows, 2, rank, shuffle=True, seed=3)
        loader = torch.utils.data.DataLoader(rows, batch_size=4, sampler=sampler)
        seen += numbers(loader)
    assert sorted(seen) == sorted(expected(cache, cache.rows("train")))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"signals": "hidden/9"}, "no signal 'hidden/9'; this cache holds attention/1, hidden/1"),
        ({"batch_rows": 1000}, "train rows do not fill one batch of batch_rows = 1000"),
        ({"batch_rows": 3, "rank": 0, "world_size": 2}, "use a multiple of 2"),
        ({"rank": 2, "world_size": 2}, "rank is 2, expected 0 to 1"),
        ({"rank": 1}, "belong together"),
    ],
)
def test_what_does_not_fit_is_refused(cache, options, says):
    with pytest.raises(ValueError, match=says):
        decant_torch.batches(cache, **options)


def test_a_loop_of_ones_own_judges_like_decant_evaluate(cache):
    """A student that knows nothing: its cross-entropy is log V, its bound that of the entropy."""
    found = decant_torch.evaluate(lambda batch: torch.zeros(*batch["tokens"].shape, 512), cache)
    batch = cache.read(cache.rows("heldout"))
    counted = batch["loss_mask"]
    logp = np.where(np.isfinite(batch["topk_logprobs"]), batch["topk_logprobs"], 0)[counted]
    mass = batch["tail_logmass"][counted][:, -1]
    bound = (np.exp(logp) * (logp + np.log(512))).sum(-1)
    bound += np.exp(mass) * (mass - np.log((512 - 8) / 512))
    assert found["heldout_kl_bound"] == pytest.approx(bound.mean(), rel=1e-5)
    assert found["heldout_ce"] == pytest.approx(np.log(512), rel=1e-6)
    assert found["heldout_perplexity"] == pytest.approx(512, rel=1e-5)
    assert found["heldout_tokens"] == counted.sum()
    assert found["heldout_kl_by"] == "draws"
    assert found["heldout_kl"] == found["heldout_kl_unbiased"] > found["heldout_kl_bound"]

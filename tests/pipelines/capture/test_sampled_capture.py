"""Tail draws and the tail prior, captured and read by `Cache.read`."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from decant.models import open_checkpoint
from decant.pipelines.calibration.sample import sample_places
from decant.pipelines.capture.job import precompute
from decant.schemas import Cache, open_cache
from decant.schemas.disk.atomic import read_json
from decant.schemas.manifest.plan import read_plan
from decant.schemas.targets.targets import BETAS
from tests.formulas import sampling
from tests.making.caches import tiny_cache, tiny_settings

M, TEMPERATURES = 6, (1.0, 2.0)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("sampled")


@pytest.fixture(scope="module")
def cache(root) -> Cache:
    return tiny_cache(root, draws=M, draw_temperatures=TEMPERATURES)


def teacher_logits(root: Path, batch: dict[str, np.ndarray]) -> np.ndarray:
    """The teacher's dense logits [n, S, V] for a batch from `Cache.read`."""
    model = open_checkpoint(str(root / "teacher")).load(dtype="float32")
    hidden, _ = model(*(batch[name] for name in ("tokens", "segment_ids", "positions")))
    return np.asarray(hidden, np.float64) @ np.asarray(model.unembedding(), np.float64)


def test_read_gives_draws_with_the_weights_of_their_proposal(root, cache):
    batch = cache.read(cache.rows()[:5])
    scored = batch["loss_mask"]
    logits = teacher_logits(root, batch)[scored]
    ids, logprobs, weights = (
        batch[name][scored] for name in ("tail_ids", "tail_logprobs", "tail_logweights")
    )
    assert ids.shape == (scored.sum(), M)
    exact = np.take_along_axis(sampling.log_softmax(logits), ids, 1)
    np.testing.assert_allclose(logprobs, exact, atol=2e-5)
    r = sampling.proposal(logits, k=8, betas=(0.5, 1.0))
    of_draws = np.take_along_axis(r, ids, 1)
    np.testing.assert_allclose(weights, -np.log(M * of_draws), atol=2e-4)
    assert not (ids[:, :, None] == batch["topk_ids"][scored][:, None, :]).any()
    for name in ("tail_logprobs", "tail_logweights"):
        assert (batch[name][~scored] == -np.inf).all()


def test_draws_depend_only_on_the_row(root, cache):
    """Other batches and units give the same draws, except those counted as near an edge."""
    again = tiny_cache(
        root,
        draws=M,
        draw_temperatures=TEMPERATURES,
        batch_rows=5,
        output=root / "other-batch",
    )
    assert_same_draws(cache, again)


def assert_same_draws(cache: Cache, again: Cache) -> None:
    assert cache.manifest.rows_id == again.manifest.rows_id
    commits = [p for c in (cache, again) for p in (c.path / "parts/0000/commits").iterdir()]
    near = sum(read_json(path)["draws_near_edge"] for path in commits)
    batches = [c.read(c.rows()) for c in (cache, again)]
    scored = batches[0]["loss_mask"]
    ids = [batch["tail_ids"][scored] for batch in batches]
    differing, total = (ids[0] != ids[1]).sum(), ids[0].size
    assert total > 10_000
    assert differing <= near
    assert 0 < near < 0.01 * total


@pytest.mark.slow
def test_four_devices_draw_what_one_draws(root, cache):
    """Two devices split every matrix, and two split the batch."""
    script = (
        "import sys, pathlib; from decant.schemas.manifest.plan import TeacherMesh;"
        "from tests.making.caches import tiny_settings;"
        "from decant.pipelines.capture.job import precompute; import dataclasses;"
        "root = pathlib.Path(sys.argv[1]);"
        f"config = tiny_settings(root, draws={M}, draw_temperatures={TEMPERATURES},"
        " output=root / 'four-devices');"
        "teacher = dataclasses.replace(config.teacher, mesh=TeacherMesh(tensor=2));"
        "precompute(dataclasses.replace(config, teacher=teacher))"
    )
    environment = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "NPROC": "32",  # fewer threads than devices deadlock in a collective
        "PYTHONPATH": str(Path.cwd()),
    }
    subprocess.run([sys.executable, "-c", script, str(root)], env=environment, check=True)
    again = open_cache(root / "four-devices")
    (devices,) = {
        read_json(path)["provenance"]["devices"]
        for path in (again.path / "parts/0000/commits").iterdir()
    }
    assert devices == "4"
    assert_same_draws(cache, again)


def test_a_row_captured_in_another_corpus_draws_the_same(root, cache):
    """Fewer files, other shards, other units: rows in both caches have equal draws."""
    some = dataclasses.replace(
        (config := tiny_settings(root, draws=M, draw_temperatures=TEMPERATURES)),
        corpus=dataclasses.replace(
            config.corpus, files=(str(root / "corpus" / "document-00[0-3].txt"),)
        ),
        output=root / "some",
    )
    precompute(some)
    fewer = open_cache(some.output)
    rows = [c.read(c.rows()) for c in (cache, fewer)]
    places = {tokens.tobytes(): i for i, tokens in enumerate(rows[0]["tokens"])}
    both = [
        (places[tokens.tobytes()], i)
        for i, tokens in enumerate(rows[1]["tokens"])
        if tokens.tobytes() in places
    ]
    assert len(both) >= 3
    same = np.mean([rows[0]["tail_ids"][i] == rows[1]["tail_ids"][j] for i, j in both])
    assert same > 0.999


def test_the_prior_is_the_mean_over_the_sampled_rows(root, cache):
    rows = read_plan(cache.path / "parts/0000/plan.json").rows
    first = np.cumsum([0] + [unit.rows for unit in rows.units])
    sample = sample_places(rows, length=64)
    batch = cache.read(np.array([first[unit] + offset for unit, offset in sample]))
    logits = teacher_logits(root, batch)[batch["loss_mask"]]
    tail = sampling.tail_of(logits, 8)
    pi = np.exp(cache.tail_prior())
    for node, beta in enumerate(BETAS):
        p = np.exp(sampling.log_softmax(beta * logits))
        expected = np.where(tail, p, 0).sum(0) / np.maximum(tail.sum(0), 1)
        np.testing.assert_allclose(pi[node][tail.any(0)], expected[tail.any(0)], rtol=1e-3)


def test_draws_are_captured_to_the_same_bytes_twice(root, cache):
    again = tiny_cache(root, draws=M, draw_temperatures=TEMPERATURES, output=root / "again")
    assert again.manifest.cache_id == cache.manifest.cache_id


@pytest.mark.parametrize(
    ("logits", "message"),
    [
        ({"draws": 3, "draw_temperatures": (1.5,)}, r"1, 1.143, 1.333, 2, 4, 8"),
        ({"draws": 3, "draw_temperatures": (2.0, 2.0)}, "each once"),
        ({"draws": -1}, "0 to 4,096"),
        ({"draws": 3, "k": 512}, "must leave a tail"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(root, logits, message):
    with pytest.raises(ValueError, match=message):
        precompute(tiny_settings(root, **logits, output=root / "refused"))
    assert not (root / "refused").exists()

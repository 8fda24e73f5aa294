"""The classic step from a cache that loses nothing is the step with the teacher in the loop."""

import csv

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from benchmarks import seed_parity
from decant.pipelines.config import Attention, Hidden, Sketch
from tests.making.caches import tiny_cache, write_teacher

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A teacher and a student whose attention is far from uniform."""
    root = tmp_path_factory.mktemp("parity")
    for seed, name in enumerate(("teacher", "student")):
        weights = write_teacher(root / name, seed=seed) / "model.safetensors"
        tensors = load_file(weights)
        queries = [name for name in tensors if name.endswith("q_proj.weight")]
        save_file({**tensors, **{name: tensors[name] * 100 for name in queries}}, weights)
    return root


@pytest.fixture(scope="module")
def whole(root):
    """Every token of the vocabulary stored exactly; states and maps in bfloat16."""
    return tiny_cache(
        root,
        k=512,
        hidden=Hidden(layers=(-1,)),
        attention=Attention(layers="all", dtype="bfloat16"),
    )


@pytest.fixture(scope="module")
def sketched(root):
    """Eight tokens, and a sketch of all dimensions that is not rounded."""
    return tiny_cache(root, k=8, sketch=Sketch(rank="full", step=0.0), output=root / "sketched")


def run(cache, work, *flags):
    teacher, student = (cache.path.parent / name for name in ("teacher", "student"))
    inputs = [f"--cache={cache.path}", f"--teacher={teacher}", f"--student={student}"]
    shape = [f"--work={work}", "--layers=2", "--updates=4", "--rows=2", "--learning-rate=0.01"]
    return seed_parity.main([*inputs, *shape, *flags])


@pytest.mark.parametrize(("stored", "tail"), [("whole", "bucket"), ("sketched", "default")])
def test_without_terms_the_losses_of_all_updates_are_equal(stored, tail, request, tmp_path):
    cache = request.getfixturevalue(stored)
    results = run(cache, tmp_path, f"--tails={tail}", "--hidden=0", "--attention=0")
    online, cached = (
        [line["loss"] for line in results[name]["curve"]] for name in ("online", tail)
    )
    assert len(online) == 4
    assert online[-1] < online[0] - 0.1  # it learns
    np.testing.assert_allclose(cached, online, rtol=1e-6)
    kl = [results[name]["heldout"]["kl"] for name in ("online", tail)]
    assert kl[0] == pytest.approx(kl[1], rel=1e-4)


def test_the_terms_differ_by_how_states_and_maps_are_stored(whole, tmp_path):
    results = run(whole, tmp_path, "--tails=bucket", "--attention=100")
    for ours, theirs in zip(results["bucket"]["curve"], results["online"]["curve"], strict=True):
        assert theirs["hidden_state_loss"] > 1
        for part, within in (("hidden_state_loss", 1e-3), ("attention_loss", 2e-2)):
            assert ours[part] == pytest.approx(theirs[part], rel=within)
    with (tmp_path / "curves.csv").open() as file:
        lines = list(csv.DictReader(file))
    for name, line in (("bucket", ours), ("online", theirs)):
        for part in ("loss", *seed_parity.PARTS):
            assert float(lines[-1][f"{name} {part}"]) == pytest.approx(line[part], rel=1e-6)

"""Projections: their initial values, and that a run keeps them."""

import numpy as np
import pytest

from decant.trainer.loss.layer_pairs import HiddenPair, Pairs
from decant.trainer.loss.projections import (
    initial_projections,
    saved_projections,
    with_projections,
    without_projections,
)

FIRST = HiddenPair(1, "hidden/2", 64, projection="hidden-0-0")
SECOND = HiddenPair(2, "hidden/4", 32, projection="hidden-0-1")
BARE = HiddenPair(2, "hidden/4", 48)


def initial(run, *terms, seed=0):
    run.mkdir(exist_ok=True)
    return initial_projections(Pairs(hidden=terms), width=48, run=run, seed=seed)


def test_states_keep_their_size_through_a_first_projection(tmp_path):
    projections = initial(tmp_path, (FIRST, SECOND), (BARE,))
    assert {name: x.shape for name, x in projections.items()} == {
        "hidden-0-0": (48, 64),
        "hidden-0-1": (48, 32),
    }
    states = np.random.default_rng(0).normal(size=(1000, 48))
    for matrix in projections.values():
        assert matrix.dtype == np.float32
        np.testing.assert_allclose(np.mean((states @ matrix) ** 2), 1, rtol=0.1)


def test_each_projection_is_seeded_by_its_name(tmp_path):
    both, one = initial(tmp_path / "a", (FIRST, SECOND)), initial(tmp_path / "b", (FIRST,))
    np.testing.assert_array_equal(both["hidden-0-0"], one["hidden-0-0"])
    other = initial(tmp_path / "c", (FIRST,), seed=1)
    assert not np.array_equal(one["hidden-0-0"], other["hidden-0-0"])
    assert not np.array_equal(both["hidden-0-0"][:, :32], both["hidden-0-1"])


def test_a_resumed_run_reads_its_initial_projections(tmp_path):
    """So that another version of numpy cannot change them."""
    began = initial(tmp_path, (FIRST,), seed=5)
    again = initial(tmp_path, (FIRST,), seed=6)
    np.testing.assert_array_equal(again["hidden-0-0"], began["hidden-0-0"])
    np.testing.assert_array_equal(saved_projections(tmp_path)["hidden-0-0"], began["hidden-0-0"])


def test_a_run_without_projections_writes_no_file(tmp_path):
    params = {"blocks": 1, "embedding": 2}
    assert with_projections(params, initial(tmp_path, (BARE,))) == params
    assert list(tmp_path.iterdir()) == []
    assert saved_projections(tmp_path) == {}
    assert without_projections(with_projections(params, {"hidden-0-0": 3})) == params


def test_damaged_projections_are_named(tmp_path):
    initial(tmp_path, (FIRST,))
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=rf"{file.name}: damaged"):
        saved_projections(tmp_path)

"""Any model is judged with the measures of the command `evaluate`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import decant
from decant.trainer.results.evaluate import read_evaluation
from decant.trainer.run.trained_student import load_checkpoint


@pytest.fixture(scope="module")
def student(noisy_run):
    """A run's student as any other model: a function to logits, with columns beyond the ids."""
    graph, params, _ = load_checkpoint(noisy_run.run, dtype="float32")

    @jax.jit
    def logits(tokens, segment_ids, positions):
        model = nnx.merge(graph, params)
        hidden, _ = model(tokens, segment_ids, positions)
        own = hidden @ model.unembedding()
        return jnp.pad(own, ((0, 0), (0, 0), (0, 8)), constant_values=50.0)

    return logits


def test_the_measures_are_those_of_the_command(noisy_run, student):
    expected = decant.evaluate_run(run=noisy_run.run)
    judged = decant.evaluate(str(noisy_run.cache), student, temperature=2.0)
    about_a_run = {"step", "weights", "other_teacher", "dtype", "temperature"}
    assert judged.keys() == expected.keys() - about_a_run
    measures = [name for name in judged if name.startswith("heldout_") and name != "heldout_kl_by"]
    assert len(measures) > 10
    for name in measures:
        assert judged[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-6), name
    for name in ("cache_id", "teacher_id", "rows", "heldout_kl_by"):
        assert judged[name] == expected[name]
    for ours, theirs in zip(judged["by_position"], expected["by_position"], strict=True):
        assert ours["ce"] == pytest.approx(theirs["ce"], rel=1e-4)
    assert read_evaluation(noisy_run.run)["cache_id"] == judged["cache_id"]


def test_the_size_of_a_call_changes_nothing(noisy_run, student):
    def as_numpy(*inputs):
        return np.asarray(student(*inputs), np.float64)

    few = decant.evaluate(noisy_run.cache, student, heldout_rows=3, batch_rows=1, quiet=True)
    many = decant.evaluate(noisy_run.cache, as_numpy, heldout_rows=3, batch_rows=8, quiet=True)
    assert many["heldout_kl"] == pytest.approx(few["heldout_kl"], rel=1e-5)
    assert many["rows"] == 3


def test_logits_of_another_shape_are_refused(noisy_run, student):
    with pytest.raises(ValueError, match=r"shape \(4, 64, 100\); expected \(4, 64, 512\)"):
        decant.evaluate(noisy_run.cache, lambda *x: student(*x)[..., :100])
    with pytest.raises(ValueError, match=r"shape \(4, 63, 520\); expected \(4, 64, 512\)"):
        decant.evaluate(noisy_run.cache, lambda *x: student(*x)[:, 1:])
    with pytest.raises(ValueError, match="batch_rows is 0; expected a whole number"):
        decant.evaluate(noisy_run.cache, student, batch_rows=0)

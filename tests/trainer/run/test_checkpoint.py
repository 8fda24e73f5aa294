"""Which checkpoints are kept, which is the best, and what is read from one of another optimiser."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decant.trainer.config import Keep, Optimiser
from decant.trainer.run.checkpoint import Checkpoints, latest_step
from decant.trainer.update.step import TrainState, initial_state

KL_AT = {10: 3.0, 20: 2.0, 30: 2.5, 40: None, 50: 2.2, 60: float("nan")}


def state_at(step, name="adamw"):
    params = {"embedding": jnp.full((4, 2), float(step)), "final_norm": jnp.ones(2)}
    state = initial_state(params, config=Optimiser(name=name))
    return TrainState(*state[:2], jnp.int32(step), *state[3:])


def heldout(kl):
    return None if kl is None else {"heldout_kl_bound": kl, "heldout_ce": 10 - kl}


def kept_after_saving(run, keep, *, steps=KL_AT):
    """Steps of the checkpoints that are kept after saving at each of these steps."""
    checkpoints = Checkpoints(run, keep=keep)
    for step in steps:
        checkpoints.save(state_at(step), data={"position": step}, heldout=heldout(KL_AT[step]))
    kept = checkpoints.steps
    checkpoints.close()
    return kept


@pytest.mark.parametrize(
    ("keep", "kept"),
    [
        (Keep(), [60]),
        (Keep(last=3), [40, 50, 60]),
        (Keep(best=1), [20, 60]),
        (Keep(best=2), [20, 50, 60]),
        (Keep(best=1, best_by="ce"), [10, 60]),
        (Keep(last=2, every=30), [30, 50, 60]),
        (Keep(last=1, best=1, every=40), [20, 40, 60]),
    ],
)
def test_the_last_the_best_and_every_nth_are_kept(tmp_path, keep, kept):
    assert kept_after_saving(tmp_path, keep) == kept
    assert latest_step(tmp_path) == 60


def test_the_next_process_knows_the_best_checkpoints(tmp_path):
    kept_after_saving(tmp_path, Keep(best=2), steps=[10, 20, 30])
    again = Checkpoints(tmp_path, keep=Keep(best=2))
    assert not again.due(40, heldout=heldout(2.6))
    assert again.due(40, heldout=heldout(2.4))
    assert not again.due(40, heldout=None)
    assert Checkpoints(tmp_path, keep=Keep(every=7)).due(42, heldout=None)
    again.save(state_at(50), data={}, heldout=heldout(2.2))
    assert again.steps == [20, 50]
    assert again.named_step("best") == 20
    assert again.named_step("best-ce") == 50
    assert (again.named_step("last"), again.named_step("20")) == (50, 20)
    with pytest.raises(
        ValueError, match=r"no checkpoint .30.; the run has checkpoints after updates 20, 50"
    ):
        again.named_step("30")
    again.close()


def test_without_held_out_metrics_there_is_no_best(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.named_step("last") is None
    checkpoints.save(state_at(5), data={})
    with pytest.raises(ValueError, match=r"no checkpoint has held-out metrics.* --keep\.best 1"):
        checkpoints.named_step("best")
    checkpoints.close()


@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon"])
def test_parameters_can_be_restored_without_the_rest_of_the_state(tmp_path, name, caplog):
    checkpoints, state = Checkpoints(tmp_path), state_at(5, name)
    checkpoints.save(state, data={"position": 3})
    restored, data = checkpoints.restore(state_at(0, name))
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, restored, state)))
    assert data["position"] == 3
    checkpoints.close()
    reader = Checkpoints(tmp_path, read_only=True)
    params = reader.restore_parameters(state_at(0).params, step=5)
    np.testing.assert_array_equal(params["embedding"], state.params["embedding"])
    reader.close()
    assert not [record for record in caplog.records if record.levelname == "WARNING"]

"""Which checkpoints stay, which are the best, and what another optimiser's can be read of."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decant.trainer.config import Keep, Optimiser
from decant.trainer.run.checkpoint import Checkpoints, latest_step
from decant.trainer.update.step import TrainState, initial_state

JUDGED = {10: 3.0, 20: 2.0, 30: 2.5, 40: None, 50: 2.2, 60: float("nan")}


def state_at(step, name="adamw"):
    params = {"embedding": jnp.full((4, 2), float(step)), "final_norm": jnp.ones(2)}
    state = initial_state(params, config=Optimiser(name=name))
    return TrainState(*state[:2], jnp.int32(step), *state[3:])


def judged(kl):
    return None if kl is None else {"heldout_kl_bound": kl, "heldout_ce": 10 - kl}


def saved(run, keep, *, steps=JUDGED):
    """The steps that are there after saving at each of these, if it is due or every tenth."""
    checkpoints = Checkpoints(run, keep=keep)
    for step in steps:
        checkpoints.save(state_at(step), data={"position": step}, judged=judged(JUDGED[step]))
    there = checkpoints.steps
    checkpoints.close()
    return there


@pytest.mark.parametrize(
    ("keep", "there"),
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
def test_the_last_the_best_and_the_numbered_stay(tmp_path, keep, there):
    assert saved(tmp_path, keep) == there
    assert latest_step(tmp_path) == 60


def test_the_best_are_known_again_by_the_next_process(tmp_path):
    saved(tmp_path, Keep(best=2), steps=[10, 20, 30])
    again = Checkpoints(tmp_path, keep=Keep(best=2))
    assert not again.due(40, judged=judged(2.6))
    assert again.due(40, judged=judged(2.4))
    assert not again.due(40, judged=None)
    assert Checkpoints(tmp_path, keep=Keep(every=7)).due(42, judged=None)
    again.save(state_at(50), data={}, judged=judged(2.2))
    assert again.steps == [20, 50]
    assert again.named_step("best") == 20
    assert again.named_step("best-ce") == 50
    assert (again.named_step("last"), again.named_step("20")) == (50, 20)
    with pytest.raises(
        ValueError, match=r"no checkpoint .30.; the run has checkpoints after updates 20, 50"
    ):
        again.named_step("30")
    again.close()


def test_without_a_judged_checkpoint_there_is_no_best(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.named_step("last") is None
    checkpoints.save(state_at(5), data={})
    with pytest.raises(ValueError, match=r"no checkpoint was judged .* --keep\.best 1"):
        checkpoints.named_step("best")
    checkpoints.close()


@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon"])
def test_parameters_are_read_alone_and_states_whole(tmp_path, name, caplog):
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

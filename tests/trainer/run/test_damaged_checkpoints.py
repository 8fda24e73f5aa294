"""A damaged checkpoint is never used in silence: the newest good one is, and a warning says so."""

import gc
import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decant.trainer.config import Keep, Optimiser
from decant.trainer.run.checkpoint import CHECKPOINTS, DAMAGED, Checkpoints
from decant.trainer.run.checksums import summarise
from decant.trainer.update.step import initial_state


@pytest.fixture(autouse=True)
def collected():
    """Garbage of failed reads is collected here, so that its errors fail this test, not another."""
    yield
    gc.collect()


def state_at(step):
    values = np.random.default_rng(step).normal(size=(64, 8))
    params = {"embedding": jnp.asarray(values, jnp.float32), "final_norm": jnp.ones(8)}
    return initial_state(params, config=Optimiser())._replace(step=jnp.int32(step))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    run = tmp_path_factory.mktemp("run")
    checkpoints = Checkpoints(run, keep=Keep(last=2))
    for step in (1, 2):
        checkpoints.save(state_at(step), data={"position": {"next_index": step}})
    checkpoints.close()
    return run


@pytest.fixture
def run(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "run")
    return tmp_path / "run"


def restored(run, *, read_only=False):
    """Step, state and position of the run's newest good checkpoint."""
    checkpoints = Checkpoints(run, read_only=read_only)
    try:
        if read_only:
            params, step = checkpoints.restore_newest_parameters(state_at(0).params)
            return step, params, None
        state, data = checkpoints.restore(state_at(0))
        return int(state.step), state.params, data["position"]["next_index"]
    finally:
        checkpoints.close()


def files(directory):
    return sorted(path for path in directory.rglob("*") if path.is_file())


def largest(run, step):
    return max(files(run / CHECKPOINTS / str(step)), key=lambda path: path.stat().st_size)


def equal(params, step):
    pairs = jax.tree.map(np.array_equal, params, state_at(step).params)
    return all(jax.tree.leaves(pairs))


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at // 8] ^= 1 << at % 8
    path.write_bytes(data)


def test_any_change_of_one_number_changes_both_halves_of_the_checksum():
    x = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    before = summarise({"x": jnp.asarray(x)})["['x']"].checksum
    for place in np.ndindex(x.shape):
        changed = x.copy()
        changed.view(np.uint32)[place] ^= 1 << 31
        after = summarise({"x": jnp.asarray(changed)})["['x']"].checksum
        assert after[:8] != before[:8]
        assert after[8:] != before[8:]
    assert summarise({"x": jnp.asarray(x[:, ::-1])})["['x']"].checksum != before


def test_the_checksum_is_worked_out_by_hand():
    x = jnp.asarray([[3, 5]], jnp.int32)  # places 0 and 1; the weight of place 0 is 1
    first, second = (3 + 5 * (factor | 1) for factor in (0x9E3779B1, 0x85EBCA6B))
    expected = f"{first % 2**32:08x}{second % 2**32:08x}"
    assert summarise({"x": x})["['x']"] == (expected, True)


def test_training_goes_on_from_the_checkpoint_before_a_damaged_one(run, capsys):
    path = largest(run, 2)
    path.write_bytes(path.read_bytes()[:-9])
    step, params, position = restored(run)
    assert (step, position) == (1, 1)
    assert equal(params, 1)
    said = capsys.readouterr().err
    assert f"{run / CHECKPOINTS / '2'}: this checkpoint is damaged" in said
    assert "training goes on after update 1" in said
    assert [path.name for path in (run / DAMAGED).iterdir()] == ["2"]
    # The step can be saved again.
    checkpoints = Checkpoints(run)
    checkpoints.save(state_at(2), data={})
    assert checkpoints.latest == 2
    checkpoints.close()


def test_readers_use_the_checkpoint_before_and_move_nothing(run, capsys):
    path = largest(run, 2)
    path.write_bytes(b"")
    step, params, _ = restored(run, read_only=True)
    assert step == 1
    assert equal(params, 1)
    assert "the checkpoint after update 1 is used" in capsys.readouterr().err
    assert not (run / DAMAGED).exists()
    reader = Checkpoints(run, read_only=True)
    with pytest.raises(ValueError, match=r"checkpoints/2: this checkpoint is damaged"):
        reader.restore_parameters(state_at(0).params, step=2)
    reader.close()


def test_a_checkpoint_under_the_name_of_another_is_not_used(run):
    checkpoints = run / CHECKPOINTS
    (checkpoints / "1").rename(checkpoints / "3")
    step, params, _ = restored(run)
    assert step == 2
    assert equal(params, 2)


def test_without_a_good_checkpoint_nothing_is_begun_anew(run):
    for step in (1, 2):
        largest(run, step).unlink()
    with pytest.raises(ValueError, match=r"no checkpoint is good. Bring back a copy or delete"):
        restored(run)
    assert not (run / DAMAGED).exists()


def test_a_checkpoint_of_an_older_release_is_read_as_before(run):
    """Releases before 0.8 saved no checksums."""
    path = next((run / CHECKPOINTS / "2").rglob("data/metadata"))
    data = json.loads(path.read_text())
    data = {name: data[name] for name in data if name not in ("digest", "checksums")}
    path.write_text(json.dumps(data))
    assert restored(run)[0] == 2


def test_values_without_checksums_and_position_are_of_no_release(run):
    path = next((run / CHECKPOINTS / "2").rglob("data/metadata"))
    path.write_text("{}")
    assert restored(run)[0] == 1


def test_weights_that_are_not_finite_are_not_saved(run):
    checkpoints, state = Checkpoints(run), state_at(3)
    for spoilt in (
        state._replace(params={**state.params, "final_norm": jnp.ones(8).at[3].set(math.nan)}),
        state._replace(moments=jax.tree.map(lambda x: x / 0.0, state.moments)),
    ):
        with pytest.raises(FloatingPointError, match=r"after update 3: .* not finite"):
            checkpoints.save(spoilt, data={})
    assert checkpoints.steps == [1, 2]
    checkpoints.close()


def damage(path, random):
    """Change a file as a bad disk or a careless hand would; say how."""
    data = bytearray(path.read_bytes())
    kind = random.choice(["flip", "flip", "flip", "cut", "zeros", "delete", "swap"])
    if kind == "delete" or not data:
        path.unlink()
    elif kind == "flip":
        flip(path, int(random.integers(8 * len(data))))
    elif kind == "cut":
        path.write_bytes(data[: int(random.integers(len(data)))])
    elif kind == "zeros":
        at = int(random.integers(len(data)))
        data[at : at + 512] = bytes(len(data[at : at + 512]))
        path.write_bytes(data)
    else:
        checkpoint = next(p for p in path.parents if p.name == "2")
        shutil.copy(random.choice(files(checkpoint.with_name("1"))), path)
    return f"{kind} {path}"


def damaged_restores(run, tmp_path, *, trials, seed):
    """Damage a checkpoint's files one at a time; count what restoring then uses."""
    random, used = np.random.default_rng(seed), {1: 0, 2: 0}
    for trial in range(trials):
        copy = shutil.copytree(run, tmp_path / f"{trial}")
        how = damage(random.choice(files(copy / CHECKPOINTS / "2")), random)
        step, params, _ = restored(copy, read_only=bool(trial % 2))
        assert equal(params, step), f"trial {trial}: {how}: other weights"
        used[step] += 1
        shutil.rmtree(copy)
    return used


def test_damage_to_any_file_of_a_checkpoint_never_gives_other_weights(run, tmp_path):
    used = damaged_restores(run, tmp_path, trials=25, seed=0)
    assert min(used.values()) > 0


@pytest.mark.mistreat
def test_a_thousand_damages_never_give_other_weights(run, tmp_path, capsys):
    used = damaged_restores(run, tmp_path, trials=1000, seed=1)
    with capsys.disabled():
        print(f"\n1000 damages: {used[2]} harmless, {used[1]} used the checkpoint before")

"""A student may begin as what another run has trained."""

import dataclasses

import numpy as np
import pytest
from flax import nnx

from decant.models.parameters import parameters_by_path
from decant.trainer.config import Adapter, Data, Loss, Optimiser, Student, Train
from decant.trainer.run.saved_initial import load_initial_student
from decant.trainer.run.train import train
from decant.trainer.run.trained_student import load_student

SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "num_kv_heads": 1}


def settings(cache, run, student: Student) -> Train:
    return Train(
        cache=cache.path,
        run=run,
        student=student,
        data=Data(batch_rows=4, steps=4),
        loss=Loss(chunk_tokens=64),
        optimiser=Optimiser(learning_rate=1e-2, warmup_steps=1),
        heldout_rows=0,
        quiet=True,
    )


@pytest.fixture(scope="module")
def first(cache, tmp_path_factory):
    """A run of two blocks."""
    run = tmp_path_factory.mktemp("first") / "run"
    train(settings(cache, run, Student(init="scratch", layers=2, **SHAPE)))
    return run


def arrays(model) -> dict[str, np.ndarray]:
    return {
        path: np.asarray(parameter.get_value())
        for path, parameter in parameters_by_path(model).items()
    }


def test_the_next_run_begins_with_the_last_checkpoint_of_the_first(cache, first, tmp_path):
    config = settings(cache, tmp_path / "b", Student(init="checkpoint", source=str(first)))
    train(config)
    last = arrays(nnx.merge(*load_student(first, dtype="float32")))
    begun = arrays(load_initial_student(config.run, dtype="float32"))
    assert last.keys() == begun.keys()
    assert all(np.array_equal(last[path], begun[path]) for path in last)
    first_begun = arrays(load_initial_student(first, dtype="float32"))
    assert not np.array_equal(first_begun["blocks.query"], begun["blocks.query"])


@pytest.mark.slow
def test_blocks_of_a_run_are_cut(cache, first, tmp_path):
    config = settings(cache, tmp_path / "b", Student(source=str(first), layers=(1,)))
    train(config)
    last = arrays(nnx.merge(*load_student(first, dtype="float32")))
    begun = arrays(load_initial_student(config.run, dtype="float32"))
    assert np.array_equal(last["blocks.query"][1:], begun["blocks.query"])


@pytest.mark.slow
def test_an_adapter_on_a_run_is_refused_and_mended_settings_take_its_place(cache, first, tmp_path):
    student = Student(init="checkpoint", source=str(first), adapter=Adapter(rank=2))
    config = settings(cache, tmp_path / "b", student)
    with pytest.raises(ValueError, match=r"is a run, .* `decant export "):
        train(config)
    train(dataclasses.replace(config, student=Student(init="checkpoint", source=str(first))))

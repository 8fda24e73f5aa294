"""Students with an adapter: what is trained, saved, judged, refused and exported."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from decant.models import open_checkpoint
from decant.models.checkpoints.adapters import Lora, add_adapter, merged
from decant.models.families import config_to_json
from decant.trainer.config import (
    Adapter,
    AttentionLoss,
    Data,
    Evaluate,
    Export,
    HiddenLoss,
    Loss,
    Optimiser,
    Student,
    Train,
)
from decant.trainer.loss.batch_fields import loss_fields
from decant.trainer.loss.frozen import joined, trained_and_frozen
from decant.trainer.loss.objective import Objective, Tables, scheduled_values
from decant.trainer.results.evaluate import evaluate
from decant.trainer.results.export import export
from decant.trainer.results.generate import generate
from decant.trainer.run.adapter_check import check_adapter
from decant.trainer.run.metrics_log import read_metrics
from decant.trainer.run.student_parameters import graph_and_parameters
from decant.trainer.run.train import train
from decant.trainer.run.trained_student import load_student, student_digest
from decant.trainer.update.step import mean_gradient
from tests.making.caches import write_teacher
from tests.making.models import CONFIG, final_states

RANK = 4


@pytest.fixture(scope="module")
def source(root, drawn_cache, tmp_path_factory):
    """A checkpoint with the cache's tokenizer and other weights than the teacher's."""
    return write_teacher(tmp_path_factory.mktemp("source") / "source", seed=3)


def settings(cache, run, source, *, adapter=None, **changes):
    chosen = {"rank": RANK, "targets": ("q_proj", "o_proj", "down_proj"), **(adapter or {})}
    fixed = {
        "student": Student(init="checkpoint", source=str(source), adapter=Adapter(**chosen)),
        "data": Data(batch_rows=2, steps=6),
        "loss": Loss(alpha=0.5, temperature=2.0, tail="bucket", chunk_tokens=64),
        "optimiser": Optimiser(learning_rate=0.02, warmup_steps=1),
        "checkpoint_every": 3,
        "evaluate_every": 3,
        "heldout_rows": 2,
        "compilation_cache": False,
        "quiet": True,
    }
    return Train(cache=cache.path, run=run, **{**fixed, **changes})


@pytest.fixture(scope="module")
def adapted(drawn_cache, source, tmp_path_factory):
    config = settings(drawn_cache, tmp_path_factory.mktemp("runs") / "adapted", source)
    train(config)
    return config


def test_the_gradient_is_that_of_the_whole_matrices_projected(drawn_cache, source):
    """d/dA = s·G·Bᵀ and d/dB = s·Aᵀ·G, where G is the gradient of the merged matrix; float64."""
    scaling = 0.7
    model = open_checkpoint(source).load()
    add_adapter(model, Lora(RANK, scaling, ("all-linear",)), seed=0)
    draw = np.random.default_rng(0)
    for name in ("query", "key", "value", "output", "gate", "up", "down"):
        b = getattr(model.blocks, name + "_lora_b")
        b.set_value(jnp.asarray(draw.standard_normal(b.shape, np.float32) * 0.02))
    whole = merged(model)
    for parameter in jax.tree.leaves(nnx.state(whole, nnx.Param), is_leaf=is_variable):
        parameter.set_value(jnp.asarray(parameter.get_value()))
    batch = {n: jnp.asarray(x) for n, x in drawn_cache.read(drawn_cache.rows()[:2]).items()}
    loss = Loss(alpha=0.5, temperature=2.0, tail="bucket", chunk_tokens=64)
    batch = {name: batch[name] for name in loss_fields(loss.tail)}

    def gradient_of(model):
        graph, params = graph_and_parameters(model)
        trained, frozen = trained_and_frozen(params)
        objective = Objective(graph, loss, vocabulary=512)
        values = scheduled_values(loss, 0, steps=1)
        tables = Tables(frozen=frozen or None)
        compute = jax.jit(
            lambda p: mean_gradient(objective, p, batch, values=values, tables=tables)
        )
        return compute(trained)

    ours, theirs = gradient_of(model), gradient_of(whole)
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-5)
    inputs = {"output": 2}
    for name in ("query", "key", "value", "output", "gate", "up", "down"):
        a, b = (
            np.asarray(getattr(model.blocks, f"{name}_lora_{part}")[...], np.float64)
            for part in "ab"
        )
        whole_gradient = np.asarray(theirs[2]["blocks"][name], np.float64)
        layers, count = len(a), inputs.get(name, 1)
        width = int(np.prod(whole_gradient.shape[1 : 1 + count]))
        g = whole_gradient.reshape(layers, width, -1)
        flat_a, flat_b = a.reshape(layers, width, RANK), b.reshape(layers, RANK, -1)
        d_a = scaling * np.einsum("lio,lro->lir", g, flat_b).reshape(a.shape)
        d_b = scaling * np.einsum("lir,lio->lro", flat_a, g).reshape(b.shape)
        for expected, part in ((d_a, "a"), (d_b, "b")):
            found = ours[2]["blocks"][f"{name}_lora_{part}"]
            scale = np.abs(expected).max()
            np.testing.assert_allclose(found, expected, rtol=1e-3, atol=2e-5 * scale)


def is_variable(x):
    return isinstance(x, nnx.Variable)


def test_the_student_learns_and_its_base_stays(adapted, source):
    lines = [line["heldout_kl"] for line in read_metrics(adapted.run) if "heldout_kl" in line]
    assert lines[-1] < lines[0]
    _, params = load_student(adapted.run, dtype="float32")
    trained, frozen = trained_and_frozen(params)
    names = {f"{name}_lora_{part}" for name in ("query", "output", "down") for part in "ab"}
    assert trained["blocks"].keys() == names
    assert all(np.asarray(x).any() for x in trained["blocks"].values())
    _, whole = graph_and_parameters(open_checkpoint(source).load())
    for ours, base in zip(jax.tree.leaves(frozen), jax.tree.leaves(whole), strict=True):
        assert ours.dtype == jnp.bfloat16
        np.testing.assert_array_equal(ours, base.astype(jnp.bfloat16))
    assert {x.dtype for x in jax.tree.leaves(trained)} == {np.dtype("float32")}


def test_the_run_holds_the_adapter_alone(adapted, source):
    initial = {path.name for path in (adapted.run / "initial").iterdir()}
    assert "model.safetensors" not in initial
    assert "adapter.json" in initial
    saved = [p for p in (adapted.run / "checkpoints/6/state").rglob("*") if p.is_file()]
    matrices = 2 * RANK * (32 + 32) * 2 + 2 * RANK * (64 + 32)
    # The matrices and two moments of each, in float32, and what Orbax writes beside them; the whole
    # student is ten times as large.
    assert sum(path.stat().st_size for path in saved) < 3 * 4 * matrices + 60_000
    assert "embedding" not in (adapted.run / "checkpoints/6/state/_METADATA").read_text()


def test_interrupted_and_continued_it_is_the_same(adapted, drawn_cache, source, tmp_path):
    run = shutil.copytree(adapted.run, tmp_path / "run")
    shutil.rmtree(run / "checkpoints/6", ignore_errors=True)
    assert not (run / "checkpoints/3").exists()  # only the last is kept
    config = dataclasses.replace(adapted, run=tmp_path / "again")
    train(config)
    for ours, theirs in zip(*map(leaves, (config.run, adapted.run)), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def leaves(run):
    return jax.tree.leaves(load_student(run, dtype="float32")[1])


def test_a_run_stopped_half_way_goes_on_to_the_same_weights(adapted, tmp_path):
    """The first half keeps its checkpoint; a second start begins from there."""
    config = dataclasses.replace(adapted, run=tmp_path / "run")
    stop = RuntimeError("stopped")

    def at_four(line):
        if line.get("step") == 4 and "loss" in line:
            raise stop

    with pytest.raises(RuntimeError):
        train(config, callbacks=[at_four])
    assert sorted(p.name for p in (config.run / "checkpoints").iterdir()) == ["3"]
    train(config)
    for ours, theirs in zip(*map(leaves, (config.run, adapted.run)), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_another_base_is_refused_and_a_moved_one_found(adapted, drawn_cache, source, tmp_path):
    run = shutil.copytree(adapted.run, tmp_path / "run")
    moved = shutil.copytree(source, tmp_path / "moved")
    tensors = load_file(source / "model.safetensors")
    other = shutil.copytree(source, tmp_path / "other")
    first = next(iter(tensors))
    save_file({**tensors, first: tensors[first] + 1}, other / "model.safetensors")

    def again(place, *allow):
        student = dataclasses.replace(adapted.student, source=str(place))
        train(dataclasses.replace(adapted, run=run, student=student, allow=allow))

    with pytest.raises(ValueError, match=r"cannot continue with these:\n  student.source"):
        again(other)
    with pytest.raises(ValueError, match=r"stands on a base of identity .* has .*: other weights"):
        again(other, "student.source")
    again(moved, "student.source")
    assert leaves(run)
    shutil.rmtree(moved)
    with pytest.raises(
        FileNotFoundError, match=r"the base of its adapter: .*--student.source PLACE"
    ):
        load_student(run, dtype="float32")


def test_evaluation_and_samples_are_those_of_the_merged_student(adapted, tmp_path):
    run = shutil.copytree(adapted.run, tmp_path / "run")
    judged = evaluate(Evaluate(run=run, heldout_rows=2, quiet=True))
    last = [line for line in read_metrics(run) if "heldout_ce" in line][-1]
    assert judged["heldout_ce"] == pytest.approx(last["heldout_ce"], rel=1e-5)
    assert len([*generate(generation(run))]) == 1


def generation(run):
    from decant.trainer.config import Generate

    return Generate(run=run, samples=1, max_tokens=3)


def test_the_exported_adapter_and_the_merged_student_compute_the_same(adapted, source, tmp_path):
    apart = export(Export(run=adapted.run, output=tmp_path / "apart"))
    whole = export(Export(run=adapted.run, output=tmp_path / "whole", adapter="merged"))
    written = json.loads((apart / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == str(source.resolve())
    assert (written["r"], written["lora_alpha"]) == (RANK, 2 * RANK)
    assert written["target_modules"] == ["down_proj", "o_proj", "q_proj"]
    tensors = load_file(apart / "adapter_model.safetensors")
    at = "base_model.model.model.layers.1.mlp.down_proj"
    assert tensors[f"{at}.lora_A.weight"].shape == (RANK, 64)
    assert tensors[f"{at}.lora_B.weight"].shape == (32, RANK)
    assert len(tensors) == 2 * 2 * 3
    assert not (apart / "config.json").exists()
    model = nnx.merge(*load_student(adapted.run, dtype="float32"))
    assert student_digest(model) == student_digest(open_checkpoint(whole).load())
    expected = np.asarray(final_states(model))
    # The base is float32 in its directory, and bfloat16 in the run.
    for directory, tolerance in ((whole, 1e-4), (apart, 0.05)):
        states = np.asarray(final_states(open_checkpoint(directory).load()))
        np.testing.assert_allclose(states, expected, rtol=0, atol=tolerance)
    text = (apart / "README.md").read_text("utf-8")
    assert "| student.adapter.rank | 4 |" in text


def test_one_output_holds_one_kind_of_export(adapted, tmp_path):
    out = tmp_path / "out"
    for kind, there, gone in (
        ("merged", "model.safetensors", "adapter_config.json"),
        ("apart", "adapter_model.safetensors", "model.safetensors"),
        ("merged", "model.safetensors", "adapter_model.safetensors"),
    ):
        export(Export(run=adapted.run, output=out, adapter=kind))
        assert (out / there).exists()
        assert not (out / gone).exists()


def test_an_adapter_on_a_cut_student_stands_on_the_runs_own_base(drawn_cache, source, tmp_path):
    config = settings(drawn_cache, tmp_path / "run", source, adapter={"base": "float32"})
    cut = dataclasses.replace(config.student, init="cut", layers=1)
    train(dataclasses.replace(config, student=cut))
    apart = export(Export(run=config.run, output=tmp_path / "apart"))
    written = json.loads((apart / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == str((tmp_path / "run/initial").resolve())
    model = nnx.merge(*load_student(config.run, dtype="float32"))
    states = final_states(open_checkpoint(apart).load())
    np.testing.assert_allclose(states, final_states(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "optimiser",
    [
        Optimiser(name="adafactor"),
        Optimiser(name="muon", freeze=("layers.0",)),
        pytest.param(Optimiser(no_decay=("*lora_b",)), marks=pytest.mark.slow),
    ],
)
def test_every_optimiser_trains_it(drawn_cache, source, tmp_path, optimiser):
    config = settings(
        drawn_cache,
        tmp_path / "run",
        source,
        adapter={"targets": ("v_proj",), "scaling": "root", "alpha": 3.0},
        optimiser=optimiser,
        data=Data(batch_rows=2, steps=2, microbatches=2),
    )
    assert train(config).finished
    written = load_student(config.run, dtype="float32")[1]["blocks"]["value_lora_b"]
    moved = np.asarray(written).any(axis=(1, 2, 3))
    assert moved.tolist() == [not optimiser.freeze, True]


@pytest.mark.slow
def test_losses_over_layers_train_it(layered_cache, layered_root, tmp_path):
    loss = Loss(
        tail="sampled",
        chunk_tokens=64,
        hidden=(HiddenLoss(weight=0.5, projection=True),),
        attention=(AttentionLoss(weight=0.5, kind="kl"),),
    )
    config = settings(layered_cache, tmp_path / "run", layered_root / "teacher", loss=loss)
    assert train(config).finished
    assert evaluate(Evaluate(run=config.run, heldout_rows=1, quiet=True))["step"] == 6


@pytest.mark.parametrize(
    ("adapter", "expected"),
    [
        ({"rank": 0}, r"student.adapter.rank is 0; expected a whole number, 1 to 4,096"),
        ({"rank": None}, "student.adapter.targets is given, but student.adapter.rank is not"),
        ({"targets": ("qproj",)}, r"'qproj' cannot be adapted; this model has q_proj, k_proj"),
        ({"targets": ()}, "student.adapter.targets is empty"),
    ],
)
def test_settings_that_make_no_adapter_are_refused(
    drawn_cache, source, tmp_path, adapter, expected
):
    with pytest.raises(ValueError, match=expected):
        train(settings(drawn_cache, tmp_path / "run", source, adapter=adapter))


def student_of(tmp_path, *targets, **changes):
    """A student from scratch of this shape, with an adapter on the targets."""
    shape = dataclasses.replace(CONFIG, max_positions=256, **changes)
    (tmp_path / "config.json").write_text(json.dumps(config_to_json(shape)))
    adapter = Adapter(rank=RANK, targets=targets)
    return Student(init="scratch", config=tmp_path / "config.json", adapter=adapter)


FUSED = {"family": "phi3"}
EXPERTS = {"family": "mixtral", "num_experts": 4, "experts_per_token": 2, "normalise_experts": True}
DENSE_FIRST = {
    "family": "glm4_moe",
    "num_experts": 4,
    "experts_per_token": 2,
    "router": "sigmoid",
    "router_correction": True,
    "shared_intermediate_size": 64,
    "dense_layers": 1,
    "dense_intermediate_size": 64,
}


def test_an_adapter_that_can_only_be_exported_merged_is_named_when_training_begins(
    drawn_cache, tmp_path
):
    student = student_of(tmp_path, "q_proj", "o_proj", "up_proj", **FUSED)
    said = check_adapter(student, cache=drawn_cache, run=tmp_path / "run") or ""
    assert "hold query, up together with other matrices" in said
    assert f"`decant export {tmp_path / 'run'} --adapter merged`" in said
    apart = student_of(tmp_path, "o_proj", "down_proj", **FUSED)
    assert check_adapter(apart, cache=drawn_cache, run=tmp_path / "run") is None


@pytest.mark.parametrize(
    ("shape", "target", "expected"),
    [
        (EXPERTS, "up_proj", r"'up_proj' is a matrix of each expert, which cannot be adapted"),
        (DENSE_FIRST, "q_proj", r"the first 1 blocks of this model have no experts"),
    ],
)
def test_students_that_cannot_have_the_adapter_are_refused_before_anything_is_written(
    drawn_cache, tmp_path, shape, target, expected
):
    config = settings(drawn_cache, tmp_path / "run", "")
    student = student_of(tmp_path, target, **shape)
    with pytest.raises(ValueError, match=expected):
        train(dataclasses.replace(config, student=student))
    assert not (tmp_path / "run").exists()


def test_joined_is_the_inverse_of_taking_apart():
    params = {"embedding": 1, "blocks": {"query": 2, "query_lora_a": 3}, "projections": {"p": 4}}
    trained, frozen = trained_and_frozen(params)
    assert trained == {"blocks": {"query_lora_a": 3}, "projections": {"p": 4}}
    assert joined(trained, frozen) == params
    plain = {"embedding": 1, "projections": {"p": 4}}
    assert trained_and_frozen(plain) == (plain, {})

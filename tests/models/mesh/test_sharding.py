"""The same model on 1, 2 and 4 simulated devices."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
from decant.models import ModelConfig
from decant.models.numerics import logits
from decant.models.mesh.sharding import batch_sharding, teacher_mesh, place_parameters
from tests.making.models import random_decoder

config = ModelConfig(
    vocab_size=52, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=4,
    num_kv_heads=2, head_dim=8, tie_embeddings=True,
)
tokens = np.random.default_rng(0).integers(0, 52, (4, 12)).astype(np.int32)
segments = np.array([[1] * 5 + [2] * 7, [1] * 12, [1] * 4 + [0] * 8, [1] * 6 + [2] * 6], np.int32)
positions = np.array([[*range(5), *range(7)], [*range(12)], [*range(4), *[0] * 8],
                      [*range(6), *range(6)]], np.int32)

def loss(model, *rows):
    z = logits(model(*rows)[0].reshape(-1, 16), model.unembedding(), softcap=None)
    return jnp.mean(jax.nn.logsumexp(z, -1) - z[:, 0]), z

def run(function, count, tensor):
    mesh = teacher_mesh(tensor=tensor, devices=jax.devices()[:count])
    model = random_decoder(config)
    place_parameters(model, mesh)
    rows = [jax.device_put(a, batch_sharding(mesh)) for a in (tokens, segments, positions)]
    return model, jax.tree.map(np.asarray, nnx.jit(function)(model, *rows))

with_gradients = nnx.value_and_grad(loss, has_aux=True)
_, ((_, expected), slopes) = run(with_gradients, 1, 1)
for count, tensor in ((2, 1), (2, 2), (4, 4)):
    model, (_, z) = run(loss, count, tensor)
    np.testing.assert_allclose(z, expected, rtol=1e-5, atol=1e-6)
    pieces = {name: array[...].sharding.shard_shape(array[...].shape) for name, array in (
        ("up", model.blocks.up), ("query", model.blocks.query), ("key", model.blocks.key),
        ("embedding", model.embedding), ("norm", model.final_norm))}
    print(count, tensor, pieces)
_, (_, gradients) = run(with_gradients, 4, 2)
for mine, theirs in zip(*map(jax.tree.leaves, (gradients, slopes)), strict=True):
    np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-7)
print("gradients are equal")
"""


@pytest.fixture(scope="module")
def report():
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    flags["NPROC"] = "32"  # fewer threads than devices deadlock in a collective
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=os.environ | flags, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_on_two_and_four_devices_logits_and_gradients_are_those_of_one(report):
    assert report.splitlines()[-1] == "gradients are equal"


def test_heads_mlp_and_vocabulary_are_split_and_norms_are_not(report):
    assert (
        "2 2 {'up': (2, 16, 12), 'query': (2, 16, 2, 8), 'key': (2, 16, 1, 8), "
        "'embedding': (26, 16), 'norm': (16,)}" in report
    )


def test_an_axis_that_the_mesh_does_not_divide_stays_whole(report):
    # 2 key/value heads on 4 devices.
    assert "4 4 {'up': (2, 16, 6), 'query': (2, 16, 1, 8), 'key': (2, 16, 2, 8)" in report


def test_data_parallel_devices_each_hold_the_whole_model(report):
    assert "2 1 {'up': (2, 16, 24), 'query': (2, 16, 4, 8)" in report


def test_a_mesh_that_does_not_fit_the_devices_is_refused():
    from decant.models.mesh.sharding import teacher_mesh

    with pytest.raises(ValueError, match="tensor = 2, expert = 1 needs 2 devices"):
        teacher_mesh(tensor=2, devices=[object()])


def test_a_parameter_without_logical_axes_is_named():
    from flax import nnx

    from decant.models.mesh.sharding import parameter_shardings, teacher_mesh

    class Bare(nnx.Module):
        def __init__(self):
            self.weight = nnx.Param(1.0)

    with pytest.raises(ValueError, match="parameter weight has no logical axes"):
        parameter_shardings(Bare(), teacher_mesh())

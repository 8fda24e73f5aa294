"""Learned positions, biases, norms of whole queries, fused tensors, latent attention, linear
attention: on eight devices as on one.

The fused tensors are split where a device's share of their parameters lies.
"""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import jax, numpy as np
from flax import nnx
from decant.models import open_checkpoint
from decant.models.mesh.execution import Execution
from decant.models.mesh.sharding import batch_sharding, student_mesh, teacher_mesh
from decant.models.parameters import parameters_by_path
from tests.paths import GOLDEN

draw = np.random.default_rng(0)
tokens = draw.integers(0, 80, (8, 12)).astype(np.int32)
segments = np.repeat([[1] * 5 + [2] * 7, [1] * 9 + [0] * 3], 4, axis=0).astype(np.int32)
positions = np.repeat([[*range(5), *range(7)], [*range(9), 0, 0, 0]], 4, axis=0).astype(np.int32)

def final(model, execution):
    return model(tokens, segments, positions, execution=execution)[0]

meshes = [teacher_mesh(data=d, tensor=t) for d, t in ((1, 8), (2, 4), (8, 1))]
meshes.append(student_mesh(data=2, fsdp=2, tensor=2))
run = (*("gpt2", "gpt_neox", "olmo2", "deepseek_v3", "qwen3_next"),
       *("gemma3n", "gemma4", "gemma4_moe"))
for name in (*run, "phi3", "granite4", "qwen3_5"):
    checkpoint = open_checkpoint(GOLDEN / "families" / name)
    alone = checkpoint.load()
    expected = nnx.jit(final, static_argnums=1)(alone, Execution())
    whole = {path: np.asarray(p[...]) for path, p in parameters_by_path(alone).items()}
    for mesh in meshes:
        model = checkpoint.load(mesh=mesh)
        for path, parameter in parameters_by_path(model).items():
            np.testing.assert_array_equal(np.asarray(parameter[...]), whole[path])
        if name in run:
            states = nnx.jit(final, static_argnums=1)(model, Execution(mesh))
            loose = {"qwen3_next": 10, "gemma3n": 4, "gemma4": 4, "gemma4_moe": 4}.get(name, 1)
            np.testing.assert_allclose(states, expected, rtol=1e-5, atol=5e-6 * loose)
    split = {path: p[...].sharding.shard_shape(p[...].shape)[-2:]
             for path, p in parameters_by_path(checkpoint.load(mesh=meshes[1])).items()}
    of = "full_" if name.startswith("gemma") else ""
    print(name, "query", split[of + "blocks.query"], "up", split[of + "blocks.up"])
"""


@pytest.mark.slow
def test_on_eight_devices_results_are_those_of_one():
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    # Fewer threads than devices deadlock in a collective.
    more = {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "NPROC": "32"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=os.environ | more, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    # One of four heads, and a quarter of the MLP's 40 columns.
    for name in ("gpt2", "gpt_neox", "olmo2", "phi3"):
        assert f"{name} query (1, 8) up (32, 10)" in done.stdout
    assert "gemma3n query (1, 8) up (32, 10)" in done.stdout
    assert "gemma4 query (1, 16) up (32, 10)" in done.stdout
    assert "gemma4_moe query (1, 16) up (32, 6)" in done.stdout
    assert "deepseek_v3 query (1, 16) up (32, 6)" in done.stdout

"""What the backward pass keeps changes memory; it changes results by rounding only."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from decant.models import ModelConfig
from decant.models.mesh.execution import Execution
from tests.making.models import random_decoder

SMALL = ModelConfig(
    vocab_size=64,
    hidden_size=16,
    intermediate_size=64,
    num_layers=8,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    max_positions=256,
    tie_embeddings=True,
)


def test_keeping_less_of_each_block_takes_less_memory_and_gives_the_same_gradient():
    graph, params = nnx.split(random_decoder(SMALL))
    tokens = np.arange(256, dtype=np.int32).reshape(2, 128) % 64
    where = np.ones_like(tokens), np.broadcast_to(np.arange(128, dtype=np.int32), tokens.shape)

    def gradient(remat):
        def loss(params):
            states, kept = nnx.merge(graph, params)(
                tokens, *where, hidden_layers=(3,), execution=Execution(remat=remat)
            )
            return jnp.sum(states**2) + jnp.sum(kept[3])

        options = {"xla_backend_optimization_level": 0}
        program = jax.jit(jax.grad(loss), compiler_options=options).lower(params).compile()
        return program.memory_analysis().temp_size_in_bytes, program(params)

    memory, gradients = zip(*map(gradient, ("none", "dots", "block")), strict=True)
    assert memory[0] > 1.2 * memory[1]
    assert memory[1] > 1.2 * memory[2]
    for other in gradients[1:]:
        for mine, theirs in zip(*map(jax.tree.leaves, (other, gradients[0])), strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-4 * np.abs(theirs).max())


def test_a_bfloat16_model_keeps_its_widest_arrays_in_bfloat16():
    config = dataclasses.replace(SMALL, num_layers=7, intermediate_size=48)
    graph, params = nnx.split(random_decoder(config, dtype=jnp.bfloat16))
    tokens = np.zeros((1, 32), np.int32)

    def kept(remat):
        def loss(params):
            states, _ = nnx.merge(graph, params)(
                tokens, tokens, tokens, execution=Execution(remat=remat)
            )
            return jnp.sum(states.astype(jnp.float32) ** 2)

        program = jax.jit(jax.grad(loss)).lower(params).as_text()
        forward = program.split("stablehlo.while", 1)[1].split("cond {")[0]
        return Counter(re.findall(r"tensor<7x1x32x([\dx]*x\w+)>", forward))

    # The residual stream before attention and before the MLP, and both after their norms; queries
    # and the output of attention; keys and values; gate, up and their product.
    assert kept("none") == {
        **{"16xf32": 2, "16xbf16": 2, "2x8xbf16": 2, "1x8xbf16": 2, "48xbf16": 3},
    }
    assert kept("dots") == {"16xf32": 1, "2x8xbf16": 1, "1x8xbf16": 2, "48xbf16": 2}
    assert kept("block") == {"16xf32": 1}


def test_over_fsdp_no_device_keeps_gathered_matrices():
    """No device's program has an array of the whole matrices of all blocks, or their gradients."""
    flags = "--xla_force_host_platform_device_count=4"
    env = os.environ | {"XLA_FLAGS": flags, "NPROC": "32", "PYTHONPATH": str(Path.cwd())}
    done = subprocess.run(
        [sys.executable, "-c", KEPT_OVER_FSDP], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == []


KEPT_OVER_FSDP = """
import json, re
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from decant.models import ModelConfig
from decant.models.mesh.execution import Execution
from decant.models.mesh.sharding import partition_spec, student_mesh
from tests.making.models import random_decoder

sizes = dict(vocab_size=64, hidden_size=64, intermediate_size=160, num_layers=7, num_heads=4)
config, mesh = ModelConfig(**sizes, num_kv_heads=2, head_dim=16), student_mesh(fsdp=4)
rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
tokens = jax.device_put(np.zeros((4, 32), np.int32), rows)

def place(v):
    where = NamedSharding(mesh, partition_spec(v.get_metadata()["axes"], v.get_value().shape, mesh))
    return v.replace(jax.device_put(v.get_value(), where))

whole_matrices = []
for dtype in ("bfloat16", "float32"):
    graph, state = nnx.split(random_decoder(config, dtype=jnp.dtype(dtype)))
    state = jax.tree.map(place, state, is_leaf=lambda x: isinstance(x, nnx.Variable))
    def loss(state):
        model = nnx.merge(graph, state)
        states, _ = model(tokens, tokens, tokens, execution=Execution(mesh))
        return jnp.sum(states.astype(jnp.float32) ** 2)
    program = jax.jit(jax.grad(loss)).lower(state).compile().as_text()
    whole_matrices += re.findall(r"\\w+\\[7,(?:64,160|160,64)\\]", program)
print(json.dumps(whole_matrices))
"""

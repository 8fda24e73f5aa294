"""Weights loaded share by share onto eight simulated devices, and int8 weights."""

import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from decant.models import open_checkpoint, save_directory
from decant.models.checkpoints.quantization import int8_codes, int8_scales
from decant.models.parameters import parameters_by_path
from tests.models.families.test_families import GOLDEN, everything, packed

FAMILIES = ("glm4_moe", "gpt_oss_mxfp4", "gemma2", "llama3", "mistral", "qwen2", "qwen3_moe")
EXPERTS = ("blocks.gate", "blocks.up", "blocks.down")
MESHES = ((8, 1, 1), (2, 4, 1), (1, 8, 1), (2, 2, 2))

SCRIPT = """
import sys
import jax, numpy as np
from decant.models import open_checkpoint
from decant.models.parameters import parameters_by_path
from decant.models.mesh.sharding import teacher_mesh
from tests.models.checkpoints.test_loading import MESHES
from tests.models.families.test_families import GOLDEN, everything, packed

for family in sys.argv[1:]:
    checkpoint = open_checkpoint(GOLDEN / family)
    golden = dict(np.load(GOLDEN / family / "golden.npz"))
    for quantize in ("none", "int8"):
        alone = checkpoint.load(quantize=quantize)
        expected = {
            path: np.asarray(p.get_value()) for path, p in parameters_by_path(alone).items()
        }
        rows = packed(golden)
        states = np.asarray(everything(alone, *rows)[0]) if quantize == "none" else None
        for data, tensor, expert in MESHES:
            mesh = teacher_mesh(data=data, tensor=tensor, expert=expert)
            model = checkpoint.load(quantize=quantize, mesh=mesh)
            for path, parameter in parameters_by_path(model).items():
                array = parameter.get_value()
                assert len(array.sharding.device_set) == 8, path
                np.testing.assert_array_equal(np.asarray(array), expected[path], err_msg=path)
            if states is not None and (data, tensor) in ((2, 4), (2, 2)):
                split = np.asarray(everything(model, *rows)[0])
                np.testing.assert_allclose(split, states, atol=3e-5)
            if expert > 1 and family == "qwen3_moe":
                up = model.blocks.up.get_value()
                print("experts", up.shape, up.sharding.shard_shape(up.shape))
print("equal")
"""


@pytest.fixture(
    scope="module",
    params=[("llama3", "qwen3_moe"), pytest.param(FAMILIES, marks=pytest.mark.slow)],
    ids=["two families", "every family"],
)
def report(request) -> str:
    environment = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "NPROC": "32",  # fewer threads than devices deadlock in a collective
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(Path.cwd()),
    }
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *request.param],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_shares_on_every_mesh_make_up_the_whole(report):
    assert report.splitlines()[-1] == "equal"


def test_experts_are_split_over_their_devices(report):
    (line,) = {line for line in report.splitlines() if line.startswith("experts")}
    shape, share = (tuple(map(int, part.split(","))) for part in line[9:-1].split(") ("))
    assert share[1] == shape[1] // 2


def test_int8_is_within_half_a_step_of_every_weight():
    exact, coarse = (
        parameters_by_path(open_checkpoint(GOLDEN / "qwen3_moe").load(quantize=quantize))
        for quantize in ("none", "int8")
    )
    for name, over in (("query", (1,)), ("output", (1, 2)), ("down", (2,))):
        weights = np.asarray(exact[f"blocks.{name}"].get_value())
        codes = np.asarray(coarse[f"blocks.{name}"].get_value())
        scales = np.expand_dims(np.asarray(coarse[f"blocks.{name}_scale"].get_value()), over)
        assert codes.dtype == np.int8
        np.testing.assert_allclose(np.abs(weights).max(axis=over, keepdims=True), scales * 127)
        assert (np.abs(codes * scales - weights) <= scales * 0.5001).all()
    assert not any("_scale" in path for path in exact)
    assert coarse["blocks.router"].get_value().dtype == np.float32


@pytest.mark.parametrize("family", ["llama3", "qwen3_moe"])
def test_an_int8_model_computes_like_its_dequantised_weights(family):
    """Against the same decoder with weights codes · scales in float32."""
    checkpoint = open_checkpoint(GOLDEN / family)
    golden = dict(np.load(GOLDEN / family / "golden.npz"))
    coarse, exact = checkpoint.load(quantize="int8"), checkpoint.load()
    values = parameters_by_path(exact)
    for path, parameter in parameters_by_path(coarse).items():
        if path.endswith("_scale"):
            continue
        array = parameter.get_value()
        if array.dtype == np.int8:
            scales = parameters_by_path(coarse)[f"{path}_scale"].get_value()
            lead = 1 + (path in EXPERTS and family == "qwen3_moe")
            inputs = tuple(range(lead, lead + array.ndim - scales.ndim))
            array = array.astype(jnp.float32) * jnp.expand_dims(scales, inputs)
        values[path].set_value(array)
    ours, dense = (everything(model, *packed(golden))[0] for model in (coarse, exact))
    np.testing.assert_allclose(ours, dense, atol=1e-4)
    plain = everything(checkpoint.load(), *packed(golden))[0]
    assert np.abs(np.asarray(ours) - np.asarray(plain)).max() > 1e-3, "nothing was rounded"


def test_a_channel_of_zeros_stays_zero():
    matrix = np.zeros((1, 3, 2), np.float32)
    matrix[0, :, 1] = 1, -2, 0.5
    scales = int8_scales(matrix, over=(1,))
    codes = int8_codes(matrix, scales, over=(1,))
    assert codes[0, :, 0].tolist() == [0, 0, 0]
    assert codes[0, :, 1].tolist() == [64, -127, 32]


def test_int8_weights_cannot_be_saved(tmp_path):
    model = open_checkpoint(GOLDEN / "llama3").load(quantize="int8")
    with pytest.raises(ValueError, match="int8 weights are for running a teacher"):
        save_directory(model, tmp_path, {})


def test_a_slice_of_a_bfloat16_tensor_can_be_read():
    checkpoint = open_checkpoint(GOLDEN / "gemma2")
    (file,) = checkpoint.files.weight_files
    whole = load_file(checkpoint.path / file)
    name = "model.layers.1.self_attn.q_proj.weight"
    part = checkpoint.files.read(name, (slice(8, 16), slice(0, 5)))
    np.testing.assert_array_equal(part, whole[name][8:16, :5])

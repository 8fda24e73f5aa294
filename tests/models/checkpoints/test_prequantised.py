"""Checkpoints in few bits: opened, read share by share, and nowhere else than in the files."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from decant.models import open_checkpoint, save_directory
from decant.models.checkpoints.cut import cut_layers
from decant.models.checkpoints.safetensors_files import SafetensorsFiles
from decant.models.parameters import parameters_by_path
from decant.pipelines.teacher.identity import teacher_id_of
from tests.making import quantised
from tests.making.models import HF_CONFIG, hf_tensors, write_hf
from tests.making.safetensors_bytes import write_safetensors
from tests.models.checkpoints.test_bucket import upload
from tests.models.prequantised.test_layouts import AWQ, FP8, GPTQ, packs
from tests.paths import GOLDEN

# The config, and the function that stores a matrix of this shape under a module's name.
FORMATS = {
    "fp8": (
        FP8 | {"weight_block_size": [24, 24], "modules_to_not_convert": ["lm_head"]},
        lambda draw, name, shape: quantised.fp8_blocks(draw, name, shape, block=(24, 24)),
    ),
    "gptq": (
        GPTQ | {"desc_act": True},
        lambda draw, name, shape: quantised.gptq(draw, name, shape, bits=4, size=16, order=True),
    ),
    "awq": (AWQ, lambda draw, name, shape: quantised.awq(draw, name, shape, size=16)),
    "pack-quantized": (
        packs(group_size=16, symmetric=False),
        lambda draw, name, shape: quantised.compressed_int(
            draw, name, shape, bits=4, strategy="group", size=16, symmetric=False
        ),
    ),
    "int-quantized": (
        packs(num_bits=8, strategy="channel") | {"format": "int-quantized"},
        lambda draw, name, shape: quantised.compressed_int(
            draw, name, shape, bits=8, strategy="channel", pack=False
        ),
    ),
}


def write_both(folder: Path, name: str) -> tuple[Path, Path]:
    """A directory in few bits, and one of its plain weights, which the layout's formula gives."""
    config, store = FORMATS[name]
    draw, few, plain = np.random.default_rng(0), {}, {}
    for tensor, array in hf_tensors().items():
        few[tensor] = plain[tensor] = array
        if "proj" in tensor:
            module = tensor.removesuffix(".weight")
            stored, exact = store(draw, module, array.shape)
            del few[tensor]
            few |= stored
            plain[tensor] = exact.astype(np.float32)
    write_hf(folder / "plain", plain)
    write_hf(folder / "few", {}, HF_CONFIG | {"quantization_config": config})
    write_safetensors(folder / "few" / "model.safetensors", few)
    return folder / "few", folder / "plain"


def weights(checkpoint, **how):
    loaded = parameters_by_path(checkpoint.load(**how))
    return {path: np.asarray(parameter.get_value()) for path, parameter in loaded.items()}


def identity(checkpoint, memory):
    return teacher_id_of(checkpoint, dtype="float32", quantize="none", vocabulary=64, memory=memory)


@pytest.mark.parametrize("name", FORMATS)
def test_a_model_in_few_bits_is_that_of_its_plain_weights(name, tmp_path):
    few, plain = (open_checkpoint(path) for path in write_both(tmp_path, name))
    assert few.config == plain.config
    expected = weights(plain)
    for path, array in weights(few).items():
        np.testing.assert_array_equal(array, expected[path], err_msg=path)
    again = weights(few, quantize="int8")
    for path, array in weights(plain, quantize="int8").items():
        np.testing.assert_array_equal(again[path], array, err_msg=path)


def test_latent_attention_in_fp8_is_that_of_its_plain_weights(tmp_path):
    """Two of DeepSeek's maps hold several parameters each, whose edges are inside of blocks."""
    source = GOLDEN / "families" / "deepseek_v3"
    draw, few, plain = np.random.default_rng(0), {}, {}
    for tensor, array in load_file(source / "model.safetensors").items():
        few[tensor] = plain[tensor] = array.astype(np.float32)
        if "proj" in tensor:
            module = tensor.removesuffix(".weight")
            stored, exact = quantised.fp8_blocks(draw, module, array.shape, block=(24, 24))
            few = {n: a for n, a in few.items() if n != tensor} | stored
            plain[tensor] = exact.astype(np.float32)
    fields = json.loads((source / "config.json").read_text())
    write_hf(tmp_path / "plain", plain, fields)
    config = FORMATS["fp8"][0]
    write_hf(tmp_path / "few", {}, fields | {"quantization_config": config})
    write_safetensors(tmp_path / "few" / "model.safetensors", few)
    for how in ({}, {"quantize": "int8"}):
        expected = weights(open_checkpoint(tmp_path / "plain"), **how)
        for path, array in weights(open_checkpoint(tmp_path / "few"), **how).items():
            np.testing.assert_array_equal(array, expected[path], err_msg=path)
    assert expected["blocks.latent"].dtype == np.int8


@pytest.mark.parametrize("name", FORMATS)
def test_from_a_bucket_it_is_the_same(name, bucket, tmp_path):
    few, _ = write_both(tmp_path, name)
    here, there = open_checkpoint(few), open_checkpoint(upload(few, bucket))
    expected = weights(here)
    for path, array in weights(there).items():
        np.testing.assert_array_equal(array, expected[path], err_msg=path)
    memory = tmp_path / "digests"
    assert identity(here, memory) == identity(there, memory)


MESHES = ((1, 8), (2, 4), (8, 1))
SCRIPT = """
import sys
import numpy as np
from decant.models import open_checkpoint
from decant.models.parameters import parameters_by_path
from decant.models.mesh.sharding import teacher_mesh
from tests.models.checkpoints.test_prequantised import MESHES, weights

for directory in sys.argv[1:]:
    checkpoint = open_checkpoint(directory)
    expected = weights(checkpoint)
    for data, tensor in MESHES:
        mesh = teacher_mesh(data=data, tensor=tensor)
        for path, array in weights(checkpoint, mesh=mesh).items():
            np.testing.assert_array_equal(array, expected[path], err_msg=path)
print("equal")
"""


@pytest.mark.parametrize("names", [["gptq"], pytest.param(list(FORMATS), marks=pytest.mark.slow)])
def test_shares_on_every_mesh_make_up_the_whole(names, tmp_path):
    environment = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "NPROC": "32",  # fewer threads than devices deadlock in a collective
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(Path.cwd()),
    }
    few = [str(write_both(tmp_path / name, name)[0]) for name in names]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *few], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "equal"


def test_the_teachers_id_tells_files_and_their_reading_apart(tmp_path):
    few, plain = write_both(tmp_path, "gptq")
    memory = tmp_path / "digests"
    config = json.loads((few / "config.json").read_text())
    ids = [identity(open_checkpoint(path), memory) for path in (few, plain)]
    # The same bytes with other zero points are another teacher; what was said to a kernel is not.
    for change in ({"checkpoint_format": "gptq_v2"}, {"use_exllama": False}):
        fields = config | {"quantization_config": config["quantization_config"] | change}
        (few / "config.json").write_text(json.dumps(fields))
        ids.append(identity(open_checkpoint(few), memory))
    assert ids[3] == ids[0]
    assert len(set(ids)) == 3


def test_a_student_cut_out_of_it_is_saved_in_plain_weights(tmp_path):
    few, plain = write_both(tmp_path, "awq")
    student = cut_layers(open_checkpoint(few), (1,), param_dtype="float32")
    save_directory(student, tmp_path / "student", {})
    assert "quantization_config" not in json.loads(
        (tmp_path / "student" / "config.json").read_text()
    )
    again = open_checkpoint(tmp_path / "student")
    assert set(again.files.kinds.values()) == {"F32"}
    for path, array in weights(open_checkpoint(plain)).items():
        kept = array[1:] if path.startswith("blocks.") else array
        np.testing.assert_array_equal(weights(again)[path], kept, err_msg=path)


def test_numbers_of_bytes_and_kinds_are_those_of_the_files(tmp_path):
    few, plain = write_both(tmp_path, "awq")
    files = SafetensorsFiles(few)
    assert files.shapes == SafetensorsFiles(plain).shapes
    assert sorted(set(files.kinds.values())) == ["F32", "INT4"]
    assert files.weight_bytes < 0.6 * SafetensorsFiles(plain).weight_bytes


def test_biases_of_zeros_that_gptq_writes_are_left_out(tmp_path):
    few, _ = write_both(tmp_path, "gptq")
    tensors = load_file(few / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.bias"
    write_safetensors(few / "model.safetensors", tensors | {name: np.zeros(32, np.float16)})
    open_checkpoint(few).load()
    write_safetensors(few / "model.safetensors", tensors | {name: np.ones(32, np.float16)})
    with pytest.raises(ValueError, match=rf"not expected: {name}"):
        open_checkpoint(few).load()


def test_tensors_in_few_bits_without_a_word_in_the_config_are_refused(tmp_path):
    few, _ = write_both(tmp_path, "fp8")
    (few / "config.json").write_text(json.dumps(HF_CONFIG))
    with pytest.raises(ValueError, match=r"not expected: .*weight_scale_inv"):
        open_checkpoint(few).load()


def test_bitsandbytes_is_refused_by_name_when_the_checkpoint_is_opened(tmp_path):
    fields = HF_CONFIG | {"quantization_config": {"load_in_4bit": True, "bnb_4bit_use": "nf4"}}
    directory = write_hf(tmp_path, hf_tensors(), fields)
    with pytest.raises(
        ValueError, match=r"config.json: quantization_config: quantised by bitsandbytes. Take"
    ):
        _ = open_checkpoint(directory).config

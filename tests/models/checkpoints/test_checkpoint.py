"""Loading and saving checkpoints: Hugging Face directories, GGUF files, and refusals."""

import dataclasses
import json
import os
import stat

import gguf
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from safetensors.numpy import load_file

from decant.models import open_checkpoint, save_directory
from decant.models.checkpoints import embedded
from decant.models.checkpoints.gguf_file import GgufFile
from decant.models.families import config_from_json
from decant.models.mesh.sharding import teacher_mesh
from tests.making.models import (
    CONFIG,
    HF_CONFIG,
    final_states,
    hf_tensors,
    random_decoder,
    write_gguf,
    write_hf,
)


@pytest.fixture
def directory(tmp_path):
    return write_hf(tmp_path / "model", hf_tensors())


def test_a_hugging_face_directory_gives_its_config_and_weights(directory):
    tensors, model = hf_tensors(), open_checkpoint(directory).load()
    assert model.config == CONFIG
    # A file's [output, input] matrix is ours transposed, with an axis of heads.
    query = tensors["model.layers.1.self_attn.q_proj.weight"].T.reshape(32, 4, 8)
    output = tensors["model.layers.1.self_attn.o_proj.weight"].T.reshape(4, 8, 32)
    np.testing.assert_array_equal(model.blocks.query[1], query)
    np.testing.assert_array_equal(model.blocks.output[1], output)
    np.testing.assert_array_equal(
        model.blocks.down[0], tensors["model.layers.0.mlp.down_proj.weight"].T
    )
    np.testing.assert_array_equal(model.embedding[...], tensors["model.embed_tokens.weight"])
    np.testing.assert_array_equal(model.unembedding(), tensors["lm_head.weight"].T)


@pytest.mark.parametrize(
    "change", [{}, {"tie_embeddings": True}, {"qkv_bias": True, "family": "qwen2"}]
)
def test_a_saved_model_opens_as_the_same_model(tmp_path, change):
    model = random_decoder(dataclasses.replace(CONFIG, **change))
    save_directory(model, tmp_path, {"tokenizer.json": b"{}"})
    again = open_checkpoint(tmp_path)
    assert again.config == model.config
    assert again.files.weight_files == ["model.safetensors"]
    np.testing.assert_array_equal(final_states(again.load()), final_states(model))
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]


def test_a_saved_file_has_the_names_shapes_and_bytes_of_the_one_it_came_from(directory, tmp_path):
    save_directory(open_checkpoint(directory).load(), tmp_path / "copy", {})
    original, copy = hf_tensors(), load_file(tmp_path / "copy" / "model.safetensors")
    assert original.keys() == copy.keys()
    for name, tensor in original.items():
        np.testing.assert_array_equal(copy[name], tensor)


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o007, 0o660)])
def test_saved_files_have_the_mode_that_the_umask_gives(directory, tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        save_directory(open_checkpoint(directory).load(), tmp_path / "new", {"some.json": b"{}"})
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "new").iterdir()}
    assert modes == dict.fromkeys(["config.json", "model.safetensors", "some.json"], mode)


def test_bfloat16_weights_survive_a_round_trip_unrounded(tmp_path):
    model = random_decoder(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    save_directory(model, tmp_path, {})
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
    again = open_checkpoint(tmp_path).load(dtype="bfloat16")
    assert again.blocks.up[...].dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(again.blocks.up[...], model.blocks.up[...])


def test_weights_may_be_kept_in_another_dtype_than_they_are_used_in(directory):
    model = open_checkpoint(directory).load(dtype="bfloat16", param_dtype="float32")
    assert (model.dtype, model.embedding[...].dtype) == (jnp.bfloat16, jnp.float32)
    with pytest.raises(ValueError, match=r"dtype is 'float16'; expected one of float32, bfloat16"):
        open_checkpoint(directory).load(dtype="float16")


def test_a_checkpoint_can_be_loaded_onto_a_mesh(directory):
    mesh = teacher_mesh()
    model = open_checkpoint(directory).load(mesh=mesh)
    assert model.blocks.up[...].sharding.mesh == mesh
    np.testing.assert_array_equal(
        final_states(model), final_states(open_checkpoint(directory).load())
    )


# The value that each GGUF quantisation gives a weight, by its definition.


def half(x):
    return x.astype(np.float16).astype(np.float32)


def q8_0(blocks):
    """scale = max|x| / 127, kept as a half; 8-bit integers."""
    scale = np.abs(blocks).max(-1, keepdims=True) / 127
    return np.round(blocks / scale) * half(scale)


def q4_0(blocks):
    """scale = the value of largest magnitude / −8; integers from −8 to 7."""
    peak = np.take_along_axis(blocks, np.abs(blocks).argmax(-1)[..., None], -1)
    scale = peak / -8
    return (np.clip(np.floor(blocks / scale + 8.5), 0, 15) - 8) * half(scale)


def q4_1(blocks):
    """16 equal steps from the smallest to the largest value."""
    low, high = blocks.min(-1, keepdims=True), blocks.max(-1, keepdims=True)
    scale = (high - low) / 15
    return np.floor((blocks - low) / scale + 0.5) * half(scale) + half(low)


@pytest.mark.parametrize(
    ("kind", "kept"),
    [
        (Kind.F32, lambda x: x),
        (Kind.F16, half),
        (Kind.BF16, lambda x: x.astype(ml_dtypes.bfloat16).astype(np.float32)),
        (Kind.Q8_0, q8_0),
        (Kind.Q4_0, q4_0),
        (Kind.Q4_1, q4_1),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_a_gguf_file_of_each_quantisation_gives_the_weights_it_keeps(tmp_path, kind, kept):
    tensors = hf_tensors()
    checkpoint = open_checkpoint(write_gguf(tmp_path / "model.gguf", tensors, kind=kind))
    model = checkpoint.load()
    assert model.config == dataclasses.replace(CONFIG, norm_eps=model.config.norm_eps)
    assert model.config.norm_eps == pytest.approx(1e-6)

    def expected(name):
        array = tensors[name]
        return kept(array.reshape(len(array), -1, 32)).reshape(array.shape)

    close = {"rtol": 1e-6, "atol": 1e-7}
    at = "model.layers.1"
    for part, ours in (("q", model.blocks.query[1]), ("k", model.blocks.key[1])):
        # Rows are quantised one by one, so their order does not change their values.
        weight = expected(f"{at}.self_attn.{part}_proj.weight").T.reshape(ours.shape)
        np.testing.assert_allclose(ours, weight, **close)
    np.testing.assert_allclose(
        model.blocks.gate[1], expected(f"{at}.mlp.gate_proj.weight").T, **close
    )
    np.testing.assert_allclose(model.unembedding(), expected("lm_head.weight").T, **close)
    np.testing.assert_array_equal(model.final_norm[...], tensors["model.norm.weight"])


def test_a_float_gguf_computes_what_its_hugging_face_original_computes(directory, tmp_path):
    other = open_checkpoint(write_gguf(tmp_path / "model.gguf", hf_tensors())).load()
    np.testing.assert_allclose(
        final_states(other), final_states(open_checkpoint(directory).load()), rtol=1e-5, atol=1e-6
    )


def test_a_gguf_file_without_an_output_matrix_is_tied(tmp_path):
    tensors = hf_tensors(dataclasses.replace(CONFIG, tie_embeddings=True))
    assert open_checkpoint(write_gguf(tmp_path / "model.gguf", tensors)).config.tie_embeddings


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_scaling": {"rope_type": "spiral", "factor": 8.0}}, "rope_type = 'spiral'"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported"),
        ({"attention_bias": 1}, "attention_bias = 1; expected true or false"),
        ({"sliding_window": 4096}, "sliding_window = 4096"),
        ({"logit_softcap": 30.0}, r"unknown field\(s\) logit_softcap"),
        (
            {"model_type": "mamba"},
            "model_type is 'mamba', which we cannot run; known: deepseek_v2, deepseek_v3, gemma, ",
        ),
        ({"hidden_size": None}, "'hidden_size' is missing"),
        ({"num_key_value_heads": 3}, "4 query heads cannot share 3"),
    ],
)
def test_a_config_that_we_would_not_honour_is_refused_by_field(tmp_path, change, message):
    directory = write_hf(tmp_path, hf_tensors(), HF_CONFIG | change)
    with pytest.raises(ValueError, match=message) as caught:
        _ = open_checkpoint(directory).config
    assert str(tmp_path) in str(caught.value)


def test_both_spellings_of_rotary_parameters_are_read():
    plain = {k: v for k, v in HF_CONFIG.items() if not k.startswith("rope")}
    new = plain | {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}
    assert config_from_json(new) == config_from_json(HF_CONFIG) == CONFIG


def test_tensors_that_do_not_fit_are_listed_with_both_shapes(tmp_path):
    tensors = hf_tensors()
    del tensors["model.norm.weight"]
    tensors["model.layers.2.mlp.up_proj.weight"] = np.zeros((64, 32), np.float32)
    tensors["lm_head.weight"] = np.zeros((63, 32), np.float32)
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        open_checkpoint(write_hf(tmp_path, tensors)).load()
    assert str(caught.value).splitlines() == [
        f"{tmp_path}: tensors do not fit the config (a family 'llama' model of 2 layers):",
        "  missing: model.norm.weight (32,)",
        "  not expected: model.layers.2.mlp.up_proj.weight (64, 32)",
        "  misshapen: lm_head.weight is (63, 32), expected (64, 32)",
    ]


def test_a_long_list_of_misfits_is_cut_short(tmp_path):
    directory = write_hf(
        tmp_path, hf_tensors(), HF_CONFIG | {"intermediate_size": 65, "num_hidden_layers": 9}
    )
    with pytest.raises(ValueError, match=r"and [0-9]+ more") as caught:
        open_checkpoint(directory).load()
    assert len(str(caught.value).splitlines()) == 12


def test_an_unsupported_quantisation_is_named_with_its_tensor(tmp_path, monkeypatch):
    # Those that we cannot read have blocks of 256, wider than these rows.
    monkeypatch.setattr(GgufFile, "readable", ("F32", "Q8_0"))
    path = write_gguf(tmp_path / "model.gguf", hf_tensors(), kind=Kind.Q5_0)
    with pytest.raises(ValueError, match=r"not readable: token_embd.weight is stored as Q5_0"):
        open_checkpoint(path).load()


def test_gguf_metadata_that_we_would_not_honour_is_refused(tmp_path):
    scaled = {"llama.rope.scaling.type": "longrope"}
    path = write_gguf(tmp_path / "model.gguf", hf_tensors(), **scaled)
    with pytest.raises(ValueError, match=r"scaling.type = 'longrope' is not supported"):
        _ = open_checkpoint(path).config


@pytest.mark.parametrize("content", [b"", b"GGUF", b"not a gguf file at all"])
def test_a_broken_gguf_file_is_named(tmp_path, content):
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"model.gguf: not a readable GGUF file"):
        _ = open_checkpoint(path).config


def test_truncated_weights_are_named(directory):
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"model.safetensors: weights cannot be read"):
        open_checkpoint(directory).load()


def test_a_name_that_is_not_a_checkpoint_is_refused_with_the_expected_kinds(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected 'embedded', a Hugging Face directory"):
        open_checkpoint(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match=r"no config.json here"):
        open_checkpoint(tmp_path)


def test_without_its_package_the_embedded_teacher_names_the_remedy(monkeypatch):
    monkeypatch.setattr(embedded, "PACKAGE", "no-such-package")
    with pytest.raises(FileNotFoundError, match=r"make setup"):
        open_checkpoint("embedded")


def test_the_gguf_package_has_the_published_block_sizes():
    # Quantised blocks: 32 values in 18, 20 and 34 bytes.
    sizes = {k: gguf.GGML_QUANT_SIZES[k] for k in (Kind.Q4_0, Kind.Q4_1, Kind.Q8_0)}
    assert sizes == {Kind.Q4_0: (32, 18), Kind.Q4_1: (32, 20), Kind.Q8_0: (32, 34)}

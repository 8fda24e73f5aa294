"""Models of images and text: their text model is read out of either spelling of their files.

What it computes is held to transformers in test_families.py, like every family.
"""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from decant.models import open_checkpoint, save_directory
from decant.models.families import config_from_json
from decant.models.parameters import parameters_by_path
from tests.paths import GOLDEN

FAMILIES = GOLDEN / "families"
TOWERS = {
    "tower_gemma3": "Gemma3ForCausalLM",
    "tower_mistral3": "MistralForCausalLM",
    "tower_ministral3": "Ministral3ForCausalLM",
    "tower_qwen3_vl": "Qwen3ForCausalLM",
    "tower_qwen2_5_vl": "Qwen2ForCausalLM",
    "tower_qwen3_vl_moe": "Qwen3MoeForCausalLM",
    "tower_kimi_k25": "DeepseekV3ForCausalLM",
    "tower_qwen3_5": "Qwen3_5ForCausalLM",
}


FLAT = ("model.layers.", "model.embed_tokens.", "model.norm.")


def older(name):
    """A tensor's name as transformers 4.50 wrote it."""
    if name.startswith(FLAT):  # as of Qwen2.5-VL in any version
        return "language_model." + name
    if name.startswith("model.language_model."):
        return "language_model.model." + name.removeprefix("model.language_model.")
    return "language_model." + name if name.startswith("lm_head") else name.removeprefix("model.")


def newer(name):
    """A tensor's name as transformers 4.52 began to write it."""
    if name.startswith("language_model.model."):
        return "model.language_model." + name.removeprefix("language_model.model.")
    if name.startswith(FLAT):
        return "model.language_model." + name.removeprefix("model.")
    text = name.removeprefix("language_model.")
    return text if text.startswith(("lm_head", "model.")) else "model." + text


def renamed(name, directory, rename):
    shutil.copytree(FAMILIES / name, directory)
    file = directory / "model.safetensors"
    tensors = load_file(file)
    save_file({rename(tensor): array for tensor, array in tensors.items()}, file)
    return open_checkpoint(directory)


@pytest.mark.parametrize("name", TOWERS)
@pytest.mark.parametrize("rename", [older, newer])
def test_both_spellings_of_the_tensors_names_are_the_same_model(name, rename, tmp_path):
    plain, other = open_checkpoint(FAMILIES / name), renamed(name, tmp_path / "other", rename)
    assert other.config == plain.config
    ours, theirs = (parameters_by_path(c.load()) for c in (plain, other))
    for path, parameter in ours.items():
        np.testing.assert_array_equal(parameter.get_value(), theirs[path].get_value())


@pytest.mark.parametrize("name", TOWERS)
def test_tensors_of_other_parts_are_counted_and_not_read(name):
    checkpoint = open_checkpoint(FAMILIES / name)
    every = load_file(FAMILIES / name / "model.safetensors")
    others = [n for n in every if "visual" in n or "vision" in n or "projector" in n]
    assert checkpoint.files.unread == sorted(others) != []
    assert f"{len(others)} tensors of other parts are not read" in checkpoint.left_out
    assert open_checkpoint(FAMILIES / "llama").left_out == ""


def test_the_text_of_gemma_3n_is_read_out_of_a_model_with_encoders(tmp_path):
    fields = json.loads((FAMILIES / "gemma3n" / "config.json").read_text())
    others = ("vision_tower.conv", "audio_tower.conv", "embed_vision.norm", "embed_audio.norm")
    extra = {f"model.{name}.weight": np.zeros(2, np.float32) for name in others}
    tensors = {newer(n): t for n, t in load_file(FAMILIES / "gemma3n/model.safetensors").items()}
    save_file(tensors | extra, tmp_path / "model.safetensors")
    whole = {
        "model_type": "gemma3n",
        "text_config": fields,
        "vision_config": {"model_type": "gemma3n_vision", "vocab_offset": 72},
        "audio_config": {"model_type": "gemma3n_audio", "vocab_offset": 76},
        "audio_soft_tokens_per_image": 188,
        "vision_soft_tokens_per_image": 256,
        **{f"{name}_token_id": 79 for name in ("image", "audio", "boi", "boa", "eoi", "eoa")},
    }
    (tmp_path / "config.json").write_text(json.dumps(whole))
    plain, checkpoint = open_checkpoint(FAMILIES / "gemma3n"), open_checkpoint(tmp_path)
    assert checkpoint.config == plain.config
    assert checkpoint.files.unread == sorted(extra)
    ours, theirs = (parameters_by_path(c.load()) for c in (plain, checkpoint))
    for path, parameter in ours.items():
        np.testing.assert_array_equal(parameter.get_value(), theirs[path].get_value())


def test_layers_of_qwen35_that_guess_further_tokens_are_counted_and_not_read(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(FAMILIES / "tower_qwen3_5", folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["mtp.fc.weight"] = np.zeros((32, 64), np.float32)
    save_file(tensors, folder / "model.safetensors")
    checkpoint = open_checkpoint(folder)
    checkpoint.load()
    assert "mtp.fc.weight" in checkpoint.files.unread


def test_a_tensor_that_is_of_no_known_part_is_refused(tmp_path):
    checkpoint = renamed(
        *("tower_gemma3", tmp_path / "other"),
        lambda name: name.replace("multi_modal_projector", "depth_tower"),
    )
    with pytest.raises(ValueError, match=r"not expected: depth_tower\.mm_soft"):
        checkpoint.load()


def test_two_spellings_of_one_tensor_are_refused(tmp_path):
    shutil.copytree(FAMILIES / "tower_gemma3", tmp_path / "both")
    file = tmp_path / "both" / "model.safetensors"
    tensors = load_file(file)
    save_file(
        tensors | {newer(n): a for n, a in tensors.items() if n.endswith("model.norm.weight")}, file
    )
    with pytest.raises(ValueError, match=r"both: tensors .* are both model\.norm\.weight"):
        open_checkpoint(tmp_path / "both").load()


@pytest.mark.parametrize("name", TOWERS)
def test_an_export_is_a_text_model_without_its_other_parts(name, tmp_path):
    save_directory(open_checkpoint(FAMILIES / name).load(), tmp_path, {})
    fields = json.loads((tmp_path / "config.json").read_text())
    assert fields["architectures"] == [TOWERS[name]]
    assert not any("vision" in field or "image" in field for field in fields)
    tensors = load_file(tmp_path / "model.safetensors")
    assert all(
        tensor.startswith(("model.layers", "model.embed", "model.norm", "lm_head"))
        for tensor in tensors
    )


def fields(name):
    return json.loads((FAMILIES / name / "config.json").read_text())


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("tower_gemma3", {"text_config": None}, "text_config is missing"),
        ("tower_gemma3", {"text_config": 5}, "text_config = 5; expected an object"),
        ("tower_gemma3", {"attention_sinks": 4}, "attention_sinks = 4"),
        ("tower_gemma3", {"hidden_size": 64}, "hidden_size = 64"),
        ("tower_gemma3", {"text_config": {"model_type": "llama"}}, "model_type = 'llama'"),
        ("tower_qwen3_vl", {"text_config": {"hidden_size": 64}}, "'rope_theta' is missing"),
        ("tower_mistral3", {"text_config": {"attention_sinks": 4}}, "attention_sinks = 4"),
        (
            "tower_qwen3_vl_moe",
            {"text_config": {"norm_topk_prob": False}},
            "norm_topk_prob = False",
        ),
    ],
)
def test_a_field_that_may_change_the_texts_function_is_refused(name, change, message):
    with pytest.raises(ValueError, match=message):
        config_from_json(fields(name) | change)


def test_a_field_of_the_text_may_be_repeated_outside():
    whole = fields("tower_gemma3")
    assert config_from_json(whole | {"hidden_size": 32, "vocab_size": 80}) == config_from_json(
        whole
    )


def test_fields_of_the_text_may_stand_beside_those_of_the_whole_model():
    """Qwen2.5-VL's published config.json has no text_config, and calls its rotation mrope."""
    whole = fields("tower_qwen2_5_vl")
    text = whole.pop("text_config")
    rope = text.pop("rope_parameters")
    old = {"rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]}}
    flat = text | whole | old | {"rope_theta": rope["rope_theta"]}
    assert config_from_json(flat) == config_from_json(fields("tower_qwen2_5_vl"))
    with pytest.raises(ValueError, match="attention_sinks = 4"):
        config_from_json(flat | {"attention_sinks": 4})


def test_a_text_config_that_leaves_its_classs_defaults_out_is_read():
    config = config_from_json(
        {
            "model_type": "gemma3",
            "mm_tokens_per_image": 256,
            "text_config": {"hidden_size": 2560, "num_hidden_layers": 34, "sliding_window": 1024},
            "vision_config": {"image_size": 896},
        }
    )
    assert (config.hidden_size, config.num_heads, config.num_kv_heads) == (2560, 8, 4)
    assert (config.vocab_size, config.max_positions, config.head_dim) == (262208, 131072, 256)
    assert config.windows[:6] == (1024,) * 5 + (None,)


@pytest.mark.parametrize(
    ("outer", "inner", "tied"),
    [(None, None, False), (True, None, True), (True, False, False), (False, True, True)],
)
def test_the_text_models_own_flag_says_whether_its_head_is_the_embedding(outer, inner, tied):
    whole = fields("tower_mistral3")
    for place, value in ((whole, outer), (whole["text_config"], inner)):
        del place["tie_word_embeddings"]
        place |= {} if value is None else {"tie_word_embeddings": value}
    assert config_from_json(whole).tie_embeddings == tied


@pytest.mark.parametrize("inside", ["language_model.model", "model.language_model"])
def test_an_adapter_of_a_model_of_images_and_text_changes_its_text_model(inside, tmp_path):
    base = FAMILIES / "tower_mistral3"
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["up_proj"]}
    settings |= {"base_model_name_or_path": str(base), "task_type": "CAUSAL_LM"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    a, b = np.ones((2, 32), np.float32), np.full((40, 2), 0.25, np.float32)
    module = f"base_model.model.{inside}.layers.1.mlp.up_proj"
    lora = {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
    save_file(lora, tmp_path / "adapter_model.safetensors")
    files, plain = open_checkpoint(tmp_path).files, open_checkpoint(base).files
    name = "model.layers.1.mlp.up_proj.weight"
    expected = plain.read(name).astype(np.float32) + 0.5  # 2 · 0.25, times alpha / r = 1
    np.testing.assert_array_equal(files.read(name), expected)
    assert files.unread == plain.unread != []

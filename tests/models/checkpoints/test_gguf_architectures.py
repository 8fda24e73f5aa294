"""GGUF files of GPT-NeoX, Phi-3, gpt-oss and DeepSeek, which lay tensors out in their own way.

The gguf package names the tensors and writes the files here. How llama.cpp's converter orders,
splits and merges them is written out below.
"""

import json
import re
import shutil

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from safetensors.numpy import load_file

from decant.models import open_checkpoint
from decant.models.checkpoints.safetensors_files import SafetensorsFiles
from decant.models.families import config_from_gguf
from decant.models.numerics import logits
from decant.models.rotary import attention_factor
from tests.models.checkpoints.test_gguf_file import write_out
from tests.paths import GOLDEN

FAMILIES = GOLDEN / "families"


def arrays_of(directory):
    files = SafetensorsFiles(directory)
    return {name: np.asarray(files.read(name), np.float32) for name in files.shapes}


def neox(name, array, config):
    """Queries, keys and values of all heads one after another, not head by head."""
    if "query_key_value" in name:
        by_head = array.reshape(config["num_attention_heads"], 3, -1, *array.shape[1:])
        array = np.concatenate(
            [part.reshape(-1, *array.shape[1:]) for part in by_head.swapaxes(0, 1)]
        )
    yield name, array


def phi3(name, array, config):
    yield name, array


def gpt_oss(name, array, config):
    """Matrices of experts as [expert, output, input]; gates and values apart."""
    if "sinks" in name:
        yield f"{name}.weight", array
    elif ".experts." not in name:
        yield name, array
    else:
        path, _, kind = name.removesuffix("_bias"), None, "bias" if "_bias" in name else "weight"
        array = array if kind == "bias" else array.swapaxes(1, 2)
        if "gate_up" in path:
            yield path.replace("gate_up", "gate") + f".{kind}", array[:, ::2]
            yield path.replace("gate_up", "up") + f".{kind}", array[:, 1::2]
        else:
            yield f"{path}.{kind}", array


def deepseek(name, array, config):
    """Maps from latents to keys (transposed) and to values, head by head."""
    if "kv_b_proj" not in name:
        yield name.replace("correction_bias", "correction.bias"), array
        return
    by_head = array.reshape(config["num_attention_heads"], -1, array.shape[-1])
    keys, values = np.split(by_head, [config["qk_nope_head_dim"]], axis=1)
    yield name.replace("kv_b_proj", "k_b_proj"), keys.swapaxes(1, 2)
    yield name.replace("kv_b_proj", "v_b_proj"), values


def older_deepseek(name, array, config):
    yield name.replace("correction_bias", "correction.bias"), array


def both_deepseeks(name, array, config):
    yield from deepseek(name, array, config)
    if "kv_b_proj" in name:
        yield name, array


def merged_experts(tensors):
    """Each expert's matrices of one block in one tensor."""
    merged, rest = {}, {}
    for name, array in tensors.items():
        found = re.fullmatch(r"(.*\.experts)\.(\d+)(\..*)", name)
        if found is None:
            rest[name] = array
        else:
            merged.setdefault(found[1] + found[3], {})[int(found[2])] = array
    stacked = {name: np.stack([m[i] for i in range(len(m))]) for name, m in merged.items()}
    return rest | stacked


def write(path, architecture, *, layers, fields, tensors, extra=None, kinds=None):
    """A GGUF file. `tensors` have Hugging Face's names and `extra` GGUF's.

    `kinds` has the raw blocks and their quantisation of some, by GGUF's name.
    """
    number = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}[architecture]
    names = gguf.get_tensor_name_map(number, layers)
    writer = gguf.GGUFWriter(path, architecture)
    adders = {
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        bool: writer.add_bool,
    }
    for name, value in fields.items():
        adders[type(value)](f"{architecture}.{name}", value)
    for name, array in tensors.items():
        named = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert named is not None, name
        if named in (kinds or {}):
            blocks, kind = kinds[named]
            writer.add_tensor(named, blocks, raw_dtype=kind)
        else:
            writer.add_tensor(named, np.ascontiguousarray(array))
    for name, array in (extra or {}).items():
        writer.add_tensor(name, array)
    write_out(writer)
    return path


def sizes(config):
    return {
        "vocab_size": config["vocab_size"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "block_count": config["num_hidden_layers"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
    }


def of_rope(config):
    rope = config["rope_parameters"]
    fields = {"rope.freq_base": float(rope["rope_theta"])}
    if rope["rope_type"] == "yarn":
        fields |= {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": rope["factor"],
            "rope.scaling.original_context_length": rope["original_max_position_embeddings"],
            "rope.scaling.yarn_beta_fast": rope["beta_fast"],
            "rope.scaling.yarn_beta_slow": rope["beta_slow"],
        }
    return fields


def neox_fields(config):
    head = config["hidden_size"] // config["num_attention_heads"]
    rope = config["rope_parameters"]
    return {
        "rope.freq_base": float(rope["rope_theta"]),
        "rope.dimension_count": int(head * rope["partial_rotary_factor"]),
        "attention.layer_norm_epsilon": config["layer_norm_eps"],
        "use_parallel_residual": config["use_parallel_residual"],
    }


FACTORS = ("rope_factors_long", "rope_factors_short")
# √(1 + ln(128 / 16) / ln 16), as the converter makes it of the two lengths.
PHI3_FACTOR = (1 + 3 / 4) ** 0.5


def phi3_fields(config):
    return {
        "rope.freq_base": float(config["rope_parameters"]["rope_theta"]),
        "rope.dimension_count": 6,
        "rope.scaling.original_context_length": 16,
        "rope.scaling.attn_factor": PHI3_FACTOR,
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "attention.sliding_window": config["sliding_window"],
    }


def gpt_oss_fields(config):
    return of_rope(config) | {
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": config["head_dim"],
        "attention.value_length": config["head_dim"],
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "attention.sliding_window": config["sliding_window"],
        "expert_feed_forward_length": config["intermediate_size"],
        "expert_count": config["num_local_experts"],
        "expert_used_count": config["num_experts_per_tok"],
    }


def deepseek_fields(config):
    turned, latent = config["qk_rope_head_dim"], config["kv_lora_rank"]
    fields = of_rope(config) | {
        "attention.head_count_kv": 1,
        "attention.kv_lora_rank": latent,
        "attention.key_length": latent + turned,
        "attention.value_length": latent,
        "attention.key_length_mla": config["qk_nope_head_dim"] + turned,
        "attention.value_length_mla": config["v_head_dim"],
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "rope.dimension_count": turned,
    }
    if config["q_lora_rank"]:
        fields["attention.q_lora_rank"] = config["q_lora_rank"]
    if "mscale_all_dim" in config["rope_parameters"]:
        multiplier = 0.1 * config["rope_parameters"]["mscale_all_dim"]
        fields["rope.scaling.yarn_log_multiplier"] = multiplier
    if "n_routed_experts" not in config:
        layers, width = config["num_hidden_layers"], config["intermediate_size"]
        no_experts = {"leading_dense_block_count": layers, "expert_shared_count": 0}
        return fields | no_experts | {"expert_feed_forward_length": width}
    return fields | {
        "leading_dense_block_count": config["first_k_dense_replace"],
        "expert_feed_forward_length": config["moe_intermediate_size"],
        "expert_count": config["n_routed_experts"],
        "expert_used_count": config["num_experts_per_tok"],
        "expert_shared_count": config["n_shared_experts"],
        "expert_group_count": config["n_group"],
        "expert_group_used_count": config["topk_group"],
        "expert_weights_scale": float(config["routed_scaling_factor"]),
        "expert_weights_norm": config.get("norm_topk_prob", False),
        "expert_gating_func": 2 if config["model_type"] == "deepseek_v3" else 1,
    }


def older_fields(config):
    """As llama.cpp wrote deepseek2 before it knew the one head of keys."""
    fields = deepseek_fields(config)
    fields["attention.head_count_kv"] = config["num_attention_heads"]
    for name in ("attention.key_length", "attention.value_length"):
        fields[name] = fields.pop(f"{name}_mla")
    return fields


# One scale of scores, and a ramp whose ends are whole numbers: all that these files can say.
SAYABLE = {"mscale": 0.6, "mscale_all_dim": 0.6, "truncate": True}
CASES = {
    "neox": ("gpt_neox", "gptneox", neox, neox_fields, {}),
    "phi3": ("phi3", "phi3", phi3, phi3_fields, {}),
    "gpt_oss": ("gpt_oss", "gpt-oss", gpt_oss, gpt_oss_fields, {}),
    "deepseek_v2": ("deepseek_v2", "deepseek2", deepseek, deepseek_fields, SAYABLE),
    "deepseek_v3": ("deepseek_v3", "deepseek2", deepseek, deepseek_fields, SAYABLE),
    "older": ("deepseek_v3", "deepseek2", older_deepseek, older_fields, SAYABLE),
    "both forms": ("deepseek_v2", "deepseek2", both_deepseeks, deepseek_fields, SAYABLE),
    "youtu": ("youtu", "deepseek2", deepseek, deepseek_fields, {}),
}
SLOW = ("older", "both forms", "youtu")
"""Models of which another case is one, too."""


def original_of(case, directory):
    """A golden checkpoint with what GGUF files can say of its rotation, and its config.json."""
    name, *_, rope = CASES[case]
    shutil.copytree(FAMILIES / name, directory)
    config = json.loads((directory / "config.json").read_text())
    config["rope_parameters"] |= rope
    (directory / "config.json").write_text(json.dumps(config))
    return config


def gguf_of(case, directory, path, *, more=None, less=(), kinds=None):
    _, architecture, convert, own, _ = CASES[case]
    config = json.loads((directory / "config.json").read_text())
    fields = {
        k: v for k, v in (sizes(config) | own(config) | (more or {})).items() if k not in less
    }
    tensors = {}
    for name, array in merged_experts(arrays_of(directory)).items():
        tensors |= convert(name, array, config)
    extra = {}
    if case == "phi3":
        for kind in ("long", "short"):
            factors = config["rope_parameters"][f"{kind}_factor"]
            extra[f"rope_factors_{kind}.weight"] = np.array(factors, np.float32)
    layers = config["num_hidden_layers"]
    return write(
        *(path, architecture),
        layers=layers,
        fields=fields,
        tensors=tensors,
        extra=extra,
        kinds=kinds,
    )


def logits_of(model):
    tokens = np.arange(20, dtype=np.int32)[None] * 7 % model.config.vocab_size
    hidden, _ = model(tokens, np.ones_like(tokens), np.arange(20, dtype=np.int32)[None])
    return np.asarray(logits(hidden[0], model.unembedding(), softcap=None))


@pytest.mark.parametrize(
    "case", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in CASES]
)
def test_an_architecture_is_read_as_the_checkpoint_it_was_made_from(tmp_path, case):
    original_of(case, tmp_path / "hf")
    path = gguf_of(case, tmp_path / "hf", tmp_path / "model.gguf")
    original, model = open_checkpoint(tmp_path / "hf").load(), open_checkpoint(path).load()
    ours, theirs = model.config.identity(), original.config.identity()
    for name in ("norm_eps", "rope_scaling"):  # float32 in GGUF
        assert flat(ours.pop(name, None)) == pytest.approx(flat(theirs.pop(name, None)))
    assert ours == theirs
    expected = logits_of(original)
    assert np.abs(expected).max() > 2
    np.testing.assert_allclose(logits_of(model), expected, rtol=0, atol=1e-5)


def ggml_blocks(blocks, scales):
    """Blocks of MXFP4 in ggml's order: a scale, then codes i and i + 16 in byte i.

    Hugging Face files have codes 2i and 2i + 1 in byte i.
    """
    codes = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(*blocks.shape[:-1], 32)
    packed = codes[..., :16] | codes[..., 16:] << 4
    whole = np.concatenate([scales[..., None], packed], axis=-1)
    return whole.reshape(*whole.shape[:2], -1)


def test_experts_in_mxfp4_are_the_same_in_both_kinds_of_files(tmp_path):
    directory, kinds = FAMILIES / "gpt_oss_mxfp4", {}
    stored = load_file(directory / "model.safetensors")
    for layer in range(3):
        path = f"model.layers.{layer}.mlp.experts"
        for file, names in (("gate_up_proj", ("gate", "up")), ("down_proj", ("down",))):
            blocks, scales = (stored[f"{path}.{file}_{kind}"] for kind in ("blocks", "scales"))
            for i, name in enumerate(names):
                own = np.s_[:, i :: len(names)]
                named = f"blk.{layer}.ffn_{name}_exps.weight"
                kinds[named] = (ggml_blocks(blocks[own], scales[own]), Kind.MXFP4)
    path = gguf_of("gpt_oss", directory, tmp_path / "model.gguf", kinds=kinds)
    checkpoint, original = open_checkpoint(path), open_checkpoint(directory)
    assert checkpoint.files.kinds["blk.0.ffn_up_exps.weight"] == "MXFP4"
    ours, theirs = logits_of(checkpoint.load()), logits_of(original.load())
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


def config_of(case, *, tensors=(), less=(), **changes):
    """The config that a file's metadata give, with changes by name."""
    name, architecture, _, own, _ = CASES[case]
    config = json.loads((FAMILIES / name / "config.json").read_text())
    fields = sizes(config) | own(config) | changes
    metadata = {f"{architecture}.{k}": v for k, v in fields.items() if k not in less}
    values = {name: np.ones(3, np.float32) for name in FACTORS if name in tensors}
    return config_from_gguf(
        {"general.architecture": architecture, **metadata, **values}, set(tensors) - set(values)
    )


@pytest.mark.parametrize(
    ("case", "field"),
    [
        ("neox", "rope.dimension_count"),
        ("phi3", "attention.sliding_window"),
        ("phi3", "rope.scaling.original_context_length"),
        ("gpt_oss", "attention.sliding_window"),
        ("deepseek_v2", "rope.scaling.yarn_log_multiplier"),
        ("deepseek_v3", "attention.kv_lora_rank"),
    ],
)
def test_a_file_that_leaves_out_a_field_that_the_function_needs_is_refused_by_name(case, field):
    tensors = FACTORS if case == "phi3" else ()
    assert config_of(case, tensors=tensors)
    with pytest.raises(ValueError, match=f"field '{re.escape(field)}' is missing"):
        config_of(case, tensors=tensors, less=(field,))


def test_a_file_without_groups_is_refused_if_models_of_its_size_have_them():
    groups = ("expert_group_count", "expert_group_used_count")
    assert config_of("deepseek_v2", less=groups).expert_groups == 1
    with pytest.raises(ValueError, match="field 'expert_group_count' is missing"):
        config_of("deepseek_v2", less=groups, expert_count=160)


def test_a_deepseek_file_that_does_not_name_its_router_has_a_sigmoid_if_it_has_a_correction():
    less, correction = ("expert_gating_func",), ("blk.1.exp_probs_b.bias",)
    assert config_of("deepseek_v2", less=less).family == "deepseek_v2"
    assert config_of("deepseek_v3", less=less, tensors=correction).family == "deepseek_v3"
    with pytest.raises(ValueError, match="expert_gating_func = 3 is not supported"):
        config_of("deepseek_v3", expert_gating_func=3)


def test_phi_3s_divisors_must_all_be_in_the_file():
    factor = ("rope.scaling.attn_factor",)
    assert config_of("phi3", less=factor).rope_scaling is None
    scaling = config_of("phi3", tensors=FACTORS).rope_scaling
    assert attention_factor(scaling) == PHI3_FACTOR
    with pytest.raises(ValueError, match=r"field 'rope.scaling.attn_factor' is missing"):
        config_of("phi3", tensors=FACTORS, less=factor)
    with pytest.raises(ValueError, match=r"rope_factors_short\.weight is missing"):
        config_of("phi3", tensors=["rope_factors_long"])
    with pytest.raises(ValueError, match=r"rope_factors_short\.weight is missing"):
        config_of("phi3", **{"rope.scaling.type": "longrope"})


def test_phi_3s_window_of_no_positions_is_none():
    none = config_of("phi3", tensors=FACTORS, **{"attention.sliding_window": 0})
    assert none.windows == (None,)


def flat(value):
    if isinstance(value, dict):
        return [number for item in value.values() for number in flat(item)]
    if isinstance(value, (list, tuple)):
        return [number for item in value for number in flat(item)]
    return [] if value is None else [float(value)]

"""A base with a LoRA adapter: merged where tensors are read, as W + s·B·A."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from decant.models import open_checkpoint
from decant.models.parameters import parameters_by_path
from tests.making.models import HF_CONFIG, hf_tensors, write_hf

QUERY, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
SIZES = {QUERY: (32, 32), DOWN: (32, 64)}


def matrices(ranks, seed=0):
    """A random adapter by tensor name: module → rank."""
    draw = np.random.default_rng(seed).standard_normal
    tensors = {}
    for module, rank in ranks.items():
        outputs, inputs = SIZES[module]
        tensors[f"base_model.model.{module}.lora_A.weight"] = draw((rank, inputs))
        tensors[f"base_model.model.{module}.lora_B.weight"] = draw((outputs, rank))
    return {name: array.astype(np.float32) for name, array in tensors.items()}


def write_adapter(directory, tensors, *, base, **fields):
    """A PEFT directory as its `save_pretrained` writes it."""
    directory.mkdir(parents=True, exist_ok=True)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": 4,
        "lora_alpha": 6,
        "lora_dropout": 0.05,
        "bias": "none",
        "target_modules": ["q_proj", "down_proj"],
        "modules_to_save": None,
        "megatron_core": "megatron.core",
        "qalora_group_size": 16,
        "inference_mode": True,
    }
    (directory / "adapter_config.json").write_text(json.dumps(config | fields))
    save_file(tensors, directory / "adapter_model.safetensors")
    return directory


@pytest.fixture
def base(tmp_path):
    return write_hf(tmp_path / "base", hf_tensors())


def merged(adapter, *, scaling):
    """The base's tensors with s·B·A added in float64."""
    expected = {name: array.astype(np.float64) for name, array in hf_tensors().items()}
    for module in SIZES:
        a, b = (
            adapter.get(f"base_model.model.{module}.lora_{part}.weight", np.zeros((1, 1)))
            for part in "AB"
        )
        expected[f"{module}.weight"] += scaling.get(module, 0) * (b.astype(np.float64) @ a)
    return expected


@pytest.mark.parametrize(
    ("fields", "ranks", "scaling"),
    [
        ({}, {QUERY: 4, DOWN: 4}, {QUERY: 6 / 4, DOWN: 6 / 4}),
        ({"use_rslora": True}, {QUERY: 4}, {QUERY: 6 / 2}),
        (
            {"rank_pattern": {"down_proj": 8}, "alpha_pattern": {r"\d+\.self_attn.q_proj$": 1}},
            {QUERY: 4, DOWN: 8},
            {QUERY: 1 / 4, DOWN: 6 / 8},
        ),
        # A pattern is not the end of a word.
        ({"alpha_pattern": {"proj": 1, "own_proj": 1}}, {DOWN: 4}, {DOWN: 6 / 4}),
    ],
)  # fmt: skip
def test_matrices_are_the_bases_plus_the_scaled_product(tmp_path, base, fields, ranks, scaling):
    adapter = matrices(ranks)
    path = write_adapter(tmp_path / "adapter", adapter, base=base, **fields)
    files = open_checkpoint(path).files
    expected = merged(adapter, scaling=scaling)
    assert files.shapes.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(files.read(name), array.astype(np.float32))


def test_a_share_is_what_the_whole_matrix_has_there(tmp_path, base):
    path = write_adapter(tmp_path / "adapter", matrices({QUERY: 4, DOWN: 4}), base=base)
    files, at = open_checkpoint(path).files, (slice(3, 20), slice(5, 31))
    for name in (QUERY, DOWN):
        whole = files.read(f"{name}.weight")
        np.testing.assert_array_equal(files.read(f"{name}.weight", at), whole[at])


def test_the_model_is_that_of_the_merged_directory(tmp_path, base):
    adapter = matrices({QUERY: 4, DOWN: 4})
    path = write_adapter(tmp_path / "adapter", adapter, base=base)
    plain = merged(adapter, scaling={QUERY: 1.5, DOWN: 1.5})
    write_hf(tmp_path / "plain", {n: a.astype(np.float32) for n, a in plain.items()})
    expected = parameters_by_path(open_checkpoint(tmp_path / "plain").load())
    ours = parameters_by_path(open_checkpoint(path).load())
    assert open_checkpoint(path).left_out == ""
    for name, parameter in expected.items():
        np.testing.assert_array_equal(ours[name].get_value(), parameter.get_value())


def test_matrices_stored_as_input_by_output_get_the_transpose(tmp_path):
    tensors = hf_tensors()
    name = f"{DOWN}.weight"
    turned = write_hf(tmp_path / "base", {**tensors, name: tensors[name].T.copy()})
    adapter = matrices({DOWN: 4})
    fields = {"fan_in_fan_out": True}
    path = write_adapter(tmp_path / "adapter", adapter, base=turned, **fields)
    expected = merged(adapter, scaling={DOWN: 1.5})[name].T
    np.testing.assert_array_equal(open_checkpoint(path).files.read(name), expected.astype("f4"))


def test_a_saved_module_replaces_the_bases(tmp_path, base):
    head = np.ones((64, 32), np.float32)
    adapter = matrices({QUERY: 4}) | {"base_model.model.lm_head.weight": head}
    path = write_adapter(tmp_path / "adapter", adapter, base=base, modules_to_save=["lm_head"])
    files = open_checkpoint(path).files
    np.testing.assert_array_equal(files.read("lm_head.weight"), head)
    assert files.read("lm_head.weight", (slice(0, 2), slice(0, 3))).shape == (2, 3)


def test_the_base_may_lie_beside_the_adapter(tmp_path, base, monkeypatch):
    path = write_adapter(tmp_path / "adapter", matrices({QUERY: 4}), base="../base")
    assert open_checkpoint(path).config.hidden_size == 32
    path = write_adapter(tmp_path / "elsewhere/adapter", matrices({QUERY: 4}), base="base")
    monkeypatch.chdir(tmp_path)
    assert open_checkpoint(path).config.hidden_size == 32


def test_the_hashes_tell_base_matrices_and_scaling(tmp_path, base):
    def hashes(name, tensors, of=base, **fields):
        path = write_adapter(tmp_path / name, tensors, base=of, **fields)
        return open_checkpoint(path).files.weight_sha256s(memory=tmp_path / "memory")

    first = hashes("a", matrices({QUERY: 4}))
    other = write_hf(tmp_path / "moved", hf_tensors())
    assert hashes("b", matrices({QUERY: 4}), of=other, lora_dropout=0.5) == first
    another = write_hf(tmp_path / "another", hf_tensors(seed=1))
    for differs in (
        hashes("c", matrices({QUERY: 4}, seed=1)),
        hashes("d", matrices({QUERY: 4}), lora_alpha=7),
        hashes("e", matrices({QUERY: 4}), use_rslora=True),
        hashes("f", matrices({QUERY: 4}), of=another),
    ):
        assert sorted(differs.values()) != sorted(first.values())


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"use_dora": True}, "use_dora = True is not supported"),
        ({"peft_type": "IA3"}, "peft_type = 'IA3' is not supported"),
        ({"bias": "lora_only"}, "bias = 'lora_only' is not supported"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa' is not supported"),
        ({"trainable_token_indices": [1]}, r"unknown field\(s\) trainable_token_indices"),
        ({"target_parameters": ["experts.up"]}, r"unknown field\(s\) target_parameters"),
        ({"lora_bias": True}, r"unknown field\(s\) lora_bias"),
        ({"r": 0}, "r = 0; expected a whole number from 1"),
        ({"alpha_pattern": {"(a+)+": 2}}, "only . .. .d. . . are read"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern: q_proj = 0"),
        ({"base_model_name_or_path": None}, "'base_model_name_or_path' is missing"),
        ({"base_model_name_or_path": "s3://bucket/x"}, "is an address; copy it"),
        ({"base_model_name_or_path": "embedded"}, "expected a Hugging Face directory"),
    ],
)
def test_adapters_that_are_no_plain_lora_are_refused_by_name(tmp_path, base, fields, expected):
    path = write_adapter(tmp_path / "adapter", matrices({QUERY: 4}), **{"base": base}, **fields)
    with pytest.raises((ValueError, FileNotFoundError), match=expected):
        open_checkpoint(path).load()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda t: t | {"base_model.model.x.lora_A.weight": np.zeros((4, 3), "f4")}, "'x' is not"),
        (lambda t: dict([*t.items()][:1]), "lora_B.weight missing"),
        (
            lambda t: {n: a[:, :16] if "A" in n.split("_")[-1] else a for n, a in t.items()},
            r"is F32 \[4, 16\], expected \[4, 32\]",
        ),
        (lambda t: {n: a.astype("i4") for n, a in t.items()}, "is I32"),
        (
            lambda t: t | {"base_model.model.embed.lora_embedding_A": np.ones((4, 64), "f4")},
            "neither a LoRA matrix",
        ),
        (
            lambda t: t | {f"base_model.model.{QUERY}.lora_magnitude_vector": np.ones(32, "f4")},
            "neither a LoRA matrix",
        ),
        (
            lambda t: t | {"base_model.model.lm_head.weight": np.ones((65, 32), "f4")},
            r"is F32 \[65, 32\], expected \[64, 32\]",
        ),
        (lambda _: {}, "holds no matrices"),
    ],
)  # fmt: skip
def test_matrices_of_another_base_or_kind_are_refused_by_name(tmp_path, base, change, expected):
    path = write_adapter(tmp_path / "adapter", change(matrices({QUERY: 4})), base=base)
    with pytest.raises(ValueError, match=expected):
        open_checkpoint(path).load()


def test_a_changed_embedding_that_is_also_the_head_is_refused(tmp_path):
    tensors = {name: array for name, array in hf_tensors().items() if name != "lm_head.weight"}
    tied = write_hf(tmp_path / "base", tensors, HF_CONFIG | {"tie_word_embeddings": True})
    new = {"base_model.model.model.embed_tokens.weight": np.ones((64, 32), np.float32)}
    path = write_adapter(tmp_path / "adapter", new, base=tied)
    with pytest.raises(ValueError, match="the base's head is its embedding"):
        open_checkpoint(path).load()


def test_an_adapter_of_an_adapter_and_a_missing_base_are_refused(tmp_path, base):
    first = write_adapter(tmp_path / "first", matrices({QUERY: 4}), base=base)
    second = write_adapter(tmp_path / "second", matrices({QUERY: 4}), base=first)
    with pytest.raises(ValueError, match=r"its base is .*expected a Hugging Face directory"):
        open_checkpoint(second)
    lost = write_adapter(tmp_path / "lost", matrices({QUERY: 4}), base=tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match=r"lost: the base of this adapter: .*gone"):
        open_checkpoint(lost)
    # An adapter of itself does not run for ever.
    itself = write_adapter(tmp_path / "itself", matrices({QUERY: 4}), base=tmp_path / "itself")
    with pytest.raises(ValueError, match=r"its base is .*expected a Hugging Face directory"):
        open_checkpoint(itself)
    (first / "adapter_model.safetensors").rename(first / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match="Save it as safetensors"):
        open_checkpoint(first)


def test_a_directory_with_a_whole_model_is_read_as_that_model(tmp_path, base):
    write_adapter(base, matrices({QUERY: 4}), base=base)
    expected = hf_tensors()[f"{QUERY}.weight"]
    np.testing.assert_array_equal(open_checkpoint(base).files.read(f"{QUERY}.weight"), expected)

"""Capture, train, export of each family's tiny teacher: transformers agrees at both ends.

Needs the reference extra; see test_models_against_transformers.py for the interpreter.
"""

import json
import subprocess

import numpy as np
import pytest
from flax import nnx

from decant.models.rotary import YarnScaling
from decant.trainer.config import Data, Export, Loss, Student, Train
from decant.trainer.results.export import export
from decant.trainer.run.train import train
from decant.trainer.run.trained_student import load_student
from tests.making.caches import tiny_cache, write_teacher
from tests.reference.test_models_against_transformers import PYTHON

pytestmark = pytest.mark.reference

OLMO = {"pre_norms": False, "post_norms": True, "qk_norm": True, "qk_norm_whole": True}
BIASES = {"qkv_bias": True, "output_bias": True, "mlp_bias": True}
LAYER_NORM = {"norm": "layer", "gated_mlp": False, "num_kv_heads": 4, **BIASES}
EXPERTS = {"num_experts": 4, "experts_per_token": 2, "normalise_experts": True}
GRANITE = {
    "embedding_multiplier": 0.5,
    "residual_multiplier": 0.6,
    "score_multiplier": 0.25,
    "logit_divisor": 1.5,
}
TEACHERS = {
    "smollm3": {"rotary_layers": (True, False)},
    "mixtral": EXPERTS,
    "gemma": {"norm_adds_one": True, "scale_embedding": True, "activation": "gelu_tanh"},
    "gemma3n": {
        "num_layers": 4,
        "windows": (12, 12, None, None),
        "window_rope_theta": 100.0,
        "reading_layers": 1,
        "layer_input_dim": 4,
        "layer_input_rows": 600,
        "stream_copies": 3,
        "laurel_rank": 4,
        "gate_sparsity": (0.8, 0.0),
        "final_softcap": 4.0,
        "value_norm": True,
        "score_multiplier": 1.0,
        "qk_norm": True,
        "post_norms": True,
        "scale_embedding": True,
        "activation": "gelu_tanh",
    },
    "gemma4": {
        "num_layers": 4,
        "windows": (12, 12, None, None),
        "window_rope_theta": 100.0,
        "full_head_dim": 16,
        "reading_layers": 1,
        "reading_mlp_factor": 2,
        "layer_input_dim": 4,
        "layer_factors": True,
        "value_norm": True,
        "score_multiplier": 1.0,
        "qk_norm": True,
        "post_norms": True,
        "scale_embedding": True,
        "activation": "gelu_tanh",
    },
    "olmo2": OLMO,
    "olmo3": {**OLMO, "windows": (12, None), "rope_theta": 5e5, "window_rope_theta": 5e5},
    "phi3": {"windows": (12,), "rotary_dim": 6},
    "granite": GRANITE,
    "granite_hybrid": GRANITE,
    "gpt2": {
        **LAYER_NORM,
        "learned_positions": True,
        "rotary_layers": (False,),
        "activation": "gelu_tanh",
    },
    "gpt_neox": {**LAYER_NORM, "parallel_blocks": True, "rotary_dim": 4, "activation": "gelu"},
    "gpt_oss": {
        **EXPERTS,
        **BIASES,
        "router_bias": True,
        "attention_sinks": True,
        "activation": "clamped_swish",
        "windows": (12, None),
        "rope_scaling": YarnScaling(32.0, 64, truncate=False, attention_factor=1.3465735902799727),
    },
    "glm4_moe": {
        **EXPERTS,
        "num_layers": 3,
        "router": "sigmoid",
        "router_correction": True,
        "shared_intermediate_size": 64,
        "dense_layers": 1,
        "dense_intermediate_size": 48,
        "rotary_dim": 4,
    },
}
LATENT = {
    "num_kv_heads": 4,
    "head_dim": 12,
    "rotary_dim": 4,
    "value_dim": 10,
    "latent_dim": 14,
    "query_latent_dim": 18,
    "rotary_neighbours": True,
}
YARN = {"rope_scaling": YarnScaling(4.0, 64), "yarn_score_scale": 0.7}
GROUPS = {"expert_groups": 2, "groups_per_token": 1, "expert_multiplier": 1.5}
DEEPSEEK = TEACHERS["glm4_moe"] | LATENT
TEACHERS |= {
    "deepseek_v3": DEEPSEEK | YARN | GROUPS,
    "deepseek_v2": DEEPSEEK
    | YARN
    | GROUPS
    | {
        "router": "softmax",
        "router_correction": False,
        "normalise_experts": False,
        "group_votes": 1,
    },
    "glm4_moe_lite": DEEPSEEK,
    "youtu": LATENT,
    "glm4": {"rotary_dim": 4, "rotary_neighbours": True, "post_norms": True},
}
HYBRID = {
    "num_layers": 3,
    "linear_layers": (True, True, False),
    "linear_key_heads": 2,
    "linear_value_heads": 4,
    "linear_key_dim": 8,
    "linear_value_dim": 6,
    "convolution": 4,
    "norm_adds_one": True,
    "qk_norm": True,
    "attention_gate": True,
    "rotary_dim": 4,
}
TEACHERS |= {
    "qwen3_5": HYBRID,
    "qwen3_next": HYBRID | EXPERTS | {"shared_intermediate_size": 20, "shared_expert_gate": True},
}
SCRIPT = """
import json, sys
import torch
from transformers import AutoModelForCausalLM
torch.set_grad_enabled(False)
teacher, student, tokens = sys.argv[1], sys.argv[2], torch.tensor([json.loads(sys.argv[3])])

def load(directory):
    model, info = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", output_loading_info=True)
    return model.eval(), {k: sorted(map(str, v)) for k, v in info.items() if v}

(theirs, first), (ours, second) = load(teacher), load(student)
best = theirs(tokens).logits[0].log_softmax(-1).topk(8).values
json.dump({"problems": [first, second], "best": best.tolist(),
           "logits": ours(tokens).logits[0].tolist()}, open(sys.argv[4], "w"))
"""


@pytest.fixture(scope="module", params=TEACHERS)
def trip(request, tmp_path_factory):
    """Cache, one document's length at the start of its first row, run, and transformers' report."""
    if subprocess.run([PYTHON, "-c", "import torch, transformers"], capture_output=True).returncode:
        pytest.skip(f"{PYTHON} has no torch and transformers: `make reference` installs them.")
    root = tmp_path_factory.mktemp(request.param)
    write_teacher(root / "teacher", family=request.param, **TEACHERS[request.param])
    cache, layers = tiny_cache(root, k=8), TEACHERS[request.param].get("num_layers", 2)
    batch = cache.read(cache.rows()[:1])
    length = int((batch["segment_ids"][0] == 1).sum())
    config = Train(
        cache=cache.path,
        run=root / "run",
        student=Student(source=str(root / "teacher"), layers=layers - 1),
        data=Data(batch_rows=2, steps=2),
        loss=Loss(tail="bucket", alpha=0.5, chunk_tokens=64),
    )
    train(config)
    out = export(Export(run=config.run, cache=cache.path, output=root / "exported"))
    tokens = json.dumps(batch["tokens"][0, :length].tolist())
    arguments = [str(root / "teacher"), str(out), tokens, str(root / "report.json")]
    subprocess.run([PYTHON, "-c", SCRIPT, *arguments], check=True)
    return batch, length, config.run, json.loads((root / "report.json").read_text())


def test_stored_targets_are_those_of_the_teacher_in_transformers(trip):
    batch, length, _, theirs = trip
    stored, known = batch["topk_logprobs"][0, :length], batch["loss_mask"][0, :length]
    assert known.sum() > length / 2
    difference = np.abs(stored - np.array(theirs["best"]))[known].max()
    print(f"\n{length} tokens: max |Δ log-prob| {difference:.1e}")
    assert difference <= 5e-4


def test_transformers_runs_the_exported_student_as_we_do(trip):
    batch, length, run, theirs = trip
    assert theirs["problems"] == [{}, {}]
    model = nnx.merge(*load_student(run, dtype="float32"))
    tokens = batch["tokens"][:1, :length]
    hidden, _ = model(tokens, np.ones_like(tokens), np.arange(length, dtype=np.int32)[None])
    ours = np.asarray(hidden[0], np.float64) @ np.asarray(model.unembedding(), np.float64)
    if cap := model.config.final_softcap:
        ours = cap * np.tanh(ours / cap)
    np.testing.assert_allclose(theirs["logits"], ours, rtol=0, atol=3e-5 * np.abs(ours).max())

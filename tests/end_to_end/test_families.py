"""Teachers with caps, windows, two rotations and experts: captured, cut and trained from.

The one of family gemma3 is the text model of a model of images and text.
"""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from decant.models import open_checkpoint, save_directory
from decant.models.parameters import parameters_by_path
from decant.trainer.config import Data, Loss, Student, Train
from decant.trainer.run.metrics_log import read_metrics
from decant.trainer.run.saved_initial import INITIAL
from decant.trainer.run.train import train
from tests.making.caches import tiny_cache, write_teacher

TEACHERS = {
    "gemma3": {
        "windows": (12, None),
        "window_rope_theta": 100.0,
        "query_scalar": 6.0,
        "attention_softcap": 5.0,
        "final_softcap": 4.0,
        "qk_norm": True,
        "post_norms": True,
        "norm_adds_one": True,
        "scale_embedding": True,
        "activation": "gelu_tanh",
    },
    "gemma4": {
        "windows": (12, None, None),
        "window_rope_theta": 100.0,
        "full_head_dim": 16,
        "full_keys_are_values": True,
        "reading_layers": 1,
        "layer_input_dim": 4,
        "layer_factors": True,
        "value_norm": True,
        "score_multiplier": 1.0,
        "final_softcap": 4.0,
        "qk_norm": True,
        "post_norms": True,
        "scale_embedding": True,
        "activation": "gelu_tanh",
        "tie_embeddings": True,
    },
    "qwen3_moe": {"qk_norm": True, "num_experts": 4, "experts_per_token": 2},
}


@pytest.fixture(
    scope="module",
    # Gemma 4 caps its logits as Gemma 3 does.
    params=[pytest.param(n, marks=[pytest.mark.slow] * (n == "gemma3")) for n in TEACHERS],
)
def captured(request, tmp_path_factory):
    root = tmp_path_factory.mktemp(request.param)
    fields = {"num_layers": 3, "family": request.param, **TEACHERS[request.param]}
    checkpoint = open_checkpoint(write_teacher(root / "quiet", **fields))
    model = checkpoint.load()
    for path, parameter in parameters_by_path(model).items():
        # The blocks of a new model hardly change their input; these do.
        if "blocks." in path and "norm" not in path and "factor" not in path:
            parameter.set_value(parameter[...] * 8)
    save_directory(model, root / "teacher", checkpoint.tokenizer().files())
    if request.param == "gemma3":
        wrap(root / "teacher")
    return root, tiny_cache(root, k=8)


def wrap(directory):
    """Make a text model one of images and text, as transformers writes them."""
    file = directory / "config.json"
    text = json.loads(file.read_text())
    whole = {"model_type": "gemma3", "text_config": text, "vision_config": {"hidden_size": 8}}
    file.write_text(json.dumps(whole))
    tensors = load_file(directory / "model.safetensors")
    tensors = {f"language_model.{name}": array for name, array in tensors.items()}
    tensors["vision_tower.patch.weight"] = np.ones((8, 3), np.float32)
    save_file(tensors, directory / "model.safetensors")


def test_stored_targets_are_those_of_the_capped_logits(captured):
    root, cache = captured
    model = open_checkpoint(root / "teacher").load()
    batch = cache.read(cache.rows()[:4])
    rows = (jnp.asarray(batch[name]) for name in ("tokens", "segment_ids", "positions"))
    hidden = np.asarray(model(*rows)[0], np.float64)
    z = hidden @ np.asarray(model.unembedding(), np.float64)
    cap = model.config.final_softcap
    z = cap * np.tanh(z / cap) if cap else z
    logprobs = z - np.log(np.exp(z).sum(-1, keepdims=True))
    best, mask = -np.sort(-logprobs, axis=-1)[..., :8], batch["loss_mask"]
    np.testing.assert_allclose(batch["topk_logprobs"][mask], best[mask], atol=5e-5)


@pytest.mark.slow
def test_a_student_that_is_the_whole_teacher_has_nothing_to_learn_and_a_cut_one_has(
    captured, tmp_path
):
    root, cache = captured
    losses = {}
    for layers in ((0, 1, 2), (1, 2)):
        config = Train(
            cache=cache.path,
            run=tmp_path / str(len(layers)),
            student=Student(source=str(root / "teacher"), layers=layers),
            data=Data(batch_rows=2, steps=1),
            loss=Loss(alpha=1.0, tail="bucket"),
            heldout_rows=2,
        )
        train(config)
        losses[layers] = next(
            line["heldout_kl_bound"]
            for line in read_metrics(config.run)
            if "heldout_kl_bound" in line
        )
        student = open_checkpoint(config.run / INITIAL).config
        assert student == open_checkpoint(root / "teacher").config.with_layers(layers)
        assert "vision_config" not in (config.run / INITIAL / "config.json").read_text()
    assert abs(losses[0, 1, 2]) < 1e-5 < 1e-2 < losses[1, 2]

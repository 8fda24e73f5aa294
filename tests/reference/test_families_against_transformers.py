"""Transformers loads our exports of every family with equal logits. Needs the reference extra.

See test_models_against_transformers.py for the interpreter. The exports are made from the golden
checkpoints, so they can be compared with the originals that transformers wrote.
"""

import json
import subprocess

import numpy as np
import pytest
from safetensors.numpy import load_file

from decant.models import open_checkpoint, save_directory
from decant.models.checkpoints.cut import cut_layers
from decant.models.families.towers import text_tensors
from decant.models.numerics import logits
from tests import paths
from tests.models.families.test_families import close
from tests.reference.test_models_against_transformers import PYTHON

pytestmark = pytest.mark.reference

GOLDEN = paths.GOLDEN / "families"
# Loading MXFP4 with transformers needs more packages; the plain case has the same tensors.
CASES = sorted(
    path.parent.name for path in GOLDEN.glob("*/config.json") if path.parent.name != "gpt_oss_mxfp4"
)
# A student of the first and last two blocks, whose windows no longer alternate.
CUT = {
    "glm4_moe": (0, 2),
    "deepseek_v2": (1,),
    "deepseek_v3": (1, 2),
    "youtu": (2, 0),
    "glm": (1,),
    "glm4": (2, 0),
    "gpt_oss": (1, 2),
    "gemma2": (0, 2),
    "gemma3": (0, 5, 6),
    "gemma3n": (0, 2, 4, 5),
    "gemma4": (0, 2, 4, 5),
    "gemma4_moe": (2, 1),
    "qwen2": (2, 0),
    "qwen3_moe": (1,),
    "tower_gemma3": (4, 5),
    "tower_ministral3": (1,),
    "smollm3": (0, 3),
    "olmo3": (0, 3),
    "phi3": (2, 0),
    "granite4": (1,),
    "gpt2": (0, 2),
    "gpt_neox": (1, 2),
    "qwen3_next": (1, 3, 4),
    "qwen3_5": (3, 0, 7, 9),
    "qwen3_5_moe": (3,),
}

SCRIPT = """
import json, sys
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
torch.set_grad_enabled(False)
original, exports = Path(sys.argv[1]), Path(sys.argv[2])

def load(directory):
    whole = "text_config" in json.loads((directory / "config.json").read_text())
    kind = AutoModelForImageTextToText if whole else AutoModelForCausalLM
    model, info = kind.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", output_loading_info=True)
    return model.eval(), {k: sorted(map(str, v)) for k, v in info.items() if v}

tokens = torch.arange(40)[None] * 7 % 80
report = {}
for export in sorted(exports.iterdir()):
    model, problems = load(export)
    logits = model(tokens).logits
    report[export.name] = {"problems": problems, "dtype": str(model.config.dtype),
                           "logits": logits[0].tolist()}
    if (original / export.name).is_dir():
        theirs, _ = load(original / export.name)
        report[export.name]["same"] = bool(torch.equal(theirs(tokens).logits, logits))
json.dump(report, open(sys.argv[3], "w"))
"""


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    if subprocess.run([PYTHON, "-c", "import torch, transformers"], capture_output=True).returncode:
        pytest.skip(f"{PYTHON} has no torch and transformers: `make reference` installs them.")
    directory = tmp_path_factory.mktemp("families")
    for name in CASES:
        save_directory(open_checkpoint(GOLDEN / name).load(), directory / "out" / name, {})
    for name, layers in CUT.items():
        student = cut_layers(open_checkpoint(GOLDEN / name), layers)
        save_directory(student, directory / "out" / f"{name}-cut", {})
    arguments = [GOLDEN, directory / "out", directory / "report.json"]
    subprocess.run([PYTHON, "-c", SCRIPT, *map(str, arguments)], check=True)
    return directory, json.loads((directory / "report.json").read_text())


@pytest.mark.parametrize("name", CASES)
def test_an_export_has_bit_for_bit_the_logits_of_the_original(report, name):
    assert report[1][name]["problems"] == {}
    assert report[1][name]["same"]


@pytest.mark.parametrize("name", CUT)
def test_transformers_runs_an_exported_student_as_we_do(report, name):
    directory, theirs = report
    assert theirs[f"{name}-cut"]["problems"] == {}
    model = open_checkpoint(directory / "out" / f"{name}-cut").load()
    tokens = np.arange(40, dtype=np.int32)[None] * 7 % 80
    hidden, _ = model(tokens, np.ones_like(tokens), np.arange(40, dtype=np.int32)[None])
    ours = logits(hidden[0], model.unembedding(), softcap=model.config.final_softcap)
    close(name, ours, theirs[f"{name}-cut"]["logits"], atol=3e-5)


def one_expert_a_tensor(tensors):
    """Qwen3-VL's experts, in tensors [expert, input, output], as the text model has them."""
    for name, array in tensors.items():
        at, _, fused = name.partition(".experts.")
        matrices = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
        if fused not in matrices:
            yield name, array
            continue
        for matrix, part in zip(
            matrices[fused], np.split(array, len(matrices[fused]), axis=2), strict=True
        ):
            for expert, weight in enumerate(part):
                yield f"{at}.experts.{expert}.{matrix}.weight", weight.T


@pytest.mark.parametrize("name", CASES)
def test_an_export_has_the_originals_tensors(report, name):
    directory, _ = report
    exported = load_file(directory / "out" / name / "model.safetensors")
    original = {}
    for file in (GOLDEN / name).glob("*.safetensors"):
        original |= load_file(file)
    if "text_config" in json.loads((GOLDEN / name / "config.json").read_text()):
        original = {ours: original[stored] for ours, stored in text_tensors(original).items()}
    if name == "tower_qwen3_vl_moe":
        original = dict(one_expert_a_tensor(original))
    assert exported.keys() == original.keys()
    for tensor, array in original.items():
        np.testing.assert_array_equal(exported[tensor], array.astype(np.float32))

"""What we read over in a config.json changes nothing in transformers either: bit for bit.

Needs the reference extra; see test_models_against_transformers.py for the interpreter.
"""

import json
import shutil
import subprocess

import pytest

from decant.models import open_checkpoint
from tests import paths
from tests.models.families.test_real_configs import EVERYWHERE
from tests.reference.test_models_against_transformers import PYTHON

pytestmark = pytest.mark.reference

GOLDEN = paths.GOLDEN / "families"
# Loading MXFP4 with transformers needs more packages, and models of images and text another class.
CASES = sorted(
    path.parent.name
    for path in GOLDEN.glob("*/config.json")
    if not path.parent.name.startswith(("gpt_oss_mxfp4", "tower"))
)
# Transformers takes any quantization_config, even null, for one.
EXTRAS = {
    name: {k: v for k, v in fields.items() if k != "quantization_config"}
    for name, fields in EVERYWHERE.items()
} | {"control": {"rms_norm_eps": 0.5, "layer_norm_eps": 0.5, "layer_norm_epsilon": 0.5}}

SCRIPT = """
import json, sys
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM
torch.set_grad_enabled(False)
tokens = torch.arange(40)[None] * 7 % 80

def logits(directory):
    return AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager").eval()(tokens).logits

report = {}
for family in sorted(Path(sys.argv[1]).iterdir()):
    plain = logits(family / "plain")
    report[family.name] = {
        case.name: bool(torch.equal(logits(case), plain)) for case in sorted(family.iterdir())}
json.dump(report, open(sys.argv[2], "w"))
"""


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """Family → what was added → a checkpoint with that."""
    root = tmp_path_factory.mktemp("configs")
    for family in CASES:
        for name, extra in {"plain": {}, **EXTRAS}.items():
            shutil.copytree(GOLDEN / family, root / family / name)
            file = root / family / name / "config.json"
            # What the file says itself comes last, but for the control.
            own = json.loads(file.read_text())
            both = own | extra if name == "control" else extra | own
            file.write_text(json.dumps(both))
    return root


@pytest.fixture(scope="module")
def same(directories, tmp_path_factory):
    if subprocess.run([PYTHON, "-c", "import torch, transformers"], capture_output=True).returncode:
        pytest.skip(f"{PYTHON} has no torch and transformers: `make reference` installs them.")
    report = tmp_path_factory.mktemp("report") / "report.json"
    subprocess.run([PYTHON, "-c", SCRIPT, directories, report], check=True)
    return json.loads(report.read_text())


@pytest.mark.parametrize("family", CASES)
def test_a_config_with_harmless_extras_is_the_same_model_on_both_sides(same, directories, family):
    assert same[family] == {"plain": True, "control": False} | dict.fromkeys(EVERYWHERE, True)
    plain = open_checkpoint(directories / family / "plain").config
    for name in EVERYWHERE:
        assert open_checkpoint(directories / family / name).config == plain

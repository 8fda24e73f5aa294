"""LoRA adapters against PEFT itself: it loads ours, and we load those that it saves.

Needs an interpreter with torch, transformers and peft, which DECANT_REFERENCE_PYTHON names
(default: this one); `make reference` installs them.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from decant.models import open_checkpoint
from decant.models.checkpoints.adapters import Lora, add_adapter
from decant.models.checkpoints.peft_saving import save_adapter
from decant.models.numerics import logits
from decant.models.parameters import parameters_by_path
from tests.making.models import hf_tensors, write_hf

pytestmark = pytest.mark.reference

PYTHON = os.environ.get("DECANT_REFERENCE_PYTHON", sys.executable)
KINDS = ("plain", "root", "patterns", "saved module")
"""Those of `peft_side.py`."""
TOKENS = np.random.default_rng(0).integers(0, 64, (2, 20))


def ours(directory, *, root):
    """A random adapter on `base`, written into `ours`; and its decoder."""
    model = open_checkpoint(directory / "base").load()
    alpha, rank = 5.0, 3
    lora = Lora(rank, alpha / rank ** (0.5 if root else 1), ("all-linear",))
    add_adapter(model, lora, seed=0)
    for path, parameter in parameters_by_path(model).items():
        if path.endswith("_lora_b"):
            noise = np.random.default_rng(1).standard_normal(parameter.shape, np.float32)
            parameter.set_value(noise * np.float32(0.2))
    save_adapter(
        model,
        directory / "ours",
        {},
        lora=lora,
        alpha=alpha,
        root=root,
        base=str(directory / "base"),
    )
    return model


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    probe = "import torch, transformers, peft"
    if subprocess.run([PYTHON, "-c", probe], capture_output=True).returncode:
        pytest.skip(f"{PYTHON} has no torch, transformers and peft: `make reference` installs them")
    directory = tmp_path_factory.mktemp("peft")
    write_hf(directory / "base", hf_tensors())
    np.save(directory / "tokens.npy", TOKENS)
    model = ours(directory, root=True)
    script = Path(__file__).with_name("peft_side.py")
    subprocess.run(
        [PYTHON, script, directory], check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    return directory, model, dict(np.load(directory / "logits.npz"))


def logits_of(model):
    time = np.broadcast_to(np.arange(TOKENS.shape[1]), TOKENS.shape)
    hidden, _ = model(TOKENS, np.ones_like(TOKENS), time)
    return np.stack([logits(row, model.unembedding(), softcap=None) for row in hidden])


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_that_peft_saved_computes_the_same(both, kind):
    directory, _, theirs = both
    assert np.abs(theirs[kind] - theirs["base"]).max() > 0.05
    found = logits_of(open_checkpoint(directory / kind).load())
    np.testing.assert_allclose(found, theirs[kind], rtol=1e-4, atol=1e-4)


def test_peft_and_transformers_load_our_adapter_to_the_same_function(both):
    _, model, theirs = both
    found = logits_of(model)
    assert np.abs(found - theirs["base"]).max() > 0.05
    for by in ("ours by peft", "ours by transformers"):
        np.testing.assert_allclose(found, theirs[by], rtol=1e-4, atol=1e-4)

"""Transformers loads an exported student, with equal logits and the same greedy text.

Needs the reference extra; see test_models_against_transformers.py for the interpreter.
"""

import json
import subprocess

import jax
import numpy as np
import pytest
from flax import nnx

from decant.models.mesh.sharding import student_mesh
from decant.trainer.config import Data, Export, Loss, Student, Train
from decant.trainer.results.export import export
from decant.trainer.results.sampling import Request, Sampler, Sampling
from decant.trainer.run.train import train
from decant.trainer.run.trained_student import load_student
from tests.making.caches import tiny_cache
from tests.reference.test_models_against_transformers import PYTHON

pytestmark = pytest.mark.reference

PROMPT = [5, 9, 300]
SCRIPT = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
torch.set_grad_enabled(False)
directory, prompt = sys.argv[1], json.loads(sys.argv[2])
model, info = AutoModelForCausalLM.from_pretrained(
    directory, dtype=torch.float32, attn_implementation="eager", output_loading_info=True)
tokenizer = AutoTokenizer.from_pretrained(directory)
tokens = torch.arange(40)[None] * 7 % 512
text = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)
json.dump({"problems": {k: sorted(map(str, v)) for k, v in info.items() if v},
           "logits": model(tokens).logits[0].tolist(), "eos": model.generation_config.eos_token_id,
           "greedy": text[0].tolist(), "ids": tokenizer("a cache is written once")["input_ids"]},
          open(sys.argv[3], "w"))
"""


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The run's directory, and the report of transformers on the exported student."""
    if subprocess.run([PYTHON, "-c", "import torch, transformers"], capture_output=True).returncode:
        pytest.skip(f"{PYTHON} has no torch and transformers: `make reference` installs them.")
    root = tmp_path_factory.mktemp("student")
    cache = tiny_cache(root, k=8)
    config = Train(
        cache=cache.path,
        run=root / "run",
        student=Student(source=str(root / "teacher"), layers=1),
        data=Data(batch_rows=2, steps=5),
        loss=Loss(tail="bucket", alpha=0.5, chunk_tokens=64),
    )
    train(config)
    out = export(Export(run=config.run, cache=cache.path, output=root / "exported"))
    arguments = [str(out), json.dumps(PROMPT), str(root / "report.json")]
    subprocess.run([PYTHON, "-c", SCRIPT, *arguments], check=True)
    return config.run, json.loads((root / "report.json").read_text())


def test_transformers_loads_a_student_with_equal_logits(both):
    run, theirs = both
    assert theirs["problems"] == {}
    model = nnx.merge(*load_student(run, dtype="float32"))
    tokens = np.arange(40, dtype=np.int32)[None] * 7 % 512
    hidden, _ = model(tokens, np.ones_like(tokens), np.arange(40, dtype=np.int32)[None])
    ours = np.asarray(hidden[0], np.float64) @ np.asarray(model.unembedding(), np.float64)
    np.testing.assert_allclose(theirs["logits"], ours, rtol=0, atol=3e-5 * np.abs(ours).max())


def test_transformers_generates_the_same_text_and_knows_the_end_token(both):
    run, theirs = both
    mesh = student_mesh(fsdp=jax.device_count())
    sampler = Sampler(
        *load_student(run, dtype="float32", mesh=mesh),
        sampling=Sampling(max_tokens=12, temperature=0.0),
        vocabulary=512,
        stop={theirs["eos"]},
        batch_rows=1,
        mesh=mesh,
    )
    (ours,) = sampler.complete([Request(PROMPT, 0, 0)])
    assert theirs["eos"] == 0
    assert theirs["greedy"] == PROMPT + ours.ids.tolist()


def test_transformers_reads_the_exported_tokenizer(both):
    assert len(both[1]["ids"]) >= 5

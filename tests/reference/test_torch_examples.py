"""The examples for PyTorch run as they are, and their students learn."""

import re
import subprocess
import sys

import pytest

from tests.making.caches import tiny_cache
from tests.paths import ROOT, environment

pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.reference


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tiny_cache(tmp_path_factory.mktemp("examples"), draws=4)


def run(name, *arguments):
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / name), *map(str, arguments)],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_loop_of_ones_own_learns(cache):
    printed = run("torch_loop.py", cache.path, "--steps", 20, "--rows", 4)
    before, after = map(float, re.findall(r"^held out: KL ([\d.]+) \(draws\)", printed, re.M))
    assert after < before - 0.3, printed
    assert printed.count("\nstep ") == 5


def test_the_hugging_face_trainer_learns_and_saves_a_student(cache, tmp_path):
    printed = run("hf_trainer.py", cache.path, "--output", tmp_path, "--steps", 10)
    first, last = map(float, re.findall(r"'eval_kl': '([\d.]+)'", printed))
    assert last < first, printed
    student = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "student")
    assert student.config.vocab_size == 512
    assert tokenizer("a cache is written once")["input_ids"]

"""A tokenizer that Hugging Face transformers has read and saved again is the same tokenizer.

Needs an interpreter with transformers, like the other reference tests.
"""

import os
import subprocess
import sys

import pytest

from decant.models import open_checkpoint
from decant.models.text.tokenizer import Tokenizer
from tests.making.chats import HEADERS, chat_tokenizer

pytestmark = pytest.mark.reference

PYTHON = os.environ.get("DECANT_REFERENCE_PYTHON", sys.executable)
SAVE = """
import sys
from transformers import PreTrainedTokenizerFast
PreTrainedTokenizerFast.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[2])
"""


@pytest.mark.parametrize("name", ["smollm2", "headers"])
def test_saved_by_transformers_it_has_the_same_digest(name, tmp_path):
    probe = "import transformers, jinja2"
    if subprocess.run([PYTHON, "-c", probe], capture_output=True).returncode:
        pytest.skip(f"{PYTHON} has no transformers: `make reference` installs it.")
    made = {
        "smollm2": lambda: open_checkpoint("embedded").tokenizer(),
        "headers": lambda: chat_tokenizer(HEADERS, bos=False),
    }
    tokenizer = made[name]()
    for file, content in tokenizer.files().items():
        (tmp_path / file).write_bytes(content)
    subprocess.run([PYTHON, "-c", SAVE, str(tmp_path), str(tmp_path / "saved")], check=True)
    saved = Tokenizer.from_files(tmp_path / "saved")
    assert tokenizer.difference(saved) is None
    assert saved.digest == tokenizer.digest

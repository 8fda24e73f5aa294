"""Chat texts and ids against Hugging Face transformers, template by template.

Needs an interpreter with transformers, like the other reference tests.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from decant.models import open_checkpoint
from decant.pipelines.rows.documents import Chat, Document
from decant.pipelines.rows.marking import mark, segments
from decant.pipelines.rows.records import Place
from tests.making.chats import (
    GENERATION,
    HEADERS,
    OPENED,
    THINKING,
    TURNS,
    chat_tokenizer,
    dialogue,
)

pytestmark = pytest.mark.reference

PYTHON = os.environ.get("DECANT_REFERENCE_PYTHON", sys.executable)
TALKS = [
    dialogue("Hi", "Yes"),
    dialogue("Hi  \n", "naïve ½ 🙂\n\ncode:\n    x = 1", "<b>&amp;</b> \"'", " Why  "),
    [{"role": "system", "content": "Be brief."}, *dialogue("a", "b", "c", "d", "e", "f")],
    dialogue("Hi", "<think>\nhm\n</think>\n\nYes"),
]
TEMPLATES = {
    "headers": HEADERS,
    "turns": TURNS,
    "thinking": THINKING,
    "opened": OPENED,
    "generation": GENERATION,
    "smollm2": None,
}


def tokenizer_of(name):
    template = TEMPLATES[name]
    return chat_tokenizer(template) if template else open_checkpoint("embedded").tokenizer()


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """Template → the reports of chats_side.py, one per chat."""
    probe = "import transformers, jinja2"
    if subprocess.run([PYTHON, "-c", probe], capture_output=True).returncode:
        pytest.skip(f"{PYTHON} has no transformers: `make reference` installs it.")
    directory = tmp_path_factory.mktemp("chats")
    for name in TEMPLATES:
        (directory / name).mkdir()
        for file, content in tokenizer_of(name).files().items():
            (directory / name / file).write_bytes(content)
    (directory / "talks.json").write_text(json.dumps(TALKS))
    script = Path(__file__).with_name("chats_side.py")
    subprocess.run([PYTHON, script, directory], check=True)
    return json.loads((directory / "report.json").read_text())


@pytest.mark.parametrize("name", TEMPLATES)
def test_texts_ids_and_prompts_are_those_of_transformers(theirs, name):
    tokenizer = tokenizer_of(name)
    template = tokenizer.chat_template()
    assert template
    refused = 0
    for talk, report in zip(TALKS, theirs[name], strict=True):
        if report is None:
            refused += 1
            with pytest.raises(ValueError, match="refuses these messages"):
                template.render(talk)
            continue
        text = template.render(talk).text
        assert text == report["text"]
        assert template.render(talk[:-1], add_generation_prompt=True).text == report["prompt"]
        ((ids, _),) = tokenizer.encode_with_spans([text])
        assert ids.tolist() == report["ids"]
    assert refused == (name == "turns")


def test_transformers_masks_the_tokens_that_a_template_marks(theirs):
    """Except in chats where an answer begins with a space: there transformers masks no token."""
    tokenizer, compared = tokenizer_of("generation"), 0
    for talk, report in zip(TALKS, theirs["generation"], strict=True):
        document = Document(Place(0, 0), Chat(tuple(talk)))
        (segment,) = segments([mark(document, tokenizer, tokenizer.chat_template())], tokenizer)
        mask = segment.counted.astype(int).tolist()
        assert sum(mask) > 0
        if not any(message["content"][0] == " " for message in talk):
            assert report["mask"] == mask + [0] * (len(report["mask"]) - len(mask))
            compared += 1
    assert compared == 3

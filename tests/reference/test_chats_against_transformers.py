"""Chats as Hugging Face transformers renders and tokenises them, template by template.

Needs an interpreter with transformers, as the other reference tests do.
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
from tests.making.chats import GENERATION, HEADERS, OPENED, THINKING, TURNS, chat_tokenizer, said

pytestmark = pytest.mark.reference

PYTHON = os.environ.get("DECANT_REFERENCE_PYTHON", sys.executable)
TALKS = [
    said("Hi", "Yes"),
    said("Hi  \n", "naïve ½ 🙂\n\ncode:\n    x = 1", "<b>&amp;</b> \"'", " Why  "),
    [{"role": "system", "content": "Be brief."}, *said("a", "b", "c", "d", "e", "f")],
    said("Hi", "<think>\nhm\n</think>\n\nYes"),
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
    """{template: a report for each chat}; None for what it refuses."""
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


def test_what_a_template_marks_is_what_transformers_masks(theirs):
    """Where no answer begins with a space, whose token it does not find and then masks nothing."""
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

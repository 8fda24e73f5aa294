"""Which characters the assistant wrote, against what transformers says of templates with marks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from decant.models.text.chat_template import ChatTemplate
from decant.pipelines.rows.assistant_spans import assistant_spans
from decant.pipelines.rows.documents import Chat
from tests.making.chat_behaviours import BEHAVIOURS, CONVERSATIONS, SPECIAL, TOOLS, by_hand, plain

pytestmark = pytest.mark.reference

PYTHON = os.environ.get("DECANT_REFERENCE_PYTHON", sys.executable)
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}


def test_the_plain_template_gives_what_transformers_says_of_the_marked_one():
    if subprocess.run([PYTHON, "-c", "import transformers"], capture_output=True).returncode:
        pytest.skip(f"{PYTHON} has no transformers: `make reference` installs it.")
    asked, ours = [], []
    for source in BEHAVIOURS.values():
        published = ChatTemplate(plain(source), tokens=TOKENS)
        for messages in CONVERSATIONS.values():
            for tools in (None, TOOLS):
                try:
                    published.render(messages, tools=tools)
                except ValueError:
                    continue  # the template refuses the chat
                chat = Chat(tuple(messages), tools)
                ours.append(assistant_spans(chat, published, special=SPECIAL))
                marked = {"messages": messages, "tools": tools, "chat_template": by_hand(source)}
                asked.append(json.dumps(marked))
    script = Path(__file__).with_name("spans_side.py")
    answer = subprocess.run(
        [PYTHON, script], input="\n".join(asked), check=True, capture_output=True, text=True
    )
    theirs = [json.loads(line) for line in answer.stdout.splitlines()]
    assert len(theirs) == len(ours) > 700
    for (text, spans), (their_text, their_spans) in zip(ours, theirs, strict=True):
        assert text == their_text
        assert characters(spans) == characters(their_spans)


def characters(spans) -> set[int]:
    return {at for start, end in spans for at in range(start, end)}

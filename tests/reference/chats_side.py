"""Hugging Face transformers renders and tokenises chats: `python chats_side.py DIRECTORY`.

DIRECTORY holds `talks.json`, and a tokenizer in each of its directories. The script writes
report.json there: for each tokenizer a list with one entry per chat.
"""

import json
import sys
from pathlib import Path

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast


def main() -> None:
    directory = Path(sys.argv[1])
    talks = json.loads((directory / "talks.json").read_text())
    report = {
        path.name: [
            report_on(PreTrainedTokenizerFast.from_pretrained(path), talk) for talk in talks
        ]
        for path in directory.iterdir()
        if path.is_dir()
    }
    (directory / "report.json").write_text(json.dumps(report))


def report_on(tokenizer: PreTrainedTokenizerFast, talk: list[dict]) -> dict | None:
    """Text, ids and assistant mask of a chat, and its prompt; None if the template refuses it."""
    try:
        text = tokenizer.apply_chat_template(talk, tokenize=False)
    except TemplateError:
        return None
    tokens = tokenizer.apply_chat_template(
        talk, return_dict=True, return_assistant_tokens_mask=True
    )
    prompt = tokenizer.apply_chat_template(talk[:-1], tokenize=False, add_generation_prompt=True)
    ids, mask = tokens["input_ids"], tokens["assistant_masks"]
    return {"text": text, "prompt": prompt, "ids": ids, "mask": mask}


if __name__ == "__main__":
    main()

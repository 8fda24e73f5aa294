"""Prompts for `generate`: texts and chats, from the settings or a file of JSON lines, as ids."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from decant.models import ModelConfig
from decant.models.text.tokenizer import Tokenizer
from decant.trainer.config import Generate


class Prompt(NamedTuple):
    """A beginning that a student goes on from."""

    number: int
    """Its place among the prompts, from 0."""
    where: str
    """Its origin, for errors."""
    text: str
    """A chat's is what the template makes of it."""
    ids: list[int]


def prompts_of(config: Generate, tokenizer: Tokenizer) -> list[Prompt]:
    """The prompts of `config.prompts`, or the one of `config.prompt`, as a document begins in a
    row: BOS if the tokenizer has one, then text.

    ValueError that names the line for a record that is no prompt; FileNotFoundError without the
    file.
    """
    if config.prompts is None:
        records: Sequence[tuple[str, Any]] = [("the prompt", {"prompt": config.prompt})]
    else:
        records = list(_records(config.prompts))
    return as_prompts(records, config=config, tokenizer=tokenizer)


def as_prompts(
    records: Sequence[tuple[str, Any]], *, config: Generate, tokenizer: Tokenizer
) -> list[Prompt]:
    """The prompts in records, each given with its origin. Records are `{"prompt": text}`,
    `{"prompt": messages}` or `{"messages": …}`, the latter two also with `tools`."""
    template = _Template(config, tokenizer)
    texts, chats = [], []
    for where, record in records:
        try:
            text, is_chat = _text(record, template)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        texts.append(text)
        chats.append(is_chat)
    bos = tokenizer.bos_id
    prompts = []
    for number, ids in enumerate(tokenizer.encode_batch(texts)):
        found = ids.tolist()
        if bos is not None and not chats[number] and found[:1] != [bos]:
            found = [bos, *found]
        where, text = records[number][0], texts[number]
        if not found:
            raise ValueError(
                f"{where} is empty and the tokenizer has no BOS token; give it some text"
            )
        prompts.append(Prompt(number, where, text, found))
    return prompts


def that_fit(
    prompts: Sequence[Prompt], *, config: Generate, student: ModelConfig, tokenizer: Tokenizer
) -> list[Prompt]:
    """The prompts that the student can go on from; with `config.skip_long` without those that are
    too long.

    ValueError for a prompt with a token that the student has no embedding for, and for prompts
    that exceed its positions together with `max_tokens`.
    """
    place, most = config.model or config.run, student.longest_row - config.max_tokens
    for prompt in prompts:
        if (largest := max(prompt.ids)) >= student.vocab_size:
            raise ValueError(
                f"{place}: {prompt.where} holds {tokenizer.decode([largest])!r}, token {largest}, "
                f"but the student has embeddings for ids below {student.vocab_size} only"
            )
    fitting = [prompt for prompt in prompts if len(prompt.ids) <= most]
    if len(fitting) == len(prompts) or (config.skip_long and fitting):
        return fitting
    longest = max(prompts, key=lambda prompt: len(prompt.ids))
    length, many = len(longest.ids), len(prompts) - len(fitting)
    which = "" if len(prompts) == 1 else f" ({longest.where}; {many:,} prompts are too long)"
    skip = "" if config.prompts is None or not fitting else ", or leave them out with --skip-long"
    raise ValueError(
        f"{place}: a prompt of {length} tokens{which} and max_tokens = {config.max_tokens} are "
        f"more than the {student.longest_row} positions of this student; set max_tokens to at "
        f"most {max(student.longest_row - length, 0)}{skip}"
    )


def _records(path: Path) -> Iterator[tuple[str, Any]]:
    """Each line's record, and its place."""
    if not path.is_file():
        raise FileNotFoundError(
            f"prompts: {path} is not a file; expected a file of JSON lines, each with 'prompt' or "
            "'messages'"
        )
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{path}: line {number}"
            try:
                yield where, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{where}: not JSON: {error}") from error


class _Template:
    """The tokenizer's chat template, looked up when the first chat needs it."""

    def __init__(self, config: Generate, tokenizer: Tokenizer):
        self.always = config.chat
        self._config, self._tokenizer = config, tokenizer

    def render(self, messages: Sequence[Mapping[str, Any]], tools: Any = None) -> str:
        config = self._config
        template = self._tokenizer.chat_template(
            date=config.chat_date, variables=config.chat_variables
        )
        if template is None:
            raise ValueError(
                f"{config.model or config.run}: its tokenizer has no chat template; leave out "
                "--chat, and give prompts as texts"
            )
        return template.render(messages, tools=tools, add_generation_prompt=True).text


def _text(record: Any, template: _Template) -> tuple[str, bool]:
    """A record's prompt as text, and whether a chat template made it."""
    record = {"prompt": record} if isinstance(record, str) else record
    if not isinstance(record, Mapping):
        raise ValueError(f"{type(record).__name__}; expected an object with 'prompt' or 'messages'")
    value = record.get("prompt", record.get("messages"))
    if isinstance(value, str) and template.always:
        value = [{"role": "user", "content": value}]
    if isinstance(value, str):
        text, is_chat = value, False
    elif isinstance(value, list):
        text, is_chat = template.render(_messages(value), record.get("tools")), True
    else:
        raise ValueError("expected 'prompt', a text or messages, or 'messages'")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("the prompt holds half of a surrogate pair") from None
    return text, is_chat


def _messages(value: list[Any]) -> list[Mapping[str, Any]]:
    """The messages before the answer: a last one of the assistant is what the student writes."""
    for message in value:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(f"{str(message)[:60]} is no message with 'role' and 'content'")
    asked = value[:-1] if value and value[-1]["role"] == "assistant" else value
    if not asked:
        raise ValueError("there is no message before the assistant's")
    return asked

"""A checkpoint's chat template: messages to the text that the model was trained on.

Templates are written for Hugging Face transformers, in Jinja with a few functions more, and run
in a sandbox: they come with checkpoints. The same messages must give the same text whenever they
are rendered, so the clock that templates may ask for (`strftime_now`) is a date that is given, or
is not there: templates that can do without it have a date of their own.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

# Unicode guarantees that these two stand for nothing in a text.
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"
_CLOCK = "strftime_now"


class Rendered(NamedTuple):
    """A chat as one text. `generated`: characters [start, end) that the template's `generation`
    blocks say the assistant wrote."""

    text: str
    generated: tuple[tuple[int, int], ...]


class ChatTemplate:
    """Renders chats. `tokens` are the texts of special tokens by name, such as `bos_token`."""

    def __init__(
        self, source: str, *, tokens: Mapping[str, str], date: str | None = None, where: str = ""
    ):
        self._source, self._tokens, self._date = source, dict(tokens), date
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _refuse
        if date is not None:
            day = _day(date)
            environment.globals[_CLOCK] = lambda form: day.strftime(form)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(
                f"{where}: the chat template cannot be read: line {error.lineno}: {error.message}"
            ) from error

    @cached_property
    def digest(self) -> str:
        """Sha-256 of all that decides texts."""
        facts = {"source": self._source, "tokens": self._tokens, "date": self._date}
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    @cached_property
    def marks_generation(self) -> bool:
        """Whether the template itself says what the assistant writes."""
        return bool(re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", self._source))

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Any] | None = None,
        add_generation_prompt: bool = False,
    ) -> Rendered:
        """The text. ValueError with the template's reason for messages that it refuses."""
        if self.marks_generation and re.search(f"[{_OPEN}{_CLOSE}]", _tojson([*messages])):
            raise ValueError("a message holds U+FDD0 or U+FDD1, which are no characters")
        try:
            text = self._template.render(
                messages=[*messages],
                tools=tools,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._tokens,
            )
        except Exception as error:  # a template is a program, which may fail in any way
            if isinstance(error, jinja2.UndefinedError) and _CLOCK in str(error):
                raise ValueError(
                    "the chat template writes the current date, which would make other rows "
                    'tomorrow; set corpus.chat_date = "2026-01-31" or whichever it shall write'
                ) from error
            raise ValueError(f"the chat template refuses these messages: {error}") from error
        return _without_marks(text)


class _Generation(Extension):
    """`{% generation %} … {% endgeneration %}`: the marks round what the assistant writes."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        opening, closing = (
            nodes.Output([nodes.TemplateData(mark)]).set_lineno(line) for mark in (_OPEN, _CLOSE)
        )
        return [opening, *body, closing]


def _without_marks(text: str) -> Rendered:
    pieces = re.split(f"[{_OPEN}{_CLOSE}]", text)
    generated, at = [], 0
    for number, piece in enumerate(pieces):
        if number % 2 and piece:
            generated.append((at, at + len(piece)))
        at += len(piece)
    return Rendered("".join(pieces), tuple(generated))


def _day(date: str) -> datetime.datetime:
    try:
        return datetime.datetime.fromisoformat(date)
    except ValueError as error:
        raise ValueError(f"{date!r} is no date for a chat template; write 2026-01-31") from error


def _tojson(value: Any, **options: Any) -> str:
    """Jinja's own escapes what HTML would; its options are those of json.dumps."""
    return json.dumps(value, **{"ensure_ascii": False, **options})


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)

"""A checkpoint's chat template, which turns messages into the text the model was trained on.

Templates are written for Hugging Face transformers, in Jinja with a few more functions. They run in
a sandbox with limits, because they come with checkpoints. The same messages must give the same text
on every day. So the clock that templates may use (`strftime_now`) shows a fixed date, or is
undefined if none is given; templates that can do without a clock then write a date of their own.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import re
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser

from decant.models.text.bounded_sandbox import BoundedEnvironment, bounded, weight

# Unicode noncharacters, which texts do not use. A message that holds one is refused.
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"
_CLOCK = "strftime_now"
_LONGEST_ERROR = 500
_LONGEST = 1 << 20  # characters of a template; published ones have up to 30,000


class Rendered(NamedTuple):
    """A chat as one text."""

    text: str
    generated: tuple[tuple[int, int], ...]
    """Spans [start, end) of characters inside the template's `generation` blocks, which mark the
    assistant's words."""


class ChatTemplate:
    """Renders chats by one template. ValueError if its syntax is wrong.

    Args:
        source: the template, in Jinja.
        tokens: texts of special tokens by name, such as `bos_token`.
        date: the day that the template's clock shows, as 2026-01-31. None: it has no clock.
        where: the template's origin, for error messages.
        variables: what the template may read besides, such as `enable_thinking`.
        with_tools: the template for chats with tools; None: the same.
    """

    def __init__(
        self,
        source: str,
        *,
        tokens: Mapping[str, str],
        date: str | None = None,
        where: str = "",
        variables: Mapping[str, Any] | None = None,
        with_tools: ChatTemplate | None = None,
    ):
        self._source, self._tokens, self._date = source, dict(tokens), date
        self._variables, self._with_tools = dict(variables or {}), with_tools
        self._environment = environment = BoundedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        environment.add_filter("tojson", _tojson)
        environment.globals["raise_exception"] = _refuse
        if date is not None:
            day = _day(date)
            environment.globals[_CLOCK] = _clock(day)
        if len(source) > _LONGEST:
            raise ValueError(
                f"{where}: the chat template has {len(source):,} characters; at most {_LONGEST:,} "
                "are allowed"
            )
        try:
            with bounded(len(source)):
                self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(
                f"{where}: the chat template cannot be read: line {error.lineno}: {error.message}"
            ) from error
        except (SecurityError, SyntaxError, RecursionError, MemoryError) as error:
            raise ValueError(f"{where}: the chat template cannot be read: {error}") from error

    @cached_property
    def digest(self) -> str:
        """Sha-256 of everything that decides the rendered text: template, tokens and date."""
        facts = {"source": self._source, "tokens": self._tokens, "date": self._date}
        if self._variables:
            facts["variables"] = self._variables
        if self._with_tools:
            facts["with_tools"] = self._with_tools.digest
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    @cached_property
    def marks_generation(self) -> bool:
        """Whether the template has `generation` blocks, which mark the assistant's words."""
        return bool(re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", self._source))

    @cached_property
    def sought(self) -> frozenset[str]:
        """Texts that the template looks for in messages, such as `</think>`, words apart."""
        tree = self._environment.parse(self._source)
        looking = tree.find_all((nodes.Call, nodes.Compare, nodes.Filter, nodes.Test))
        texts = (c.value for node in looking for c in node.find_all(nodes.Const))
        found = frozenset(text for text in texts if isinstance(text, str) and text.strip())
        return frozenset(text for text in found if not text.strip().isalnum())

    def chosen(self, tools: Sequence[Any] | None) -> ChatTemplate:
        """The template that renders chats with these tools."""
        return self._with_tools if self._with_tools and tools else self

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Any] | None = None,
        add_generation_prompt: bool = False,
    ) -> Rendered:
        """The chat's text. ValueError with the template's reason if it refuses the messages.

        Args:
            messages: mappings with `role` and `content`, and whatever else the template reads.
            tools: descriptions of tools that the template may list.
            add_generation_prompt: end with the opening of an assistant's turn.
        """
        if (chosen := self.chosen(tools)) is not self:
            return chosen.render(messages, tools=tools, add_generation_prompt=add_generation_prompt)
        if self.marks_generation and re.search(f"[{_OPEN}{_CLOSE}]", _tojson([*messages])):
            raise ValueError("a message holds U+FDD0 or U+FDD1, which are not characters")
        try:
            with bounded(weight(messages) + weight(tools)):
                text = self._template.render(
                    messages=[*messages],
                    tools=tools,
                    documents=None,
                    add_generation_prompt=add_generation_prompt,
                    **{**self._tokens, **self._variables},
                )
        except TimeoutError:  # not the same on every machine, so no record is skipped for it
            raise
        except Exception as error:  # a template is a program, which may fail in any way
            if isinstance(error, jinja2.UndefinedError) and _CLOCK in str(error):
                raise ValueError(
                    "the chat template writes the current date, so the rows would differ "
                    'tomorrow; set corpus.chat_date = "2026-01-31", or the date it shall write'
                ) from error
            raise ValueError(
                f"the chat template refuses these messages: {_shortened(error)}{_line(error)}"
            ) from error
        return _without_marks(text)


_OWN_NAMES = {"add_generation_prompt", "documents", "messages", "tools"}


def chat_variables(settings: Sequence[str]) -> dict[str, Any]:
    """Variables for a chat template from `name=value`; a value is JSON, or else a text.

    ValueError for a setting of another form, or a name that a chat itself gives.
    """
    variables: dict[str, Any] = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals or not name.isidentifier() or name in _OWN_NAMES:
            raise ValueError(
                f"chat_variables: {setting!r} is not name=value with the name of a variable, such "
                "as enable_thinking=false"
            )
        try:
            variables[name] = json.loads(value)
        except (ValueError, RecursionError):
            variables[name] = value
    return variables


class _Generation(Extension):
    """`{% generation %} … {% endgeneration %}`: renders its body between `_OPEN` and `_CLOSE`."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        opening, closing = (
            nodes.Output([nodes.TemplateData(mark)]).set_lineno(line) for mark in (_OPEN, _CLOSE)
        )
        return [opening, *body, closing]


def _shortened(error: Exception) -> str:
    text = str(error)
    return text if len(text) <= _LONGEST_ERROR else f"{text[:_LONGEST_ERROR]}…"


def _line(error: Exception) -> str:
    """Where in the template the error arose, if it is known."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == "<template>"]
    return f" (line {lines[-1]} of the template)" if lines else ""


def _without_marks(text: str) -> Rendered:
    """Remove `_OPEN` and `_CLOSE` from the text, and note the spans inside at least one pair."""
    pieces, generated, at, depth = [], [], 0, 0
    for piece in re.split(f"([{_OPEN}{_CLOSE}])", text):
        if piece in (_OPEN, _CLOSE):
            depth += 1 if piece == _OPEN else -1
        elif piece:
            if depth:
                generated.append((at, at + len(piece)))
            pieces.append(piece)
            at += len(piece)
    return Rendered("".join(pieces), tuple(generated))


def _day(date: str) -> datetime.datetime:
    try:
        return datetime.datetime.fromisoformat(date)
    except ValueError as error:
        raise ValueError(f"{date!r} is not a date for a chat template; write 2026-01-31") from error


def _clock(day: datetime.datetime) -> Callable[[str], str]:
    def strftime_now(form: str) -> str:
        return day.strftime(form)

    return strftime_now


def _tojson(value: Any, **options: Any) -> str:
    """json.dumps as a filter; unlike Jinja's own it does not escape HTML."""
    return json.dumps(value, **{"ensure_ascii": False, **options})


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)

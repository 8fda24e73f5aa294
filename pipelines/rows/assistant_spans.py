"""Finds the characters of a rendered chat that the assistant wrote.

That is what a model itself writes after the generation prompt, with its end-of-turn token. White
space after that token does not belong to it, and an empty block of thinking that the template adds
does not either. Templates with `{% generation %}` blocks say themselves what it is. For others,
shorter chats are rendered: a turn begins where the messages before it, with the generation prompt,
end, and ends where the messages up to and including it end. A template that rewrites earlier
messages needs `marked_turns`.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

from decant.models.text.chat_template import ChatTemplate, Rendered
from decant.pipelines.rows.documents import Chat
from decant.pipelines.rows.marked_turns import (
    NO_THOUGHT,
    MarkedTurns,
    Span,
    common_length,
    header_of,
    last_special_end,
)

Spans = tuple[Span, ...]

_BY_HAND = (
    "set corpus.chat_template to a copy of the template that has {% generation %} … "
    "{% endgeneration %} round what the assistant writes"
)


def assistant_spans(
    chat: Chat, template: ChatTemplate, *, special: Sequence[str]
) -> tuple[str, Spans]:
    """The whole chat as text, and the characters [start, end) that the assistant wrote, in order.

    Turns of the prompt (`chat.first`) are left out. `special` are the texts of special tokens.
    ValueError if it cannot be told which characters the assistant wrote.
    """
    finder = _Finder(chat, template.chosen(chat.tools), special)
    spans = finder.generated() if finder.whole.generated else finder.turns()
    spoken = (m["content"].strip() for m in chat.messages[chat.first :] if _is_assistant(m))
    if not (spans := _union(spans)) and any(spoken):
        raise ValueError("the chat template writes nothing of what the assistant says")
    return finder.whole.text, spans


class _Finder:
    """Finds the turns of one chat."""

    def __init__(self, chat: Chat, template: ChatTemplate, special: Sequence[str]):
        self._chat, self._template, self._special = chat, template, tuple(special)
        self.whole = self._render(len(chat.messages))

    def generated(self) -> list[Span]:
        """Where the template says that the assistant writes, behind the prompt's messages."""
        first = self._chat.first
        prompt = self._beginning(first, prompt=True) if first else ""
        if prompt is not None:
            clipped = ((max(start, len(prompt)), end) for start, end in self.whole.generated)
            return [span for span in clipped if span[0] < span[1]]
        spans = self._marked.behind(first, self.whole.generated)
        if spans is None:
            raise self._unknown(first)
        return spans

    def turns(self) -> list[Span]:
        """Each assistant's turn behind the prompt's messages."""
        messages = enumerate(self._chat.messages)
        wanted = (i for i, m in messages if i >= self._chat.first and _is_assistant(m))
        return [self._trimmed(number, *self._turn(number)) for number in wanted]

    @cached_property
    def _marked(self) -> MarkedTurns:
        return MarkedTurns(self._chat, self._template, self.whole.text, self._special)

    def _render(self, count: int, *, prompt: bool = False) -> Rendered:
        messages, tools = self._chat.messages[:count], self._chat.tools
        return self._template.render(messages, tools=tools, add_generation_prompt=prompt)

    def _beginning(self, count: int, *, prompt: bool = False) -> str | None:
        """The first messages as text, if the whole text begins with it."""
        try:
            text = self._render(count, prompt=prompt).text if count else None
        except ValueError:  # the template wants more messages
            return None
        return text if text is not None and self.whole.text.startswith(text) else None

    def _turn(self, number: int) -> Span:
        span = self._by_prefixes(number)
        empty = NO_THOUGHT.match(self.whole.text, *span) if span else None
        if span and not empty:
            return span
        if marked := self._marked.span(number):
            return marked
        if span and empty:
            own = NO_THOUGHT.match(self._chat.messages[number]["content"])
            return span if own else (empty.end(), span[1])
        if self._is_written(number):
            raise self._unknown(number)
        return 0, 0

    def _by_prefixes(self, number: int) -> Span | None:
        prompt, through = self._beginning(number, prompt=True), self._beginning(number + 1)
        return None if prompt is None or through is None else (len(prompt), len(through))

    def _is_written(self, number: int) -> bool:
        """Whether the text is another one without this message."""
        messages = [m for i, m in enumerate(self._chat.messages) if i != number]
        try:
            text = self._template.render(messages, tools=self._chat.tools).text if messages else ""
        except ValueError:
            return True
        return text != self.whole.text

    def _trimmed(self, number: int, start: int, end: int) -> Span:
        """The span without white space behind its last special token, and without a final EOS."""
        ended = self.whole.text[start:end].rstrip()
        if not ended.endswith(self._special):
            return start, end
        if number + 1 == len(self._chat.messages) and self._two_ends.search(ended):
            return start, self._before_eos(start, start + len(ended))
        return start, start + len(ended)

    @cached_property
    def _two_ends(self) -> re.Pattern[str]:
        special = "|".join(map(re.escape, self._special))
        return re.compile(rf"(?:{special})\s+(?:{special})$")

    def _before_eos(self, start: int, end: int) -> int:
        """The end of the last turn as it is when another turn follows.

        Some templates end every turn with one token, and the text with EOS. No model writes both.
        """
        count = len(self._chat.messages)
        going_on = self._render(count, prompt=True).text
        closed = last_special_end(
            going_on[: min(end, common_length(going_on, self.whole.text))], self._special
        )
        if closed <= start or going_on[closed:].lstrip() != self._header:
            return end
        return closed

    @cached_property
    def _header(self) -> str:
        question = [{"role": "user", "content": "?"}]
        before, prompt = (
            self._template.render(question, tools=self._chat.tools, add_generation_prompt=p).text
            for p in (False, True)
        )
        return header_of(before, prompt)

    def _unknown(self, number: int) -> ValueError:
        last = number + 1 == len(self._chat.messages)
        end_there = "let its record end with it (`prompt` and `completion` may be messages), or "
        return ValueError(
            f"message {number + 1}: the chat template changes what the assistant says, so it is "
            f"not known which characters it wrote; {'' if last else end_there}{_BY_HAND}"
        )


def _is_assistant(message: Mapping[str, Any]) -> bool:
    return message["role"] == "assistant"


def _union(spans: Iterable[Span]) -> Spans:
    """The spans in order, joined where they touch; empty ones are left out."""
    joined: list[Span] = []
    for start, end in sorted(span for span in spans if span[0] < span[1]):
        if joined and start <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(end, joined[-1][1])
        else:
            joined.append((start, end))
    return tuple(joined)

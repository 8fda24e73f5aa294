"""Finds the characters of a rendered chat that the assistant wrote.

A template with `{% generation %}` blocks marks them itself. For other templates, shorter chats are
rendered: a turn begins where the messages before it, with the generation prompt, end. It ends where
the messages up to and including it end. So the end-of-turn token belongs to the turn, and the
header does not. White space after that token does not either: no model writes it.
"""

from collections.abc import Sequence
from typing import Any

from decant.models.text.chat_template import ChatTemplate
from decant.pipelines.rows.documents import Chat

Spans = tuple[tuple[int, int], ...]

_REMEDY = (
    "Leave out of earlier turns what the template drops (such as thinking), make every turn a "
    "record that ends with it, or use a template with {% generation %} blocks"
)


def assistant_spans(
    chat: Chat, template: ChatTemplate, *, special: Sequence[str]
) -> tuple[str, Spans]:
    """The whole chat as text, and the characters [start, end) of each assistant turn.

    Turns of the prompt (`chat.first`) are left out. `special` are the texts of special tokens.
    ValueError if it cannot be told which characters the assistant wrote.
    """
    whole = template.render(chat.messages, tools=chat.tools)
    turns = [i for i, message in enumerate(chat.messages) if message["role"] == "assistant"]
    if template.marks_generation:
        if len(whole.generated) != len(turns):
            raise ValueError(
                f"the chat template marks {len(whole.generated)} turns as generated, but "
                f"{len(turns)} of the messages are the assistant's"
            )
        spans = dict(zip(turns, whole.generated, strict=True))
    else:
        spans = {turn: _span(turn, chat, template, whole.text, tuple(special)) for turn in turns}
    return whole.text, tuple(spans[turn] for turn in turns if turn >= chat.first)


def _span(
    turn: int, chat: Chat, template: ChatTemplate, whole: str, special: tuple[str, ...]
) -> tuple[int, int]:
    def rendered(count: int, **options: Any) -> str:
        return template.render(chat.messages[:count], tools=chat.tools, **options).text

    prompt, through = rendered(turn, add_generation_prompt=True), rendered(turn + 1)
    start = _common_length(prompt, whole)
    if start == len(prompt) and whole.startswith(through):
        written = through[start:]
    else:
        # Otherwise a template that rewrites earlier messages might repeat the turn's text there.
        before = rendered(turn)
        same = whole.startswith(before) and start >= len(before)
        written = _earlier_form(chat.messages[turn], through[start:], whole[start:]) if same else ""
    if not written:
        raise ValueError(
            f"message {turn + 1}: the chat template writes it otherwise once the conversation goes "
            f"on, so it is not known which of its tokens the assistant wrote. {_REMEDY}"
        )
    ended = written.rstrip()
    return start, start + len(ended if ended.endswith(special) else written)


def _common_length(one: str, other: str) -> int:
    """Length of the common beginning of two texts."""
    if other.startswith(one):
        return len(one)
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def _earlier_form(message: dict[str, Any], through: str, rest: str) -> str:
    """The turn as the template writes it when other messages follow, at the start of `rest`.

    `through` is the turn as the template writes it when it is the last: a header, the content, and
    the turn's end. Content and end must be the same in both. Empty if they are not.
    """
    content = message["content"].strip()
    if not content or message.keys() > {"role", "content"}:
        return ""
    at = through.find(content)
    while at >= 0:
        if rest.startswith(through[at:]):
            return through[at:]
        at = through.find(content, at + 1)
    return ""

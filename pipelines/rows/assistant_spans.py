"""Which characters of a rendered chat the assistant wrote.

A template with `{% generation %}` blocks says so itself. Of others it is found by rendering: a
turn begins where the messages before it, rendered with the prompt to generate, end, and it ends
where the messages up to it end. So the end-of-turn token is the assistant's, and the header is
not. White space that a template puts behind that token is nobody's: no model writes it.
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
    """The whole chat as text, and the characters [start, end) of each of the assistant's turns.

    `special` are the texts of special tokens. ValueError where it cannot be told who wrote what.
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
    start = _shared(prompt, whole)
    if start == len(prompt) and whole.startswith(through):
        written = through[start:]
    else:
        # Without this a history that is written anew may look like the turn, by what it repeats.
        before = rendered(turn)
        same = whole.startswith(before) and start >= len(before)
        written = _rewritten(chat.messages[turn], through[start:], whole[start:]) if same else ""
    if not written:
        raise ValueError(
            f"message {turn + 1}: the chat template writes it otherwise once the conversation goes "
            f"on, so it is not known which of its tokens the assistant wrote. {_REMEDY}"
        )
    ended = written.rstrip()
    return start, start + len(ended if ended.endswith(special) else written)


def _shared(one: str, other: str) -> int:
    """How many characters at the start are the same."""
    if other.startswith(one):
        return len(one)
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def _rewritten(message: dict[str, Any], through: str, rest: str) -> str:
    """The turn at the start of `rest`, which others follow, where a template writes such a turn
    otherwise than the last one: its content and what ended it when it was the last, `through`.
    Empty if this is not there."""
    content = message["content"].strip()
    if not content or message.keys() > {"role", "content"}:
        return ""
    at = through.find(content)
    while at >= 0:
        if rest.startswith(through[at:]):
            return through[at:]
        at = through.find(content, at + 1)
    return ""

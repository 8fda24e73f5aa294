"""A chat whose letters are marked, to see in the rendered text which message each comes from.

Every letter of a message is replaced by a private-use character, which stands for this letter in
this message. A template that only trims, splits and joins texts does the same to the marked chat as
to the true one. So if the marked text with its marks undone is the true text, each mark tells whose
letter stands there. Otherwise the template changed letters, and the marks tell nothing.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property, partial
from typing import Any, Literal, NamedTuple

from decant.models.text.chat_template import ChatTemplate
from decant.pipelines.rows.documents import Chat

_PRIVATE = (range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))
# Templates compare these with other messages, or with names that they know.
_UNMARKED = {"role", "name", "id", "type", "tool_call_id"}


class Run(NamedTuple):
    """Characters [start, end) of a marked text that come from message number `owner`."""

    owner: int
    start: int
    end: int


Probe = Literal["content", "message", "none"]


class Turn(NamedTuple):
    """A turn as the template writes it when it is the last, marked. None: the template refuses."""

    before: str | None
    """The messages before it."""
    prompt: str | None
    """The messages before it, with the generation prompt."""
    text: str
    """The messages before it and the turn."""
    closed: str | None
    """The messages before it, the turn, and the generation prompt."""
    plain: str | None
    """The messages before it, and a turn that says only `MarkedChat.letter`."""


class MarkedChat:
    """The marked messages of `chat`, for `template`.

    White space, quotes and backslashes stay, which JSON would escape, and so do texts that the
    template looks for, such as `</think>`. An assistant's content may get one mark more at its end,
    which stands for no letter: if `probe` is "content", when the content has no letter; if it is
    "message", when nothing in the message has one.
    """

    def __init__(self, chat: Chat, template: ChatTemplate, *, probe: Probe):
        self._template, self._tools, self._probe = template, chat.tools, probe
        taken = set(map(ord, repr(chat)))
        self._free = (code for codes in _PRIVATE for code in codes if code not in taken)
        self.letter = chr(next(self._free))
        """Not in the chat."""
        self._letters: dict[int, str] = {}
        self._owners: dict[str, int] = {}
        sought = sorted((re.escape(text) for text in template.sought), key=len, reverse=True)
        self._kept = re.compile("(" + "|".join([*sought, r'[\s"\\\x00-\x1f]+']) + ")")
        self._messages = [self._message(i, message) for i, message in enumerate(chat.messages)]

    def render(self, count: int, *, add_generation_prompt: bool = False) -> str | None:
        """The first `count` messages, marked; None if the template refuses them."""
        return self._rendered(self._messages[:count], add_generation_prompt=add_generation_prompt)

    def render_turn(self, number: int) -> "Turn | None":
        """Message `number` as the last one, and what precedes it. None if it is refused so.

        A question is put before a first message, because many templates want one.
        """
        before = self._messages[:number] or [self._question]
        through = [*before, self._messages[number]]
        text = self._rendered(through)
        if text is None:
            return None
        return Turn(
            before=self._rendered(before),
            prompt=self._rendered(before, add_generation_prompt=True),
            text=text,
            closed=self._rendered(through, add_generation_prompt=True),
            plain=self._rendered([*before, {"role": "assistant", "content": self.letter}]),
        )

    @cached_property
    def after_question(self) -> tuple[str, str] | None:
        """A question alone, without and with the generation prompt; None if that is refused."""
        text = self._rendered([self._question])
        prompt = self._rendered([self._question], add_generation_prompt=True)
        return None if text is None or prompt is None else (text, prompt)

    @property
    def _question(self) -> dict[str, Any]:
        return {"role": "user", "content": self.letter}

    def _rendered(
        self, messages: list[dict[str, Any]], *, add_generation_prompt: bool = False
    ) -> str | None:
        prompt = add_generation_prompt
        try:
            rendered = self._template.render(
                messages, tools=self._tools, add_generation_prompt=prompt
            )
        except ValueError:
            return None
        return rendered.text

    def undone(self, text: str) -> str:
        """The text with letters in the place of their marks."""
        return text.translate(self._letters)

    def before_letters(self, number: int) -> str:
        """What stands before the first marked letter of a message's content."""
        content = self._messages[number]["content"]
        return next((content[: run.start] for run in self.runs(content)), content)

    def runs(self, text: str) -> Iterator[Run]:
        """The marked characters of the text in order; each run has one owner."""
        start, owner = 0, None
        for at, character in enumerate([*text, ""]):
            now = self._owners.get(character)
            if now != owner:
                if owner is not None:
                    yield Run(owner, start, at)
                start, owner = at, now

    def _message(self, owner: int, message: Mapping[str, Any]) -> dict[str, Any]:
        table = _Table(partial(self._mark, owner))
        if message["role"] != "assistant":
            return {**message, "content": self._marked(message["content"], table)}
        content = self._marked(message["content"], table)
        silent = not table
        marked = self._marked(dict(message), table) | {"content": content}
        if (self._probe == "content" and silent) or (self._probe == "message" and not table):
            body = marked["content"].rstrip()
            probe = self._mark(owner, "") or ""
            marked["content"] = body + probe + marked["content"][len(body) :]
        return marked

    def _marked(self, value: Any, table: "_Table") -> Any:
        if isinstance(value, str):
            pieces = self._kept.split(value)
            pieces[::2] = [piece.translate(table) for piece in pieces[::2]]
            return "".join(pieces)
        if isinstance(value, dict):
            return {k: v if k in _UNMARKED else self._marked(v, table) for k, v in value.items()}
        return [self._marked(item, table) for item in value] if isinstance(value, list) else value

    def _mark(self, owner: int, letter: str) -> str | None:
        code = next(self._free, None)
        if code is None:
            return None
        self._letters[code] = letter
        self._owners[chr(code)] = owner
        return chr(code)


class _Table(dict[int, str]):
    """Letter → mark for the letters of one message, as `str.translate` wants it."""

    def __init__(self, mark: Callable[[str], str | None]):
        super().__init__()
        self._mark = mark

    def __missing__(self, code: int) -> str:
        mark = self._mark(chr(code))
        if mark is None:  # no marks are left: the letter stays
            return chr(code)
        self[code] = mark
        return mark

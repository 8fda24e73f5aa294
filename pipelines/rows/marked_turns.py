"""Finds an assistant's turn in a chat whose letters are marked.

The marks show where the turn's own letters stand. Before them the turn begins where the template's
header ends, which is what it writes as generation prompt. After them it ends as the template ends
the same turn when it is the last.
"""

import re
from collections.abc import Sequence
from typing import get_args

from decant.models.text.chat_template import ChatTemplate
from decant.pipelines.rows.documents import Chat
from decant.pipelines.rows.marked_chat import MarkedChat, Probe, Run, Turn

Span = tuple[int, int]

_INSIDE = r"[^<>\[\]◁▷\s]*"
_TAG = rf"[<\[◁](?={_INSIDE}(?:think|thought|reason))%s{_INSIDE}[>\]▷]\s*"
_OPEN = _TAG % rf"(?!{_INSIDE}(?:/|end))"
_CLOSE = _TAG % rf"(?={_INSIDE}(?:/|end))"
NO_THOUGHT = re.compile(rf"\s*(?:{_OPEN})?{_CLOSE}", re.IGNORECASE)
"""A block of thinking with nothing in it, or the end of one that the generation prompt opened."""
_THINK_TAGS_LAST = re.compile(rf"(?:{_OPEN}|{_CLOSE})+$", re.IGNORECASE)
_PART_OF_A_TAG = re.compile(r"[<\[◁][^<>\[\]◁▷\s]*$")


class MarkedTurns:
    """Finds the turns of `chat`, whose true text is `whole`. `special`: texts of special tokens."""

    def __init__(self, chat: Chat, template: ChatTemplate, whole: str, special: Sequence[str]):
        self._chat, self._special = chat, special
        for probe in get_args(Probe):
            self._marked = MarkedChat(chat, template, probe=probe)
            self._text = self._marked.render(len(chat.messages)) or ""
            if self._marked.undone(self._text) == whole:
                break
        else:
            self._text = ""  # the template changes letters
        self._runs = list(self._marked.runs(self._text))

    def span(self, number: int) -> Span | None:
        """Characters [start, end) of message `number` in the true text; None if that is unknown."""
        turn = self._marked.render_turn(number) if self._text else None
        if not turn:
            return None
        own = _extent(self._runs, number)
        found = self._around(number, turn, own) if own else self._without_letters(number, turn)
        return found and (self._true(found[0]), self._true(found[1]))

    def behind(self, number: int, spans: Sequence[Span]) -> list[Span] | None:
        """The parts of `spans` behind the messages before `number`; None if that is unknown."""
        if not self._text:
            return None
        first = self._true(max((run.end for run in self._runs if run.owner < number), default=0))
        learned = [self._true(run.start) for run in self._runs if run.owner >= number]
        return [
            (max(start, first), end)
            for start, end in spans
            if start >= first or any(start <= letter < end for letter in learned)
        ]

    def _true(self, place: int) -> int:
        return len(self._marked.undone(self._text[:place]))

    def _around(self, number: int, turn: Turn, own: Run) -> Span | None:
        """The span of a turn whose letters stand at `own`."""
        if any(run.owner != number and own.start < run.start < own.end for run in self._runs):
            return None
        start, end = self._start(number, turn, own), self._end(number, turn, own)
        return None if start is None or end is None else (start, end)

    def _start(self, number: int, turn: Turn, own: Run) -> int | None:
        before = next((run for run in reversed(self._runs) if run.end <= own.start), None)
        low = before.end if before else 0
        if turn.prompt and len(turn.prompt) >= low and self._text.startswith(turn.prompt):
            start = len(turn.prompt)
        elif (after := self._after_header(turn, low, own.start)) is not None:
            start = after
        elif before and self._joins(before, Run(number, own.start, own.end), turn):
            start = before.end
        else:
            head = self._head(number, turn)
            if head is None or not self._text[low : own.start].endswith(head):
                return None
            start = own.start - len(head)
        return self._after_no_thought(turn, min(start, own.start), own.start)

    def _after_header(self, turn: Turn, low: int, high: int) -> int | None:
        for header in self._headers(turn):
            at = self._text.rfind(header, low, high)
            if at >= 0:
                return at + len(header)
        return None

    def _headers(self, turn: Turn) -> list[str]:
        """What may stand directly before the turn, longest first: the generation prompt, or of its
        beginning that which a finished turn has."""
        if turn.before is None or turn.prompt is None:
            return []
        # Some templates end the last turn before it otherwise without the prompt.
        usual = header_of(*self._marked.after_question) if self._marked.after_question else ""
        whole = usual if turn.prompt.endswith(usual) else ""
        whole = whole or header_of(turn.before, turn.prompt)
        shared = _tag_start(turn.prompt, common_length(turn.prompt, turn.text))
        part = turn.prompt[len(turn.prompt) - len(whole) : shared]
        without = [_THINK_TAGS_LAST.sub("", header) for header in (whole, part)]
        headers = {whole, *without, *(header.lstrip() for header in (whole, *without))}
        return sorted(headers - {""}, key=lambda header: (-len(header), header))

    def _head(self, number: int, turn: Turn) -> str | None:
        """What the turn has before its letters, if the template has no generation prompt."""
        own = _extent(list(self._marked.runs(turn.text)), number)
        if turn.prompt is None or turn.prompt != turn.before or not own:
            return None
        begins = turn.text.startswith(turn.prompt)
        return turn.text[len(turn.prompt) : own.start] if begins else None

    def _after_no_thought(self, turn: Turn, start: int, high: int) -> int:
        """`start`, or the end of the empty block of thinking that the template puts there."""
        empty = NO_THOUGHT.match(self._text, start, high)
        if not empty:
            return start
        if turn.plain is None:
            return empty.end()
        # White space behind the block belongs to it as far as the template writes it itself.
        plain = turn.plain.rpartition(self._marked.letter)[0]
        blocks = [found.group().lstrip() for found in NO_THOUGHT.finditer(plain)]
        if not blocks or not plain.endswith(blocks[-1]):
            return start  # the message itself holds the block
        at = self._text.rfind(blocks[-1], max(0, start - len(blocks[-1])), empty.end())
        return max(start, at + len(blocks[-1])) if at >= 0 else empty.end()

    def _end(self, number: int, turn: Turn, own: Run) -> int | None:
        there = _extent(list(self._marked.runs(turn.text)), number)
        if not there:
            return None
        rest, tail = self._text[own.end :], turn.text[there.end :]
        special = self._to_last_special(tail, rest)
        for ending in (tail, tail.lstrip(), special, self._closed(turn, there)):
            if ending is not None and rest.startswith(ending):
                return own.end + len(ending)
        after = next((run for run in self._runs if run.start >= own.end), None)
        return own.end if after and self._joins(own, after, turn) else None

    def _to_last_special(self, tail: str, rest: str) -> str | None:
        """The common beginning of both up to the end of its last special token, if it has one."""
        common = tail[: common_length(tail, rest)]
        return common[: last_special_end(common, self._special)] or None

    def _closed(self, turn: Turn, own: Run) -> str | None:
        """The turn's end if another turn of the assistant follows."""
        written = turn.text[: own.end]
        if turn.closed is None or not turn.closed.startswith(written):
            return None
        rest = turn.closed[own.end :]
        endings = (rest.removesuffix(h) for h in self._headers(turn) if rest.endswith(h))
        return next(endings, None)

    def _joins(self, one: Run, other: Run, turn: Turn) -> bool:
        """Whether these are messages of the assistant in a row that the template joins to one."""
        between = self._text[one.end : other.start]
        roles = [message["role"] for message in self._chat.messages[one.owner : other.owner + 1]]
        ends = (*self._headers(turn), *self._special)
        return roles == ["assistant", "assistant"] and not any(text in between for text in ends)

    def _without_letters(self, number: int, turn: Turn) -> Span | None:
        """The span of a turn that has no letter, such as a call without arguments."""
        if _extent(list(self._marked.runs(turn.text)), number):
            return None
        low = max((run.end for run in self._runs if run.owner < number), default=0)
        high = min((r.start for r in self._runs if r.owner > number), default=len(self._text))
        for header in self._headers(turn) or ("",):
            own = self._own_text(turn, header)
            starts = [
                self._after_no_thought(turn, low + found.end(), high)
                for found in re.finditer(re.escape(header), self._text[low:high])
            ]
            for ending in (own, own[: last_special_end(own, self._special)]):
                places = [s for s in starts if ending and self._text.startswith(ending, s)]
                if len(places) == 1:
                    return places[0], places[0] + len(ending)
        return None

    def _own_text(self, turn: Turn, header: str) -> str:
        """The turn behind `header`; empty if it does not stand there."""
        if header:
            at = turn.text.rfind(header)
            text = turn.text[at + len(header) :] if at >= 0 else ""
        else:
            text = turn.text.removeprefix(turn.prompt or turn.text)
        return NO_THOUGHT.sub("", text, count=1) if NO_THOUGHT.match(text) else text


def last_special_end(text: str, special: Sequence[str]) -> int:
    """The end of the last special token in `text`; 0 if it has none."""
    return max((text.rfind(token) + len(token) for token in special if token in text), default=0)


def common_length(one: str, other: str) -> int:
    """Length of the common beginning of two texts."""
    if other.startswith(one):
        return len(one)
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def header_of(before: str, prompt: str) -> str:
    """What the generation prompt adds to the text `before`."""
    common = common_length(before, prompt)
    return prompt[common if common == len(before) else _tag_start(prompt, common) :]


def _tag_start(text: str, end: int) -> int:
    """`end`, or where the tag begins that it cuts in two."""
    tag = _PART_OF_A_TAG.search(text, 0, end)
    return tag.start() if tag else end


def _extent(runs: Sequence[Run], owner: int) -> Run | None:
    """From the first to the last mark of a message."""
    own = [run for run in runs if run.owner == owner]
    return Run(owner, own[0].start, own[-1].end) if own else None

"""What a chat template leaves out without a word: a chat's tools, or the assistant's reasoning."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from decant.models.text.chat_template import ChatTemplate
from decant.pipelines.rows.documents import Chat
from decant.schemas.disk.atomic import read_json
from decant.schemas.disk.stand_in import each_of, names_in

_REASONING = ("reasoning_content", "reasoning", "thinking")


@dataclass
class Unwritten:
    """How many chats have something that the template does not write, and where the first is."""

    count: int = 0
    first: str = ""


def unwritten(chat: Chat, template: ChatTemplate, text: str) -> Iterator[str]:
    """Names of what `chat` has and `template` leaves out; `text` is the chat as it is written."""
    template = template.chosen(chat.tools)
    if chat.tools and text == _text(template, chat.messages, None):
        yield "tools"
    for name in _REASONING:
        if any(message.get(name) for message in chat.messages):
            without = tuple({k: v for k, v in m.items() if k != name} for m in chat.messages)
            if text == _text(template, without, chat.tools):
                yield name


def notices(work: Path) -> Iterator[str]:
    """A line for each thing that chats lost, from the shards' commits in the directory `work`."""
    found: dict[str, Unwritten] = {}
    commits = [work / name for name in sorted(names_in(work, ".json")) if name.startswith("shard-")]
    for commit in each_of(read_json, commits, cache=work):
        for name, (count, first) in commit.get("unwritten", {}).items():
            seen = found.setdefault(name, Unwritten(first=first))
            seen.count += count
    for name, seen in found.items():
        yield f"note: the chat template leaves out {name} of {seen.count:,} chats; {seen.first}"


def _text(template: ChatTemplate, messages: tuple[dict[str, Any], ...], tools: Any) -> str | None:
    try:
        return template.render(messages, tools=tools).text
    except ValueError:
        return None

"""Turns a shard's records into documents: texts, chats, prompts with completions, and rollouts."""

import dataclasses
import hashlib
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from decant.pipelines.rows import rollouts
from decant.pipelines.rows.long_text import LongText
from decant.pipelines.rows.records import Located, Place, Record, read_records
from decant.pipelines.rows.rollouts import LOGPROBS, Rollout
from decant.pipelines.rows.sources import InputShard, Kind, SourceFile, Span
from decant.schemas.disk.identity import canonical_json

_CHAT = ("messages",)
_COMPLETION = ("prompt", "completion")
_TOOLS, _IMAGES = "tools", "images"
_REQUESTS = 16
"""Files at addresses of which the first record is read at once."""
_LONGEST_LIST = 300
"""Characters of a list of fields in a message."""


class Chat(NamedTuple):
    """Messages, each with `role`, `content` and any other keys that a chat template reads."""

    messages: tuple[dict[str, Any], ...]
    tools: list[Any] | None = None
    first: int = 0
    """Number of messages at the start that are a prompt: none is learned from, not even the
    assistant's."""


class Completion(NamedTuple):
    """A prompt, and the text that follows it."""

    prompt: str
    completion: str


Content = str | LongText | Chat | Completion | Rollout


@dataclass(frozen=True)
class Document:
    """A document's content, and its place."""

    place: Place
    content: Content
    located: Located = str

    @property
    def content_hash(self) -> bytes:
        """sha256 of the content: finds duplicates.

        A chat is hashed before it is rendered, so that every teacher holds out the same chats.
        """
        if isinstance(self.content, LongText):
            return self.content.sha256
        return hashlib.sha256(self._data(self.content)).digest()

    @property
    def split_hash(self) -> bytes:
        """sha256 that chooses the held-out documents: of a rollout its prompt's, so that no answer
        to a held-out prompt is learned from; of others the content's."""
        if isinstance(self.content, Rollout):
            return hashlib.sha256(self.content.prompt.encode()).digest()
        return self.content_hash

    @property
    def size(self) -> int:
        """Bytes of the content, as UTF-8 or JSON; of a rollout those of its texts."""
        if isinstance(self.content, LongText):
            return sum(len(chunk.encode()) for chunk in self.content.chunks())
        if isinstance(self.content, Rollout):
            return len((self.content.prompt + self.content.completion).encode())
        return len(self._data(self.content))

    @staticmethod
    def _data(content: str | Chat | Completion | Rollout) -> bytes:
        if isinstance(content, Rollout):
            return content.data
        return content.encode() if isinstance(content, str) else canonical_json(content._asdict())


Refuse = Callable[[Place, str], None]
"""Called with the place of an unreadable document and the problem; may raise."""


def read_documents(
    shard: InputShard, sources: Sequence[SourceFile], *, text_field: str, refuse: Refuse
) -> Iterator[Document]:
    """Non-empty documents of `shard`, in order. The same inputs give the same documents.

    `sources` have the kinds that `with_kinds` found.
    """
    for span in shard.spans:
        source = sources[span.source]
        field = source.text_field or text_field
        for record in _records(span, source, field):
            if record.problem:
                refuse(record.place, record.problem)
                continue
            try:
                content = _content(record.value, source, text_field=field)
                if isinstance(content, LongText):
                    _ = content.sha256  # reads it once, before anything is made of it
            except ValueError as error:
                refuse(record.place, record.located(str(error)))
            else:
                if content:
                    yield Document(record.place, content, record.located)


def with_kinds(sources: Sequence[SourceFile], *, text_field: str) -> list[SourceFile]:
    """The sources with their kinds: the kind of a file is that of its first readable record."""
    with ThreadPoolExecutor(_REQUESTS) as pool:
        each = pool.map if any(source.remote for source in sources) else map
        kinds = list(each(lambda s: _first_kind(s, s.text_field or text_field), sources))
    return [dataclasses.replace(s, kind=kind) for s, kind in zip(sources, kinds, strict=True)]


def _first_kind(source: SourceFile, text_field: str) -> Kind:
    if source.format == "text":
        return "text"
    for record in _records(Span(0, 0, source.bytes), source, text_field):
        try:
            if not record.problem:
                return _kind(record.value, text_field)
        except ValueError:
            pass
    return "text"


def _records(span: Span, source: SourceFile, text_field: str) -> Iterator[Record]:
    return read_records(span, source, fields=partial(_columns, text_field=text_field))


def _columns(names: Collection[str], *, text_field: str) -> list[str]:
    fields = _fields(names, text_field)
    more = {_CHAT: (_TOOLS, _IMAGES), _COMPLETION: (_TOOLS, *rollouts.FIELDS)}.get(
        fields, (_TOOLS,)
    )
    return [*fields, *(name for name in more if name in names)]


def _fields(names: Collection[str], text_field: str) -> tuple[str, ...]:
    """The fields that hold the document, of a record with fields `names`."""
    for fields in ((text_field,), _CHAT, _COMPLETION):
        if all(name in names for name in fields):
            return fields
    raise ValueError(
        f"no field {text_field!r} (has: {_shortened(', '.join(names))}); set corpus.text_field, or "
        "have 'messages', or 'prompt' and 'completion'"
    )


def _kind(record: Any, text_field: str) -> Kind:
    """The kind of document that a record is. ValueError if it is none of them."""
    if not isinstance(record, dict):
        raise ValueError(
            f"no field {text_field!r} (has: {type(record).__name__}); set corpus.text_field"
        )
    fields = _fields(record, text_field)
    types = {str if isinstance(record[n], LongText) else type(record[n]) for n in fields}
    if types == {list}:
        return "chat"
    if types == {str} and fields == (text_field,):
        return "text"
    if types == {str} and fields == _COMPLETION:
        return "completion" if record.get(LOGPROBS) is None else "rollout"
    for name in fields:
        if not isinstance(record[name], str | LongText | list):
            got = type(record[name]).__name__
            raise ValueError(f"field {name!r} is {got}, not a string or a list of messages")
    if fields == _COMPLETION:
        raise ValueError("of 'prompt' and 'completion' one is a string, the other a list")
    raise ValueError(f"field {fields[0]!r} is a string, not a list of messages")


def _content(value: Any, source: SourceFile, *, text_field: str) -> Content:
    """The content of a record. ValueError with the problem if it has none."""
    if source.format == "text":
        return value
    kind = _kind(value, text_field)
    if kind != source.kind:
        raise ValueError(
            f"this record is a {kind}, but the file's first is a {source.kind}; put records of "
            "different kinds into files of their own"
        )
    fields = [value[name] for name in _fields(value, text_field)]
    if kind == "chat":
        if value.get(_IMAGES):
            raise ValueError(f"field {_IMAGES!r} is not empty; teachers read text only")
        return _chat(fields, value.get(_TOOLS))
    if isinstance(fields[0], LongText) and kind == "text":
        return fields[0]
    texts = ["".join(f.chunks()) if isinstance(f, LongText) else f for f in fields]
    for text in texts:
        _require_text(text)
    if kind == "rollout":
        prompt, completion = texts
        return rollouts.rollout(prompt, completion, value)
    return texts[0] if kind == "text" else Completion(*texts)


def _chat(parts: list[list[Any]], tools: Any) -> Chat:
    messages = [_message(message) for part in parts for message in part]
    first = len(parts[0]) if len(parts) > 1 else 0
    if not any(message["role"] == "assistant" for message in messages[first:]):
        raise ValueError("no message with the role 'assistant', so there is nothing to learn from")
    if tools is not None and not isinstance(tools, list):
        raise ValueError(f"field {_TOOLS!r} is {type(tools).__name__}, not a list")
    chat = Chat(tuple(messages), tools or None, first)
    try:
        canonical_json(chat._asdict())
    except (UnicodeEncodeError, TypeError, RecursionError) as error:
        raise ValueError(f"a message cannot be written as JSON: {error}") from error
    return chat


def _message(message: Any) -> dict[str, Any]:
    """The message as templates expect it: text parts are joined, and keys without a value are
    left out (a table's records have every key)."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        got = (
            _shortened(", ".join(message)) if isinstance(message, dict) else type(message).__name__
        )
        raise ValueError(f"a message needs 'role' and 'content'; got: {got}")
    content = message.get("content")
    if isinstance(content, list):
        texts = [part.get("text") if isinstance(part, dict) else part for part in content]
        for part, text in zip(content, texts, strict=True):
            if not isinstance(text, str):
                raise ValueError(f"a message's content has {_part(part)}; teachers read text only")
        content = "".join(map(str, texts))
    if content is None and "tool_calls" in message:
        content = ""
    if not isinstance(content, str):
        got = type(content).__name__
        raise ValueError(f"a message's content is {got}, not a string or a list of text parts")
    others = {name: value for name, value in message.items() if value is not None}
    return others | {"content": content}


def _part(part: Any) -> str:
    """A part that is no text, named by its type."""
    kind = part.get("type") if isinstance(part, dict) else None
    named = isinstance(kind, str) and kind.isidentifier() and len(kind) <= 30
    return f"a part of type {kind!r}" if named else "parts that are not text"


def _shortened(names: str) -> str:
    return names if len(names) <= _LONGEST_LIST else f"{names[:_LONGEST_LIST]}…"


def _require_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"half of a surrogate pair at character {error.start}") from error

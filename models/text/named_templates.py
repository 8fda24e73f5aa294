"""A tokenizer's chat templates by name, wherever its files keep them.

Most checkpoints have one, called "default". Some have another for chats with tools, "tool_use".
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

CHAT_TEMPLATE = "chat_template.jinja"
ADDITIONAL = "additional_chat_templates"
"""Directory of the templates besides `CHAT_TEMPLATE`: NAME.jinja holds the one called NAME."""
DEFAULT, TOOL_USE = "default", "tool_use"


def template_files(directory: Path) -> list[str]:
    """Names of the template files in `directory`, relative to it."""
    one = [CHAT_TEMPLATE] if (directory / CHAT_TEMPLATE).is_file() else []
    more = (path for path in (directory / ADDITIONAL).glob("*.jinja") if path.is_file())
    return one + sorted(f"{ADDITIONAL}/{path.name}" for path in more)


def is_template_file(name: str) -> bool:
    """Whether a file of this name, relative to the tokenizer's directory, is a template."""
    path = Path(name)
    return name == CHAT_TEMPLATE or (path.parent == Path(ADDITIONAL) and path.suffix == ".jinja")


def named_templates(
    settings: Mapping[str, Any], files: Mapping[str, bytes], *, where: str
) -> dict[str, str]:
    """The source of each template by its name. Files precede the settings' `chat_template`.

    `settings` is the content of tokenizer_config.json, `files` has contents by file name.
    ValueError for templates that are not texts.
    """
    stored = settings.get("chat_template")
    if isinstance(stored, list) and all(isinstance(item, dict) for item in stored):
        stored = {item.get("name"): item.get("template") for item in stored}
    sources: dict[Any, Any] = {} if stored is None else {DEFAULT: stored}
    if isinstance(stored, dict):
        sources = stored
    if not all(isinstance(text, str) for pair in sources.items() for text in pair):
        raise ValueError(f"{where}: chat_template is neither a text nor a list of named templates")
    for name, content in files.items():
        if is_template_file(name):
            stem = DEFAULT if name == CHAT_TEMPLATE else Path(name).stem
            sources = {**sources, stem: _text(content, where=f"{where}: {name}")}
    return sources


def _text(content: bytes, *, where: str) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 text: {error}") from error

"""Where a path in a config file leads: relative to the file, or where older releases looked.

Until release 0.8 such paths were relative to the working directory. A path that is only there still
leads there, and a notice says so: a capture of weeks must not begin again beside its config.
"""

import glob
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from decant.command_line.local_paths import paths_in, without_tilde
from decant.foreign import tell
from decant.store.urls import is_url

EMBEDDED = "embedded"
"""The word for what is at hand without a file: a teacher, and a corpus. Never a path."""


@dataclass
class ConfigPaths:
    """The paths of one config file, and those of them that lead nowhere."""

    file: Path
    missing: dict[str, str] = field(default_factory=dict)
    """By path that a command would read: the error if it does."""

    def located(self, value: Any, *, setting: str, metadata: Mapping[str, Any]) -> Any:
        """A setting's text, or list of texts, as paths for a program in the working directory."""
        if isinstance(value, list):
            return [self.located(one, setting=setting, metadata=metadata) for one in value]
        if not isinstance(value, str) or value in (EMBEDDED, "None") or is_url(value):
            return value
        return self._located(without_tilde(value), setting, metadata)

    def _located(self, text: str, setting: str, metadata: Mapping[str, Any]) -> str:
        folder = self.file.parent
        if Path(text).is_absolute() or folder.resolve() == Path.cwd():
            return text
        beside = _joined(folder, text)
        if _exists(beside):
            if _exists(text) and not _same(beside, text):
                self._say(setting, f"{beside}, beside the file; {text} here is another one")
            return beside
        if _exists(text):
            self._say(
                setting,
                f"{text} in the working directory, because there is no {beside}. Paths in a config "
                f"file are relative to the file: write {os.path.relpath(text, folder)}",
            )
            return text
        if metadata.get("is_model") and not text.startswith((".", "/")):
            return text  # a hub id
        if not metadata.get("is_output"):
            self.missing[beside] = (
                f"{self.file}: {setting} is not there. Looked for {beside}, relative to the file, "
                f"and for {text} in the working directory, {Path.cwd()}"
            )
        return beside

    def _say(self, setting: str, text: str) -> None:
        tell(f"note: {self.file}: {setting} is {text}", file=sys.stderr)


def require_there(settings: Any, missing: Mapping[str, str]) -> None:
    """FileNotFoundError if the settings, flags included, still have a path that leads nowhere."""
    for _, path, _ in paths_in(settings):
        if str(path) in missing:
            raise FileNotFoundError(missing[str(path)])


def _joined(folder: Path, text: str) -> str:
    """`folder/text`, without `..` unless a link in it gives `..` another meaning."""
    path = folder / text
    short = os.path.normpath(path)
    return short if Path(short).resolve() == path.resolve() else str(path)


def _exists(pattern: str) -> bool:
    """Whether a path is there, or a file that matches a glob."""
    if os.path.lexists(pattern):
        return True
    path = Path(pattern)
    folder = Path(path.anchor)
    return glob.has_magic(pattern) and any(True for _ in folder.glob(str(path.relative_to(folder))))


def _same(one: str, other: str) -> bool:
    """Whether both are one place; never of globs, which may match files of several folders."""
    first, second = Path(one), Path(other)
    return first.exists() and second.exists() and first.samefile(second)

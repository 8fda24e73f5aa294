"""The messages that docs/errors.md quotes are in the code."""

import ast
import re
from functools import cache

from tests.paths import ROOT

PACKAGES = (
    *("schemas", "models", "pipelines", "trainer"),
    *("decant/command_line", "decant/store", "decant/foreign.py", "decant/served_losses.py"),
)
ENTRY = re.compile(r"^- (`.+?`): ", re.M | re.S)
QUOTED = re.compile(r"`((?:[^`]|`\w+`)+?)`(?=,|$)")


@cache
def texts() -> str:
    """All texts of the code; what an f-string fills in is left out."""
    files = [
        file
        for package in PACKAGES
        for file in [ROOT / package, *(ROOT / package).rglob("*.py")]
        if file.is_file()
    ]
    found = [
        node.value
        for file in files
        for node in ast.walk(ast.parse(file.read_text("utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    return "\n".join(found)


def quoted_messages() -> list[str]:
    page = (ROOT / "docs" / "errors.md").read_text("utf-8")
    entries = [entry.replace("\n  ", " ") for entry in ENTRY.findall(page)]
    return [message for entry in entries for message in QUOTED.findall(entry)]


def test_every_quoted_message_is_one_of_the_code():
    messages = quoted_messages()
    assert len(messages) > 40
    missing = [
        (message, piece)
        for message in messages
        for piece in message.split("…")
        if piece.strip() and piece.strip() not in texts()
    ]
    assert missing == []

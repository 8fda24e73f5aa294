"""Reads pages as a browser without scripts does: their texts, links and policy."""

import html
import re
from html.parser import HTMLParser


class Page(HTMLParser):
    """A parsed page."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.inside: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.inside.append(tag)

    def handle_endtag(self, tag):
        self.inside.append(f"/{tag}")

    def handle_data(self, data):
        if self.inside[-1:] not in (["script"], ["style"]):
            self.texts.append(data)

    @property
    def links(self) -> list[str]:
        return [str(attributes["href"]) for tag, attributes in self.tags if tag == "a"]


def numbers_of(text: str) -> list[list[str]]:
    """The cells of the table of all numbers, as text; its cells have no end tags."""
    body = text.split('<table id="numbers">')[1].split("<tbody>")[1].split("</tbody>")[0]
    lines = [line.removesuffix("\n") for line in body.split("<tr>")[1:]]
    return [
        [html.unescape(re.sub(r"<[^>]*>", "", cell)) for cell in re.split(r"<td[^>]*>", line)[1:]]
        for line in lines
    ]

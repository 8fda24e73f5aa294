"""Text of strangers reaches neither the terminal nor a page as anything but text."""

import base64
import hashlib
import html.parser
import io
import re

import pytest
from rich.table import Table

from decant.foreign import escaped, page, plain, tell, terminal

HOSTILE = (
    "\x1b]0;title\x07\x1b[31mred\x9b2J\x7f\r over",
    "[/x] [bold]b[/bold] [link=https://x.example]l[/link] :smile:",
    "\u202eright to left \ud800 half",
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "{{body}} {{title}}",
)


@pytest.mark.parametrize("text", HOSTILE)
def test_what_is_told_has_no_control_character_and_loses_nothing(text, capsys):
    tell(text, "and", text)
    shown = capsys.readouterr().out
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e\ud800]", shown)
    assert shown.count(plain(text)) == 2
    assert plain("tab\tand\nline, ü, 漢, 👩‍🔬") == "tab\tand\nline, ü, 漢, 👩‍🔬"
    assert plain("\x1b[2J") == "\\u001b[2J"


@pytest.mark.parametrize("text", HOSTILE)
def test_a_console_shows_markup_and_escapes_as_they_are(text):
    out = io.StringIO()
    console = terminal(file=out, width=200, force_terminal=True, color_system="truecolor")
    table = Table(text, title=text)
    table.add_row(text)
    console.print(text, highlight=False)
    console.print(table)
    # Rich's own sequences set colours only.
    shown = re.sub("\x1b\\[[0-9;]*m", "", out.getvalue())
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e\ud800]", shown)
    assert shown.count(plain(text)) == 4


class Tags(html.parser.HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))


@pytest.mark.parametrize("text", HOSTILE)
def test_a_value_in_a_page_is_text_even_if_it_looks_like_a_tag_or_a_place(text):
    template = '<head></head><p title="{{title}}">{{body}}</p>'
    made = page(template, {"title": escaped(text), "body": escaped(text)})
    tags = Tags(made).tags
    assert [tag for tag, _ in tags] == ["head", "meta", "p"]
    assert tags[2][1] == {"title": plain(text)}


def test_a_page_runs_its_own_script_only():
    own = "let data = 3;"
    made = page("<head></head><script>let data = {{data}};</script>", {"data": "3"})
    policy = Tags(made).tags[1][1]["content"]
    digest = base64.b64encode(hashlib.sha256(own.encode()).digest()).decode()
    assert f"default-src 'none'; script-src 'sha256-{digest}';" in policy
    assert "script-src 'none';" in Tags(page("<head></head>", {})).tags[1][1]["content"]

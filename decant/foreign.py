"""Text that others wrote, such as names in a cache: as the terminal and our pages may show it.

A name may hold a terminal's escape sequences, Rich's markup or HTML. Every command prints through
`tell` or `terminal`, and every page is made by `page`.
"""

import base64
import hashlib
import html
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

# Control characters but tab and line feed, marks that reverse the order of writing, line and
# paragraph separators, and surrogates, which no terminal can encode.
_UNSAFE = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)
_PLACE = re.compile(r"\{\{(\w+)\}\}")
_SCRIPT = re.compile(r"<script>(.*?)</script>", re.DOTALL)


def plain(text: object) -> str:
    r"""`text` with control characters as JSON escapes, such as \u001b."""
    return _UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", str(text))


def tell(*values: object, **options: Any) -> None:
    """`print` the values as `plain` text."""
    print(*map(plain, values), **options)


def terminal(**options: Any) -> "Console":
    """A Rich console that shows strings as `plain` text, and reads no markup in them."""
    from rich.console import Console
    from rich.text import Text

    class Terminal(Console):
        def render_str(self, text: str, **options: Any) -> Text:
            return super().render_str(plain(text), **{**options, "markup": False, "emoji": False})

    return Terminal(**options)


def escaped(value: object) -> str:
    """Any value as text in a page, between tags or in a quoted attribute."""
    return html.escape(plain(value))


def page(template: str, values: Mapping[str, str]) -> str:
    """The page with each `{{name}}` of `template` replaced by `values[name]`, which is HTML.

    A policy is put into its head: nothing is fetched, and no script runs but the template's own.
    """
    # In one pass, because a value may contain what looks like a place.
    filled = _PLACE.sub(lambda place: values[place[1]], template)
    own = _PLACE.sub(lambda place: values[place[1]], "".join(_SCRIPT.findall(template)))
    scripts = "'none'"
    if own:
        digest = hashlib.sha256(own.encode()).digest()
        scripts = f"'sha256-{base64.b64encode(digest).decode()}'"
    policy = (
        f"default-src 'none'; script-src {scripts}; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    tag = f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
    return filled.replace("<head>", f"<head>\n{tag}", 1)

"""A hook for mkdocs: links from a page to files outside docs/ work in the built site too.

On a git host `../examples/own-teacher.toml` is right. The site has a copy of such a file, and the
link goes there. A link to a file that does not exist stays as it is, so that a strict build fails.
"""

import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("CHANGELOG.md", "CONTRIBUTING.md")
OUTSIDE = re.compile(r"\]\(\.\./([\w./-]+)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files outside docs/ that a page links to."""
    linked = {
        name
        for page in files.documentation_pages()
        for name in OUTSIDE.findall(page.content_string)
        if (ROOT / name).is_file()
    }
    for name in sorted({*PAGES, *linked}):
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Point links at these copies: `../NAME` of a page, `docs/NAME` of a file at the root."""
    if page.file.src_uri in PAGES:
        return markdown.replace("](docs/", "](")
    return OUTSIDE.sub(_inside, markdown)


def _inside(link: re.Match[str]) -> str:
    return f"]({link[1]}" if (ROOT / link[1]).is_file() else link[0]

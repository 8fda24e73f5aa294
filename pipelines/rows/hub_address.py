"""Addresses of files in datasets of the Hugging Face hub: `hf://datasets/owner/name@revision/…`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import unquote

SCHEME = "hf://"
_NAME = r"[A-Za-z0-9][\w.-]*"
# Only these revisions may hold a slash as it is; in others it is written %2F.
_REVISION = r"refs/(?:convert|pr)/[\w.-]+|[\w.%-]+"
_ADDRESS = re.compile(
    rf"hf://datasets/(?P<repo>{_NAME}/{_NAME})(@(?P<revision>{_REVISION}))?(/(?P<path>.*))?"
)
_COMMIT = re.compile("[0-9a-f]{40}")


@dataclass(frozen=True)
class HubAddress:
    """A file, folder or glob in a dataset's repository, at a revision."""

    repo: str
    revision: str | None
    """A branch, tag or commit; None is the main branch."""
    path: str
    """Path inside the repository; empty for all of it."""

    @classmethod
    def parse(cls, url: str) -> HubAddress:
        """ValueError if `url` is no such address."""
        match = _ADDRESS.fullmatch(url)
        # Of `..` the client would make a path outside of its cache.
        if match is None or ".." in re.split("[/@]", unquote(url)):
            raise ValueError(
                f"{url}: expected hf://datasets/owner/name/PATH or "
                "hf://datasets/owner/name@REVISION/PATH; a slash in a revision is written %2F"
            )
        revision = match["revision"]
        path = (match["path"] or "").strip("/")
        return cls(match["repo"], revision and unquote(revision), path)

    @property
    def dataset(self) -> str:
        """The address of the repository, with the revision if there is one."""
        revision = f"@{self._quoted}" if self.revision else ""
        return f"{SCHEME}datasets/{self.repo}{revision}"

    @property
    def is_pinned(self) -> bool:
        """Whether the revision is a commit, which never changes."""
        return bool(self.revision and _COMMIT.fullmatch(self.revision))

    @property
    def _quoted(self) -> str:
        revision = self.revision or ""
        return revision if revision.startswith("refs/") else revision.replace("/", "%2F")

    def __str__(self) -> str:
        """The address."""
        return f"{self.dataset}/{self.path}" if self.path else self.dataset

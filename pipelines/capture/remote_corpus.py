"""What a capture keeps about a corpus at addresses, so that every run reads the same files.

The commit of each dataset is that of the first run; files that were hashed are not read again for
that. Both stand in the `request.json` of each part.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from decant.pipelines.config import Corpus
from decant.pipelines.rows import hub_dataset
from decant.pipelines.rows.hub_address import SCHEME, HubAddress
from decant.pipelines.rows.remote_digests import digest_key
from decant.pipelines.rows.sources import SourceFile
from decant.schemas.disk.atomic import read_json
from decant.schemas.disk.layout import part_layout
from decant.schemas.disk.stand_in import exists
from decant.schemas.manifest.request import Remote, claimed_remote


def kept_remote(cache: Path) -> Remote:
    """What the cache's parts keep; of two commits of one address that of the older part."""
    revisions: dict[str, str] = {}
    digests: dict[str, str] = {}
    number = 0
    while exists(request := part_layout(cache, number).request):
        kept = claimed_remote(read_json(request))
        revisions = {**kept.revisions, **revisions}
        digests |= kept.digests
        number += 1
    return Remote(revisions, digests)


def pinned_corpus(
    corpus: Corpus, kept: Mapping[str, str], *, tell: Callable[[str], None] = lambda _: None
) -> tuple[Corpus, dict[str, str]]:
    """The corpus with a commit in every address of the hub, and the commits that were put there, by
    the addresses of the datasets.

    A commit in `kept` is put there in any case; `tell` gets a line that says so.
    """
    revisions: dict[str, str] = {}

    def pinned(pattern: str) -> str:
        if not pattern.startswith(SCHEME):
            return pattern
        asked = HubAddress.parse(pattern)
        if asked.is_pinned:
            return pattern
        if asked.dataset not in revisions:
            if commit := kept.get(asked.dataset):
                tell(f"{asked.dataset}: read at commit {commit[:12]}, as by the first run")
            revisions[asked.dataset] = commit or str(hub_dataset.pinned(asked).revision)
        return str(dataclasses.replace(asked, revision=revisions[asked.dataset]))

    files = tuple(map(pinned, corpus.files))
    sources = tuple(
        dataclasses.replace(group, files=tuple(map(pinned, group.files)))
        for group in corpus.sources
    )
    return dataclasses.replace(corpus, files=files, sources=sources), revisions


def remote_digests(sources: Iterable[SourceFile]) -> dict[str, str]:
    """sha256 of the files in buckets, which had to be read for that, by `digest_key`."""
    remote = [source.remote for source in sources if not source.forgotten]
    return {digest_key(f): f.sha256 for f in remote if f and not f.url.startswith(SCHEME)}

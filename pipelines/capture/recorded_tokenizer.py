"""The digest by which a cache knows its tokenizer.

A cache keeps the digest that it was begun with, because the ids of its rows contain it. Releases
before 0.8 took it from the spelling of the tokenizer's files.
"""

from pathlib import Path

from decant.models.text.tokenizer import Tokenizer
from decant.schemas.disk.layout import part_layout
from decant.schemas.disk.stand_in import exists
from decant.schemas.manifest.manifest import Manifest
from decant.schemas.manifest.plan import read_plan
from decant.schemas.manifest.tokenizer_files import tokenizer_folder


def recorded_digest(cache: Path, manifest: Manifest | None, tokenizer: Tokenizer) -> str:
    """The digest of the teacher's `tokenizer` for the parts of a cache.

    It is the one that the cache records if it was begun with this tokenizer, otherwise the current
    one. `manifest` is None if the cache is not sealed.
    """
    plan = part_layout(cache, 0).plan
    if manifest is None and not exists(plan):
        return tokenizer.digest
    recorded = manifest.tokenizer if manifest else read_plan(plan).tokenizer
    return recorded if _is_known(cache, tokenizer, recorded) else tokenizer.digest


def _is_known(cache: Path, tokenizer: Tokenizer, recorded: str) -> bool:
    if tokenizer.known_as(recorded):
        return True
    try:
        kept = Tokenizer.from_files(tokenizer_folder(cache))
    except (FileNotFoundError, ValueError):
        return False
    # The teacher's files may have been saved again, in another spelling.
    return kept.known_as(recorded) and kept.digest == tokenizer.digest

"""The files in a cache's `tokenizer/`, and their hashes for the manifest."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

from decant.schemas.disk import inside
from decant.schemas.disk.layout import TOKENIZER

_MOST_BYTES = 512 << 20
"""Most bytes of the files in `tokenizer/`; the largest known tokenizers have a tenth."""


def tokenizer_files(cache: Path) -> dict[str, bytes]:
    """Contents of the files in `tokenizer/` by name; links and devices are left out.

    Commands copy these files to other places, so a link to a private file must not be followed.
    ValueError if they are too large or the directory is a link; FileNotFoundError if there is none.
    """
    return inside.regular_files(cache, Path(TOKENIZER), most=_MOST_BYTES)


def tokenizer_hashes(files: Mapping[str, bytes]) -> dict[str, str]:
    """sha256 of each file by name, given the contents by name."""
    return {name: hashlib.sha256(files[name]).hexdigest() for name in sorted(files)}

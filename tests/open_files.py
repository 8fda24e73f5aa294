"""Whether this process has a file open."""

import os
from pathlib import Path


def is_open(path: Path) -> bool:
    """Whether a descriptor of this process leads to `path`.

    The number of descriptors would not tell: a collection of garbage may close other tests' files.
    """
    return any(_leads_to(path, int(each.name)) for each in Path("/dev/fd").iterdir())


def _leads_to(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except OSError:  # the descriptor that listed the folder
        return False

"""Find files that could execute code when they are loaded: pickles."""

import pickletools
import zipfile
from pathlib import Path


def pickles_below(directory: Path) -> list[Path]:
    """Files that are pickles of any protocol, or zip archives, which may contain pickles."""
    files = [path for path in directory.rglob("*") if path.is_file()]
    return [path for path in files if is_pickle(path.read_bytes()) or zipfile.is_zipfile(path)]


def is_pickle(data: bytes) -> bool:
    """Whether `data` begins with a complete pickle.

    Text can look like a pickle of protocol 0 or 1 by chance. So without the first byte of later
    protocols, the pickle must end where `data` ends.
    """
    try:
        *others, (_, _, last) = pickletools.genops(data)
    except Exception:  # an invalid opcode: not a pickle
        return False
    return bool(others) and (data[0] == 0x80 or last == len(data) - 1)

"""Finding what could execute code when it is read."""

import pickletools
import zipfile
from pathlib import Path


def pickles_below(directory: Path) -> list[Path]:
    """Files that are pickles of any protocol, or archives, which other libraries put them in."""
    files = [path for path in directory.rglob("*") if path.is_file()]
    return [path for path in files if is_pickle(path.read_bytes()) or zipfile.is_zipfile(path)]


def is_pickle(data: bytes) -> bool:
    """Whether it begins with opcodes up to one that ends a pickle.

    Text may do that by chance: without a pickle's first byte, which protocols 0 and 1 do not have,
    nothing may come after.
    """
    try:
        *others, (_, _, last) = pickletools.genops(data)
    except Exception:  # whatever its bytes stand for, it is none
        return False
    return bool(others) and (data[0] == 0x80 or last == len(data) - 1)

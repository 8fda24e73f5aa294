"""The grammar of names in a cache, and the check that a file from elsewhere keeps to it.

A cache may come from a stranger. Names in its manifest, plans, commits and journals become paths
that commands write and delete, so each name is checked when such a file is parsed. Names of sources
are free text: no code makes a path of them.
"""

import re
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

_NUMBER = r"(?:0|[1-9][0-9]{0,8})"
_PART = r"parts/[0-9]{4,9}"
_ARRAY = rf"(?:hidden|attention)/{_NUMBER}"
_RECORDS = r"logits|counts|sketch"
_UNIT = r"unit-[0-9]{5,9}"
_SHARD = rf"c(?:\.{_NUMBER})+"

GRAMMAR = {
    "part": (_PART, "parts/0000"),
    # The other cache may lie anywhere; only the end of the path is the format's.
    "part of another cache": (
        rf"[^/\x00-\x1f\x7f][^\x00-\x1f\x7f]*/{_PART}",
        "../cache/parts/0000",
    ),
    "signal": (rf"{_RECORDS}|{_ARRAY}", "logits, hidden/12 or attention/3"),
    "array": (rf"{_ARRAY}(?:-scale)?", "hidden/12 or hidden/12-scale"),
    "shard file": (_SHARD, "c.0.0.0"),
    "statistic": (r"[A-Za-z0-9][A-Za-z0-9._-]{0,120}\.npy", "tail-prior-sums.npy"),
    "staging folder": (r"[0-9a-f]{16}", "16 hexadecimal digits"),
    "file of a unit": (
        rf"{_PART}/(?:(?:rows|{_RECORDS})/{_UNIT}\.array_record|{_ARRAY}(?:-scale)?/{_SHARD}"
        rf"|commits/(?:{_RECORDS}|(?:hidden|attention)-{_NUMBER})-{_UNIT}\.json)",
        "parts/0000/rows/unit-00000.array_record",
    ),
}
"""By kind of name: its regular expression, and an example for errors."""


def require_names(kind: str, names: Iterable[Any]) -> None:
    """ValueError that shows the first of `names` that is not a name of this kind in `GRAMMAR`."""
    expression, example = GRAMMAR[kind]
    for name in names:
        if not (isinstance(name, str) and re.fullmatch(expression, name)):
            raise ValueError(f"{name!r:.120} is not a name of a {kind}, such as {example}")


def require_unit_numbers(numbers: Sequence[Any]) -> None:
    """ValueError unless `numbers` are unit numbers in ascending order."""
    for number in numbers:
        if type(number) is not int or not 0 <= number < 10**9:
            raise ValueError(f"{number!r:.120} is not the number of a unit")
    if any(a >= b for a, b in pairwise(numbers)):
        raise ValueError("the numbers of a part's units are not in ascending order")

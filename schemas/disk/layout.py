"""Paths inside a cache. No other module spells file names."""

import re
from dataclasses import dataclass
from pathlib import Path

MANIFEST = "manifest.json"
TOKENIZER = "tokenizer"
TOKENIZER_FILES = "tokenizer.json"
"""In a bucket: the names and hashes of the files in `TOKENIZER`."""
PARTS = "parts"
REQUEST = "request.json"
ROWS = "rows"
"""Directory of the row records, and their name beside the signals' names."""
LOGITS = "logits"
"""Name and directory of the signal with the teacher's next-token distributions."""
COUNTS = "counts"
SKETCH = "sketch"
RECORDS = (LOGITS, COUNTS, SKETCH)
"""Names and directories of the signals that are stored in records, one a row. `COUNTS` and `SKETCH`
are of the positions that `LOGITS` scores."""
STATISTICS = "statistics"
"""In a part: what calibration froze. Its files are never changed in place: parts may share them."""
JOURNAL = "gc.json"
"""Journal of a `gc` that has begun to replace files; the next `gc` finishes it."""
STAGED = "gc"
"""Directory of new files that `gc` will move over old ones; each `gc` has a folder in it."""
CHANGE_LOCK = ".seal.lock"
"""In the cache; held by whoever changes its manifest or the files that this names."""
CAPTURE_LOCK = ".capture.lock"
"""In a part directory. Shared by captures of it; `gc` takes it alone, or leaves the directory."""
ARRAY_KINDS = ("hidden", "attention")
"""Signals stored in arrays have names that begin with one of these and a slash."""
ADDITION = "plan-adding-"
"""What the name of an addition's plan begins with."""


def unit_name(unit: int) -> str:
    """Stem of the names of a unit's files, `unit-00042`."""
    return f"unit-{unit:05d}"


@dataclass(frozen=True)
class PartLayout:
    """Paths inside one part, `CACHE/parts/0000`."""

    root: Path

    @property
    def request(self) -> Path:
        """The settings that claimed this directory."""
        return self.root / REQUEST

    @property
    def plan(self) -> Path:
        """The plan: written once by calibration, obeyed by capture."""
        return self.root / "plan.json"

    @property
    def statistics(self) -> Path:
        """Directory of the statistics that calibration froze."""
        return self.root / STATISTICS

    @property
    def commits(self) -> Path:
        """Directory of commits: one JSON per unit and signal, written after the files it names."""
        return self.root / "commits"

    @property
    def work(self) -> Path:
        """Scratch directory of an unfinished capture; deleted when the part is sealed."""
        return self.root / "work"

    def records(self, signal: str, unit: int) -> Path:
        """The ArrayRecord file of a unit. `signal` is `ROWS` or one of `RECORDS`."""
        return self.root / signal / f"{unit_name(unit)}.array_record"

    def array(self, name: str) -> Path:
        """Directory of the zarr array called `name`, such as `hidden/12` or `hidden/12-scale`."""
        return self.root / name

    @property
    def arrays(self) -> list[Path]:
        """Directories of all arrays on disk."""
        return sorted(path for kind in ARRAY_KINDS for path in (self.root / kind).glob("*"))

    def addition(self, digest: str) -> Path:
        """Plan of signals being added to a sealed part; deleted when they are sealed."""
        return self.root / f"{ADDITION}{digest[:12]}.json"

    def commit(self, signal: str, unit: int) -> Path:
        """The commit of a unit and signal."""
        return self.commits / f"{signal.replace('/', '-')}-{unit_name(unit)}.json"


def part_layout(cache: Path, part: int) -> PartLayout:
    """Layout of part number `part` of the cache at `cache`."""
    return PartLayout(cache / PARTS / f"{part:04d}")


_IN_PART = re.compile(
    rf"(?:(.*)/)?{PARTS}/[0-9]+/"
    rf"(?:[^/]+\.json|(?:{'|'.join((ROWS, *RECORDS, *ARRAY_KINDS))}|commits|{STATISTICS}|work)/.+)"
)


def cache_of(file: Path) -> Path | None:
    """The cache in which `file` lies in a part; None if its path is none of a part's."""
    found = _IN_PART.fullmatch(file.as_posix())
    if not found:
        return None
    return Path() if found[1] is None else Path(found[1] or "/")

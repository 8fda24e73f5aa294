"""Where everything in a cache lies. The only module that spells file names."""

from dataclasses import dataclass
from pathlib import Path

MANIFEST = "manifest.json"
TOKENIZER = "tokenizer"
PARTS = "parts"
REQUEST = "request.json"
ROWS = "rows"
"""Directory of the row records, and their name beside the signals' names."""
LOGITS = "logits"
"""Name and directory of the signal that is stored in records."""
JOURNAL = "gc.json"
"""What `gc` has to finish, from the moment on at which files take others' places."""
STAGED = "gc"
"""Files that are to take others' places."""
ARRAY_KINDS = ("hidden", "attention")
"""First half of the name of a signal that is stored in arrays."""
_ADDITION = "plan-adding-"


def unit_name(unit: int) -> str:
    """`unit-00042`: what every file of a unit is called."""
    return f"unit-{unit:05d}"


@dataclass(frozen=True)
class PartLayout:
    """Paths inside one part, `CACHE/parts/0000`."""

    root: Path

    @property
    def request(self) -> Path:
        """What was asked for; claims the directory."""
        return self.root / REQUEST

    @property
    def plan(self) -> Path:
        """What capture obeys; written once by calibration."""
        return self.root / "plan.json"

    @property
    def statistics(self) -> Path:
        """Tables frozen by calibration."""
        return self.root / "statistics"

    @property
    def commits(self) -> Path:
        """One JSON for each unit and signal, written when all else of it is on disk."""
        return self.root / "commits"

    @property
    def work(self) -> Path:
        """Scratch of an unfinished capture; gone once the part is sealed."""
        return self.root / "work"

    def records(self, signal: str, unit: int) -> Path:
        """The ArrayRecord file of a unit: `rows/` or `logits/`."""
        return self.root / signal / f"{unit_name(unit)}.array_record"

    def array(self, name: str) -> Path:
        """The zarr array of a signal that is one: `hidden/12`, `hidden/12-scale`."""
        return self.root / name

    @property
    def arrays(self) -> list[Path]:
        """Directories of all arrays that are there, of whatever signal."""
        return sorted(path for kind in ARRAY_KINDS for path in (self.root / kind).glob("*"))

    def addition(self, digest: str) -> Path:
        """The plan of signals that are being added to a sealed part; gone once they are."""
        return self.root / f"{_ADDITION}{digest[:12]}.json"

    @property
    def additions(self) -> list[Path]:
        """Plans of additions that are not sealed."""
        return sorted(self.root.glob(f"{_ADDITION}*.json"))

    def commit(self, signal: str, unit: int) -> Path:
        """The commit record of a unit and signal."""
        return self.commits / f"{signal.replace('/', '-')}-{unit_name(unit)}.json"


def part_layout(cache: Path, part: int) -> PartLayout:
    """Layout of part number `part` of the cache at `cache`."""
    return PartLayout(cache / PARTS / f"{part:04d}")

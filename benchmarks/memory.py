"""Peak memory of a whole capture with hidden states and attention maps, against logits only.

    python -m benchmarks.memory [--max-bytes 60000] [--sequence-length 512]

Each capture is a process of its own, `decant precompute`; its peak is its largest resident set. It
uses the default teacher and batch, and stores two layers of states and two of maps.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

SIGNALS = {
    "logits": (),
    "logits, hidden 12 and 30 (bfloat16), attention 0 and 15 (uint8-log)": (
        *("--signals.hidden.layers", "12", "-1"),
        *("--signals.attention.layers", "0", "15"),
    ),
}


def main() -> None:
    options = _arguments()
    table = Table("signals", "peak MB", "above logits only")
    first = None
    for name, flags in SIGNALS.items():
        peak = peak_bytes(flags, options)
        first = first or peak
        table.add_row(name, f"{peak / 1e6:,.0f}", f"{(peak - first) / 1e6:,.0f} MB")
    Console(width=120).print(table)


def peak_bytes(flags: tuple[str, ...], options: argparse.Namespace) -> int:
    """The largest resident set of one capture, in bytes."""
    with tempfile.TemporaryDirectory() as directory:
        command = [
            *(sys.executable, "-m", "decant.pipelines", "precompute"),
            f"--output={Path(directory) / 'cache'}",
            f"--corpus.max-bytes={options.max_bytes}",
            f"--corpus.sequence-length={options.sequence_length}",
            *flags,
        ]
        process = subprocess.Popen(command)
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise SystemExit(f"{' '.join(command)}: ended with status {status}")
    return usage.ru_maxrss * 1024


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--max-bytes", type=int, default=60_000, help="bytes of the embedded corpus"
    )
    parser.add_argument("--sequence-length", type=int, default=512)
    return parser.parse_args()


if __name__ == "__main__":
    main()

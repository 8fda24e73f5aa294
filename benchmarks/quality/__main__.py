"""Does it matter which targets a student learns from? A study that runs on a laptop's CPU.

    python -m benchmarks.quality [--work runs/quality] [--only TEXT …] [--seeds 0 1 2] [--report]

One teacher, one first student (some of the teacher's blocks), the same rows in the same order, the
same number of updates and the same learning rate; what differs is the target:

- `ce`: hard labels only (α = 0). All others have α = 0.9.
- `dense`: the teacher's whole distribution. `online` is the same in the time that `bucket` takes,
  the teacher's forward pass included: fewer updates.
- `renormalize`, `bucket`, `prior`: top-32 through `compact`, at T = 1, 2, 4.
- `sampled`: top-16 and tail draws for about the same bytes; `rs-kd`: as many of the
  teacher's draws as the same bytes hold, target counts/N.

Judged on held-out rows against the dense teacher: cross-entropy, true KL, agreement, calibration,
and how much of the way from `ce` to `dense` was made. Then, without training, the angle between
each target's gradient and the dense one.

Resumable: a cell that has a result is not run again, and one that fails does not stop the others.
Each cell's config file is `WORK/cells/NAME.toml`, its result `NAME.json`. `WORK/report.md` and
`WORK/report.png` are rewritten after every seed, or by `--report` alone.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from rich.console import Console

from benchmarks.quality.study import FIRST_SEED, Study, cells

WIDTH = 160
"""Of the tables, in characters."""


def main() -> int:
    options = _arguments()
    study = Study(
        work=options.work,
        teacher=options.teacher,
        files=tuple(options.files),
        max_bytes=options.max_bytes,
        sequence_length=options.sequence_length,
        layers=options.layers,
        updates=options.updates,
        learning_rate=options.learning_rate,
        seeds=tuple(options.seeds),
    )
    console = Console(highlight=False, soft_wrap=True, width=WIDTH)
    failures = {} if options.report else _run(study, only=options.only, console=console)
    from benchmarks.quality.report import report

    report(study, console=console)
    for name, reason in failures.items():
        console.print(f"failed: {name}: {reason}", markup=False)
    return 1 if failures else 0


def _run(study: Study, *, only: list[str], console: Console) -> dict[str, str]:
    """Run what is chosen and not done; why each that failed did."""
    import jax

    # The same shapes come in every cell and every restart; compiling them is a third of a cell.
    jax.config.update("jax_compilation_cache_dir", str((study.work / "compiled").absolute()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)

    from benchmarks.quality.angles import measure
    from benchmarks.quality.report import report
    from benchmarks.quality.run import Workshop, run_cell

    def chosen(name: str) -> bool:
        return not only or any(text in name for text in only)

    shop, failures = Workshop(study), {}
    for seed in study.seeds:
        for cell in (c for c in cells(study) if c.seed == seed and chosen(c.name)):
            start = time.perf_counter()
            try:
                result = run_cell(cell, shop)
            except Exception as error:  # one cell's failure is not the others'
                failures[cell.name] = f"{type(error).__name__}: {error}"
                console.print(f"{cell.name}: {failures[cell.name]}", markup=False)
                continue
            console.print(
                f"{cell.name}: KL {result['kl']:.4f}, CE {result['ce']:.4f}, agreement "
                f"{result['agreement']:.1%}  ({time.perf_counter() - start:.0f} s)"
            )
        if seed == FIRST_SEED:
            for name, reason in measure(shop, chosen=chosen):
                if reason:
                    failures[name] = reason
                console.print(f"angle {name}: {reason or 'done'}", markup=False)
        if seed != study.seeds[-1]:
            report(study, console=console)
    return failures


def _arguments() -> argparse.Namespace:
    default = Study(work=Path("runs/quality"))
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--work", type=Path, default=default.work)
    parser.add_argument("--only", nargs="+", default=[], help="cells and angles whose name has it")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(default.seeds))
    parser.add_argument("--report", action="store_true", help="only the table and the picture")
    parser.add_argument("--teacher", default=default.teacher)
    parser.add_argument("--files", nargs="+", default=list(default.files), help="globs of text")
    parser.add_argument("--max-bytes", type=int, default=default.max_bytes, help="of the text")
    parser.add_argument("--sequence-length", type=int, default=default.sequence_length)
    parser.add_argument("--layers", type=int, default=default.layers, help="of the student")
    parser.add_argument("--updates", type=int, default=default.updates)
    parser.add_argument("--learning-rate", type=float, default=default.learning_rate)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())

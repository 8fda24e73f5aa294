"""A study of how targets affect a student's quality; it runs on a laptop's CPU.

    python -m benchmarks.quality [--only TEXT …] [--seeds 0 1 2] [--report]

All students begin as the same blocks of one teacher. They see the same rows in the same order, for
the same number of updates with the same learning rate. They differ in their targets:

- `ce`: hard labels only (α = 0). All others have α = 0.9.
- `dense`: the teacher's whole distribution.
- `online`: like `dense`, with the fewer updates that fit into `record`'s time if each includes the
  teacher's forward pass.
- `record`: one cache for every temperature: a small head, counts and a sketch of 64 exact numbers.
  `dithered`: the default capture, the same with 256 coarse numbers; with a size no counts, and one
  or two tokens. At T = 1 `record` learns from the counts, which both have, `dithered` from its
  sketch.
- `counts`: equally spaced draws of the whole distribution, at T = 1. `rs-kd`: independent draws.
- `fresh`: as many draws as `counts`, but new ones at each visit of a row: what does it cost that a
  cache repeats its draws? It differs only where a row is seen again, with more `--updates`.
- `sketch`: a head, and the tail's shape as a few numbers.
- `sampled`: a head and tail draws at the same T. `renormalize`, `bucket`, `prior`: a head.

Each method has several sizes: about 16, 32, 64 and 120 bytes a token.

Students are compared with the dense teacher on held-out rows: cross-entropy, true KL, agreement,
calibration, and the share of the KL's way from `ce` to `dense`. Then, without training, the angle
between each target's gradient and the dense one is measured, at the student that learned densely.

A study can be stopped and continued: a cell with a result is not run again. A cell that fails does
not stop the others. Each cell's config file is `WORK/cells/NAME.toml`, its result
`RESULTS/cells/NAME.json`. The results in the repository are those of the default settings.
`WORK/report.md` and `WORK/report.png` are rewritten after every seed, and by `--report`.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from rich.console import Console

from benchmarks.quality.study import FIRST_SEED, Study, cells

RESULTS = Path(__file__).parent / "results"
WIDTH = 160
"""Width of the tables in characters."""


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
        results=options.results,
    )
    console = Console(highlight=False, soft_wrap=True, width=WIDTH)
    failures = {} if options.report else _run(study, only=options.only, console=console)
    from benchmarks.quality.report import report

    report(study, console=console)
    for name, reason in failures.items():
        console.print(f"failed: {name}: {reason}", markup=False)
    return 1 if failures else 0


def _run(study: Study, *, only: list[str], console: Console) -> dict[str, str]:
    """Run the chosen cells and angles without a result; returns each failure and its reason."""
    import jax

    # All cells have the same shapes, and compiling takes a third of a cell's time.
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
            except Exception as error:  # A failure does not stop the other cells.
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
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument(
        "--only", nargs="+", default=[], help="only names that contain one of these"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=list(default.seeds))
    parser.add_argument("--report", action="store_true", help="only write the report")
    parser.add_argument("--teacher", default=default.teacher)
    parser.add_argument(
        "--files", nargs="+", default=list(default.files), help="globs of text files"
    )
    parser.add_argument(
        "--max-bytes", type=int, default=default.max_bytes, help="bytes of the text"
    )
    parser.add_argument("--sequence-length", type=int, default=default.sequence_length)
    parser.add_argument("--layers", type=int, default=default.layers, help="blocks of the student")
    parser.add_argument("--updates", type=int, default=default.updates)
    parser.add_argument("--learning-rate", type=float, default=default.learning_rate)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())

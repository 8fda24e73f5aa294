"""Three rounds of offline on-policy distillation against as many updates of plain distillation.

    python -m benchmarks.on_policy FOLDER [--seeds 2]

The task has many right answers: sort four digits by swaps of neighbours, in any order, and write
down every state, such as `3142:` and `1342,1324,1234`. The teacher learned the task from hard
labels. The student has one block in place of the teacher's three and cannot follow it everywhere.
It begins with plain distillation on answers that the teacher wrote, one to each prompt. Then each
arm gets three rounds of equally many updates:
- `forward_kl, texts`: more of the same (plain distillation);
- `reverse_kl, own answers`: in each round the student writes answers to the same prompts, the
  teacher scores them, and the student learns from the scores;
- `on_policy, own answers`: the same rounds with the loss of sampled tokens.

Each arm's learning rate is the one of `RATES` that is best after one round of the first seed, on
prompts of their own. Reported is the share of right answers to held-out prompts, drawn at T = 1.
All is done by the commands that users type. A command whose result is in FOLDER is not repeated, so
a killed benchmark goes on. Writes FOLDER/results.json and the figure.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from rich.console import Console
from rich.table import Table

from decant.__main__ import main as decant
from decant.models import Decoder, ModelConfig, save_directory

FIGURE = Path(__file__).parent / "figures" / "on-policy.png"
ROUNDS = 3
DIGITS = 4
MOST_TOKENS = (DIGITS + 1) * DIGITS * (DIGITS - 1) // 2
"""Of an answer: each swap mends one of the pairs in the wrong order, and has a state and a sign."""
SPLITS = {"heldout": 1000, "tuning": 500, "taught": 1500, "teacher": 6000}
"""Prompts to judge by, to choose settings by, for students, and for the teacher alone."""
LENGTH = 64
FAST = 3e-3
"""Peak learning rate from random weights."""
TEACHER = ModelConfig(
    vocab_size=257,
    hidden_size=64,
    intermediate_size=192,
    num_layers=3,
    num_heads=4,
    num_kv_heads=4,
    head_dim=16,
    max_positions=256,
    tie_embeddings=True,
)
ROWS = 16
"""Of an update."""


class Arm(NamedTuple):
    """A way to go on from the common start."""

    divergence: str
    own: bool
    """Learns from answers of the student, new ones in each round."""

    @property
    def name(self) -> str:
        """In tables."""
        return f"{self.divergence}, {'own answers' if self.own else 'texts'}"

    @property
    def file(self) -> str:
        """The beginning of file names."""
        return self.name.replace(", ", "-").replace(" ", "-")


ARMS = (
    Arm("forward_kl", own=False),
    Arm("reverse_kl", own=True),
    Arm("on_policy", own=True),
)


RATES = (1e-4, 3e-4, 1e-3)
"""Constant learning rates that every arm is tried with."""


def main():
    options = _arguments()
    folder = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str((folder / "compiled").absolute()))
    teacher = make_teacher(folder, updates=options.teacher_updates)
    work = Work(folder, teacher, make_corpus(folder, teacher), options.updates)
    begun = work.start(0, updates=options.start)
    found = {arm.name: work.search(arm, begun) for arm in ARMS}
    results: dict[str, Any] = {
        "teacher": share(teacher, folder / "heldout.jsonl"),
        "before": share(begun, folder / "tuning.jsonl"),
        "search": found,
        "curves": {arm.name: [] for arm in ARMS},
    }
    for seed in range(options.seeds):
        begun = work.start(seed, updates=options.start)
        for arm in ARMS:
            rate = max(RATES, key=found[arm.name].__getitem__)
            results["curves"][arm.name].append(work.rounds(arm, rate, begun, seed=seed))
        (folder / "results.json").write_text(json.dumps(results, indent=1))
        show(results)
        plot(results["curves"], options.figure)


def make_teacher(folder: Path, *, updates: int) -> Path:
    """A model that answers nearly all held-out prompts, made by hard labels."""
    write_tasks(folder)
    blank = folder / "blank"
    if not blank.exists():
        save_directory(Decoder(TEACHER, rngs=nnx.Rngs(0)), blank, tokenizer_files())
    cache, run, teacher = folder / "blank-cache", folder / "teacher-run", folder / "teacher"
    labels_alone = ("--signals.logits.counts", "0", "--signals.logits.sketch.rank", "0")
    capture(blank, folder / "teacher.jsonl", cache, *labels_alone)
    train(
        run,
        cache,
        *("--student.init", "scratch", "--student.layers", TEACHER.num_layers),
        *("--loss.alpha", "0", "--data.steps", updates),
        *("--optimiser.learning-rate", FAST),
    )
    once(teacher, "export", run, teacher)
    return teacher


def make_corpus(folder: Path, teacher: Path) -> Path:
    """The cache of plain distillation: a teacher's answer to each of the students' prompts."""
    texts, cache = folder / "texts.jsonl", folder / "texts"
    generate(teacher, folder / "taught.jsonl", texts)
    capture(teacher, texts, cache)
    return cache


class Work(NamedTuple):
    """What all arms share."""

    folder: Path
    teacher: Path
    corpus: Path
    updates: int
    """Of a round."""

    def start(self, seed: int, *, updates: int) -> Path:
        """The run of a seed's first student: plain distillation from random weights."""
        run = self.folder / f"start-{seed}"
        train(
            run,
            self.corpus,
            *("--student.init", "scratch", "--student.layers", 1, "--data.seed", seed),
            *("--data.steps", updates),
            *("--optimiser.learning-rate", FAST),
        )
        return run

    def search(self, arm: Arm, begun: Path) -> dict[float, float]:
        """By learning rates, the share of right answers after the first round of seed 0."""
        runs = {rate: self.round(arm, rate, begun, seed=0, number=1) for rate in RATES}
        return {rate: share(run, self.folder / "tuning.jsonl") for rate, run in runs.items()}

    def rounds(self, arm: Arm, rate: float, run: Path, *, seed: int) -> list[float]:
        """The share of right answers of the run that an arm begins with, and after each round."""
        curve = [share(run, self.folder / "heldout.jsonl")]
        for number in range(1, ROUNDS + 1):
            run = self.round(arm, rate, run, seed=seed, number=number)
            curve.append(share(run, self.folder / "heldout.jsonl"))
        return curve

    def round(self, arm: Arm, rate: float, begun: Path, *, seed: int, number: int) -> Path:
        """The run of one round that goes on from the run `begun`."""
        run = self.folder / f"{arm.file}-{rate:g}-{seed}-{number}"
        cache = self.answers(begun, seed=number) if arm.own else self.corpus
        train(
            run,
            cache,
            *("--student.init", "checkpoint", "--student.source", begun),
            *("--data.steps", self.updates, "--data.seed", 100 * seed + number),
            *("--optimiser.learning-rate", rate, "--optimiser.schedule", "constant"),
            *("--loss.divergence", arm.divergence),
        )
        return run

    def answers(self, student: Path, *, seed: int) -> Path:
        """The teacher's cache of what a run's student answers to all prompts that it may learn
        from."""
        written = student.with_name(f"{student.name}-answers.jsonl")
        cache = written.with_suffix("")
        generate(student, self.folder / "taught.jsonl", written, "--logprobs", "--seed", seed)
        capture(self.teacher, written, cache)
        return cache


def share(model: Path, prompts: Path) -> float:
    """The share of prompts that a model, or a run's student, answers right at T = 1."""
    written = model.with_name(f"{model.name}-{prompts.name}")
    generate(model, prompts, written)
    records = map(json.loads, written.read_text("utf-8").splitlines())
    found = float(np.mean([is_right(one["prompt"], one["completion"]) for one in records]))
    print(f"{written.name}: {found:.1%} right", flush=True)
    return found


def generate(model: Path, prompts: Path, output: Path, *flags: object) -> None:
    """A record of what a model, or a run's student, answers to each of `prompts`."""
    is_run = (model / "run.json").exists()
    once(
        output,
        *("generate", *([model] if is_run else ["--model", model])),
        *("--prompts", prompts, "--output", output, "--jsonl"),
        *("--max-tokens", MOST_TOKENS, "--batch-rows", 500, *flags),
    )


def capture(teacher: Path, texts: Path, output: Path, *signals: str) -> None:
    """A cache of `texts` with the teacher's targets, `signals` or the default ones."""
    once(
        output,
        *("precompute", "--teacher.model", teacher, "--corpus.files", texts, "--output", output),
        *("--corpus.sequence-length", LENGTH, "--corpus.heldout", "0"),
        *("--teacher.dtype", "float32", *signals),
    )


def train(run: Path, cache: Path, *flags: object) -> None:
    """A run of a student, which is judged here and not by the run."""
    once(
        run,
        "train",
        "--cache",
        cache,
        "--run",
        run,
        "--heldout-rows",
        0,
        "--data.batch-rows",
        ROWS,
        *flags,
    )


def once(result: Path, *command: object) -> None:
    """Run one command of decant, unless its result is there and it had ended."""
    mark = result.with_name(f".{result.name}.done")
    if mark.exists():
        return
    begun = time.perf_counter()
    status = decant([*map(str, command)])
    if status:
        raise SystemExit(f"decant {' '.join(map(str, command))}: status {status}")
    mark.write_text(f"{time.perf_counter() - begun:.1f} s\n")


def write_tasks(folder: Path) -> None:
    """The files of prompts in `SPLITS`, each with one right answer, for the teacher alone."""
    draws = np.random.default_rng(0)
    unsorted = [n for n in range(10**DIGITS) if not _is_sorted(f"{n:0{DIGITS}d}")]
    numbers = iter(draws.permutation(unsorted).tolist())
    for name, count in SPLITS.items():
        path = folder / f"{name}.jsonl"
        prompts = [f"{number:0{DIGITS}d}:" for number in itertools.islice(numbers, count)]
        lines = [json.dumps({"prompt": p, "completion": answer(p, draws)}) + "\n" for p in prompts]
        if not path.exists():
            path.write_text("".join(lines), "utf-8")


def answer(prompt: str, draws: np.random.Generator) -> str:
    """The states up to the sorted one, by swaps that are drawn from all that bring it nearer."""
    states, now = [], prompt.removesuffix(":")
    while not _is_sorted(now):
        now = sorted(swapped(now))[draws.integers(len(swapped(now)))]
        states.append(now)
    return ",".join(states)


def swapped(state: str) -> set[str]:
    """The states after one swap of neighbours that are in the wrong order."""
    return {
        state[:i] + state[i + 1] + state[i] + state[i + 2 :]
        for i in range(len(state) - 1)
        if state[i] > state[i + 1]
    }


def is_right(prompt: str, completion: str) -> bool:
    """Whether every state follows from the one before, and the last is sorted."""
    states = [prompt.removesuffix(":"), *completion.split(",")]
    steps = all(after in swapped(before) for before, after in itertools.pairwise(states))
    return steps and _is_sorted(states[-1])


def _is_sorted(state: str) -> bool:
    return list(state) == sorted(state)


def tokenizer_files() -> dict[str, bytes]:
    """Files of a tokenizer with an id for each byte, and EOS `<end>`."""
    import tokenizers

    byte_level = tokenizers.pre_tokenizers.ByteLevel
    alphabet = sorted(byte_level.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<end>", *alphabet])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = byte_level(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    settings = {"eos_token": "<end>", "add_bos_token": False}
    return {
        "tokenizer.json": tokenizer.to_str().encode(),
        "tokenizer_config.json": json.dumps(settings).encode(),
    }


def show(results: dict[str, Any]) -> None:
    """The tables: the search, and the curves as means over seeds, with each seed's share."""
    tried = Table(
        title=f"Right answers to {SPLITS['tuning']:,} prompts after one round of seed 0, by "
        f"learning rate; before, {results['before']:.1%}"
    )
    tried.add_column("student")
    for rate in RATES:
        tried.add_column(f"{rate:g}", justify="right")
    for name, found in results["search"].items():
        tried.add_row(name, *(f"{value:.1%}" for value in found.values()))
    count = SPLITS["heldout"]
    title = f"Right answers to {count:,} held-out prompts; the teacher {results['teacher']:.1%}"
    table = Table(title=title)
    table.add_column("student")
    for number in range(ROUNDS + 1):
        table.add_column(f"round {number}" if number else "start", justify="right")
    for name, seeds in results["curves"].items():
        table.add_row(name, *(_spread(values) for values in zip(*seeds, strict=True)))
    Console().print(tried, table)


def _spread(values: Sequence[float]) -> str:
    mean = f"{np.mean(values):.1%}"
    return f"{mean} ({', '.join(f'{value:.1%}' for value in values)})" if values[1:] else mean


def plot(curves: dict[str, list[list[float]]], path: Path) -> None:
    """The share of right answers by rounds: a thin line a seed, a thick one their mean."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    for number, (name, seeds) in enumerate(curves.items()):
        percent = 100 * np.array(seeds)
        axis.plot(percent.T, color=f"C{number}", lw=0.6, alpha=0.5)
        axis.plot(percent.mean(axis=0), color=f"C{number}", label=name, marker="o")
    axis.set(xlabel="rounds after the common start", ylabel="right answers, %")
    axis.set_xticks(range(ROUNDS + 1))
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=150)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--updates", type=int, default=40, help="of each round")
    parser.add_argument("--start", type=int, default=800, help="updates of the common start")
    parser.add_argument("--teacher-updates", type=int, default=1500)
    parser.add_argument("--figure", type=Path, default=FIGURE)
    return parser.parse_args()


if __name__ == "__main__":
    main()

"""Three rounds of offline on-policy distillation against plain distillation of the same updates.

    python -m benchmarks.on_policy FOLDER [--seeds 1] [--updates 60]

The task: running sums of six digits, modulo 10, such as `573128=525686`. The teacher is a
student of `decant train` that learned the task from hard labels. All students begin as one of the
same shape that is not done: it was distilled from the teacher on the texts of the teacher's cache
for `--start` of as many updates as the teacher had. Then they get three times `--updates` updates:
- `plain`: more of the same distillation (forward KL);
- `on_policy`: in each of three rounds the student writes answers, the teacher scores them, and the
  student learns with `loss.divergence = "on_policy"`;
- `reverse_kl`: the same rounds with `reverse_kl` on the stored head and sketch of those answers.

Reported is the share of held-out prompts that a student answers exactly, greedily. All is done by
the commands that users type. A command whose result is in FOLDER is not repeated, so a killed
benchmark goes on. Writes FOLDER/curves.png and FOLDER/results.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from flax import nnx
from rich.console import Console
from rich.table import Table

from decant.__main__ import main as decant
from decant.models import Decoder, ModelConfig, save_directory

ROUNDS = 3
ARMS = ("plain", "on_policy", "reverse_kl")
HELDOUT, TAUGHT = 500, 3000
"""Prompts that no model learns from, and those that teacher and students learn from."""
DIGITS = 6
LENGTH = 128
FAST = 2e-3
"""Peak learning rate from random weights."""
BATCH = ("--data.batch-rows", "4", "--heldout-rows", "0")
TEACHER = ModelConfig(
    vocab_size=257,
    hidden_size=64,
    intermediate_size=192,
    num_layers=2,
    num_heads=4,
    num_kv_heads=4,
    head_dim=16,
    max_positions=256,
    tie_embeddings=True,
)
STUDENT = ("--student.init", "scratch", "--student.layers", str(TEACHER.num_layers))


def main():
    options = _arguments()
    folder = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder / "compiled"))
    teacher = make_teacher(folder, updates=options.teacher_updates)
    results: dict[str, dict[str, list[float]]] = {}
    for seed in range(options.seeds):
        results[str(seed)] = compare(folder, teacher, seed=seed, options=options)
        (folder / "results.json").write_text(json.dumps(results, indent=1))
        show(results, teacher=exact_match(folder, teacher), updates=options.updates)
    plot(results, folder / "curves.png", updates=options.updates)


def make_teacher(folder: Path, *, updates: int) -> Path:
    """A directory with a model that answers nearly all held-out prompts, made by hard labels."""
    write_tasks(folder)
    blank = folder / "blank"
    if not blank.exists():
        save_directory(Decoder(TEACHER, rngs=nnx.Rngs(0)), blank, tokenizer_files())
    cache, run, teacher = folder / "blank-cache", folder / "teacher-run", folder / "teacher"
    labels_alone = ("--signals.logits.counts", "0", "--signals.logits.sketch.rank", "0")
    capture(blank, folder / "taught.jsonl", cache, *labels_alone)
    once(
        run,
        *("train", "--cache", cache, "--run", run, *STUDENT, "--loss.alpha", "0"),
        *("--data.steps", updates, "--optimiser.learning-rate", FAST, *BATCH),
    )
    once(teacher, "export", run, teacher)
    return teacher


def compare(
    folder: Path, teacher: Path, *, seed: int, options: argparse.Namespace
) -> dict[str, list[float]]:
    """The share of exact answers of each arm: at its start and after each round."""
    here = folder / f"seed-{seed}"
    here.mkdir(exist_ok=True)
    corpus = folder / "corpus-cache"
    capture(teacher, folder / "taught.jsonl", corpus)
    begun, start = here / "start-run", here / "start"
    once(
        begun,
        *("train", "--cache", corpus, "--run", begun, *STUDENT),
        *("--data.steps", options.teacher_updates, "--keep.every", options.start),
        *("--data.seed", seed, "--optimiser.learning-rate", FAST, *BATCH),
    )
    once(start, "export", begun, start, "--checkpoint", options.start)
    first = exact_match(folder, start)
    shares = {arm: [first] for arm in ARMS}
    for arm in ARMS:
        student = start
        for number in range(1, ROUNDS + 1):
            run = here / f"{arm}-{number}-run"
            after = here / f"{arm}-{number}"
            if arm == "plain":
                cache = corpus
            else:  # the first round's answers are those of one student in both arms
                name = f"answers-{number}" if number == 1 else f"{arm}-answers-{number}"
                cache = answers(folder, student, teacher, here / name, seed=100 * seed + number)
            once(
                run,
                *("train", "--cache", cache, "--run", run, "--student.init", "checkpoint"),
                *("--student.source", student, "--data.steps", options.updates),
                *("--data.seed", 100 * seed + number, *BATCH),
                *("--optimiser.learning-rate", options.rate, "--optimiser.schedule", "constant"),
                *(() if arm == "plain" else ("--loss.divergence", arm)),
            )
            once(after, "export", run, after)
            shares[arm].append(exact_match(folder, after))
            student = after
    return shares


def answers(folder: Path, student: Path, teacher: Path, output: Path, *, seed: int) -> Path:
    """The teacher's cache of what the student answers to all prompts that it may learn from."""
    written = output.with_suffix(".jsonl")
    generate(student, folder / "taught.jsonl", written, "--logprobs", "--seed", str(seed))
    capture(teacher, written, output)
    return output


def exact_match(folder: Path, model: Path) -> float:
    """The share of held-out prompts that a model answers exactly, by its likeliest tokens."""
    written = model.with_name(f"{model.name}-heldout.jsonl")
    generate(model, folder / "heldout.jsonl", written, "--temperature", "0")
    lines = [json.loads(line) for line in written.read_text("utf-8").splitlines()]
    return float(np.mean([line["completion"] == answer(line["prompt"]) for line in lines]))


def generate(model: Path, prompts: Path, output: Path, *flags: str) -> None:
    """A record of what a model answers to each of `prompts`."""
    once(
        output,
        *("generate", "--model", model, "--prompts", prompts, "--output", output, "--jsonl"),
        *("--max-tokens", DIGITS + 2, "--batch-rows", "256", *flags),
    )


def capture(teacher: Path, texts: Path, output: Path, *signals: str) -> None:
    """A cache of `texts` with the teacher's targets, `signals` or the default ones."""
    once(
        output,
        *("precompute", "--teacher.model", teacher, "--corpus.files", texts, "--output", output),
        *("--corpus.sequence-length", LENGTH, "--corpus.heldout", "0"),
        *("--teacher.dtype", "float32", *signals),
    )


def once(result: Path, *command: object) -> None:
    """Run one command of decant, unless its result is there and it had ended."""
    mark = result.with_name(f".{result.name}.done")
    if mark.exists():
        return
    start = time.perf_counter()
    status = decant([*map(str, command)])
    if status:
        raise SystemExit(f"decant {' '.join(map(str, command))}: status {status}")
    mark.write_text(f"{time.perf_counter() - start:.1f} s\n")


def write_tasks(folder: Path) -> None:
    """The files of prompts with their answers: `heldout.jsonl` and `taught.jsonl`."""
    numbers = np.random.default_rng(0).choice(10**DIGITS, HELDOUT + TAUGHT, replace=False)
    prompts = [f"{number:0{DIGITS}d}=" for number in numbers]
    for name, some in {"heldout": prompts[:HELDOUT], "taught": prompts[HELDOUT:]}.items():
        path = folder / f"{name}.jsonl"
        if not path.exists():
            lines = [json.dumps({"prompt": p, "completion": answer(p)}) + "\n" for p in some]
            path.write_text("".join(lines), "utf-8")


def answer(prompt: str) -> str:
    """The running sums of a prompt's digits, modulo 10."""
    sums = itertools.accumulate(map(int, prompt.removesuffix("=")))
    return "".join(str(total % 10) for total in sums)


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


def show(results: dict[str, dict[str, list[float]]], *, teacher: float, updates: int) -> None:
    """The table: means over seeds, and the range if there are several."""
    table = Table(title=f"Exact answers to {HELDOUT} held-out prompts; the teacher {teacher:.1%}")
    table.add_column("student")
    for number in range(ROUNDS + 1):
        table.add_column(f"{number * updates} updates" if number else "start", justify="right")
    for arm in ARMS:
        rows = np.array([shares[arm] for shares in results.values()])
        table.add_row(arm, *(_spread(column) for column in rows.T))
    Console().print(table)


def _spread(values: Sequence[float]) -> str:
    mean = f"{np.mean(values):.1%}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.1%} to {max(values):.1%})"


def plot(results: dict[str, dict[str, list[float]]], path: Path, *, updates: int) -> None:
    """The share of exact answers by updates: a thin line a seed, a thick one their mean."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    x = np.arange(ROUNDS + 1) * updates
    for number, arm in enumerate(ARMS):
        rows = np.array([shares[arm] for shares in results.values()])
        axis.plot(x, 100 * rows.T, color=f"C{number}", lw=0.6, alpha=0.5)
        axis.plot(x, 100 * rows.mean(0), color=f"C{number}", label=arm, marker="o")
    axis.set(xlabel="updates after the common start", ylabel="exact answers, %")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=150)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--updates", type=int, default=60, help="of each round")
    parser.add_argument("--start", type=int, default=1100, help="updates of the common start")
    parser.add_argument("--teacher-updates", type=int, default=1500)
    parser.add_argument("--rate", type=float, default=3e-4, help="learning rate of all arms")
    return parser.parse_args()


if __name__ == "__main__":
    main()

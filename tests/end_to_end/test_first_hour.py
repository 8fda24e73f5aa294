"""A new user's first hour, typed as the commands say: own texts, tokenizer and teacher.

Each step is a process of the console script `decant`, in a directory outside the repository.
"""

import json
import random
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from decant.trainer.run.metrics_log import read_metrics
from tests.making import own_teacher
from tests.paths import environment

pytestmark = pytest.mark.slow

WORDS = [
    "the",
    "a",
    "river",
    "stone",
    "light",
    "old",
    "house",
    "garden",
    "walks",
    "runs",
    "sees",
    "slowly",
    "under",
    "over",
    "bird",
    "sings",
]
DECANT = Path(sys.executable).with_name("decant")
SWEEP = """
run = "runs/sweep"
[base.data]
steps = 12
[grid]
"optimiser.learning_rate" = [1e-3, 1e-2]
"""


def story(seed: int) -> str:
    draw = random.Random(seed)
    sentences = [" ".join(draw.choices(WORDS, k=9)).capitalize() + "." for _ in range(12)]
    return "\n".join(sentences) + "\n"


@dataclass
class Hour:
    """The user's directory, and what each command printed, by a name of the step."""

    place: Path
    done: dict[str, subprocess.CompletedProcess] = field(default_factory=dict)

    def type(self, step: str, *words: str) -> None:
        self.done[step] = subprocess.run(
            [str(DECANT), *words],
            cwd=self.place,
            env=environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        assert self.done[step].returncode == 0, self.done[step]

    def lines(self, step: str) -> list[str]:
        return self.done[step].stdout.splitlines()

    def following(self, step: str) -> list[str]:
        """The commands that a step says to type next."""
        heads = ("next: ", "      decant ")
        lines = [line for line in self.lines(step) if line.startswith(heads)]
        return [line[6:] for line in lines]

    def json(self, step: str) -> dict:
        return json.loads(self.done[step].stdout)


@pytest.fixture(scope="module")
def hour(tmp_path_factory):
    place = tmp_path_factory.mktemp("user")
    (place / "texts").mkdir()
    for number in range(80):
        (place / "texts" / f"{number}.txt").write_text(story(number))
    own_teacher.main(place / "teacher", sorted(place.glob("texts/*")))
    hour = Hour(place)
    hour.type("init", "init", "teacher", "texts")
    hour.type("plan", *hour.following("init")[0].split()[1:])
    hour.type("precompute", *hour.following("plan")[0].split()[1:])
    hour.type("inspect", *hour.following("precompute")[0].split()[1:])
    hour.type("train", *hour.following("precompute")[1].split()[1:], "--data.epochs=1")
    (place / "sweep.toml").write_text(SWEEP)
    hour.type("sweep", "train", "train.toml", "--sweep", "sweep.toml", "--heldout-rows=4")
    evaluate, generate, export = hour.following("train")
    hour.type("evaluate", *evaluate.split()[1:])
    hour.type("report", *hour.following("evaluate")[0].split()[1:])
    hour.type("generate", *generate.split()[1:], "--prompt", "The river", "--samples=1")
    hour.type("export", *export.split()[1:], "--output", "student")
    (place / "texts" / "new.txt").write_text(story(99))
    hour.type("grow", "precompute", "precompute.toml", "--json")
    hour.type("forget", "forget", "runs/cache", "--source", "3.txt", "--quiet")
    hour.type("gc", "gc", "runs/cache", "--quiet")
    hour.type("verify", "verify", "runs/cache", "--rows=4", "--json")
    return hour


def test_every_step_says_what_it_made_and_where(hour):
    ends = {
        "init": "wrote precompute.toml and train.toml; change them as you like",
        "plan": "the capture will take about ",
        "precompute": "sealed runs/cache: ",
        "train": "finished: all ",
        "sweep": "compared 2 students in runs/sweep/comparison.json; the best is ",
        "evaluate": "evaluated runs/student after update ",
        "report": "wrote runs/report/report.html",
        "export": "wrote student: ",
    }
    for step, end in ends.items():
        assert any(line.startswith(end) for line in hour.lines(step)), hour.done[step]


def test_nothing_is_told_as_an_error_and_results_are_not_mixed_with_progress(hour):
    for step, done in hour.done.items():
        assert "error" not in done.stderr.lower(), step
        assert "warning" not in done.stderr.lower(), step
        assert "Traceback" not in done.stderr + done.stdout, step
    assert "step " in hour.done["train"].stderr
    assert "step " not in hour.done["train"].stdout
    assert "rows: " in hour.done["precompute"].stderr


def test_the_run_judges_on_some_held_out_rows_and_the_student_learned(hour):
    lines = read_metrics(hour.place / "runs/student")
    judged = [line["heldout_ce"] for line in lines if "heldout_ce" in line]
    assert judged[-1] < judged[0]
    evaluation = json.loads((hour.place / "runs/student/evaluation.json").read_text())
    assert evaluation["rows"] >= 2


def test_lines_of_the_sweep_carry_the_student_and_the_time_left_of_the_whole(hour):
    told = [line for line in hour.done["sweep"].stderr.splitlines() if " step " in line]
    assert {line.partition(":")[0] for line in told} == {
        "learning_rate=0.001 (1 of 2)",
        "learning_rate=0.01 (2 of 2)",
    }
    assert all("of the sweep" in line for line in told if "step     12 of 12  loss" in line)
    assert len(told) == 2 * 4  # the first and the last update, the first and the last judgement


def test_files_are_where_the_commands_said(hour):
    for name in ("runs/report/report.html", "runs/sweep/comparison.json", "student/README.md"):
        assert (hour.place / name).stat().st_size
    config = json.loads((hour.place / "student/config.json").read_text())
    assert config["num_hidden_layers"] == 1
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert hour.done["generate"].stdout.count("The river") == 1


def test_a_new_document_becomes_a_part_and_a_forgotten_one_is_gone(hour):
    grown, verified = hour.json("grow"), hour.json("verify")
    assert grown["parts"] == 2
    assert "new files: 1; they become part 1, counted from 0" in hour.done["grow"].stderr
    (forgot,) = hour.lines("forget")
    assert "forgot 1 documents of 3.txt" in forgot
    assert hour.done["forget"].stderr == hour.done["gc"].stderr == ""
    assert len(hour.lines("gc")) == 1
    assert verified["status"] == 0
    assert verified["problems"] == []

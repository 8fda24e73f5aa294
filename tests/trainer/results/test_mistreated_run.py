"""Whatever happens to a run's files: its student is the one that was trained, or there is an error.

Every kind of file of a run is flipped, cut, zeroed, deleted or exchanged, one at a time.
"""

import collections
import contextlib
import dataclasses
import io
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file

from decant.trainer.config import Data, Evaluate, Export, Keep, Report, Train
from decant.trainer.results.evaluate import evaluate
from decant.trainer.results.export import export
from decant.trainer.results.report import report
from decant.trainer.run.train import train
from decant.trainer.run.trained_student import load_checkpoint, weights_sha256

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
REFUSED = (ValueError, OSError, FloatingPointError)


@pytest.fixture(scope="module")
def config(noisy_run, tmp_path_factory) -> Train:
    """A run with two checkpoints, an evaluation and an exported student in its directory."""
    config = dataclasses.replace(
        noisy_run,
        run=tmp_path_factory.mktemp("whole") / "run",
        data=Data(batch_rows=2, steps=2),
        keep=Keep(last=2),
        checkpoint_every=1,
        compilation_cache=False,
        quiet=True,
    )
    train(config)
    evaluate(Evaluate(run=config.run, heldout_rows=1, batch_rows=1))
    export(Export(run=config.run, output=config.run / "exported"))
    return config


@pytest.fixture(scope="module")
def students(config) -> set[str]:
    """sha256 of the weights after one update and after two."""
    names = ("1", "2")
    found = [load_checkpoint(config.run, dtype="float32", checkpoint=name)[1] for name in names]
    return {weights_sha256(params) for params in found}


def files(run):
    return sorted(
        path for path in run.rglob("*") if path.is_file() and "exported" not in path.parts
    )


def damage(path, others, random) -> str:
    data = bytearray(path.read_bytes())
    kind = str(random.choice(["flip", "flip", "flip", "cut", "zeros", "delete", "swap"]))
    if kind == "delete" or not data:
        path.unlink()
    elif kind == "swap":
        other = others[random.integers(len(others))]
        swapped = other.read_bytes()
        other.write_bytes(data)
        path.write_bytes(swapped)
    else:
        at = int(random.integers(len(data)))
        if kind == "flip":
            data[at] ^= 1 << int(random.integers(8))
        elif kind == "cut":
            del data[at:]
        else:
            data[at : at + 512] = bytes(len(data[at : at + 512]))
        path.write_bytes(data)
    return f"{kind} {path}"


def restored(config) -> str:
    return weights_sha256(load_checkpoint(config.run, dtype="float32")[1])


def exported(config) -> str:
    output = export(Export(run=config.run, output=config.run / "out"))
    assert all(np.isfinite(x).all() for x in load_file(output / "model.safetensors").values())
    return restored(config)


def evaluated(config) -> str:
    return evaluate(Evaluate(run=config.run, cache=config.cache, heldout_rows=1, batch_rows=1))[
        "weights"
    ]


def reported(config) -> None:
    report(Report(runs=(config.run,), output=config.run / "report"))


def resumed(config) -> str:
    train(config)
    return restored(config)


OFTEN = (restored, exported, reported)
ALL = (*OFTEN, evaluated, resumed)


def mistreat(config, students, tmp_path, *, trials, seed, commands):
    """Counts of refusals and of right students, by command."""
    random, counts = np.random.default_rng(seed), collections.Counter()
    kinds = collections.defaultdict(list)
    for path in files(config.run):
        kinds[path.relative_to(config.run).parts[0], path.suffix].append(path)
    for trial in range(trials):
        copy = tmp_path / f"{trial}"
        shutil.copytree(config.run, copy)
        kind = list(kinds.values())[trial % len(kinds)]
        path = copy / kind[random.integers(len(kind))].relative_to(config.run)
        how = damage(path, files(copy), random)
        command = commands[random.integers(len(commands))]
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                used = command(dataclasses.replace(config, run=copy))
        except REFUSED:
            counts[command.__name__, "refused"] += 1
        except Exception as error:
            raise AssertionError(f"trial {trial}, {how}: {command.__name__}") from error
        else:
            assert used is None or used in students, f"trial {trial}, {how}: {command.__name__}"
            counts[command.__name__, "right"] += 1
        shutil.rmtree(copy)
    return counts


@pytest.mark.slow
def test_a_mistreated_run_gives_its_own_student_or_an_error(config, students, tmp_path):
    counts = mistreat(config, students, tmp_path, trials=14, seed=0, commands=OFTEN[::2])
    assert {outcome for _, outcome in counts} == {"refused", "right"}


@pytest.mark.mistreat
def test_a_run_mistreated_a_thousand_times(config, students, tmp_path, capsys):
    counts = mistreat(config, students, tmp_path, trials=900, seed=1, commands=OFTEN)
    counts += mistreat(config, students, tmp_path, trials=100, seed=2, commands=ALL)
    with capsys.disabled():
        print(f"\n{dict(sorted(counts.items()))}")

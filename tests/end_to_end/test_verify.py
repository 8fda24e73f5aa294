"""`verify` on good caches, and on caches captured wrong in ways that no hash can show."""

import dataclasses
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from decant.models.text.tokenizer import Tokenizer
from decant.pipelines.__main__ import main
from decant.pipelines.capture.job import precompute
from decant.pipelines.config import Attention, Hidden, Teacher
from decant.pipelines.teacher import loaded as teacher
from decant.pipelines.verification.verify import Verification, sample_rows, verify
from decant.schemas import Cache, open_cache
from decant.schemas.disk.frames import Kind, unpack
from decant.schemas.targets.draws import Draws
from tests.making.caches import (
    tiny_cache,
    tiny_settings,
    tokenizer_files,
    write_corpus,
    write_teacher,
)
from tests.making.resealed import copy_of, records_of, with_records, with_targets

SIGNALS = {"hidden": Hidden(layers=(0, 1, -1)), "attention": Attention(layers="all", heads=(2, 0))}
DRAWS = {"draws": 4, "draw_temperatures": (1.0, 2.0)}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("verify")
    write_corpus(root / "corpus", files=8, words=220)
    return root


@pytest.fixture(scope="module")
def lossless(root) -> Cache:
    return tiny_cache(root, **DRAWS, **SIGNALS, output=root / "lossless")


@pytest.fixture(scope="module")
def compact(root) -> Cache:
    narrow = {
        "hidden": Hidden(layers=(1,), dtype="int8", width=12),
        "attention": Attention(layers=(1,), heads="mean", dtype="bfloat16"),
    }
    return tiny_cache(root, profile="compact", **DRAWS, **narrow, output=root / "compact")


def verified(cache: Cache | Path, rows: int = 1000, **options) -> Verification:
    path = cache.path if isinstance(cache, Cache) else cache
    settings = {"teacher": None, "memory": path.parent / "digests.json", **options}
    return verify(path, rows=rows, **settings)


def wrong_in(result: Verification) -> set[str]:
    """Names of the figures and counts beyond their limits, without the signal."""
    assert result.unable is None
    (content,) = result.content.values()
    return {one.what for one in (*content.figures, *content.counts) if not one.fine}


def figure(result: Verification, signal: str, what: str):
    (content,) = result.content.values()
    (figure,) = [f for f in content.figures if (f.signal, f.what) == (signal, what)]
    return figure


def test_a_lossless_cache_with_every_signal_is_fine(lossless):
    result = verified(lossless)
    assert result.status == 0, wrong_in(result)
    (content,) = result.content.values()
    assert content.rows == list(range(len(lossless)))
    assert content.positions == sum(u.scored for u in lossless.manifest.parts[0].units)
    assert {figure.signal for figure in content.figures} == set(lossless.manifest.signals)
    # Positions were compared: the KL is not exactly 0.
    assert figure(result, "logits", "KL at T = 2, nats").max > 0


def test_a_compact_cache_with_narrow_signals_is_fine(compact):
    result = verified(compact)
    assert result.status == 0, wrong_in(result)
    # Values were compared: rounding shows.
    assert figure(result, "logits", "KL at T = 1, nats").mean > 1e-7
    assert figure(result, "hidden/1", "error of a state, relative").mean > 1e-3
    assert figure(result, "attention/1", "a query's total variation").mean > 1e-4


def test_a_fast_cache_is_fine(root):
    cache = tiny_cache(root, profile="fast", **DRAWS, output=root / "fast")
    assert verified(cache).status == 0


def test_a_cache_of_a_bfloat16_teacher_is_fine(root):
    config = tiny_settings(root, **DRAWS, hidden=Hidden(layers=(1,)), output=root / "bfloat16")
    narrow = Teacher(model=config.teacher.model, batch_rows=2, dtype="bfloat16")
    precompute(dataclasses.replace(config, teacher=narrow))
    result = verified(root / "bfloat16")
    assert result.status == 0, wrong_in(result)


def test_a_capture_one_position_or_one_layer_off_is_found(root, monkeypatch):
    """Logits of the previous position and states of the next layer are found in their signals."""
    original = teacher.LoadedTeacher._read

    def off_by_one(self, batch, layers):
        output = original(self, batch, {layer + 1 for layer in layers})
        states = {layer: output.layers[layer + 1] for layer in layers}
        return output._replace(hidden=jnp.roll(output.hidden, 1, axis=1), layers=states)

    monkeypatch.setattr(teacher.LoadedTeacher, "_read", off_by_one)
    narrow = Hidden(layers=(1,), dtype="int8")
    cache = tiny_cache(root, profile="compact", hidden=narrow, output=root / "off")
    result = verified(cache, rows=2)
    assert not result.structure.problems
    assert result.status == 1
    wrong = {f"KL at T = {t}, nats" for t in (1, 2, 4)} | {"error of a state, relative"}
    assert wrong <= wrong_in(result)


def test_a_cache_tokenised_by_another_tokenizer_is_found(root, monkeypatch):
    """The cache names one tokenizer, but its rows hold ids of another."""
    files = tokenizer_files(400)  # same words, fewer merges, other ids
    definition = json.loads(files["tokenizer.json"])
    definition["model"]["merges"] = definition["model"]["merges"][::3]
    files["tokenizer.json"] = json.dumps(definition).encode()

    class Other(Tokenizer):
        @classmethod
        def from_files(cls, directory):
            return Tokenizer(files, where="another")

    monkeypatch.setattr("decant.pipelines.rows.shard.Tokenizer", Other)
    cache = tiny_cache(root, output=root / "tokenizer")
    monkeypatch.undo()
    result = verified(cache, rows=4)
    assert not result.structure.problems
    assert wrong_in(result) == {"tokens spelled otherwise"}


@pytest.mark.parametrize("kind", ["lossless", "compact"])
def test_a_tail_with_half_its_mass_is_found(root, kind, request, tmp_path):
    cache = request.getfixturevalue(kind)

    def halved(targets):
        return dataclasses.replace(targets, tail_logmass=targets.tail_logmass - np.log(2))

    wrong = wrong_in(verified(with_targets(copy_of(cache, tmp_path / "c"), halved), rows=4))
    assert {"KL at T = 1, nats", "KL at T = 4, nats", "tail's mass at any node"} <= wrong


def test_one_node_of_the_tail_that_no_temperature_reads_is_found(lossless, tmp_path):
    def bent(targets):
        mass = targets.tail_logmass.copy()
        mass[:, 7] -= 0.05  # β = 7/8
        return dataclasses.replace(targets, tail_logmass=mass)

    wrong = wrong_in(verified(with_targets(copy_of(lossless, tmp_path / "c"), bent), rows=4))
    assert wrong == {"tail's mass at any node"}


def test_log_probs_that_are_all_shifted_equally_are_found(lossless, tmp_path):
    """A softmax cancels such a shift, but code that reads single log-probs would be wrong."""

    def shifted(targets):
        # A reader refuses more than 0.01.
        mass = targets.tail_logmass - 0.008 * np.array(lossless.manifest.betas, np.float32)
        return dataclasses.replace(targets, logprobs=targets.logprobs - 0.008, tail_logmass=mass)

    wrong = wrong_in(verified(with_targets(copy_of(lossless, tmp_path / "c"), shifted), rows=4))
    assert wrong == {"head and tail, off from 1"}


def test_an_id_outside_the_top_k_is_found(lossless, tmp_path):
    def other_id(targets):
        ids = targets.ids.copy()
        # The first id outside top-k and draws.
        taken = np.concatenate([ids, targets.draws.ids], axis=1)
        ids[:, -1] = [next(v for v in range(512) if v not in row) for row in taken]
        return dataclasses.replace(targets, ids=ids)

    result = verified(with_targets(copy_of(lossless, tmp_path / "c"), other_id), rows=4)
    assert "ids not of the top 8" in wrong_in(result)
    (content,) = result.content.values()
    (count,) = [c for c in content.counts if c.what == "ids not of the top 8"]
    # By chance the replacement is right at a few positions.
    assert 0.9 * content.positions < count.wrong <= content.positions


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (
            lambda t, d: Draws(t.ids[:, :4].copy(), t.logprobs[:, :4].copy(), d.betas),
            "draws of the top-k",
        ),
        (lambda t, d: Draws(d.ids, d.logprobs - 0.1, d.betas), "log-prob of draws, nats"),
        (lambda t, d: Draws(np.roll(d.ids, 1, 0), d.logprobs, d.betas), "log-prob of draws, nats"),
        (lambda t, d: Draws(d.ids, np.full_like(d.logprobs, -np.inf), d.betas), "draws missing"),
    ],
)
def test_wrong_or_missing_draws_are_found(lossless, tmp_path, change, what):
    def redrawn(targets):
        return dataclasses.replace(targets, draws=change(targets, targets.draws))

    result = verified(with_targets(copy_of(lossless, tmp_path / "c"), redrawn), rows=4)
    assert what in wrong_in(result)


def test_two_records_of_a_unit_exchanged_are_found_by_their_keys(lossless, tmp_path):
    path = copy_of(lossless, tmp_path / "c")
    first, second, *rest = records_of(path, 0)
    result = verified(with_records(path, {0: [second, first, *rest]}))
    assert [(p.unit, p.signal) for p in result.structure.problems] == [(0, "logits")] * 2
    assert all("of another row" in p.got for p in result.structure.problems)
    assert result.status == 1


def test_the_files_of_two_units_exchanged_are_found_by_their_keys(lossless, tmp_path):
    path = copy_of(lossless, tmp_path / "c")
    rows = [unit.rows for unit in lossless.manifest.parts[0].units]
    a, b = next((i, j) for i in range(len(rows)) for j in range(i) if rows[i] == rows[j])
    result = verified(with_records(path, {a: records_of(path, b), b: records_of(path, a)}))
    assert {(p.unit, p.signal) for p in result.structure.problems} == {(a, "logits"), (b, "logits")}
    assert result.status == 1


def test_records_exchanged_together_with_their_keys_are_found_by_the_teacher(lossless, tmp_path):
    path = copy_of(lossless, tmp_path / "c")
    units = {}
    for number in range(len(lossless.manifest.parts[0].units)):
        frames = [unpack(r, kind=Kind.LOGITS, where="") for r in records_of(path, number)]
        same = {}
        for i, frame in enumerate(frames):
            same.setdefault(frame.blocks[0].payload, []).append(i)  # scored at the same positions
        pair = next((group[:2] for group in same.values() if len(group) > 1), None)
        if pair:
            i, j = pair
            swapped = list(frames)
            swapped[i] = dataclasses.replace(frames[j], row_key=frames[i].row_key)
            swapped[j] = dataclasses.replace(frames[i], row_key=frames[j].row_key)
            units[number] = [frame.pack() for frame in swapped]
    assert units
    result = verified(with_records(path, units))
    assert not result.structure.problems
    assert "KL at T = 1, nats" in wrong_in(result)


def test_another_teacher_is_refused_by_name(root, lossless):
    write_teacher(root / "other", seed=1)
    result = verified(lossless, teacher=str(root / "other"))
    assert result.status == 2
    assert "other: teacher_id" in result.unable
    assert "--teacher" in result.unable
    assert not result.content


def test_a_teacher_that_moved_is_used_at_its_new_place(root, lossless):
    (root / "teacher").rename(root / "moved")
    try:
        assert "--teacher" in verified(lossless).unable
        assert verified(lossless, rows=2, teacher=str(root / "moved")).status == 0
    finally:
        (root / "moved").rename(root / "teacher")


def test_a_teacher_with_another_tokenizer_is_refused_by_name(root, lossless):
    """The cache was captured while a wrong tokenizer.json lay beside the weights."""
    file = root / "teacher" / "tokenizer.json"
    right = file.read_bytes()
    file.write_bytes(tokenizer_files(400)["tokenizer.json"])
    try:
        assert "the teacher read the rows as other text" in verified(lossless).unable
    finally:
        file.write_bytes(right)


def test_a_config_in_the_cache_that_is_not_the_teachers_is_a_problem(lossless, tmp_path):
    path = copy_of(lossless, tmp_path / "c")
    file = path / "tokenizer" / "config.json"
    file.write_text(file.read_text().replace("256", "257"))
    by_its_hash, problem = verified(path, rows=1).structure.problems
    assert by_its_hash.file == problem.file
    assert problem.file == "tokenizer/config.json"


def test_the_sample_is_the_same_each_time_and_spread_over_the_cache(lossless):
    structure = verified(lossless, rows=0).structure
    (rows,) = sample_rows(lossless.manifest, structure, rows=4)
    assert len(rows) == 4
    assert (rows[0], rows[-1]) == (0, len(lossless) - 1)
    assert sample_rows(lossless.manifest, structure, rows=4) == [rows]


def test_the_command_reports_in_json_and_by_its_exit_status(lossless, tmp_path, capsys):
    assert main(["verify", str(lossless.path), "--rows", "2", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["status"] == 0
    assert document["cache_id"] == lossless.manifest.cache_id
    assert all(f["fine"] for f in document["content"]["parts/0000"]["figures"])

    path = copy_of(lossless, tmp_path / "damaged")
    (path / "parts/0000/logits/unit-00001.array_record").unlink()
    assert main(["verify", str(path), "--rows", "2", "--json"]) == 1
    (problem,) = json.loads(capsys.readouterr().out)["problems"]
    assert problem["file"] == "parts/0000/logits/unit-00001.array_record"
    assert (problem["unit"], problem["signal"], problem["got"]) == (1, "logits", "no file")

    assert main(["verify", str(tmp_path / "nothing"), "--json"]) == 2
    assert "no such cache" in json.loads(capsys.readouterr().out)["error"]


def test_the_table_names_what_is_wrong(lossless, tmp_path, capsys):
    def halved(targets):
        return dataclasses.replace(targets, tail_logmass=targets.tail_logmass - np.log(2))

    cache = with_targets(copy_of(lossless, tmp_path / "c"), halved)
    assert main(["verify", str(cache.path), "--rows", "2"]) == 1
    out = capsys.readouterr().out
    assert "WRONG" in out
    assert "--repair cannot mend them" in out
    assert open_cache(cache.path).manifest.cache_id == cache.manifest.cache_id

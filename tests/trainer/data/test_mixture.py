"""Several caches as one stream of rows: their turns, misfits, and text without a teacher."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from decant.models.text.tokenizer import Tokenizer
from decant.pipelines.capture.rows_only import tokenise_only
from decant.pipelines.config import Corpus, Tokenise
from decant.schemas import Cache, open_cache
from decant.schemas.signals import HiddenSignal, LogitsSignal
from decant.schemas.targets.targets import BETAS, EIGHTHS
from decant.trainer.config import Data, Loss, MixedCache, Student, Train
from decant.trainer.data.batches import Batches, number_of_updates
from decant.trainer.data.mixture import MixtureReader, Turns, check_mixture
from decant.trainer.loss.layer_pairs import HiddenPair, Pairs
from decant.trainer.run.metrics_log import read_metrics
from decant.trainer.run.train import train
from tests.making.caches import tokenizer_files, write_corpus


class FakeCache(Cache):
    """`rows` train rows with numbers from 100. All tokens and all `k` stored ids of row r are r."""

    def __init__(
        self,
        name,
        *,
        rows=20,
        k=2,
        nodes=7,
        teacher="t",
        draws=0,
        logits=True,
        axes=(0, 1),
        **others,
    ):
        self._axes = list(axes)
        self.path, self._rows, self._k = Path(name), rows, k
        self._nodes, self._draws, self._logits = nodes, draws, logits
        signals = {}
        if logits:
            betas = BETAS if nodes == 7 else EIGHTHS
            signals["logits"] = LogitsSignal(
                k, draws, (1.0,), betas, signal_id="s", teacher_id=teacher, profile="lossless"
            )
        self.manifest = SimpleNamespace(
            rows_id=f"rows-{name}",
            forgotten_id="",
            source_weights={},
            parts=(),
            writers=(),
            signals={**signals, **others.pop("signals", {})},
            logits=signals.get("logits"),
            **{"tokenizer": "tok", "vocabulary_size": 9, "sequence_length": 4, **others},
        )

    def directions(self, name):
        return np.eye(2)[self._axes]

    def rows(self, split=None):
        return np.arange(100, 100 + self._rows)

    def read(self, numbers, signals=("logits",), decode=True, targets=None):
        numbers = np.asarray(numbers)
        ones = np.ones((len(numbers), 4), np.int32)
        out = {"tokens": ones * numbers[:, None], "loss_mask": ones > 0}
        if "logits" in signals:
            assert self._logits
            out["topk_ids"] = np.repeat((ones * numbers[:, None])[..., None], self._k, -1)
            out["topk_logprobs"] = np.full((*ones.shape, self._k), -1.0, np.float32)
            betas = BETAS if self._nodes == 7 else EIGHTHS
            out["tail_logmass"] = np.broadcast_to(np.float32(betas), (*ones.shape, self._nodes))
            if self._draws:
                out["tail_ids"] = np.zeros((*ones.shape, self._draws), np.int32)
                for name in ("tail_logprobs", "tail_logweights"):
                    out[name] = np.zeros((*ones.shape, self._draws), np.float32)
        return out


def mixed(*weights, **settings):
    caches = tuple(MixedCache(Path(f"other-{i}"), weight) for i, weight in enumerate(weights))
    return Data(**{"batch_rows": 4, "caches": caches, **settings})


def batches_of(config, *others, main=None):
    return Batches(main or FakeCache("main"), config=config, others=others)


def test_every_stretch_of_rows_has_about_each_cache_s_share():
    turns = Turns([0.5, 0.3, 0.2])
    owners = np.array([turns.at(row)[0] for row in range(3000)])
    for start in range(0, 2900, 37):
        counts = np.bincount(owners[start : start + 100], minlength=3)
        np.testing.assert_allclose(counts, [50, 30, 20], atol=4)


@pytest.mark.parametrize("start", [0, 65_536 - 30, 3 * 65_536 - 30])
def test_a_cache_s_turns_count_its_rows_also_across_blocks(start):
    """Each cache's count grows by one at each of its rows; the counts sum to the row's number."""
    turns, counts = Turns([0.7, 0.3]), {}
    for row in range(start, start + 90):
        owner, before = turns.at(row)
        assert before == counts.setdefault(owner, before), row
        counts[owner] += 1
        assert len(counts) < 2 or sum(counts.values()) == row + 1


def test_each_cache_s_rows_come_once_before_any_comes_again():
    batches = batches_of(mixed(1.0), FakeCache("other", rows=20))
    rows = [row for _ in range(12) for row in batches.next()["rows"].tolist()]
    batches.close()
    for name in ("main", "other"):
        numbers = [row for row in rows if row.startswith(name)]
        assert sorted(numbers[:20]) == [f"{name}:{100 + i}" for i in range(20)]


def test_a_mixture_is_continued_exactly_from_every_position():
    config, other = mixed(0.5), FakeCache("other", rows=7)
    batches, states, sequence = batches_of(config, other), [], []
    for _ in range(9):
        states.append(json.loads(json.dumps(batches.state())))
        sequence.append(batches.next()["rows"].tolist())
    batches.close()
    for position in (0, 1, 4, 8):
        again = batches_of(config, other)
        again.restore(states[position])
        assert [again.next()["rows"].tolist() for _ in range(9 - position)] == sequence[position:]
        again.close()


@pytest.mark.parametrize(
    ("config", "other"),
    [(mixed(0.6), FakeCache("other")), (mixed(0.5), FakeCache("another"))],
    ids=["another weight", "another cache"],
)
def test_a_position_in_another_mixture_is_refused(config, other):
    batches, now = batches_of(mixed(0.5), FakeCache("other")), batches_of(config, other)
    with pytest.raises(ValueError, match="caches: saved"):
        now.restore(batches.state())
    now.restore(batches.state(), allows=lambda name: name == "data.caches")
    batches.close()
    now.close()


def test_in_batches_of_another_size_the_next_row_is_the_same_one():
    """If `allows` permits it. A position saved after that is continued exactly too."""
    config = Data(batch_rows=4)
    rows, batches = [], batches_of(config)
    for _ in range(4):
        rows += batches.next()["rows"].tolist()
    batches.close()
    once, then = batches_of(config), batches_of(dataclasses.replace(config, batch_rows=3))
    once.next()
    state = once.state()
    with pytest.raises(ValueError, match="batch_rows: saved 4, now 3"):
        then.restore(state)
    then.restore(state, allows=lambda name: name == "data.batch_rows")
    numbers = then.next()["rows"].tolist()
    saved = then.state()
    numbers += then.next()["rows"].tolist()
    assert numbers == rows[4:10]
    again = batches_of(dataclasses.replace(config, batch_rows=3))
    again.restore(saved)
    assert again.next()["rows"].tolist() == rows[7:10]
    for batches in (once, then, again):
        batches.close()


def test_arrays_are_as_wide_as_the_widest_and_padded_as_absent():
    caches = [FakeCache("a", k=2, nodes=9), FakeCache("b", k=5), FakeCache("text", logits=False)]
    reader = MixtureReader(caches, signals=())
    got = reader.read(np.array([1, 0, 2, 0]), np.array([101, 102, 103, 104]))
    assert got["tokens"][:, 0].tolist() == [101, 102, 103, 104]
    assert got["topk_ids"].shape == (4, 4, 5)
    assert got["topk_ids"][1, 0].tolist() == [102, 102, 0, 0, 0]
    assert np.isneginf(got["topk_logprobs"][1, :, 2:]).all()
    assert np.isneginf(got["topk_logprobs"][2]).all()
    assert np.isneginf(got["tail_logmass"][2]).all()
    # Nodes that only the lossless profile has are left out; values here equal their β.
    np.testing.assert_array_equal(got["tail_logmass"][[0, 1]], np.broadcast_to(BETAS, (2, 4, 7)))
    same_shapes = reader.read(np.array([2]), np.array([103]))
    assert same_shapes["topk_ids"].shape == (1, 4, 5)


def test_draws_are_read_if_every_cache_with_targets_has_them():
    drawn, text = FakeCache("d", draws=3), FakeCache("text", logits=False)
    reader = MixtureReader([drawn, FakeCache("e", draws=2), text], signals=())
    got = reader.read(np.array([1, 2]), np.array([101, 102]))
    assert got["tail_logweights"].shape == (2, 4, 3)
    assert np.isneginf(got["tail_logweights"][0, :, 2:]).all()
    assert np.isneginf(got["tail_logweights"][1]).all()
    assert "tail_ids" not in MixtureReader([drawn, FakeCache("f")], signals=())._shapes


def hidden(**changes):
    fields = {"dtype": "int8", "width": 8, "teacher_width": 8, "shard_rows": 4, **changes}
    return {"hidden/2": HiddenSignal("s", "t", 2, **fields)}


@pytest.mark.parametrize(
    ("other", "loss", "message"),
    [
        ({"vocabulary_size": 8}, {}, "vocabulary size 8, but main has 9"),
        ({"sequence_length": 8}, {}, "sequence length 8, but main has 4"),
        ({}, {"tail": "sampled"}, "o: holds the top .* but no draws"),
        ({"teacher": "u"}, {"tail": "prior"}, "another teacher than main .* --loss.tail sampled"),
        ({"signals": {}}, {}, "its hidden/2 is missing"),
        ({"signals": hidden(width=4)}, {}, "its hidden/2 is int8, width 4"),
    ],
)
def test_caches_that_do_not_fit_each_other_are_refused_by_name(other, loss, message):
    main = FakeCache("main", draws=2, signals=hidden())
    there = FakeCache("o", **{"signals": hidden(shard_rows=8), **other})
    pairs = Pairs(hidden=((HiddenPair(2, "hidden/2", 8),),))
    with pytest.raises(ValueError, match=message):
        check_mixture(main, [there], loss=Loss(**{"tail": "bucket", **loss}), pairs=pairs)
    fits = FakeCache("o", teacher="u", signals=hidden(shard_rows=8))
    check_mixture(
        main, [fits, FakeCache("text", logits=False)], loss=Loss(tail="bucket"), pairs=pairs
    )


def with_tokenizer(name, **changes):
    """A cache that has the files of a tokenizer: `changes` replace fields of its model."""
    cache, files = FakeCache(name), tokenizer_files(300)
    definition = json.loads(files["tokenizer.json"])
    definition["model"] |= changes
    files["tokenizer.json"] = json.dumps(definition).encode()
    cache.tokenizer_files = lambda: files
    cache.manifest.tokenizer = Tokenizer(files, where=name).digest_before_0_8
    return cache


def test_another_tokenizer_is_refused_by_what_differs_but_another_spelling_is_not():
    main, loss = with_tokenizer("main"), Loss(tail="bucket")
    model = json.loads(tokenizer_files(300)["tokenizer.json"])["model"]
    spelt = with_tokenizer("o", merges=[" ".join(pair) for pair in model["merges"]])
    assert spelt.manifest.tokenizer != main.manifest.tokenizer
    check_mixture(main, [spelt], loss=loss, pairs=Pairs())
    fewer = with_tokenizer("o", merges=model["merges"][:-1])
    with pytest.raises(ValueError, match=r"o: captured with another tokenizer than main; .* id 2"):
        check_mixture(main, [fewer], loss=loss, pairs=Pairs())


def test_states_along_other_directions_are_refused():
    """Equal directions are accepted, even in a file of another name."""
    pairs, loss = Pairs(hidden=((HiddenPair(2, "hidden/2", 8),),)), Loss(tail="bucket")
    main = FakeCache("main", signals=hidden(directions="a.npy", teacher_width=9))
    along = {"signals": hidden(directions="b.npy", teacher_width=9, variance_kept=0.5)}
    check_mixture(main, [FakeCache("o", **along)], loss=loss, pairs=pairs)
    with pytest.raises(ValueError, match=r"o: its hidden/2 is int8, width 8, .* in main is"):
        check_mixture(main, [FakeCache("o", axes=(1, 0), **along)], loss=loss, pairs=pairs)


def test_epochs_count_passes_over_the_main_cache():
    """20 rows of the main cache, 20 and 10 of the others: 50 rows, in batches of 4."""
    assert number_of_updates(FakeCache("main"), config=mixed(1.0, 0.5)) == 12


@pytest.fixture(scope="module")
def text(cache, tmp_path_factory) -> Cache:
    """Rows of other text without targets, with the tokenizer and row length of `cache`."""
    root = tmp_path_factory.mktemp("text")
    write_corpus(root / "corpus", files=3, words=300)
    config = Tokenise(
        like=cache.path,
        corpus=Corpus(files=(str(root / "corpus" / "*.txt"),), heldout=0.0),
        output=root / "rows",
    )
    tokenise_only(config)
    before = (root / "rows" / "manifest.json").read_bytes()
    tokenise_only(config)  # changes nothing
    assert (root / "rows" / "manifest.json").read_bytes() == before
    return open_cache(root / "rows")


def test_a_cache_of_rows_alone_is_refused_as_the_main_cache(text, cache, tmp_path):
    assert text.manifest.signals == {}
    assert text.manifest.tokenizer == cache.manifest.tokenizer
    row = text.read([0], signals=())
    assert row["tokens"].shape == (1, cache.manifest.sequence_length)
    assert row["loss_mask"].sum() > 10
    with pytest.raises(ValueError, match="no signal 'logits'"):
        text.read([0])
    with pytest.raises(ValueError, match=r"decant tokenise.* \[\[data.caches\]\]"):
        train(Train(cache=text.path, run=tmp_path / "run", loss=Loss(tail="bucket")))


def test_a_student_learns_from_two_caches_and_text_at_once(
    cache, whole_cache, text, root, tmp_path
):
    """Caches with k = 8, with k = 512 and without targets."""
    others = (MixedCache(whole_cache.path, 0.5), MixedCache(text.path, 0.5))
    config = Train(
        cache=cache.path,
        run=tmp_path / "run",
        student=Student(init="scratch", layers=1),
        data=Data(batch_rows=4, steps=30, caches=others),
        loss=Loss(alpha=0.5, tail="prior", chunk_tokens=64),
        heldout_rows=2,
    )
    train(config)
    lines = read_metrics(config.run)
    losses = [line["loss"] for line in lines if "loss" in line]
    assert np.mean(losses[-5:]) < losses[0] - 0.5
    bound = json.loads((config.run / "run.json").read_text())
    assert bound["data.caches[0].rows_id"] == whole_cache.manifest.rows_id
    assert "data.caches[1].signal_id logits" not in bound
    elsewhere = (MixedCache(text.path, 0.5), MixedCache(whole_cache.path, 0.5))
    with pytest.raises(ValueError, match=r"data.caches\[0\].rows_id: this run has"):
        train(dataclasses.replace(config, data=dataclasses.replace(config.data, caches=elsewhere)))

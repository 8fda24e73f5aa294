"""`Cache.read` gives counts and sketches of the positions that `logits` scores."""

import dataclasses

import numpy as np
import pytest

from decant.schemas import Cache, codecs, open_cache
from decant.schemas.disk.array_record import RecordReaders
from decant.schemas.disk.frames import Kind, unpack
from decant.schemas.disk.layout import COUNTS, LOGITS, SKETCH, part_layout
from decant.schemas.reading.record_signals import RecordSignals
from decant.schemas.targets import sketch as sketches
from decant.schemas.targets.targets import BETAS, Targets
from tests.making.caches import tiny_cache
from tests.making.companions import DRAWS, RANK, drawn, sketch_statistics, sketched, with_companions
from tests.making.grown import make_grown
from tests.making.resealed import copy_of

KEYS = {"count_ids", "counts", "sketch", "sketch_basis"}
DRAWN = {"tail_ids", "tail_logprobs", "tail_logweights"}
OPTIONAL = {*KEYS, *DRAWN, "label_logprobs"}
ROWS = {"tokens", "segment_ids", "positions", "loss_mask"}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return tiny_cache(tmp_path_factory.mktemp("companions"), shard_bytes=2048, draws=3)


@pytest.fixture(scope="module")
def cache(plain):
    return with_companions(copy_of(plain, plain.path.with_name("with")))


def expected(out, *, draws=DRAWS):
    """Counts and sketches of the scored positions, made from the targets that were read."""
    scored = out["loss_mask"]
    head = Targets(
        out["topk_ids"][scored],
        out["topk_logprobs"][scored],
        np.zeros((int(scored.sum()), len(BETAS)), np.float32),
    )
    return drawn(head, vocabulary=512, draws=draws), sketched(head)


def require_equal(out, *, draws=DRAWS):
    counts, sketch = expected(out, draws=draws)
    scored, width = out["loss_mask"], counts.ids.shape[1]
    for name, values in (("count_ids", counts.ids), ("counts", counts.counts)):
        assert out[name].dtype == np.int32
        np.testing.assert_array_equal(out[name][scored][:, :width], values)
        assert not out[name][scored][:, width:].any()
        assert not out[name][~scored].any()
    assert (out["counts"].sum(2)[scored] == draws).all()
    np.testing.assert_array_equal(out["sketch"][scored], sketch)
    assert not out["sketch"][~scored].any()


def test_logits_bring_the_counts_and_the_sketch_that_the_cache_holds(cache):
    rows = cache.rows()[::-1]
    out = cache.read(rows)
    assert out.keys() >= KEYS
    assert out["counts"].shape[2] == DRAWS
    assert out["sketch"].shape[2] == RANK
    assert out["sketch_basis"].tolist() == [0] * len(rows)
    require_equal(out)


@pytest.mark.parametrize(
    ("signals", "targets", "keys"),
    [
        (("logits",), None, OPTIONAL),
        (("logits",), ("counts",), {"count_ids", "counts"}),
        (("logits",), ("sketch",), {"sketch", "sketch_basis"}),
        (("logits",), ("draws",), DRAWN),
        (("logits",), ("labels",), {"label_logprobs"}),
        (("logits",), ("sketch", "labels"), {"sketch", "sketch_basis", "label_logprobs"}),
        (("logits",), (), set()),
        (("counts",), None, {"count_ids", "counts"}),
        (("sketch",), (), {"sketch", "sketch_basis"}),
        (("sketch", "counts"), None, KEYS),
    ],
)
def test_only_what_was_asked_for_is_read(cache, signals, targets, keys):
    rows = cache.rows()[:3]
    out, everything = cache.read(rows, signals, targets=targets), cache.read(rows)
    assert out.keys() & OPTIONAL == keys
    assert ("topk_ids" in out) == ("logits" in signals)
    for name, array in out.items():
        np.testing.assert_array_equal(array, everything[name])


def test_a_cache_without_them_reads_as_before_and_says_what_it_lacks(plain):
    assert not KEYS & plain.read([0]).keys()
    for asked in ({"signals": ("counts",)}, {"targets": ("counts",)}):
        with pytest.raises(ValueError, match="no signal 'counts'"):
            plain.read([0], **asked)
    with pytest.raises(ValueError, match="'hidden/1'; expected some of draws, labels, counts"):
        plain.read([0], targets=("hidden/1",))
    with pytest.raises(ValueError, match="no signal 'sketch'"):
        plain.sketch_heads()


def test_a_cache_says_which_targets_it_holds(plain, cache):
    assert plain.targets == ("draws", "labels")
    assert cache.targets == ("draws", "labels", "counts", "sketch")
    signals = {**plain.manifest.signals}
    signals[LOGITS] = dataclasses.replace(plain.manifest.logits, draws=0)
    part = dataclasses.replace(plain.manifest.parts[0], signals=signals)
    undrawn = Cache(plain.path, dataclasses.replace(plain.manifest, parts=(part,)))
    with pytest.raises(ValueError, match=r"'draws'; of draws, .* this cache holds labels$"):
        undrawn.read([0], targets=("labels", "draws"))


def test_damage_in_a_field_that_is_not_decoded_is_found(plain):
    part = plain.manifest.parts[0]
    file = part_layout(plain.path, 0).records(LOGITS, 0)
    (record,) = RecordReaders().read(file, [0], expected=part.units[0].files[LOGITS])
    labels = unpack(record, kind=Kind.LOGITS, where="").block(codecs.LABELS, where="").payload
    at = record.index(labels) + len(labels) // 2
    damaged = record[:at] + bytes([record[at] ^ 1]) + record[at + 1 :]
    signals = RecordSignals(plain.path, plain.manifest)
    out = {"loss_mask": np.ones((1, 64), bool), **signals.allocate(1, (LOGITS,), targets=())}
    assert "label_logprobs" not in out

    def fill(data):
        signals.fill((LOGITS,), [part], [plain.row_key(0)], lambda _: [(data, "record 0")], out)

    fill(record)
    with pytest.raises(ValueError, match="record 0: checksum mismatch"):
        fill(damaged)


def test_a_row_skipped_when_they_were_added_has_no_target_at_all(plain):
    path = copy_of(plain, plain.path.with_name("skipped"))
    cache = with_companions(path, skipped=[(0, 1)])
    out = cache.read([0, 1, 2])
    assert not out["loss_mask"][1].any()
    assert out["loss_mask"][[0, 2]].any(1).all()
    assert not out["counts"][1].any()
    assert not out["sketch"][1].any()
    require_equal({name: array[[0, 2]] for name, array in out.items()})


def test_the_sketch_head_is_the_parts_statistic(cache):
    stored = sketch_statistics(512)
    head = cache.sketch_head()
    assert head.head.dtype == np.float32
    np.testing.assert_array_equal(head.head, stored[sketches.HEAD].astype(np.float32))
    np.testing.assert_array_equal(head.bias, stored[sketches.BIAS])
    assert cache.sketch_heads()[0] is head


@pytest.mark.parametrize("equal", [True, False])
def test_parts_with_one_basis_share_its_head(tmp_path, equal):
    grown = make_grown(tmp_path)
    cache = with_companions(
        grown.cache.path, seeds=lambda part: 0 if equal else part, draws=lambda part: 8 + 4 * part
    )
    out = cache.read(cache.rows())
    ends = np.cumsum([sum(unit.rows for unit in part.units) for part in cache.manifest.parts])
    first = np.searchsorted(ends, cache.rows(), side="right") == 0
    assert out["counts"].shape[2] == 12
    assert out["counts"].sum(2).max(1)[first].tolist() == [8] * first.sum()
    assert out["counts"].sum(2).max(1)[~first].tolist() == [12] * (~first).sum()
    if equal:
        assert len(cache.sketch_heads()) == 1
        assert not out["sketch_basis"].any()
        return
    np.testing.assert_array_equal(out["sketch_basis"], (~first).astype(np.int32))
    for number, head in enumerate(cache.sketch_heads()):
        stored = sketch_statistics(512, seed=number)
        np.testing.assert_array_equal(head.bias, stored[sketches.BIAS])
    with pytest.raises(ValueError, match="2 sketch heads; use `sketch_heads"):
        cache.sketch_head()


@pytest.mark.parametrize("name", [COUNTS, SKETCH])
def test_a_damaged_record_is_named_with_its_file(cache, name):
    path = copy_of(cache, cache.path.with_name(f"damaged-{name}"))
    file = part_layout(path, 0).records(name, 0)
    data = bytearray(file.read_bytes())
    at = data.rindex(b"DCNT")
    data[at + 40] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match=f"{name}/unit-00000.array_record"):
        open_cache(path).read([0, 1, 2, 3])


def test_a_statistic_of_another_shape_is_named(plain, monkeypatch):
    path = copy_of(plain, plain.path.with_name("shape"))
    made = sketch_statistics(512)
    made[sketches.BIAS] = made[sketches.BIAS][:-1]
    monkeypatch.setattr("tests.making.companions.sketch_statistics", lambda *_, **__: made)
    cache = with_companions(path)
    with pytest.raises(ValueError, match=r"sketch-bias.npy: expected finite float32 numbers of"):
        cache.sketch_heads()

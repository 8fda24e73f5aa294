"""Decoding logits records together gives the same as each alone; errors name the record."""

import dataclasses

import numpy as np
import pytest

from decant.schemas import codecs
from decant.schemas.codecs import Profile, Tables, fit
from decant.schemas.disk.frames import Kind, unpack
from decant.schemas.records.logits import (
    LogitsRecord,
    decode_logits,
    encode_logits,
    field_bytes,
    group_for_decoding,
    open_logits,
)
from decant.schemas.signals import TargetSpec
from decant.schemas.targets.targets import Targets
from tests.formulas import sampling
from tests.schemas.codecs.test_codecs import zipf_logits

PROFILES: tuple[Profile, ...] = ("lossless", "fast", "compact")
VOCABULARY, LENGTH = 700, 60
SPEC = TargetSpec(k=8, draws=5)


def targets_of(n: int, *, k: int = 8, m: int = 5, seed: int = 0) -> Targets:
    logits = zipf_logits(max(n, 1), VOCABULARY, seed=seed)
    # Levels far from the last level, and nodes far from their prediction, need escapes.
    logits[: n // 3, 0] += 80
    starts = np.random.default_rng(seed).random(len(logits))
    return sampling.with_draws(logits, starts, k=k, m=m, betas=(0.5, 1.0))[:n]


def written(profile: Profile, sizes: list[int], **shape: int) -> tuple[list[bytes], Tables]:
    """Records of rows whose last `sizes[i]` positions are scored."""
    tables = fit(profile, targets_of(280, seed=9, **shape), vocabulary=VOCABULARY)
    records = [
        encode_logits(
            targets_of(n, seed=i, **shape),
            row_key=bytes([i]) * 16,
            scored=np.arange(LENGTH) >= LENGTH - n,
            profile=profile,
            tables=tables,
            vocabulary=VOCABULARY,
        )
        for i, n in enumerate(sizes)
    ]
    return records, tables


def opened(records: list[bytes]) -> list[LogitsRecord]:
    return [
        open_logits(data, where=f"record {i}", length=LENGTH, spec=SPEC)
        for i, data in enumerate(records)
    ]


def arrays_of(targets: Targets) -> list[np.ndarray]:
    assert targets.draws
    return [
        *(targets.ids, targets.logprobs, targets.tail_logmass),
        *(targets.draws.ids, targets.draws.logprobs),
    ]


@pytest.mark.parametrize("profile", PROFILES)
def test_records_decode_together_as_each_does_alone(profile, monkeypatch):
    # Several groups of positions in records of this size.
    monkeypatch.setattr("decant.schemas.codecs.compact._ENTRIES_PER_FRAME", 16)
    records, tables = written(profile, [60, 1, 37, 60])
    records = opened(records)
    shared = {"tables": tables, "vocabulary": VOCABULARY}
    alone = [arrays_of(decode_logits([record], **shared)) for record in records]
    together = arrays_of(decode_logits(records, **shared))
    for each, whole in zip(zip(*alone, strict=True), together, strict=True):
        np.testing.assert_array_equal(np.concatenate(each), whole)


@pytest.mark.parametrize("profile", PROFILES)
def test_a_damaged_record_in_a_group_is_named(profile):
    records, tables = written(profile, [60, 37, 60])
    frame = unpack(records[1], kind=Kind.LOGITS, where="")
    for number, block in enumerate(
        frame.blocks[2:], start=2
    ):  # damage that the record's checksum does not cover
        blocks = list(frame.blocks)
        blocks[number] = type(block)(block.field, block.codec, block.payload[:-1])
        damaged = type(frame)(frame.kind, frame.row_key, frame.positions, tuple(blocks)).pack()
        with pytest.raises(ValueError, match=r"^record 1: .*\d"):
            decode_logits(
                opened([records[0], damaged, records[2]]), tables=tables, vocabulary=VOCABULARY
            )


def test_groups_share_a_key_and_are_bounded_and_leave_out_rows_without_targets(monkeypatch):
    first, _ = written("compact", [60, 0, 20, 60])
    other_k, _ = written("compact", [60], k=4)
    other_draws, _ = written("compact", [60, 60], m=3)
    other_codec, _ = written("lossless", [10])
    records = opened([*first, *other_k, *other_draws, *other_codec])
    assert list(group_for_decoding(records)) == [[0, 2, 3], [4], [5, 6], [7]]
    monkeypatch.setattr("decant.schemas.records.logits._ENTRIES_AT_ONCE", 2 * 8 * LENGTH)
    assert list(group_for_decoding(records)) == [[0, 2], [3], [4], [5, 6], [7]]
    monkeypatch.setattr("decant.schemas.records.logits._ENTRIES_AT_ONCE", 1)
    assert list(group_for_decoding(records)) == [[0], [2], [3], [4], [5], [6], [7]]


@pytest.mark.parametrize("k", [0, 8])
def test_a_record_has_labels_exactly_if_the_manifest_says_so(k):
    whole = targets_of(20, k=max(k, 1), m=0)
    targets = Targets(
        *(array[:, : array.shape[1] if k else 0] for array in (whole.ids, whole.logprobs)),
        whole.tail_logmass if k else whole.tail_logmass[:, :0],
    )
    labels = -np.arange(20, dtype=np.float32)
    for labelled in (False, True):
        some = dataclasses.replace(targets, label_logprobs=labels if labelled else None)
        data = encode_logits(
            some,
            row_key=bytes(16),
            scored=np.arange(LENGTH) < 20,
            profile="lossless",
            tables=Tables({}),
            vocabulary=VOCABULARY,
        )
        how = {"where": "here", "length": LENGTH}
        record = open_logits(data, spec=TargetSpec(k, labels=labelled), **how)
        assert list(group_for_decoding([record])) == [[0]]
        stored = decode_logits([record], tables=Tables({}), vocabulary=VOCABULARY)
        assert stored.k == k
        assert (stored.label_logprobs is not None) == labelled
        np.testing.assert_array_equal(stored.ids, targets.ids)
        with pytest.raises(ValueError, match="log-probabilities of labels"):
            open_logits(data, spec=TargetSpec(k, labels=not labelled), **how)
        assert field_bytes(data, where="here").keys() >= ({"labels"} if labelled else set())


@pytest.mark.parametrize("profile", PROFILES)
def test_without_draws_and_labels_a_record_decodes_to_the_same_head(profile):
    targets = targets_of(LENGTH)
    labelled = dataclasses.replace(targets, label_logprobs=targets.logprobs[:, 0])
    tables = fit(profile, targets, vocabulary=VOCABULARY)
    shared = {"tables": tables, "vocabulary": VOCABULARY}
    scored = np.ones(LENGTH, bool)
    data = encode_logits(labelled, row_key=bytes(16), scored=scored, profile=profile, **shared)
    spec = dataclasses.replace(SPEC, labels=True)
    record = open_logits(data, where="", length=LENGTH, spec=spec)
    whole = decode_logits([record], **shared)
    bare = decode_logits([record.without([codecs.DRAWS, codecs.LABELS])], **shared)
    assert whole.draws is not None
    assert whole.label_logprobs is not None
    assert bare.draws is bare.label_logprobs is None
    for name in ("ids", "logprobs", "tail_logmass"):
        np.testing.assert_array_equal(getattr(bare, name), getattr(whole, name))

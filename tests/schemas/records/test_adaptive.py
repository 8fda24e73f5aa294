"""Records of adaptive heads: each position has its own number of ids."""

import dataclasses

import numpy as np
import pytest

from decant.schemas import codecs
from decant.schemas.codecs import Profile, Tables, counts_field, fit, sizes_field
from decant.schemas.disk.frames import Block, Frame, Kind, unpack
from decant.schemas.records.logits import (
    LogitsRecord,
    decode_logits,
    encode_logits,
    group_for_decoding,
    open_logits,
)
from decant.schemas.signals import TargetSpec
from decant.schemas.targets.sizes import shortened, sizes_for
from decant.schemas.targets.targets import Targets
from tests.schemas.codecs.test_codecs import from_logits, zipf_logits
from tests.schemas.codecs.test_counts import drawn

PROFILES: tuple[Profile, ...] = ("lossless", "fast", "compact")
VOCABULARY, LENGTH, K, MASS = 700, 300, 24, 0.8
SPEC = TargetSpec(K, labels=True, mass=MASS)
HOW = {"length": LENGTH, "spec": SPEC}


def targets_of(n: int, *, seed: int = 0) -> Targets:
    logits = zipf_logits(max(n, 1), VOCABULARY, seed=seed) * 2.5
    labels = -np.random.default_rng(seed).exponential(3, size=len(logits)).astype(np.float32)
    return dataclasses.replace(from_logits(logits, k=K), label_logprobs=labels)[:n]


def tables_of(profile: Profile) -> Tables:
    return fit(profile, targets_of(400, seed=9), vocabulary=VOCABULARY, mass=MASS)


def record_of(targets: Targets, profile: Profile, tables: Tables, *, mass=MASS) -> bytes:
    return encode_logits(
        targets,
        row_key=bytes(16),
        scored=np.arange(LENGTH) < len(targets),
        profile=profile,
        tables=tables,
        vocabulary=VOCABULARY,
        mass=mass,
    )


def opened(records: list[bytes]) -> list[LogitsRecord]:
    return [open_logits(data, where=f"record {i}", **HOW) for i, data in enumerate(records)]


def arrays_of(targets: Targets) -> list[np.ndarray]:
    assert targets.label_logprobs is not None
    assert targets.sizes is not None
    labels, sizes = targets.label_logprobs, targets.sizes
    return [targets.ids, targets.logprobs, targets.tail_logmass, labels, sizes]


def test_lossless_keeps_the_ids_that_hold_the_mass_bit_for_bit():
    targets = targets_of(250)
    data = record_of(targets, "lossless", Tables({}))
    stored = decode_logits(opened([data]), tables=Tables({}), vocabulary=VOCABULARY)
    sizes = sizes_for(targets.logprobs, mass=MASS)
    assert len(np.unique(sizes)) >= 3
    expected = shortened(targets, sizes)
    np.testing.assert_array_equal(stored.sizes, sizes)
    np.testing.assert_array_equal(stored.label_logprobs, targets.label_logprobs)
    np.testing.assert_array_equal(stored.ids, expected.ids)
    np.testing.assert_array_equal(stored.logprobs, expected.logprobs)
    np.testing.assert_allclose(stored.tail_logmass, expected.tail_logmass, atol=1e-6)
    # Each position has the mass that was asked for, or all k ids.
    mass = np.exp(stored.logprobs.astype(np.float64)).sum(1)
    assert ((mass >= MASS - 1e-6) | (sizes == K)).all()


@pytest.mark.parametrize("profile", ["fast", "compact"])
def test_rounding_codecs_keep_each_positions_ids_and_distribution(profile):
    targets, tables = targets_of(250), tables_of(profile)
    stored = decode_logits(
        opened([record_of(targets, profile, tables)]), tables=tables, vocabulary=VOCABULARY
    )
    assert stored.sizes is not None
    for position, size in enumerate(stored.sizes.tolist()):
        expected = set(targets.ids[position, :size].tolist())
        assert set(stored.ids[position, :size].tolist()) == expected
        assert not stored.ids[position, size:].any()
    total = np.exp(stored.logprobs).sum(1) + np.exp(stored.tail_logmass[:, -1])
    np.testing.assert_allclose(total, 1, atol=1e-5)
    expected = shortened(targets, stored.sizes).tail_logmass
    np.testing.assert_allclose(stored.tail_logmass, expected, atol=0.15)


@pytest.mark.parametrize("profile", PROFILES)
def test_records_decode_together_as_each_does_alone(profile):
    tables = tables_of(profile)
    records = [record_of(targets_of(n, seed=n), profile, tables) for n in (300, 1, 0, 77)]
    shared = {"tables": tables, "vocabulary": VOCABULARY}
    whole = opened(records)
    assert list(group_for_decoding(whole)) == [[0, 1, 3]]
    some = [record for record in whole if record.positions]
    together = arrays_of(decode_logits(some, **shared))
    at = 0
    for record in some:
        n = record.positions
        for mine, all_of in zip(
            arrays_of(decode_logits([record], **shared)), together, strict=True
        ):
            np.testing.assert_array_equal(mine, all_of[at : at + n])
        at += n


@pytest.mark.parametrize("profile", PROFILES)
def test_targets_that_were_read_are_written_with_the_ids_they_have(profile):
    """As `gc` does with what is left of a row."""
    tables, shared = tables_of(profile), {"vocabulary": VOCABULARY}
    (record,) = opened([record_of(targets_of(250), profile, tables)])
    kept = decode_logits([record], tables=tables, **shared)[5:60]
    for mass in (None, MASS):
        (again,) = opened([record_of(kept, profile, tables, mass=mass)])
        stored = decode_logits([again], tables=tables, **shared)
        np.testing.assert_array_equal(stored.sizes, kept.sizes)
        np.testing.assert_array_equal(stored.ids, kept.ids)


def test_a_record_unlike_the_manifest_is_refused():
    targets = targets_of(50)
    adaptive, equal = (record_of(targets, "lossless", Tables({}), mass=m) for m in (MASS, None))
    for data, spec in ((adaptive, TargetSpec(K, labels=True)), (equal, SPEC)):
        with pytest.raises(ValueError, match=r"here: its positions store \w+ numbers of ids"):
            open_logits(data, where="here", length=LENGTH, spec=spec)
    with pytest.raises(ValueError, match="manifest says 2"):
        open_logits(
            adaptive, where="here", length=LENGTH, spec=TargetSpec(2, labels=True, mass=MASS)
        )


@pytest.mark.parametrize("profile", PROFILES)
def test_damage_that_the_checksum_does_not_cover_is_an_error_that_names_the_record(profile):
    tables = tables_of(profile)
    records = [record_of(targets_of(100, seed=seed), profile, tables) for seed in range(3)]
    frame = unpack(records[1], kind=Kind.LOGITS, where="")
    shared = {"tables": tables, "vocabulary": VOCABULARY}
    variants = [frame.blocks[:-2], (*frame.blocks, frame.blocks[-2])]
    for number in range(1, len(frame.blocks)):
        field, codec, payload = frame.blocks[number]
        cut = list(frame.blocks)
        cut[number] = Block(field, codec, payload[:-1])
        variants.append(tuple(cut))
    for blocks in variants:
        damaged = Frame(frame.kind, frame.row_key, frame.positions, tuple(blocks)).pack()
        with pytest.raises(ValueError, match=r"^record 1: "):
            decode_logits(opened([records[0], damaged, records[2]]), **shared)


def test_sizes_take_less_than_a_byte_and_damage_to_them_is_an_error():
    sizes = np.random.default_rng(0).choice([1, 2, 8, 24], size=500)
    payload = sizes_field.encode(sizes)
    assert len(payload) < 200
    np.testing.assert_array_equal(sizes_field.decode(payload, positions=500), sizes)
    for damaged in (b"", payload[:3], payload[:-1], b"\x03" + payload[1:], payload + b"\0"):
        with pytest.raises(ValueError, match=r"\d"):
            sizes_field.decode(damaged, positions=500)


def test_counts_are_coded_with_the_ids_that_each_position_has():
    logits = zipf_logits(200, VOCABULARY) * 2.5
    counts, head = drawn(logits, draws=20, k=K)
    head = shortened(head, sizes_for(head.logprobs, mass=MASS))
    tables = counts_field.fit(counts, head=head, vocabulary=VOCABULARY)
    shared = {"tables": tables, "vocabulary": VOCABULARY}
    block = counts_field.encode(counts, head=head, **shared)
    stored = counts_field.decode([block], positions=[200], draws=20, head=head, **shared)
    np.testing.assert_array_equal(stored.ids, counts.ids)
    np.testing.assert_array_equal(stored.counts, counts.counts)


def test_without_labels_adaptive_heads_decode_to_the_same():
    tables, targets = tables_of("compact"), targets_of(LENGTH)
    (record,) = opened([record_of(targets, "compact", tables)])
    shared = {"tables": tables, "vocabulary": VOCABULARY}
    whole = decode_logits([record], **shared)
    bare = decode_logits([record.without([codecs.LABELS])], **shared)
    assert bare.label_logprobs is None
    for name in ("ids", "logprobs", "tail_logmass", "sizes"):
        np.testing.assert_array_equal(getattr(bare, name), getattr(whole, name))

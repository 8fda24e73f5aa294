"""Records whose values no teacher gave are errors, whatever their checksums say."""

import dataclasses

import numpy as np
import pytest

from decant.schemas.codecs import Tables
from decant.schemas.records.logits import decode_logits, encode_logits, open_logits
from decant.schemas.signals import TargetSpec
from decant.schemas.targets.draws import Draws
from decant.schemas.targets.targets import BETAS, Targets

VOCABULARY, K, LENGTH = 20, 3, 4
NONE = Tables.from_arrays({})


def honest() -> Targets:
    """Half of the mass on three ids, the other half spread over 17."""
    tail = np.array([np.log(17 * (0.5 / 17) ** beta) for beta in BETAS], np.float32)
    return Targets(
        ids=np.tile(np.arange(K, dtype=np.int32), (LENGTH, 1)),
        logprobs=np.full((LENGTH, K), np.log(0.5 / 3), np.float32),
        tail_logmass=np.tile(tail, (LENGTH, 1)),
        draws=Draws(
            np.full((LENGTH, 2), 9, np.int32),
            np.full((LENGTH, 2), np.log(0.5 / 17), np.float32),
            (1.0,),
        ),
    )


def through(targets: Targets, *, k: int = K, draws: int = 2, length: int = LENGTH) -> Targets:
    record = encode_logits(
        targets,
        row_key=bytes(16),
        scored=np.ones(LENGTH, bool),
        profile="lossless",
        tables=NONE,
        vocabulary=VOCABULARY,
    )
    opened = open_logits(record, where="here", length=length, spec=TargetSpec(k, draws))
    return decode_logits([opened], tables=NONE, vocabulary=VOCABULARY)


def test_honest_values_are_read():
    np.testing.assert_array_equal(through(honest()).logprobs, honest().logprobs)


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.1, -0.1, 1e30])
@pytest.mark.parametrize("name", ["logprobs", "tail_logmass"])
def test_a_value_of_no_distribution_is_an_error_of_the_record(name, value):
    targets = honest()
    values = getattr(targets, name).copy()
    values[2, -1] = value
    with pytest.raises(ValueError, match=r"^here: .*(sum to one|log-mass)"):
        through(dataclasses.replace(targets, **{name: values}))


@pytest.mark.parametrize("value", [np.nan, np.inf, 7.0])
def test_a_tail_with_more_mass_than_ids_is_an_error(value):
    targets = honest()
    targets.tail_logmass[1, 3] = value
    with pytest.raises(ValueError, match="here: a tail's log-mass"):
        through(targets)


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.5])
def test_an_impossible_draw_is_an_error(value):
    targets = honest()
    assert targets.draws
    targets.draws.logprobs[1, 1] = value
    with pytest.raises(ValueError, match="here: a draw's log-probability"):
        through(targets)


def test_a_position_without_any_finite_value_is_an_error():
    targets = honest()
    targets.logprobs[1], targets.tail_logmass[1, 1:] = -np.inf, -np.inf
    with pytest.raises(ValueError, match="sum to one"):
        through(targets)


@pytest.mark.parametrize("limits", [{"k": 2}, {"draws": 1}, {"length": 8}])
def test_a_record_with_more_than_the_manifest_says_is_an_error(limits):
    with pytest.raises(ValueError, match=r"^here: .*(the manifest says|expected a row of 8)"):
        through(honest(), **limits)

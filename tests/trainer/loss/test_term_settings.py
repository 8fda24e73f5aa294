"""Scales of terms that do not fit their kind are refused by name."""

import pytest

from decant.trainer.config import AttentionLoss, HiddenLoss, Loss


def test_a_scale_of_squared_differences_is_refused_with_other_distances():
    with pytest.raises(ValueError, match=r"loss\.hidden\[0\]: scale is sum with kind = cosine"):
        Loss(hidden=(HiddenLoss(kind="cosine", scale="sum"),))
    with pytest.raises(ValueError, match=r"loss\.attention\[1\]: scale is pairs with kind = kl"):
        Loss(attention=(AttentionLoss(), AttentionLoss(kind="kl", scale="pairs")))

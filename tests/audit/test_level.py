"""The level of the whole encoder, against figures computed by hand and shifts that are known."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from synthetic import make_signals

from distunlearn.audit.figures.level import KEPT, level


def moved(signals, by: float):
    """The same encoder, in which the loss of every image is higher by `by` standard deviations of the holdout's."""
    spread = signals.bank_loss[signals.of("holdout")].std(ddof=1)
    return dataclasses.replace(signals, bank_loss=signals.bank_loss + by * spread)


def test_an_encoder_like_the_retrained_one_keeps_its_level_and_a_moved_one_does_not():
    retrained = make_signals(0.0, seed=1)
    for by, kept in ((0.0, True), (0.2, True), (0.5, False), (-0.5, False)):
        found = level({"original": retrained, "unlearned": moved(retrained, by), "retrained": retrained})
        assert found is not None and found["kept"] is kept
        assert found["signals"]["bank_loss"]["unlearned"] == pytest.approx(by, abs=1e-9)
        assert found["signals"]["view_agreement"]["unlearned"] == 0
        assert not by or found["farthest"] == "bank_loss"
    assert 0.2 < KEPT < 0.5


def test_only_held_out_images_count_and_the_interval_is_that_of_paired_images():
    retrained, other = make_signals(0.0, seed=1), make_signals(3.0, seed=2)
    found = level({"original": retrained, "unlearned": other, "retrained": retrained})
    rows = retrained.of("holdout")
    difference = other.bank_loss[rows] - retrained.bank_loss[rows]
    spread = retrained.bank_loss[rows].std(ddof=1)
    assert found is not None
    figures = found["signals"]["bank_loss"]
    assert figures["unlearned"] == pytest.approx(difference.mean() / spread)
    reach = 1.959964 * difference.std(ddof=1) / np.sqrt(len(rows)) / spread
    assert figures["high"] - figures["low"] == pytest.approx(2 * reach, rel=1e-6)


def test_without_a_retrained_encoder_nothing_is_said():
    one = make_signals(0.0)
    assert level({"original": one, "unlearned": one}) is None

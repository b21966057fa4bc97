"""Verdicts of the equivalence gates, at and around their borders."""

from __future__ import annotations

import math

import pytest

from distunlearn.verify.gates import FEWEST, MIN_IMAGES, equivalence, no_loss, overall


def judged(low, high, *, powered=True, images=200, margin=0.06):
    return equivalence((low + high) / 2, low, high, margin, powered=powered, images=images).verdict


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (-0.05, 0.05, "pass"),
        (-0.06, 0.06, "pass"),
        (-0.07, 0.05, "inconclusive"),
        (0.0, 0.061, "inconclusive"),
        (0.05, 0.10, "inconclusive"),
        (0.0601, 0.10, "fail"),
        (-0.20, -0.0601, "fail"),  # too little known is a trace, too
        (-0.20, 0.20, "inconclusive"),
    ],
)
def test_equivalence(low, high, expected):
    assert judged(low, high) == expected


def test_an_attack_without_power_never_passes_but_may_fail():
    assert judged(-0.01, 0.01, powered=False) == "inconclusive"
    assert judged(0.10, 0.20, powered=False) == "fail"


def test_too_few_images_never_pass_but_may_fail():
    assert judged(-0.01, 0.01, images=MIN_IMAGES - 1) == "inconclusive"
    assert judged(-0.01, 0.01, images=MIN_IMAGES) == "pass"
    assert judged(0.3, 0.4, images=FEWEST + 1) == judged(-0.4, -0.3, images=FEWEST + 1) == "fail"
    assert judged(0.3, 0.4, images=FEWEST) == judged(-0.4, -0.3, images=1) == "inconclusive"
    assert judged(math.nan, math.nan) == "inconclusive"
    assert no_loss(-0.3, -0.4, -0.2, 0.025, images=FEWEST + 1).verdict == "fail"
    assert no_loss(0.0, -0.01, 0.01, 0.025, images=MIN_IMAGES - 1).verdict == "inconclusive"


def test_a_small_request_is_told_direction_and_size():
    """Twelve look-alikes driven to AUC 0.27 where retraining has 0.75."""
    gate = equivalence(-0.48, -0.62, -0.31, 0.06, powered=True, images=12)
    assert gate.verdict == "fail" and "now stand out as unknown, 0.48 below" in gate.reason
    single = equivalence(0.3, 0.3, 0.3, 0.06, powered=True, images=1)
    assert single.verdict == "inconclusive" and "1 image is too few" in single.reason
    assert "recognised, 0.30 above" in single.reason


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (-0.02, 0.01, "pass"),
        (0.0, 0.0, "pass"),
        (-0.025, 0.0, "inconclusive"),
        (-0.08, -0.0251, "fail"),
        (0.1, 0.2, "pass"),
    ],
)
def test_no_loss_looks_down_only(low, high, expected):
    assert no_loss((low + high) / 2, low, high, 0.025, images=100).verdict == expected


def test_every_verdict_but_pass_says_why():
    for low, high in ((-0.07, 0.05), (0.07, 0.1), (math.nan, 0.0)):
        assert equivalence(low, low, high, 0.06, powered=True, images=100).reason
    assert equivalence(0.0, -0.01, 0.01, 0.06, powered=True, images=100).reason is None


@pytest.mark.parametrize(
    ("verdicts", "expected"),
    [
        (["pass", "pass"], "pass"),
        (["pass", "inconclusive"], "inconclusive"),
        (["pass", "inconclusive", "fail"], "fail"),
        ([], "inconclusive"),
    ],
)
def test_overall(verdicts, expected):
    assert overall(verdicts) == expected

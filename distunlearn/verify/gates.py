"""Equivalence gates: margins declared before the run, verdicts from paired bootstrap intervals after it.

Two one-sided tests in interval form (Schuirmann, J. Pharmacokinet. Biopharm. 15, 1987): a difference is
shown to be small only if its whole interval lies inside the margin. "Not significantly different" is no pass: too few
images would pass everything. Too few images forbid a pass; a difference that lies wholly outside the margin is a fail
with any number above `FEWEST`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

MIN_IMAGES = 20  # an interval from fewer images is too narrow to show that a difference is small
RETRAINED = "what retraining gives"
FEWEST = 5  # from so few no interval means anything: only direction and size are told


@dataclass(frozen=True)
class Gate:
    """A judged figure: its estimate, interval, verdict (pass, fail, inconclusive) and why it is not a pass."""

    value: float
    low: float
    high: float
    verdict: str
    reason: str | None = None


def equivalence(
    value: float, low: float, high: float, margin: float, *, powered: bool, images: int, than: str = RETRAINED
) -> Gate:
    """Is the difference inside +-margin, from both sides?

    Args:
        value, low, high: difference and its interval. margin: > 0.
        powered: whether the attack beats chance on the original encoder; without that it never passes.
        images: the smaller side's number of images: never a pass below `MIN_IMAGES`, no verdict up to `FEWEST`.
        than: what the figure is compared with, for people.
    """
    if not all(map(math.isfinite, (value, low, high))):
        return Gate(value, low, high, "inconclusive", "the difference has no finite interval")
    if images > FEWEST and (low > margin or high < -margin):
        return Gate(value, low, high, "fail", f"the interval lies wholly outside the margin: {_seen(value, than)}")
    if images < MIN_IMAGES:
        seen = _seen(value, than) if abs(value) > margin else f"a difference of {abs(value):.2f}, within the margin"
        return Gate(value, low, high, "inconclusive", f"{_too_few(images)}; what was seen: {seen}")
    if low < -margin or high > margin:
        return Gate(value, low, high, "inconclusive", "the interval reaches beyond the margin")
    if not powered:
        return Gate(value, low, high, "inconclusive", "the attack does not beat chance on the original encoder")
    return Gate(value, low, high, "pass")


def _seen(value: float, than: str) -> str:
    """Direction and size of a difference of AUC, for people."""
    if value < 0:
        return f"these images now stand out as unknown, {-value:.2f} below {than}"
    return f"these images are recognised, {value:.2f} above {than}"


def _too_few(images: int) -> str:
    counted = "1 image is" if images == 1 else f"{images} images are"
    return f"{counted} too few for a pass; at least {MIN_IMAGES} are needed"


def no_loss(value: float, low: float, high: float, allowed: float, *, images: int) -> Gate:
    """Did a score fall by less than `allowed` (> 0)? Passes if the interval's lower end is above -allowed."""
    if not all(map(math.isfinite, (value, low, high))):
        return Gate(value, low, high, "inconclusive", "the change has no finite interval")
    if images > FEWEST and high < -allowed:
        return Gate(value, low, high, "fail", "the interval lies wholly below the allowed loss")
    if images < MIN_IMAGES:
        return Gate(value, low, high, "inconclusive", _too_few(images))
    if low <= -allowed:
        return Gate(value, low, high, "inconclusive", "the interval reaches below the allowed loss")
    return Gate(value, low, high, "pass")


def overall(verdicts: Iterable[str]) -> str:
    """Any fail: fail; else any inconclusive, or nothing judged at all: inconclusive; else pass."""
    found = set(verdicts)
    if "fail" in found:
        return "fail"
    return "pass" if found == {"pass"} else "inconclusive"

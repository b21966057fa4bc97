"""No two random streams of one seed are the same, and none is named outside the register."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import distunlearn
from distunlearn.common.random import PHILOX, STREAMS, VIEW_EPOCHS

PACKAGE = Path(distunlearn.__file__).parent


def overlapping(ranges: dict[str, tuple[int, int]]) -> list[tuple[str, str]]:
    """Pairs of names whose half-open ranges share a number."""
    pairs = itertools.combinations(ranges.items(), 2)
    return [(a, b) for (a, one), (b, other) in pairs if max(one[0], other[0]) < min(one[1], other[1])]


def test_no_two_streams_share_a_key():
    for register in (STREAMS, PHILOX):
        assert len(set(register.values())) == len(register) and 0 not in register.values()
    assert overlapping(VIEW_EPOCHS) == [] and all(first < last for first, last in VIEW_EPOCHS.values())


def test_the_check_can_fail():
    """Where the crops once were: within the epochs that relearning reaches."""
    assert overlapping({**VIEW_EPOCHS, "part crops": ((1 << 33) + 7, (1 << 33) + 8)}) != []


def test_no_stream_is_named_outside_the_register():
    literal = re.compile(r"default_rng\(\[[^]]*,\s*(?:0x)?[0-9A-Fa-f]+[\],]|_(?:STREAM|EPOCH)\b[^=\n]*= *\(*(?:0x|\d)")
    found = {path.name: literal.findall(path.read_text("utf-8")) for path in PACKAGE.rglob("*.py")}
    assert {name: hits for name, hits in found.items() if hits} == {}
    assert literal.search("default_rng([seed, 0xE4])") and literal.search("X_EPOCH = (1 << 33) + 7")  # control

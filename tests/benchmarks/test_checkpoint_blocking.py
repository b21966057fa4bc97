"""benchmarks/checkpoint.py: it saves what it says, and its figures are those of a calculation by hand."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from distunlearn.config.schema import EncoderConfig

SCRIPTS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(SCRIPTS))
spec = importlib.util.spec_from_file_location("benchmark_of_checkpoints", SCRIPTS / "checkpoint.py")
bench = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = bench  # its dataclasses look themselves up
spec.loader.exec_module(bench)

TINY = EncoderConfig(
    name="vit_tiny_patch16_224", image_size=32, in_chans=3, stem="standard",
    args={"patch_size": 8, "embed_dim": 24, "depth": 2},
)  # fmt: skip


def test_both_ways_commit_the_same_state_and_take_turns(tmp_path):
    with bench.subject(TINY, tmp_path) as made:
        first, saves = bench.measure(made, repeats=2, undisturbed=1)
        weights = sum(p.numel() for p in made.backend.model.parameters())
        sizes = [made.megabytes(way) for way in bench.WAYS]
    assert [save.way for save in first] == list(bench.WAYS)
    assert [save.way for save in saves] == [*bench.WAYS, *reversed(bench.WAYS)]
    assert all(save.blocked <= save.committed and len(save.after) == 1 for save in saves)
    assert all(not save.beside for save in saves if save.way == "synchronous")
    assert sizes[0] == sizes[1] and 12 * weights < 1e6 * sizes[0] < 12 * weights + 200_000  # weights and two moments


def test_figures_by_hand():
    synchronous = [bench.Save("synchronous", blocked, blocked, [], [1.0]) for blocked in (10.0, 20.0, 12.0)]
    beside = [bench.Save("asynchronous", blocked, 5.0, [1.5, 2.0], [1.0]) for blocked in (1.0, 4.0, 3.0)]
    found = bench.figures([*synchronous, *beside])
    assert found["synchronous"] == 12 and found["asynchronous"] == 3 and found["ratio"] == 0.25
    assert found["worst_pair"] == 0.25 and found["step"] == 1 and found["step_beside"] == 1.75
    assert found["lost"] == pytest.approx(3 + 0.5 + 1.0) and found["lost_ratio"] == pytest.approx(4.5 / 12)

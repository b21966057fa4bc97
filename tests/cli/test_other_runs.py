"""Runs that look at the settings of another run: what that one could not do now is its own affair."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import pytest

from distunlearn.config.load import load_config, save_config
from distunlearn.config.schema import EncoderConfig, PretrainConfig, RunConfig
from distunlearn.engine import digests
from distunlearn.engine.run_directory import claim, saved_config, shards_folder
from distunlearn.errors import ConfigError

EVEN = ["backend=ddp", "unlearn.forget_batch=64", "unlearn.third_party_batch=64"]


@pytest.fixture
def alone(tmp_path: Path) -> Path:
    """The folder of a run that one process made, with batches that two cannot share."""
    folder = tmp_path / "alone"
    folder.mkdir()
    save_config(replace(RunConfig(), unlearn=replace(RunConfig().unlearn, forget_batch=63)), folder / "run.yaml")
    return folder


def test_two_processes_may_reuse_what_one_made(alone, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    cfg = load_config("digits", None, [*EVEN, f"runtime.reuse={alone}"])
    assert shards_folder(cfg, alone.parent / "run") == alone / "shards"
    with pytest.raises(ConfigError, match="backend=single cannot use 2 processes"):
        saved_config(alone)  # control: to run it now is another matter


def test_a_folder_may_be_continued_with_other_processes_and_features(tmp_path, monkeypatch):
    out = tmp_path / "run"
    claim(load_config("digits", None, []), out)
    monkeypatch.setenv("WORLD_SIZE", "2")
    even = ["backend=ddp", "runtime.activation_checkpointing=true"]
    shared = load_config("digits", None, even)
    claim(shared, out)
    assert saved_config(out, world=1).backend == "single"  # the first attempt's
    with pytest.raises(ConfigError, match="unlearn.lr"):
        claim(load_config("digits", None, [*even, "unlearn.lr=0.5"]), out)


def test_digests_leave_out_what_changes_nothing_and_no_more():
    assert digests._deciding(EncoderConfig()) == asdict(EncoderConfig())  # None is a value
    plain = asdict(PretrainConfig())
    assert plain.pop("checkpoint_every") == 200
    assert digests._deciding(PretrainConfig(checkpoint_every=3)) == plain
    assert digests._deciding(PretrainConfig(accumulate=2)) == plain | {"accumulate": 2}

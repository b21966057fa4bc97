"""`open_run_directory`: what is refused is refused before anything is written; what is opened is given back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch

from distunlearn.config.load import load_config
from distunlearn.config.schema import RunConfig
from distunlearn.distributed.world import World
from distunlearn.engine.run_directory import open_run_directory, saved_config
from distunlearn.errors import ConfigError, DataError, RankLostError
from distunlearn.run import pipeline

ALONE = World(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def cfg(tmp_path_factory) -> RunConfig:
    """Settings that name prepared shards outside of the run directory."""
    shards = tmp_path_factory.mktemp("prepared") / "shards"
    found = load_config("digits", None, [*tiny.TINY, f"data.shards={shards}"])
    pipeline.prepare(found, shards.parent)
    return found


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_it_is_claimed_for_the_time_and_keeps_settings_and_environment(cfg, tmp_path):
    out = tmp_path / "run"
    with open_run_directory(cfg, out, ALONE) as opened:
        assert {"run.yaml", "env.json", "owner.json"} <= files(out)
        opened.may_write()
        with pytest.raises(ConfigError, match="is in use by process"), open_run_directory(cfg, out, ALONE):
            pass
        assert len(opened.manifest) and saved_config(out) == cfg
    assert {"run.yaml", "env.json"} <= files(out) and "owner.json" not in files(out)
    with open_run_directory(cfg, out, ALONE) as again:
        again.may_write()


class Differing(World):
    """Rank 0 of two, of which the other has another seed."""

    def gather_objects(self, value):
        return [value, {**value, "seed": 99}]


def test_what_is_refused_leaves_nothing_behind(cfg, tmp_path):
    out = tmp_path / "run"
    lost = replace(cfg, data=replace(cfg.data, shards=str(tmp_path / "none")))
    with pytest.raises(DataError), open_run_directory(lost, out, ALONE):
        pass
    two = Differing(0, 2, torch.device("cpu"))
    with pytest.raises(RankLostError, match="seed"), open_run_directory(cfg, out, two):
        pass
    assert not out.exists()
    with open_run_directory(cfg, out, ALONE):
        pass
    before = {name: (out / name).read_bytes() for name in files(out)}
    other = replace(cfg, seed=cfg.seed + 1)
    with pytest.raises(ConfigError, match="choose another --out"), open_run_directory(other, out, ALONE):
        pass
    assert {name: (out / name).read_bytes() for name in files(out)} == before


def test_finished_encoders_of_the_run_that_is_reused_are_copied(cfg, tmp_path):
    source = tmp_path / "before"
    with open_run_directory(cfg, source, ALONE):
        pass
    for name, ended in (("original", True), ("retrained", False)):
        (source / name / "checkpoints").mkdir(parents=True)
        (source / name / "weights").write_text(name)
        if ended:
            (source / name / "done.json").write_text("{}")
    reusing = replace(cfg, runtime=replace(cfg.runtime, reuse=str(source)))
    with open_run_directory(reusing, tmp_path / "run", ALONE):
        pass
    assert (tmp_path / "run" / "original" / "weights").read_text() == "original"
    assert not (tmp_path / "run" / "original" / "checkpoints").exists()
    assert not (tmp_path / "run" / "retrained").exists()

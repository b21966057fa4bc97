"""What is saved reads back the same, and the digest sees values alone."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys

import pytest
from test_config_io import load

from distunlearn.config import load as loading
from distunlearn.config import recipes
from distunlearn.config.load import dump_config, load_config, save_config
from distunlearn.config.schema import PretrainConfig, RunConfig
from distunlearn.config.shape import digest, field_diff


def test_the_resolved_config_reads_back_to_the_same_digest(tmp_path):
    path = tmp_path / "run.yaml"
    for name in recipes.RECIPES:
        values = ("pretrain.lr=3e-5", "data.forget=0.1", "data.root='1e-3'", "encoder.args.a=[1, x, null]")
        cfg = load(*values, recipe=name)
        save_config(cfg, path)
        again = load_config(None, path, [])
        assert field_diff(cfg, again) == {} and digest(cfg) == digest(again)
        assert path.read_text(encoding="utf-8") == dump_config(again)
    assert [entry.name for entry in tmp_path.iterdir()] == ["run.yaml"]


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "run.yaml"
    save_config(load(), path)
    before = path.read_bytes()

    def full(_):
        raise OSError("disk full")

    monkeypatch.setattr(loading.os, "fsync", full)
    with pytest.raises(OSError, match="disk full"):
        save_config(load("seed=9"), path)
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_digest_sees_values_not_spelling():
    assert digest(load("pretrain.lr=1")) == digest(load("pretrain.lr=1.0"))
    as_written = dataclasses.replace(RunConfig(), pretrain=PretrainConfig(lr=1))
    assert digest(as_written) == digest(dataclasses.replace(as_written, pretrain=PretrainConfig(lr=1.0)))
    assert digest(load()) != digest(load("seed=1"))
    assert digest(load()) == digest(load("runtime.threads=2", "data.workers=3", "pretrain.checkpoint_every=7"))
    assert digest(load("data.forget=1")) != digest(load("data.forget='1.txt'"))


def test_digest_is_the_same_in_another_process():
    code = (
        "from distunlearn.config.load import load_config; from distunlearn.config.shape import digest; "
        "print(digest(load_config('digits', None, [])))"
    )
    env = {**os.environ, "PYTHONHASHSEED": "7"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert done.stdout.strip() == digest(load())


def test_field_diff_names_keys_and_both_values():
    assert field_diff(load(), load()) == {}
    diff = field_diff(load(), load("pretrain.lr=0.5", "seed=2", "encoder.args={}"))
    assert diff["seed"] == (0, 2)
    assert diff["pretrain.lr"] == (recipes.digits().pretrain.lr, 0.5)
    assert list(diff) == ["seed", "encoder.args", "pretrain.lr"]

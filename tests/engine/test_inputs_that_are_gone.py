"""Case 08: what a run was made of may be gone once it is finished; its directory is enough, from any folder."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from distunlearn.config.load import load_config, save_config
from distunlearn.distributed.world import World
from distunlearn.engine.digests import CHECKPOINT_SHA256, training_digest
from distunlearn.engine.run_directory import saved_config
from distunlearn.errors import ConfigError, DataError

GIVEN = ["encoder.mean=[0.5]", "encoder.std=[0.5]", "encoder.checkpoint=enc.safetensors", "data.forget=roles.csv"]


def test_a_run_directory_is_read_from_any_folder_without_its_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("enc.safetensors").write_bytes(b"weights")
    Path("run").mkdir()
    save_config(load_config("digits", None, GIVEN), Path("run/run.yaml"))
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    there = saved_config(Path("../run"))
    assert there.encoder.checkpoint == os.path.join(tmp_path, "enc.safetensors")
    assert there.data.forget == os.path.join(tmp_path, "roles.csv")
    (tmp_path / "enc.safetensors").unlink()
    assert saved_config(Path("../run")) == there
    with pytest.raises(ConfigError, match="is not a file"):  # control: a run that has not begun needs it
        load_config("digits", None, GIVEN)


def test_the_digest_of_a_finished_original_encoder_outlives_the_checkpoint(tmp_path):
    checkpoint = tmp_path / "enc.safetensors"
    checkpoint.write_bytes(b"weights")
    cfg = load_config("digits", None, [*GIVEN[:2], f"encoder.checkpoint={checkpoint}", GIVEN[3]])
    manifest, alone = SimpleNamespace(samples_digest=lambda roles: ""), World(0, 1, torch.device("cpu"))
    session = SimpleNamespace(cfg=cfg, out=tmp_path / "run", manifest=manifest, world=alone)
    before = training_digest(session, "pretrain")
    checkpoint.unlink()
    with pytest.raises(DataError, match="cannot be read"):  # nothing was made of it yet
        training_digest(session, "pretrain")
    (tmp_path / "run/original").mkdir(parents=True)
    facts = {
        "phase": "pretrain", "digest": before, "state": "0" * 64, "export": {}, "steps": 0, "images": 0,
        "seconds": 0.0, "attempts": 1, "started": {}, CHECKPOINT_SHA256: hashlib.sha256(b"weights").hexdigest(),
    }  # fmt: skip
    (tmp_path / "run/original/done.json").write_text(json.dumps(facts))
    assert training_digest(session, "pretrain") == before
    checkpoint.write_bytes(b"other weights")
    assert training_digest(session, "pretrain") != before

"""The files in launch/ say what the backends do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from distunlearn.engine.backends.zero import zero_config

LAUNCH = Path(__file__).parents[2] / "launch"


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeed_settings_are_those_in_use_on_a_gpu(stage):
    written = json.loads((LAUNCH / f"zero{stage}.json").read_text())
    used = zero_config(stage, micro_batch=64, clip=0.0, overlap=True)
    assert used.pop("train_micro_batch_size_per_gpu") == 64
    written.pop("train_micro_batch_size_per_gpu")
    assert written == used


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_nothing_is_left_to_deepspeed_to_guess(stage):
    settings = zero_config(stage, micro_batch=64, clip=0.0, overlap=False)
    assert "auto" not in json.dumps(settings)
    assert settings["gradient_clipping"] == 0.0  # left out it would be 1.0


@pytest.mark.parametrize("backend", ["single", "ddp", "fsdp2", "zero1", "zero2", "zero3"])
def test_every_backend_has_a_file_that_starts_its_processes(backend):
    text = (LAUNCH / f"{backend}.yaml").read_text()
    settings = yaml.safe_load(text)
    alone = backend == "single"
    assert settings["num_processes"] == (1 if alone else 2)
    # With MULTI_CPU accelerate starts one process, whatever the number says; with its own DeepSpeed or FSDP types
    # it would want to shard by itself.
    assert settings["distributed_type"] == ("NO" if alone else "MULTI_GPU")
    assert alone or f"backend={backend}" in text

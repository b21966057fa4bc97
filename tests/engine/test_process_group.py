"""Opening a backend: what the launcher's variables may say, threads, and worlds that are not what they claim."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.distributed as dist

from distunlearn.config.schema import RunConfig, RuntimeConfig
from distunlearn.distributed import process_group
from distunlearn.engine.backends import open_backend
from distunlearn.errors import ConfigError, RankLostError

TORCHRUN = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29501"}
VARIABLES = (*TORCHRUN, "LOCAL_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
CFG = RunConfig(runtime=RuntimeConfig(threads=1))
DDP = dataclasses.replace(CFG, backend="ddp")


@pytest.fixture(autouse=True)
def outside_any_launcher(monkeypatch):
    threads = torch.get_num_threads()
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    yield
    torch.set_num_threads(threads)


def setenv(monkeypatch, **variables: str) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def refusal(cfg: RunConfig, kind: type[Exception] = ConfigError) -> str:
    with pytest.raises(kind) as caught:
        open_backend(cfg)
    message = str(caught.value)
    assert "\n" not in message and message.endswith(".") and ";" in message
    return message


def test_single_needs_no_process_group():
    backend = open_backend(CFG)
    assert (backend.world.rank, backend.world.size, backend.world.is_main, backend.is_prepared) == (0, 1, True, False)
    assert not dist.is_initialized()
    backend.world.barrier()
    assert backend.world.broadcast_object("x") == "x"
    assert backend.world.gather_ids({"retain": ["b", "a"]}) == {"retain": ["b", "a"]}
    assert backend.world.all_finite(torch.ones(2)) and not backend.world.all_finite(torch.tensor([1.0, float("inf")]))
    backend.release()  # of nothing


def test_single_refuses_several_processes(monkeypatch):
    setenv(monkeypatch, **TORCHRUN)
    assert "backend=single cannot use 2 processes" in refusal(CFG)


@pytest.mark.parametrize("missing", ["RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_a_missing_variable_is_named(monkeypatch, missing):
    setenv(monkeypatch, **{k: v for k, v in TORCHRUN.items() if k != missing})
    assert missing in refusal(DDP)


@pytest.mark.parametrize(
    ("name", "value"), [("WORLD_SIZE", "two"), ("RANK", "-1"), ("RANK", "2"), ("MASTER_PORT", "0"), ("LOCAL_RANK", "a")]
)
def test_an_impossible_variable_is_named(monkeypatch, name, value):
    setenv(monkeypatch, **{**TORCHRUN, name: value})
    assert name in refusal(DDP)


def test_srun_tasks_without_ranks_are_not_as_many_single_runs(monkeypatch):
    setenv(monkeypatch, SLURM_STEP_NUM_TASKS="2")
    assert "2 tasks" in refusal(CFG)
    setenv(monkeypatch, RANK="0")
    assert open_backend(CFG).world.size == 1


def test_ranks_that_do_not_come_are_reported(monkeypatch):
    setenv(monkeypatch, **TORCHRUN)
    message = refusal(dataclasses.replace(DDP, runtime=RuntimeConfig(threads=1, join_s=1.0)), RankLostError)
    assert "rank 0 of 2 did not find the others at 127.0.0.1:29501 within 1 s" in message and "WORLD_SIZE" in message
    assert not dist.is_initialized()


def test_a_world_of_another_size_than_announced_is_refused(monkeypatch):
    """What accelerate does on a CPU: every process a world of its own."""
    setenv(monkeypatch, **TORCHRUN)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 1)
    assert "has 1 processes, but WORLD_SIZE is 2" in refusal(DDP, RankLostError)


@pytest.mark.parametrize(("threads", "local", "expected"), [(3, "1", 3), (0, "1", 4), (0, "2", 2), (0, "8", 1)])
def test_threads_are_as_told_or_the_cores_shared_by_the_processes(monkeypatch, threads, local, expected):
    monkeypatch.setattr(process_group.os, "sched_getaffinity", lambda pid: range(4), raising=False)
    setenv(monkeypatch, LOCAL_WORLD_SIZE=local)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    open_backend(dataclasses.replace(CFG, runtime=RuntimeConfig(threads=threads)))
    assert torch.get_num_threads() == expected

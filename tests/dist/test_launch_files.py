"""The files in launch/ say what the backends do, and start what they say.

Those for eight and sixteen GPUs: once what accelerate makes of them is checked, once every backend trains as rank 0 of
such a world, in a process group whose other ranks do not exist, and once two launchers on this machine meet by the
file for several machines.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import prepare_multi_gpu_env
from processes import environment, free_port
from torch import nn

from distunlearn.cli.main import main
from distunlearn.engine.backends.zero import zero_config
from distunlearn.run.launch_files import accelerate_files, slurm_files

LAUNCH = Path(__file__).parents[2] / "launch"
BACKENDS = ["ddp", "fsdp2", "zero1", "zero2", "zero3"]


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


def test_the_files_are_those_that_the_package_makes(tmp_path):
    """`distunlearn launch-files`: the committed files, and no change of somebody's is lost."""
    found = {path.name: path.read_text() for pattern in ("*.yaml", "*.json") for path in LAUNCH.glob(pattern)}
    assert found == accelerate_files(), "run: python slurm/make_examples.py"
    assert main(["launch-files", str(tmp_path)]) == 0
    assert {path.name: path.read_text() for path in (tmp_path / "launch").iterdir()} == found
    assert {path.name: path.read_text() for path in (tmp_path / "slurm").iterdir()} == slurm_files()
    (tmp_path / "launch" / "ddp.yaml").write_text("num_processes: 3\n")
    assert main(["launch-files", str(tmp_path)]) == 2
    assert (tmp_path / "launch" / "ddp.yaml").read_text() == "num_processes: 3\n"


@pytest.mark.parametrize(("form", "machines", "each"), [("", 1, 2), ("_8gpus", 1, 8), ("_nodes", 2, 8)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_accelerate_starts_that_many_processes_a_machine(backend, form, machines, each, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: each)
    arguments = ["--config_file", str(LAUNCH / f"{backend}{form}.yaml"), "-m", "distunlearn", "run", "digits"]
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(arguments))
    prepare_multi_gpu_env(args)
    assert int(args.nproc_per_node) == each
    assert int(getattr(args, "nnodes", None) or 1) == machines
    assert not (args.use_deepspeed or args.use_fsdp)  # they would wrap the encoder a second time


def train_as_rank_0(world: int) -> None:
    """Two steps of every backend in a world whose other ranks are made up: their answers are this rank's own."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from distunlearn.config.load import load_config
    from distunlearn.engine.backends import open_backend
    from distunlearn.engine.backends.zero import Zero
    from distunlearn.engine.optimizer import make_optimizer

    torch.distributed.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
    for backend in BACKENDS:
        torch.manual_seed(0)
        made = open_backend(load_config("digits", None, [f"backend={backend}", "runtime.threads=1"]))
        assert (made.world.rank, made.world.size) == (0, world)
        model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 64))
        whole = sum(p.numel() for p in model.parameters())
        optimizer = make_optimizer(made.cfg.pretrain, model)
        forward = made.prepare(model, optimizer, 1.0)
        for _ in range(2):
            with made.micro_batch(last=backend != "ddp"):  # DDP's reducer wants a future that the fake group lacks
                made.backward(forward(torch.randn(4, 3, 8, 8)).square().mean())
            assert made.grad_norm() > 0
            made.step()
        assert made.num_weights == whole
        if backend != "ddp":
            tensors = made._flats() if isinstance(made, Zero) else [p.to_local() for p in model.parameters()]
            held = sum(t.numel() for t in tensors)
            assert whole / world <= held <= whole / world * 1.2 + 64, (held, whole)  # 64: parts are padded
        made.release()
        print("trained", backend, world)


@pytest.mark.parametrize("world", [8, 16])
def test_every_backend_trains_in_a_world_of_that_size(world):
    place = {"RANK": "0", "WORLD_SIZE": str(world), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "8"}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}  # accelerate wants to see them
    command = [sys.executable, __file__, str(world)]
    done = subprocess.run(command, env=environment(**place), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-4000:]
    assert [line for line in done.stdout.splitlines() if "trained" in line] == [
        f"trained {b} {world}" for b in BACKENDS
    ]


def test_two_launchers_meet_by_the_file_for_several_machines(tmp_path):
    """One process each on this machine, where the file says eight of sixteen; the rest is as on two machines."""
    port, started = str(free_port()), []
    for machine in range(2):
        command = [
            sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(LAUNCH / "ddp_nodes.yaml"),
            "--machine_rank", str(machine), "--main_process_port", port, "--num_processes", "2",
            "-m", "distunlearn", "doctor", "digits", "--set", "backend=ddp", "--set", "runtime.threads=1",
        ]  # fmt: skip
        env = environment(CUDA_VISIBLE_DEVICES="")
        started.append(
            subprocess.Popen(
                command,
                env=env,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                cwd=tmp_path,
                process_group=0,
            )
        )
    try:
        said = [process.communicate(timeout=200)[0] for process in started]
    finally:
        for process in started:
            if process.poll() is None:
                os.killpg(process.pid, 9)
    assert [p.returncode for p in started] == [0, 0], said
    assert "world: 2 processes on 1 machines, backend ddp" in said[0], said[0]


if __name__ == "__main__":
    train_as_rank_0(int(sys.argv[1]))

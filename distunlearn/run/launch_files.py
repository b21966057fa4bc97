"""Settings for `accelerate launch` and scripts for sbatch, to copy and to change: `distunlearn launch-files DIR`.

Per backend there are settings for two processes, for a machine of eight GPUs, and for two such machines. launch/ and
slurm/ of the repository hold what this makes; tests compare them, and start processes by them.
"""

from __future__ import annotations

import json
from pathlib import Path

from distunlearn.errors import ConfigError
from distunlearn.run.slurm import Job, script

__all__ = ["accelerate_files", "slurm_files", "write_launch_files"]

SHARDED = {
    "ddp": "DistributedDataParallel: every process holds the whole encoder.",
    "fsdp2": "FSDP2 (fully_shard): weights, gradients and optimizer states are sharded.",
    "zero1": "DeepSpeed ZeRO-1: optimizer states are sharded. The DeepSpeed settings are those of zero1.json.",
    "zero2": (
        "DeepSpeed ZeRO-2: optimizer states and gradients are sharded. The DeepSpeed settings are those of zero2.json."
    ),
    "zero3": "DeepSpeed ZeRO-3: weights too are sharded. The DeepSpeed settings are those of zero3.json.",
}
RUN = "-m distunlearn run digits"
WHY = """#
# accelerate only starts the processes here; the backend that --set names shards by itself, so that torchrun
# does the same. MULTI_GPU is right on a CPU too: MULTI_CPU starts one process unless mpirun is there, while
# with MULTI_GPU there are num_processes of them, which talk over gloo where there is no GPU.
"""
ALONE = f"""# One process, with or without a GPU:
#   accelerate launch --config_file launch/single.yaml {RUN} --out runs/digits
compute_environment: LOCAL_MACHINE
distributed_type: 'NO'
machine_rank: 0
main_training_function: main
mixed_precision: 'no'
num_machines: 1
num_processes: 1
use_cpu: false
"""
OUT, PHOTOS = Path("/scratch/runs/photos"), Path("/scratch/photos.yaml")
JOBS = {
    "one_node.sbatch": Job(tasks=8, gpus=8, time="12:00:00"),
    "many_nodes.sbatch": Job(nodes=4, tasks=8, gpus=8, time="24:00:00", partition="gpu"),
    "array_of_seeds.sbatch": Job(gpus=1, time="4:00:00", array="0-9%4"),
    "container.sbatch": Job(tasks=8, gpus=8, time="12:00:00", container="/images/distunlearn.sqsh"),
}
TRIALS = Job(gpus=1, time="4:00:00", array="0-63%8", name="distunlearn-trials")


def _settings(processes: int, machines: int) -> str:
    """What accelerate reads; `processes` is their number on all machines together."""
    address = "main_process_ip: 127.0.0.1\nmain_process_port: 29500\n" if machines > 1 else ""
    return (
        "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_GPU\ngpu_ids: all\nmachine_rank: 0\n"
        f"{address}main_training_function: main\nmixed_precision: 'no'\nnum_machines: {machines}\n"
        f"num_processes: {processes}\nrdzv_backend: static\nsame_network: true\nuse_cpu: false\n"
    )


def accelerate_files() -> dict[str, str]:
    """{file name: text} of accelerate's settings, and of DeepSpeed's as the backends give them to it."""
    from distunlearn.engine.backends.zero import zero_config

    made = {"single.yaml": ALONE}
    for backend, what in SHARDED.items():
        start, run = "#   accelerate launch --config_file launch", f"{RUN} --set backend={backend} --out runs/digits\n"
        made[f"{backend}.yaml"] = (
            f"# {what}\n{start}/{backend}.yaml {run}# Add --num_processes N for another number of processes.\n"
            f"{WHY}{_settings(2, 1)}"
        )
        made[f"{backend}_8gpus.yaml"] = (
            f"# {what}\n# One machine with eight GPUs.\n{start}/{backend}_8gpus.yaml \\\n#     {run}"
            f"{WHY}{_settings(8, 1)}"
        )
        made[f"{backend}_nodes.yaml"] = (
            f"# {what}\n# Two machines of eight GPUs; the same line on both, with 0 and 1 as the machine's rank:\n"
            f"{start}/{backend}_nodes.yaml --machine_rank 0 \\\n#     --main_process_ip ADDRESS_OF_MACHINE_0 {run}"
            "# N machines: --num_machines N --num_processes 8N. All of them must see the run directory.\n"
            f"{WHY}{_settings(16, 2)}"
        )
    for stage in (1, 2, 3):
        used = {**zero_config(stage, micro_batch=0, clip=0.0, overlap=True), "train_micro_batch_size_per_gpu": "auto"}
        made[f"zero{stage}.json"] = json.dumps(used, indent=2) + "\n"
    return made


def slurm_files() -> dict[str, str]:
    """{file name: script}, as `distunlearn submit --dry-run` and `distunlearn sweep --submit --dry-run` print them."""
    made = {
        name: script(
            job, None, OUT, PHOTOS, ["backend=ddp", "precision=bf16"] if job.tasks > 1 else [], python="python"
        )
        for name, job in JOBS.items()
    }
    trials = OUT.with_name("sweep") / "trials"
    return made | {"array_of_trials.sbatch": script(TRIALS, None, trials, verb=("sweep", "--task"), python="python")}


def write_launch_files(folder: Path) -> list[Path]:
    """Write launch/ and slurm/ below `folder`; returns the files.

    Raises:
        ConfigError: one of them exists and has another text.
    """
    files = {folder / "launch" / name: text for name, text in accelerate_files().items()}
    files |= {folder / "slurm" / name: text for name, text in slurm_files().items()}
    if edited := [str(path) for path, text in files.items() if path.exists() and path.read_text() != text]:
        raise ConfigError(f"{', '.join(edited)} would be overwritten; move what you changed, or name another folder")
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return list(files)

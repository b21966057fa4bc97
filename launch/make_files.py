"""Write accelerate's settings beside this file: per backend two processes, a machine of eight GPUs, two such machines.

    python launch/make_files.py

A test compares them with what this makes, and starts processes by them.
"""

from __future__ import annotations

from pathlib import Path

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


def settings(processes: int, machines: int) -> str:
    """What accelerate reads; `processes` is their number on all machines together."""
    address = "main_process_ip: 127.0.0.1\nmain_process_port: 29500\n" if machines > 1 else ""
    return (
        "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_GPU\ngpu_ids: all\nmachine_rank: 0\n"
        f"{address}main_training_function: main\nmixed_precision: 'no'\nnum_machines: {machines}\n"
        f"num_processes: {processes}\nrdzv_backend: static\nsame_network: true\nuse_cpu: false\n"
    )


def files() -> dict[str, str]:
    """{file name: text}."""
    made = {"single.yaml": ALONE}
    for backend, what in SHARDED.items():
        start, run = "#   accelerate launch --config_file launch", f"{RUN} --set backend={backend} --out runs/digits\n"
        made[f"{backend}.yaml"] = (
            f"# {what}\n{start}/{backend}.yaml {run}# Add --num_processes N for another number of processes.\n"
            f"{WHY}{settings(2, 1)}"
        )
        made[f"{backend}_8gpus.yaml"] = (
            f"# {what}\n# One machine with eight GPUs.\n{start}/{backend}_8gpus.yaml \\\n#     {run}"
            f"{WHY}{settings(8, 1)}"
        )
        made[f"{backend}_nodes.yaml"] = (
            f"# {what}\n# Two machines of eight GPUs; the same line on both, with 0 and 1 as the machine's rank:\n"
            f"{start}/{backend}_nodes.yaml --machine_rank 0 \\\n#     --main_process_ip ADDRESS_OF_MACHINE_0 {run}"
            "# N machines: --num_machines N --num_processes 8N. All of them must see the run directory.\n"
            f"{WHY}{settings(16, 2)}"
        )
    return made


if __name__ == "__main__":
    for name, text in files().items():
        (Path(__file__).parent / name).write_text(text)

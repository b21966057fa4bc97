"""Write the examples beside this file, as `distunlearn submit --dry-run` prints them.

    python slurm/make_examples.py

A test compares them with what this makes.
"""

from __future__ import annotations

from pathlib import Path

from distunlearn.submit import Job, script

OUT = Path("/scratch/runs/photos")
EXAMPLES = {
    "one_node.sbatch": Job(tasks=8, gpus=8, time="12:00:00"),
    "many_nodes.sbatch": Job(nodes=4, tasks=8, gpus=8, time="24:00:00", partition="gpu"),
    "array_of_seeds.sbatch": Job(gpus=1, time="4:00:00", array="0-9%4"),
    "container.sbatch": Job(tasks=8, gpus=8, time="12:00:00", container="/images/distunlearn.sqsh"),
}
SETTINGS = ["backend=ddp", "precision=bf16"]


def examples() -> dict[str, str]:
    """{file name: script}."""
    return {
        name: script(job, None, OUT, Path("/scratch/photos.yaml"), SETTINGS if job.tasks > 1 else [], python="python")
        for name, job in EXAMPLES.items()
    }


if __name__ == "__main__":
    for name, text in examples().items():
        Path(__file__).with_name(name).write_text(text, encoding="utf-8")

"""Write what `distunlearn launch-files` makes into launch/ and slurm/; and scaling.sbatch, which needs benchmarks/.

    python slurm/make_examples.py

Tests compare the files with what this makes.
"""

from __future__ import annotations

from pathlib import Path

from distunlearn.run.launch_files import accelerate_files, slurm_files

SCALING = """\
#!/bin/bash
#SBATCH --job-name=distunlearn-scaling
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node={tasks}
{gpus}#SBATCH --time=1:00:00

# Weak scaling of a training step over 1, 2, 4 ... nodes of one allocation, each beside nothing else:
#   sbatch slurm/scaling.sbatch FOLDER [ENCODER [BATCH [BACKEND [PRECISION]]]]
# FOLDER, on storage that all nodes see, gets one file nodes-N.json each. ENCODER: a name of ENCODERS in
# benchmarks/throughput_step.py; BATCH: images a process. Run it where benchmarks/ is.
set -eu
out=$(mkdir -p "$1" && cd "$1" && pwd)
encoder=${{2:-vit_base16-224}}
batch=${{3:-256}}
backend=${{4:-ddp}}
precision=${{5:-bf16}}
steps=${{STEPS:-50}}

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" 2> /dev/null | head -n 1)
export MASTER_ADDR="${{DISTUNLEARN_MASTER_ADDR:-${{first:-$(hostname)}}}}"
for ((nodes = 1; nodes <= SLURM_JOB_NUM_NODES; nodes *= 2)); do
    world=$((nodes * {tasks}))
    chosen=$backend
    if [ "$world" -eq 1 ]; then chosen=single; fi
    export MASTER_PORT=$((20000 + (SLURM_JOB_ID + 31 * nodes) % 20000))
    export THROUGHPUT_FOLDER="$out/nodes-$nodes"
    mkdir -p "$THROUGHPUT_FOLDER"
    cell="{{\\"encoder\\": \\"$encoder\\", \\"backend\\": \\"$chosen\\", \\"precision\\": \\"$precision\\","
    cell="$cell \\"world\\": $world, \\"batch\\": $batch}}"
    # One task is one rank. The variables are the tasks' own: they must not be expanded here, on the first node.
    srun --nodes="$nodes" --ntasks="$world" --ntasks-per-node={tasks} bash -c '
        export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID
        export LOCAL_WORLD_SIZE=$((SLURM_NTASKS / SLURM_NNODES))
        exec "$@"' rank {python} benchmarks/throughput.py --cell "$cell" --steps "$steps" --out "$out/nodes-$nodes.json"
    echo "$nodes nodes done"
done
"""


def scaling(nodes: int = 8, tasks: int = 8, gpus: int = 8, python: str = "python") -> str:
    """A batch script that measures a cell of benchmarks/throughput.py on ever more nodes."""
    wanted = f"#SBATCH --gpus-per-node={gpus}\n" if gpus else ""
    return SCALING.format(nodes=nodes, tasks=tasks, gpus=wanted, python=python)


def examples() -> dict[str, str]:
    """{file name: script}."""
    return {"scaling.sbatch": scaling(), **slurm_files()}


if __name__ == "__main__":
    for name, text in examples().items():
        Path(__file__).with_name(name).write_text(text, encoding="utf-8")
    for name, text in accelerate_files().items():
        (Path(__file__).parents[1] / "launch" / name).write_text(text, encoding="utf-8")

"""The forgetting benchmark: every method on every encoder, against retraining, as one resumable command.

    python benchmarks/forgetting.py --grid small --runs runs/forgetting --results benchmarks/results/forgetting-small
    python benchmarks/forgetting.py --grid muc --root cifar10=DIR --slurm > forgetting.sbatch

Every cell (data set, objective, encoder, seed, method) is the command line's own `distunlearn run`; its figures become
one JSON file, `<results>/<cell>.json`, kept as long as the digest of the cell's settings is the same. Runs that were
interrupted go on. Before anything starts the processor time of the missing cells is estimated from seconds per
image measured here, and a grid above its cap is refused; a grid that passes the cap on the way starts no further cell.
Afterwards `--document FILE` gets tables, pictures and all raw figures. `--report` only writes them from what is there.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from forgetting_grid import GRIDS, Cell, Grid, cell_config, cell_digest, estimate, groups
from forgetting_report import write_document

from distunlearn.config.load import dump_config
from distunlearn.config.schema import RunConfig
from distunlearn.errors import EXIT_GATE_FAILED, EXIT_INCONCLUSIVE, DistunlearnError

VERDICTS = {0: "pass", EXIT_GATE_FAILED: "fail", EXIT_INCONCLUSIVE: "inconclusive"}
CONTROLS = ("none", "random_init")
NUMERICS = 4  # a method that ran away: a result, not a mishap
KEPT = (
    "attacks", "further_attacks", "utility", "similarity", "tow", "iam", "relearning", "cost", "coverage", "images",
    "gates", "tier",
)  # fmt: skip


@dataclass
class Bench:
    """One call: where things lie, and the processor time that its cells have taken."""

    grid: Grid
    runs: Path
    results: Path
    roots: dict[str, str]
    tuned: dict[str, dict[str, dict[str, Any]]]
    cap: float  # hours
    spent: float = 0.0  # seconds
    lock: threading.Lock = field(default_factory=threading.Lock)

    def folder(self, cell: Cell) -> Path:
        return self.runs / cell.name

    def config(self, cell: Cell) -> RunConfig:
        base = None if cell.method == "none" else (self.runs / f"{cell.group}-none").resolve()
        return cell_config(cell, self.grid, self.roots, self.tuned, base, self.runs / "requests")

    def kept(self, cell: Cell) -> dict[str, Any] | None:
        """The cell's figures, if they are there, whatever the settings that they were made with."""
        path = self.results / f"{cell.name}.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def result(self, cell: Cell) -> dict[str, Any] | None:
        """The cell's figures, if they are there and of these settings."""
        found = self.kept(cell)
        return found if found is not None and found["digest"] == cell_digest(self.config(cell)) else None

    def missing(self, chosen: Sequence[Sequence[Cell]]) -> list[Cell]:
        """Cells without a result, and the bases that such cells need although they have one."""
        found = []
        for group in chosen:
            open_cells = [cell for cell in group if self.result(cell) is None]
            if open_cells and group[0] not in open_cells and not (self.folder(group[0]) / "audit").exists():
                open_cells.insert(0, group[0])
            found += open_cells
        return found


def run_cell(bench: Bench, cell: Cell) -> None:
    """Run one cell to its end and write its JSON file.

    Raises:
        SystemExit: the run ended with a code that is no result.
    """
    cfg, folder = bench.config(cell), bench.folder(cell)
    folder.parent.mkdir(parents=True, exist_ok=True)
    settings = folder.parent / f"{cell.name}.yaml"
    settings.write_text(dump_config(cfg), encoding="utf-8")
    command = [sys.executable, "-m", "distunlearn", "run", cfg.recipe, "--config", str(settings), "--out", str(folder)]
    with (folder.parent / f"{cell.name}.log").open("ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, **ONE_THREAD})
        _, status, usage = os.wait4(process.pid, 0)  # not wait(): it would not tell the processor time
        code = process.returncode = os.waitstatus_to_exitcode(status)
    seconds = usage.ru_utime + usage.ru_stime
    with bench.lock:
        bench.spent += seconds
    if code not in VERDICTS and code != NUMERICS:
        raise SystemExit(f"{cell.name} ended with exit code {code}; see {folder.parent / cell.name}.log")
    content: dict[str, Any] = {"cell": asdict(cell), "digest": cell_digest(cfg), "exit_code": code}
    content |= {"verdict": VERDICTS.get(code), "processor_seconds": round(seconds, 1)}
    if code in VERDICTS:
        summary = json.loads((folder / "audit/summary.json").read_text(encoding="utf-8"))
        content["summary"] = {key: summary.get(key) for key in KEPT}
        env = json.loads((folder / "env.json").read_text(encoding="utf-8"))
        content["environment"] = {key: env.get(key) for key in ("python", "distunlearn", "packages", "cpu")}
    bench.results.mkdir(parents=True, exist_ok=True)
    path = bench.results / f"{cell.name}.json"
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(_rounded(content), separators=(",", ":")) + "\n", encoding="utf-8")
    os.replace(partial, path)


ONE_THREAD = {"OMP_NUM_THREADS": "1"}


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_rounded(inner) for inner in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def run_groups(bench: Bench, chosen: Sequence[Sequence[Cell]], jobs: int) -> None:
    """All missing cells; groups side by side, the cells of a group one after the other, its base first."""
    needed = set(bench.missing(chosen))

    def run_group(group: Sequence[Cell]) -> None:
        for cell in group:
            if cell not in needed:
                continue
            if bench.spent > 3600 * bench.cap:
                raise SystemExit(f"the cap of {bench.cap:g} hours is spent; the same command goes on with --cap raised")
            run_cell(bench, cell)
            print(f"{cell.name}: done, {bench.spent / 3600:.2f} h so far", file=sys.stderr, flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        waiting = [pool.submit(run_group, group) for group in chosen]
        errors = [error for future in waiting if (error := future.exception()) is not None]
    if errors:
        raise errors[0]


def refuse_above_cap(bench: Bench, chosen: Sequence[Sequence[Cell]]) -> None:
    """Print what the missing cells will cost, and end here if it is more than the cap."""
    missing = bench.missing(chosen)
    expected = estimate(bench.grid, [(cell, bench.config(cell)) for cell in missing])
    hours = sum(expected.values()) / 3600
    print(f"{len(missing)} cells to run, estimated at {hours:.2f} hours of processor time; the cap is {bench.cap:g}")
    if hours > bench.cap:
        raise SystemExit("refused: the estimate is above the cap; choose fewer cells (--only) or raise --cap")


def array_script(argv: Sequence[str], count: int) -> str:
    """A SLURM array with one task a group."""
    rest = shlex.join(part for part in argv if part != "--slurm")
    lines = [
        "#!/bin/bash",
        "#SBATCH --job-name=forgetting",
        f"#SBATCH --array=0-{count - 1}",
        "#SBATCH --gres=gpu:1",
        "#SBATCH --cpus-per-task=8",
        "#SBATCH --output=forgetting-%A_%a.log",
        f'srun python benchmarks/forgetting.py {rest} --group "$SLURM_ARRAY_TASK_ID"',
    ]
    return "\n".join(lines) + "\n"


def parsed(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", choices=GRIDS, required=True)
    parser.add_argument("--runs", type=Path, default=Path("runs/forgetting"), help="run directories")
    parser.add_argument("--results", type=Path, help="folder of the cells' JSON files; default: <runs>/results")
    parser.add_argument("--document", type=Path, help="Markdown file for tables, pictures and raw figures")
    parser.add_argument("--only", nargs="+", default=[], metavar="TEXT", help="groups whose name holds one of these")
    parser.add_argument("--group", type=int, help="number of one group (a task of a SLURM array)")
    parser.add_argument("--methods", nargs="+", help="only these methods, besides the base")
    parser.add_argument("--root", action="append", default=[], metavar="DATASET=DIR", help="where a data set lies")
    parser.add_argument(
        "--tuned",
        action="append",
        default=[],
        metavar="DATASET[-ENCODER]=FILE",
        help="chosen.json of `distunlearn sweep --no-report`: settings chosen on other forget sets of this data set; "
        "those with an encoder are for that one and win",
    )
    parser.add_argument("--jobs", type=int, default=1, help="groups at a time")
    parser.add_argument("--cap", type=float, help="hours of processor time; default: the grid's own")
    parser.add_argument(
        "--report", action="store_true", help="run nothing, write the document of all cells that are there"
    )
    parser.add_argument("--estimate", action="store_true", help="run nothing, say what would be run at what cost")
    parser.add_argument("--slurm", action="store_true", help="print a SLURM array and run nothing")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> None:
    args = parsed(argv)
    grid = GRIDS[args.grid]
    if args.methods:
        grid = Grid(**{**vars(grid), "methods": tuple(args.methods)})
    everything = groups(grid)
    chosen = [g for g in everything if not args.only or any(text in g[0].group for text in args.only)]
    if args.group is not None:
        chosen = [everything[args.group]]
    if not chosen:
        raise SystemExit(f"no group of the grid {args.grid} is named like {' or '.join(args.only)}")
    if args.slurm:
        print(array_script(argv, len(everything)), end="")
        return
    roots = dict(text.split("=", 1) for text in args.root)
    chosen_for = dict(text.split("=", 1) for text in args.tuned)
    tunable = {*grid.datasets, *(f"{dataset}-{encoder}" for dataset in grid.datasets for encoder in grid.encoders)}
    if unknown := sorted({*(set(roots) - set(grid.datasets)), *(set(chosen_for) - tunable)}):
        known = ", ".join(grid.datasets)
        raise SystemExit(f"the grid {args.grid} has no data set {', '.join(unknown)}; it has {known}")
    tuned = {name: json.loads(Path(path).read_text(encoding="utf-8")) for name, path in chosen_for.items()}
    results = args.results or args.runs / "results"
    bench = Bench(grid, args.runs, results, roots, tuned, args.cap or grid.cap)
    if not args.report:
        if grid.gpu:
            import torch

            if not torch.cuda.is_available():
                raise SystemExit(f"the grid {args.grid} needs a GPU and there is none; --slurm prints a job for it")
        else:
            refuse_above_cap(bench, chosen)
        if args.estimate:
            return
        run_groups(bench, chosen, args.jobs)
    read = bench.kept if args.report else bench.result
    found = [result for group in chosen for cell in group if (result := read(cell)) is not None]
    if args.document:
        command = shlex.join(["python", "benchmarks/forgetting.py", *argv])
        write_document(args.document, args.grid, found, command, tuned)
    passed = [Cell(**r["cell"]).name for r in found if r["cell"]["method"] in CONTROLS and r["verdict"] == "pass"]
    if passed:
        raise SystemExit(f"controls that must not pass did: {', '.join(passed)}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except DistunlearnError as error:
        raise SystemExit(f"error: {error}") from None

"""Images/s of the same training from the command line and from Python, idle and beside one busy process.

    python benchmarks/python_door.py --rounds 3 > door.json

`pretrain` of the digits recipe, three ways in turn, each in a process of its own: `python -m distunlearn`; Python that
imports distunlearn first; Python that has imported and used torch before it. Figures are ratios within one round, so
that a machine that others use, too, slows all three down alike; `together` runs the three at the same time.
`torch first, left alone` shows what is mended: the same without the second team of OpenMP threads.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

EPOCHS = 12
FEW = 1  # of what is 10 times slower
DOOR = """
import distunlearn as du
from distunlearn import api
api.pretrain(du.load_config("digits", None, {settings!r}), __import__("pathlib").Path({out!r}))
"""
TORCH_FIRST = "import torch\ntorch.ones(1 << 20).add_(1)\n"
LEFT_ALONE = "import distunlearn.distributed.process_group as p\np.sleep_when_idle = lambda: None\n"
WAYS = {
    "command line": None,
    "python": DOOR,
    "python, torch first": TORCH_FIRST + DOOR,
    "python, torch first, left alone": TORCH_FIRST + LEFT_ALONE + DOOR,
}


def start(way: str, folder: Path, shards: Path) -> subprocess.Popen[bytes]:
    """Begin the training in a process of its own."""
    text = WAYS[way]
    settings = [f"pretrain.epochs={FEW if 'alone' in way else EPOCHS}", f"data.shards={shards}"]
    if text is None:
        sets = [part for value in settings for part in ("--set", value)]
        call = [sys.executable, "-m", "distunlearn", "pretrain", "digits", "--out", str(folder), *sets]
    else:
        call = [sys.executable, "-c", text.format(settings=settings, out=str(folder))]
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "GOMP_"))}
    return subprocess.Popen(call, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def rate(process: subprocess.Popen[bytes], folder: Path) -> float:
    """Images/s of the training, when it has ended."""
    if process.wait():
        raise SystemExit(f"{process.args} failed")
    facts = json.loads((folder / "original" / "done.json").read_text())
    return facts["images"] / facts["seconds"]


def keep_busy() -> None:
    """One core's worth of other work."""
    while True:
        pass


def rates(ways: list[str], root: Path, name: str, together: bool) -> dict[str, float]:
    """Images/s of every way, one after the other or all at the same time."""
    folders = {way: root / f"{name}-{place}" for place, way in enumerate(ways)}
    if not together:
        return {way: rate(start(way, folder, root / "shards"), folder) for way, folder in folders.items()}
    running = {way: start(way, folder, root / "shards") for way, folder in folders.items()}
    return {way: rate(process, folders[way]) for way, process in running.items()}


def measure(rounds: int, states: list[str]) -> dict[str, list[dict[str, float]]]:
    """Images/s by way, a dict a round, for every state."""
    found: dict[str, list[dict[str, float]]] = {state: [] for state in states}
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        call = [sys.executable, "-m", "distunlearn", "prepare", "digits", "--out", str(root)]
        subprocess.run(call, check=True, capture_output=True)
        for number in range(rounds):
            for state in states:
                other = multiprocessing.Process(target=keep_busy, daemon=True)
                if state == "busy":
                    other.start()
                ways = list(WAYS) if state != "together" else list(WAYS)[:3]
                ways = ways if number % 2 == 0 else ways[::-1]
                found[state].append(rates(ways, root, f"{state}-{number}", state == "together"))
                print(state, found[state][-1], file=sys.stderr, flush=True)
                if state == "busy":
                    other.kill()
                    other.join()
    return found


def main() -> None:
    """Print the rates and, for each way, the median over rounds of its ratio to the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--states", nargs="+", default=["idle", "busy", "together"])
    arguments = parser.parse_args()
    found = measure(arguments.rounds, arguments.states)
    ratios = {
        state: {way: statistics.median(r[way] / r["command line"] for r in rounds) for way in rounds[0]}
        for state, rounds in found.items()
    }
    facts = {"cores": os.cpu_count(), "load_average": os.getloadavg()}
    print(json.dumps({"images_per_s": found, "ratio_to_command_line": ratios, **facts}, indent=2))


if __name__ == "__main__":
    main()

"""Evidence end to end, as two people on two directories make and check it: times and sizes, as a dated document.

    python benchmarks/evidence.py --folder /tmp/evidence [--set KEY=VALUE ...] > benchmarks/results/DATE-evidence.md

The operator commits, runs, certifies, hands out a receipt and disposes; the officer countersigns and verifies, at every
level, before and after the disposal. Each command is a process of its own, and its start is in its time. A step that
has been done in the folder is not done again.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from distunlearn.data.manifest.manifest import Manifest
from distunlearn.verify.receipt import read_rows

PASSPHRASE = "benchmark"
ENDS = (0, 6, 7)  # a verdict is no matter here; 8 is
AIMS = {"certificate": 8192, "receipt": 2048}  # bytes
LEVEL_2 = 3.0  # seconds


class Bench:
    """Two folders, the commands that were run in them, and how long each took."""

    def __init__(self, folder: Path, settings: list[str]) -> None:
        self.operator, self.officer = folder / "operator", folder / "officer"
        for place in (self.operator, self.officer):
            place.mkdir(parents=True, exist_ok=True)
        self.run = self.operator / "run"
        self.settings = [part for text in settings for part in ("--set", text)]
        self.kept = folder / "steps.json"
        self.steps: dict[str, dict] = json.loads(self.kept.read_text()) if self.kept.exists() else {}

    def step(self, who: str, title: str, module: str, *args: object) -> None:
        """One command; the exit codes of all that hold are fine."""
        if title in self.steps:
            return
        place = self.operator if who == "operator" else self.officer
        began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            [sys.executable, "-m", module, *map(str, args)], cwd=place, capture_output=True, text=True,
            env={**os.environ, "DISTUNLEARN_PASSPHRASE": PASSPHRASE}, check=False,
        )  # fmt: skip
        seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
        processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        if done.returncode not in ENDS:
            raise SystemExit(f"{title}: exit code {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        words = {}
        if "--json" in args:
            words = {check["title"]: check["word"] for check in json.loads(done.stdout)["checks"]}
        self.steps[title] = {
            "who": who,
            "seconds": seconds,
            "processor": processor,
            "code": done.returncode,
            "words": words,
        }
        self.kept.write_text(json.dumps(self.steps, indent=1))

    def send(self, name: Path, to: Path) -> None:
        """A file or folder from one to the other."""
        target = to / name.name
        if not target.exists():
            shutil.copytree(name, target) if name.is_dir() else shutil.copy(name, target)


def go(bench: Bench) -> None:
    """Everything, in order."""
    tool, run, evidence = "distunlearn", bench.run, bench.run / "evidence"
    for who in ("operator", "officer"):
        bench.step(who, f"keygen ({who})", tool, "keygen", f"{who}.key")
    bench.send(bench.operator / "operator.key.pub", bench.officer)
    keys = [{"role": who, "pem": (bench.officer / f"{who}.key.pub").read_text()} for who in ("operator", "officer")]
    (bench.officer / "trust.json").write_text(json.dumps({"version": 1, "keys": keys}))
    bench.step("operator", "commit", tool, "commit", "digits", "--out", "run", *bench.settings)
    bench.send(evidence / "commitment.request.json", bench.officer)
    bench.step("officer", "countersign", tool, "countersign", "commitment.request.json", "--key", "officer.key",
               "--register", "register.jsonl", "--reference", "benchmark")  # fmt: skip
    bench.send(bench.officer / "commitment.json", bench.operator)
    bench.step("operator", "run", tool, "run", "digits", "--out", "run", *bench.settings, "--set",
               "evidence.commitment=commitment.json", "--set", "evidence.key=operator.key", "--set",
               "evidence.keep=all")  # fmt: skip
    bench.step("operator", "certify", tool, "certify", "run", "--key", "operator.key")
    sample = sorted(read_rows(run))[0] if (run / "evidence/requested.json").exists() else ""
    bench.step("operator", "receipt", tool, "receipt", "run", "--id", sample, "--out", "receipt.json")
    if not (bench.operator / "image.png").exists():
        found = Manifest.of_run(run).by_id[sample]
        with (run / "shards" / found.shard).open("rb") as shard:
            shard.seek(found.offset)
            (bench.operator / "image.png").write_bytes(shard.read(found.length))
    for name in ("certificate.json", "commitment.json"):
        if not (bench.officer / "seen" / name).exists():
            (bench.officer / "seen").mkdir(exist_ok=True)
            shutil.copy(evidence / name, bench.officer / "seen")
    verify(bench)
    bench.step("operator", "residuals", tool, "residuals", "run")
    bench.step("operator", "dispose", tool, "dispose", "run", "--key", "operator.key", "--apply")
    given = statement(bench)
    bench.step("officer", "verify, level 0 after disposal", "distunlearn.verify.cli", *given, "--disposal",
               evidence / "disposal.json")  # fmt: skip
    bench.step(
        "officer", "verify, level 1 after disposal", "distunlearn.verify.cli", *given, "--export", run / "export"
    )
    bench.step("officer", "receipt after disposal", "distunlearn.verify.cli", *given, "--receipt",
               bench.operator / "receipt.json")  # fmt: skip


def statement(bench: Bench) -> list[object]:
    """What the officer has for level 0."""
    return ["seen/certificate.json", "--trust", "trust.json", "--commitment", "seen/commitment.json", "--register",
            "register.jsonl", "--json"]  # fmt: skip


def verify(bench: Bench) -> None:
    """Every level, and a receipt with and without its image."""
    light, given, run = "distunlearn.verify.cli", statement(bench), bench.run
    image = ["--receipt", bench.operator / "receipt.json"]
    bench.step("officer", "verify, level 0", light, *given)
    bench.step("officer", "verify, level 1", light, *given, "--export", run / "export")
    bench.step("officer", "verify, level 2", light, *given, "--export", run / "export", "--run", run)
    bench.step("officer", "receipt, without image", light, *given, *image)
    bench.step("officer", "receipt, with image", light, *given, *image, "--image", bench.operator / "image.png")
    whole = [*given, "--run", run, "--shards", run / "shards"]
    bench.step("officer", "verify, level 3", "distunlearn", "verify", *whole)
    bench.step("officer", "verify, level 4, K = 3", "distunlearn", "verify", *whole, "--replay", "3")
    bench.step("officer", "verify, level 4, all", "distunlearn", "verify", *whole, "--replay", "all")


def document(bench: Bench) -> str:
    """The results as a page."""
    sizes = {
        "certificate": bench.officer / "seen/certificate.json", "commitment": bench.officer / "seen/commitment.json",
        "receipt": bench.operator / "receipt.json", "disposal": bench.run / "evidence/disposal.json",
    }  # fmt: skip
    lines = [
        "# Evidence, end to end", "",
        f"{datetime.date.today()}, `python benchmarks/evidence.py {' '.join(bench.settings)}`; torch "
        f"{torch.__version__}, {platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads. "
        "Digits, as two people on two directories. Each time is that of a whole process, with its start.",
        "", "| step | by | seconds | processor seconds | exit code | levels |", "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for title, step in bench.steps.items():
        words = "; ".join(f"{name}: {word}" for name, word in step["words"].items() if word != "not checked")
        spent = f"{step['processor']:.1f}" if "processor" in step else "not recorded"
        lines.append(f"| {title} | {step['who']} | {step['seconds']:.1f} | {spent} | {step['code']} | {words} |")
    lines += ["", "| file | bytes | aim |", "|---|---|---|"]
    there = {name: path.stat().st_size for name, path in sizes.items() if path.exists()}
    lines += [f"| {name} | {size} | {AIMS.get(name, '')} |" for name, size in there.items()]
    level_2 = bench.steps["verify, level 2"]["seconds"]
    lines += ["", f"Level 2 took {level_2:.1f} s; the aim is {LEVEL_2:g} s."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Evidence end to end: times and sizes.")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--set", action="append", default=[], help="KEY=VALUE of the run")
    found = parser.parse_args()
    made = Bench(found.folder.resolve(), found.set)
    go(made)
    print(document(made), end="")

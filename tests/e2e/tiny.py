"""Tiny runs on the embedded digits, seconds each: every part at work, nothing learned."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import zygote

TINY = [
    "data.members=96",
    "data.forget=24",
    "data.holdout=48",
    "data.calibration=24",
    "data.third_party=24",
    "data.third_party_audit=24",
    "data.samples_per_shard=32",
    "constraint.view_pairs=1",
    "pretrain.epochs=2",
    "pretrain.batch=32",
    "pretrain.checkpoint_every=2",
    "unlearn.steps=6",
    "unlearn.retain_batch=32",
    "unlearn.forget_batch=8",
    "unlearn.third_party_batch=8",
    "unlearn.checkpoint_every=2",
    "audit.views=4",
    "audit.bootstrap=100",
    "audit.relearn_steps=4",
    "runtime.threads=1",
]


def named_roles(folder: Path, forget: int = 24, non_members: int = 120) -> str:
    """The setting of a list of digits to forget and of images that a foreign encoder never saw."""
    rows = [f"digits/{n:06d},forget" for n in range(forget)]
    rows += [f"digits/{n:06d},non_member" for n in range(900, 900 + non_members)]
    path = folder / "roles.csv"
    path.write_text("id,role\n" + "\n".join(rows) + "\n")
    return f"data.forget={path}"


def settings(*extra: str) -> list[str]:
    """`--set` arguments of a tiny run; later values win."""
    return [part for value in (*TINY, *extra) for part in ("--set", value)]


def environment(**extra: str) -> dict[str, str]:
    """One thread, no network, warnings as they come."""
    return {**os.environ, **extra, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def command(*args: str, timeout: float = 300, **variables: str) -> subprocess.CompletedProcess[str]:
    """`python -m distunlearn ARGS`, output captured; by a fork of a process that has imported everything."""
    return zygote.shared().command(args, environment(**variables), timeout)


def run(out: Path, *extra: str, recipe: str = "digits", **variables: str) -> subprocess.CompletedProcess[str]:
    """A tiny `run` into `out`."""
    return command("run", recipe, "--out", str(out), *settings(*extra), **variables)

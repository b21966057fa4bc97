"""A hundred random SIGKILLs over whole runs of two processes: the same weights, scores and figures, bit for bit.

    pytest -m matrix -s tests/faults/test_many_kills.py            # KILLS=100, KILLS_SEED=0 by default

Every kill has a phase to hit; what it hit is printed in a table, with the seed of the times.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
import tiny
from zygote import Zygote

from distunlearn.common.files import file_sha256
from distunlearn.verify.scores import read_scores

PHASES = ("pretrain", "unlearn", "retrain", "audit", "report")
ENDS = {"pretrain": "original/done.json", "unlearn": "done.json", "retrain": "retrained/done.json",
        "audit": "audit/summary.json", "report": "report.html"}  # fmt: skip
FORMS = {"ddp": ("backend=ddp",), "sharded": ("backend=zero1", "checkpoint.sharded=always")}
SMALL = ("pretrain.epochs=8", "pretrain.checkpoint_every=3", "unlearn.steps=24", "unlearn.checkpoint_every=4")
KILLS, SEED = int(os.environ.get("KILLS", "100")), int(os.environ.get("KILLS_SEED", "0"))


def phase_of(out: Path) -> str:
    """The first phase that has not ended."""
    return next((phase for phase in PHASES if not (out / ENDS[phase]).exists()), "done")


def outcome(out: Path) -> dict[str, object]:
    """What must be the same: weights, exports, raw scores, figures; not how long it took."""
    done = [json.loads((out / ENDS[phase]).read_text()) for phase in ("pretrain", "unlearn", "retrain")]
    summary = json.loads((out / "audit" / "summary.json").read_text())
    kept = {key: value for key, value in summary.items() if key != "cost"}
    return {"states": [d["state"] for d in done], "exports": [d["export"] for d in done],
            "scores": read_scores(out / "audit"), "summary": kept}  # fmt: skip


def start(zygote: Zygote, out: Path, form: str):
    return zygote.start(2, ["run", "digits", "--out", str(out), *tiny.settings(*SMALL, *FORMS[form])], 250)


def watched(zygote: Zygote, out: Path, form: str) -> dict[str, float]:
    """Seconds that each phase of an undisturbed run takes, from where it was found to begin."""
    began, found, group = {}, {}, start(zygote, out, form)
    before = ""
    while group.alive():
        now = phase_of(out) if (out / "owner.json").exists() or (out / "audit").exists() else ""
        if now != before:
            if before:
                found[before] = time.monotonic() - began[before]
            began[now], before = time.monotonic(), now
        time.sleep(0.005)
    codes = group.wait()
    assert set(codes) <= {0, 6, 7}, group.said()
    if before in PHASES:
        found[before] = time.monotonic() - began[before]
    return found


def has_begun(group, out: Path, phase: str, since: float) -> bool:
    """Whether these very processes are at work at a phase, and no longer at the start of themselves."""
    try:
        if phase == "report":
            return (out / ENDS["audit"]).stat().st_mtime > since
        if phase == "audit":
            return (out / "logs" / "audit.log").stat().st_mtime > since
        last = [
            line for line in (out / "ledger.jsonl").read_text().splitlines() if f'"start","phase":"{phase}"' in line
        ]
        return bool(last) and json.loads(last[-1])["time"] > since
    except OSError:
        return False


def kill(group, out: Path, target: str, delay: float, chosen: random.Random, since: float) -> str:
    """SIGKILL one rank, or both, some time after `target` has begun; the phase that was hit, "" if all had ended."""
    while group.alive() and not has_begun(group, out, target, since):
        time.sleep(0.002)
    time.sleep(delay)
    hit = phase_of(out) if group.alive() else ""
    for rank in chosen.choice(([0], [1], [0, 1])):
        with contextlib.suppress(ProcessLookupError):
            os.kill(group.pids[rank], signal.SIGKILL)
    time.sleep(0.5)
    for pid in group.pids:  # the other one notices by itself; the table is about kills, not about waiting
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    group.wait()
    return hit


@pytest.mark.matrix
@pytest.mark.timeout(0)
@pytest.mark.parametrize("form", FORMS)
def test_killed_again_and_again_a_run_ends_as_if_nothing_had_been(tmp_path, form):
    chosen, hits, wanted = random.Random(SEED), Counter(), -(-KILLS // len(FORMS) // len(PHASES))
    with Zygote() as zygote:
        seconds = watched(zygote, tmp_path / "undisturbed", form)
        expected = outcome(tmp_path / "undisturbed")
        runs = 0
        while min(hits[phase] for phase in PHASES) < wanted:
            out, runs = tmp_path / f"run-{runs}", runs + 1
            while True:
                now = phase_of(out)
                later = PHASES[PHASES.index(now) :] if now in PHASES else ()
                left = [phase for phase in later if hits[phase] < wanted]
                since = time.time() - 0.002  # times in the ledger are rounded
                group = start(zygote, out, form)
                if not left:
                    assert set(group.wait()) <= {0, 6, 7}, group.said()
                    break
                target = left[0]
                longest = 0.3 if target == "report" else 0.6 * seconds[target]
                hits[kill(group, out, target, chosen.uniform(0, longest), chosen, since)] += 1
            assert outcome(out) == expected, f"run {runs - 1}, seed {SEED}"
            assert file_sha256(out / "ledger.jsonl") and (out / "report.html").exists()
            shutil.rmtree(out)
            table = ", ".join(f"{phase} {hits[phase]}" for phase in PHASES)
            print(f"{form}, seed {SEED}, {runs} runs, kills by phase: {table}", flush=True)
    assert min(hits[phase] for phase in PHASES) >= wanted

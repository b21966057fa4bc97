"""A hundred random SIGKILLs over whole runs of two processes: the same weights, scores and report, bit for bit.

    pytest -m matrix -s tests/faults/test_many_kills.py            # KILLS=100, KILLS_SEED=0 by default

Every run is killed in each of its phases; what a kill hit is written down with its time. With KILLS_FOLDER=FOLDER the
undisturbed runs and FOLDER/kills.jsonl, a line a run, are kept, and another start goes on after them.
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
from outcomes import PHASES, has_begun, outcome, phase_of, without_times
from zygote import Group, Zygote

from distunlearn.verify.ledger import read_ledger

FORMS = {"ddp": ("backend=ddp",), "fsdp2": ("backend=fsdp2", "checkpoint.sharded=always")}
SMALL = ("pretrain.epochs=8", "pretrain.checkpoint_every=3", "unlearn.steps=24", "unlearn.checkpoint_every=4")
KILLS, SEED = int(os.environ.get("KILLS", "100")), int(os.environ.get("KILLS_SEED", "0"))
FOLDER = os.environ.get("KILLS_FOLDER")


def start(zygote: Zygote, out: Path, form: str) -> Group:
    return zygote.start(2, ["run", "digits", "--out", str(out), *tiny.settings(*SMALL, *FORMS[form])], 1500)


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


def kill(group: Group, out: Path, target: str, delay: float, ranks: list[int], since: float) -> str:
    """SIGKILL these ranks some time after `target` has begun; the phase that was hit, "" if all had ended."""
    while group.alive() and not has_begun(out, target, since):
        time.sleep(0.002)
    time.sleep(delay)
    hit = phase_of(out) if group.alive() else ""
    for rank in ranks:
        with contextlib.suppress(ProcessLookupError):
            os.kill(group.pids[rank], signal.SIGKILL)
    time.sleep(0.5)
    for pid in group.pids:  # the other one notices by itself; the table is about kills, not about waiting
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    group.wait()
    return hit


def killed_run(zygote: Zygote, out: Path, form: str, seconds: dict[str, float], chosen: random.Random) -> list[dict]:
    """A run that is killed at least once in each phase, and then ends; its kills."""
    kills: list[dict] = []
    while (now := phase_of(out)) != "done":
        left = [phase for phase in PHASES[PHASES.index(now) :] if phase not in {found["hit"] for found in kills}]
        since = time.time() - 0.002  # times in the ledger are rounded
        group = start(zygote, out, form)
        if not left:
            assert set(group.wait()) <= {0, 6, 7}, group.said()
            break
        longest = 0.3 if left[0] == "report" else 0.6 * seconds[left[0]]
        delay, ranks = chosen.uniform(0, longest), chosen.choice(([0], [1], [0, 1]))
        hit = kill(group, out, left[0], delay, ranks, since)
        kills.append({"target": left[0], "delay": round(delay, 3), "ranks": ranks, "hit": hit})
    return kills


def differences(found: dict[str, object], expected: dict[str, object]) -> list[str]:
    return [name for name in expected if found[name] != expected[name]]


@pytest.mark.matrix
@pytest.mark.timeout(0)
@pytest.mark.parametrize("form", FORMS)
def test_killed_again_and_again_a_run_ends_as_if_nothing_had_been(tmp_path, form):
    folder = Path(FOLDER or tmp_path)
    folder.mkdir(exist_ok=True)
    kept = folder / "kills.jsonl"
    rows = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    rows = [row for row in rows if row["form"] == form and row["seed"] == SEED]
    hits = Counter(kill["hit"] for row in rows for kill in row["kills"])
    with Zygote() as zygote:
        whole, timed = folder / f"{form}-undisturbed", folder / f"{form}-seconds.json"
        if not timed.exists():
            shutil.rmtree(whole, ignore_errors=True)
            timed.write_text(json.dumps(watched(zygote, whole, form)))
        seconds, expected = json.loads(timed.read_text()), outcome(whole)
        while sum(hits[phase] for phase in PHASES) < KILLS / len(FORMS):
            out = tmp_path / f"run-{len(rows)}"
            kills = killed_run(zygote, out, form, seconds, random.Random(f"{SEED} {form} {len(rows)}"))
            found = differences(outcome(out), expected)
            if found and FOLDER:
                shutil.copytree(out, folder / f"{form}-{len(rows)}")
            assert not found, f"{form}, run {len(rows)}, seed {SEED}: other {found} after {kills}"
            assert read_ledger(out / "ledger.jsonl")
            rows.append({"form": form, "seed": SEED, "kills": kills, "state": expected["states"][1]})
            with kept.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
            shutil.rmtree(out)
            hits.update(kill["hit"] for kill in kills)
            table = ", ".join(f"{phase} {hits[phase]}" for phase in PHASES)
            print(f"{form}, seed {SEED}, {len(rows)} runs, kills by phase: {table}", flush=True)
    assert min(hits[phase] for phase in PHASES) >= KILLS // len(FORMS) // len(PHASES)


def test_a_report_differs_in_its_times_alone():
    """Control: another figure is seen, another time is not."""
    page = '<dd>2026-11-30 14:43 UTC</dd><p>0.5</p><h3 class="small">Time, in seconds</h3><dd>173 %</dd></dl><p>7</p>'
    page += "<dd>24 training steps</dd>"
    other = page.replace("14:43", "15:01").replace("173", "164")
    other = other.replace("steps<", "steps, resumed after an interruption (2 attempts)<")
    assert without_times(page) == without_times(other) != without_times(other.replace("0.5", "0.6"))
    assert without_times(page) != without_times(page.replace("<p>7", "<p>8"))

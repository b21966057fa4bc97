"""Every evaluator in a whole unlearning run on the embedded digits: it starts, trains, counts and ends."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys

import pytest
import tiny
import torch
from safetensors.torch import load_file

PLAIN = 6 * (32 + 8 + 8 + 8) * 2  # views of six steps, without what evaluators add; forgotten images climb, too
EXTRA = {"sketch": 6 * 2 * (2 * 8), "sliced": 6 * 2 * (8 + 2 * 8), "input_gp": 6 * 2 * 3 * 8}
EXTRA["ghost_norm"] = EXTRA["sketch"]


@pytest.fixture(scope="module")
def prepared(finished_run):
    """Shards, original and retrained encoder, which all evaluators share."""
    return finished_run()[0]


@pytest.mark.parametrize("evaluator", ["sketch", "sliced", "ghost_norm", "input_gp", "double_backward"])
def test_a_run_with_each_evaluator(prepared, tmp_path, evaluator):
    out = tmp_path / "run"
    often = [] if evaluator == "double_backward" else ["constraint.check_every=3"]  # which takes no differences
    done = tiny.run(out, f"constraint.evaluator={evaluator}", *often, f"runtime.reuse={prepared}")
    assert done.returncode in (0, 6, 7), done.stderr[-3000:]
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [row["values"] for row in rows if row["phase"] == "unlearn" and "loss" in row["values"]]
    assert len(steps) == 6 and all(math.isfinite(values["loss"]) for values in steps)
    assert steps[0]["constraint_gradient"] > 0
    assert [("step_size_change" in values) for values in steps] == [
        evaluator != "double_backward" and step % 3 == 0 for step in range(6)
    ]
    summary = json.loads((out / "audit/summary.json").read_text())
    assert summary["coverage"]["requested"] == 24 and summary["coverage"]["consumed_min"] == 2
    plan = json.loads((out / "plan.json").read_text())
    unlearn = plan["phases"]["unlearn"]
    checks = 0 if evaluator == "double_backward" else 2 * 2 * (2 * 8)
    assert unlearn["images"] == PLAIN + EXTRA.get(evaluator, 0) + checks
    assert summary["cost"]["unlearn_images"] == unlearn["images"] + unlearn["calibration_images"]


def ledger(out) -> list[dict]:
    """What each step consumed, without the rest of the line."""
    lines = [json.loads(line) for line in filter(None, (out / "ledger.jsonl").read_text().splitlines())]
    return [{k: line[k] for k in ("phase", "step", "count", "forget")} for line in lines if line["event"] == "step"]


def test_micro_batches_are_parts_of_the_same_batches(prepared, tmp_path):
    """Random directions are new in each part; ids, counts, and the running mean of the losses are those of the step."""
    whole, out, control = (tmp_path / name for name in ("whole", "parts", "control"))
    for folder, extra in ((whole, []), (out, ["unlearn.accumulate=4"]), (control, ["unlearn.forget_batch=12"])):
        done = tiny.run(
            folder, f"runtime.reuse={prepared}", "constraint.evaluator=sketch", "constraint.check_every=3", *extra
        )
        assert done.returncode in (0, 6, 7), done.stderr[-3000:]
    assert ledger(out) == ledger(whole) != ledger(control)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [row["values"] for row in rows if row["phase"] == "unlearn" and "loss" in row["values"]]
    assert len(steps) == 6 and all(math.isfinite(values["loss"]) for values in steps)
    audits = [json.loads((folder / "audit/summary.json").read_text()) for folder in (whole, out)]
    costs = [audit["cost"]["unlearn_images"] for audit in audits]
    banks = 4 * 2 * (32 - 8)  # of the calibration's four draws: as small as that of a micro-batch
    assert costs[0] - costs[1] == banks  # the steps themselves cost the same


def weights(out) -> dict:
    return load_file(out / "training_state.safetensors")


def test_activation_checkpointing_changes_no_bit(prepared, tmp_path):
    for name, extra in (
        ("plain", []),
        ("checkpointing", ["runtime.activation_checkpointing=true"]),
        ("control", ["unlearn.lr=0.01"]),
    ):
        chosen = tiny.settings(f"data.shards={prepared / 'shards'}", "constraint.evaluator=ghost_norm", *extra)
        reused = ["--set", f"runtime.reuse={prepared}"]
        done = tiny.command("unlearn", "digits", "--out", str(tmp_path / name), *chosen, *reused)
        assert done.returncode == 0, done.stderr[-3000:]
    expected, found, control = (weights(tmp_path / name) for name in ("plain", "checkpointing", "control"))
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert not all(torch.equal(control[key], expected[key]) for key in expected)


def test_a_compiled_run_or_the_reason_why_not(prepared, tmp_path):
    """Where there is a compiler the loss of the first step is that of the plain run, to rounding."""
    settings = [f"runtime.reuse={prepared}", "constraint.evaluator=sketch", "unlearn.steps=3"]
    command = [sys.executable, "-m", "distunlearn", "run", "digits", "--out", str(tmp_path / "refused")]
    refused = subprocess.run(  # torch asks for the compiler's name when it is imported: no fork
        [*command, *tiny.settings(*settings, "runtime.compile=true")],
        env=tiny.environment(CXX="no-such-compiler"), capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert (
        refused.returncode == 2 and "set runtime.compile=false" in refused.stderr and "Traceback" not in refused.stderr
    )
    assert not (tmp_path / "refused").exists()
    compiled = tiny.run(tmp_path / "compiled", *settings, "runtime.compile=true")
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        assert compiled.returncode == 2
        return
    assert compiled.returncode in (0, 6, 7), compiled.stderr[-3000:]
    assert tiny.run(tmp_path / "plain", *settings).returncode in (0, 6, 7)
    first = {}
    for name in ("compiled", "plain"):
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        first[name] = next(r["values"]["loss"] for r in rows if r["phase"] == "unlearn" and "loss" in r["values"])
    assert first["compiled"] == pytest.approx(first["plain"], rel=1e-4)


def test_double_backward_is_refused_for_sharded_weights_before_anything_is_written(tmp_path):
    out = tmp_path / "run"
    done = tiny.run(out, "constraint.evaluator=double_backward", "backend=fsdp2")
    assert done.returncode == 2 and "set constraint.evaluator=sketch" in done.stderr
    assert not out.exists()

"""`status`: what a run directory tells, before, during and after."""

from __future__ import annotations

import json

import tiny


def status(out) -> dict:
    said = tiny.command("status", str(out))
    assert said.returncode == 0, said.stderr
    return json.loads(said.stdout)


def test_status_follows_a_run(tmp_path):
    out = tmp_path / "run"
    nothing = tiny.command("status", str(out))
    assert nothing.returncode == 3 and "is not a run directory" in nothing.stderr and "Traceback" not in nothing.stderr
    assert not out.exists()

    for verb in ("prepare", "pretrain"):
        done = tiny.command(verb, "digits", "--out", str(out), *tiny.settings())
        assert done.returncode == 0, done.stderr
    found = status(out)
    assert {name: phase["state"] for name, phase in found["phases"].items()} == {
        "pretrain": "done", "unlearn": "waiting", "retrain": "waiting",
    }  # fmt: skip
    steps = found["phases"]["pretrain"]
    assert steps["steps"] == steps["of"] == 2 * 96 // 32 and steps["attempts"] == 1 and steps["world"] == 1
    assert found["next"] == "unlearn" and found["audit"] is None and found["jobs"] == []

    (out / "stop").touch()  # an attempt that stops after its first step
    assert tiny.command("unlearn", "digits", "--out", str(out), *tiny.settings()).returncode == 75
    unlearn = status(out)["phases"]["unlearn"]
    assert (unlearn["state"], unlearn["steps"], unlearn["of"], unlearn["checkpoint"]) == ("stopped", 1, 6, 1)
    (out / "stop").touch()
    assert tiny.command("unlearn", "digits", "--out", str(out), *tiny.settings()).returncode == 75
    next((out / "checkpoints" / "step-00000002").glob("*.safetensors")).write_bytes(b"torn")
    unlearn = status(out)["phases"]["unlearn"]
    assert unlearn["checkpoint"] == 1 and unlearn["rejected_checkpoints"] == ["step-00000002"]

    assert tiny.run(out).returncode in (0, 6, 7)
    found = status(out)
    assert found["phases"]["unlearn"]["attempts"] == 3 and found["phases"]["unlearn"]["steps"] == 6
    assert found["next"] is None and found["report"] and found["audit"]["verdict"] in ("pass", "fail", "inconclusive")
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert status(out) == found and {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_a_torn_ledger_is_told_in_one_sentence(tmp_path):
    out = tmp_path / "run"
    assert tiny.command("prepare", "digits", "--out", str(out), *tiny.settings()).returncode == 0
    assert status(out)["next"] == "pretrain"
    (out / "ledger.jsonl").write_text("{}\nnot a line\n{}\n")
    said = tiny.command("status", str(out))
    assert said.returncode == 3 and "ledger" in said.stderr and "Traceback" not in said.stderr

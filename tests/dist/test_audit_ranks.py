"""The audit of several processes finds what one finds, bit for bit; one that was killed goes on where it was."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import tiny
from processes import execute_ranks

from distunlearn.config.shape import plain as plain_settings
from distunlearn.engine.run_directory import saved_config
from distunlearn.verify.commitment import run_rules
from distunlearn.verify.run import check_run

pytestmark = pytest.mark.slow
# 376 images: six chunks of each encoder
MANY = ("backend=ddp", "data.members=256", "data.holdout=96", "audit.relearn_steps=2", "pretrain.epochs=1")
KILL = "kill@point=audit,phase=unlearned,step=3"
# Chunks that an audit that goes on must not look at: all of the first encoder, and those of the second before the end.
NEVER = ";".join(
    ["raise@point=audit,phase=original", *(f"raise@point=audit,phase=unlearned,step={n}" for n in range(3))]
)


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """A finished run that one process has audited."""
    out = tmp_path_factory.mktemp("alone") / "run"
    done = tiny.run(out, *MANY)
    assert done.returncode in (0, 6, 7), done.stderr[-3000:]
    return out


def fresh(alone: Path, place: Path) -> Path:
    """A copy that was not audited."""
    shutil.copytree(alone, place)
    shutil.rmtree(place / "audit")
    return place


def same(out: Path, alone: Path) -> bool:
    """Summary and raw scores of the two are the same bytes."""
    names = ["summary.json", *(f"scores-{name}.json" for name in ("original", "unlearned", "retrained"))]
    return all((out / "audit" / name).read_bytes() == (alone / "audit" / name).read_bytes() for name in names)


def test_four_processes_find_what_one_finds(alone, tmp_path):
    out = fresh(alone, tmp_path / "run")
    codes, said = execute_ranks(4, ["audit", str(out)])
    assert len(set(codes)) == 1 and codes[0] in (0, 6, 7), said[-4000:]
    assert same(out, alone)
    assert "audit of original: 376/376" in said
    assert {path.name for path in (out / "audit").iterdir()} == {path.name for path in (alone / "audit").iterdir()}


@pytest.mark.parametrize("world", [1, 4])
def test_an_audit_that_was_killed_goes_on(alone, tmp_path, world, monkeypatch):
    out = fresh(alone, tmp_path / "run")
    monkeypatch.setenv("DISTUNLEARN_FAULT", KILL if world == 1 else KILL.replace("step=3", "step=4"))
    codes, said = execute_ranks(world, ["audit", str(out)])
    assert codes[0] == -signal.SIGKILL and codes[1:] == [5] * (world - 1), said[-3000:]
    assert not (out / "audit" / "summary.json").exists()
    kept = list((out / "audit").rglob("*.npz"))
    assert len(kept) >= 2, kept
    # Rank 0 of four looks at the chunks 0 and 4; what others had when they ended is theirs.
    monkeypatch.setenv("DISTUNLEARN_FAULT", NEVER if world == 1 else ";".join(NEVER.split(";")[:2]))
    codes, said = execute_ranks(world, ["audit", str(out)])
    assert set(codes) <= {0, 6, 7}, said[-3000:]
    assert "what the original encoder shows is kept" in said and "fault injected" not in said
    assert same(out, alone)
    assert not list((out / "audit").rglob("*.npz"))
    checked = check_run(
        out, run_rules(plain_settings(saved_config(out)), out)
    )  # figures from the raw scores, digests, ledger
    assert not checked.gaps, checked.gaps


def killed(alone: Path, place: Path, monkeypatch) -> tuple[Path, Path]:
    """An audit that was killed, and the chunk of its second encoder that it wrote first."""
    out = fresh(alone, place)
    monkeypatch.setenv("DISTUNLEARN_FAULT", KILL)
    assert execute_ranks(1, ["audit", str(out)])[0] == [-signal.SIGKILL]
    return out, out / "audit" / "signals-unlearned" / "000000.npz"


@pytest.mark.parametrize("damage", ["torn", "of other images", "of other weights"])
def test_control_a_chunk_that_is_not_what_it_should_be_is_looked_at_again(alone, tmp_path, monkeypatch, damage):
    out, chunk = killed(alone, tmp_path / "run", monkeypatch)
    if damage == "torn":
        chunk.write_bytes(chunk.read_bytes()[:3000])
    elif damage == "of other images":
        shutil.copy(chunk.with_name("000001.npz"), chunk)
    else:
        arrays = dict(np.load(chunk))
        np.savez(chunk, **{**arrays, "key": np.array("another")})
    monkeypatch.setenv("DISTUNLEARN_FAULT", NEVER)
    codes, said = execute_ranks(1, ["audit", str(out)])
    assert codes == [70] and "fault injected: raise at audit, rank 0, unlearned step 0" in said, said[-3000:]
    monkeypatch.setenv("DISTUNLEARN_FAULT", "")
    assert execute_ranks(1, ["audit", str(out)])[0][0] in (0, 6, 7) and same(out, alone)


def test_control_what_was_kept_is_used_and_the_comparison_sees_it(alone, tmp_path, monkeypatch):
    out, chunk = killed(alone, tmp_path / "run", monkeypatch)
    arrays = dict(np.load(chunk))
    np.savez(chunk, **{**arrays, "bank_loss": arrays["bank_loss"] + 1e-9})
    monkeypatch.setenv("DISTUNLEARN_FAULT", NEVER)
    assert execute_ranks(1, ["audit", str(out)])[0][0] in (0, 6, 7)
    assert not same(out, alone)


def test_a_stop_request_keeps_what_was_found(alone, tmp_path, monkeypatch):
    out = fresh(alone, tmp_path / "run")
    monkeypatch.setenv("DISTUNLEARN_FAULT", KILL.replace("kill", "stop"))
    codes, said = execute_ranks(2, ["audit", str(out)])
    assert codes == [75, 75] and "stopped by SIGTERM in the audit" in said, said[-3000:]
    monkeypatch.setenv("DISTUNLEARN_FAULT", NEVER.split(";")[0])
    codes, said = execute_ranks(1, ["audit", str(out)])
    assert codes[0] in (0, 6, 7) and same(out, alone), said[-3000:]
    json.loads((out / "audit" / "summary.json").read_text())

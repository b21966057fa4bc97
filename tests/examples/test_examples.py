"""The examples run from another folder, and what they bring works by the command line too."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
SCRIPTS = sorted(path.name for path in EXAMPLES.glob("*.py"))
TINY = [
    "pretrain.epochs=2", "unlearn.steps=8", "unlearn.retain_batch=16", "unlearn.forget_batch=8",
    "unlearn.third_party_batch=8", "pretrain.batch=16", "audit.views=4", "audit.bootstrap=100", "data.members=64",
    "data.forget=16", "data.holdout=48", "data.calibration=24", "data.third_party=24", "data.third_party_audit=24",
    "constraint.view_pairs=1",
]  # fmt: skip


def call(*arguments: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **variables}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, cwd=cwd, env=environment, timeout=600
    )


def check(run: Path) -> None:
    """It forgot, was audited and was exported."""
    summary = json.loads((run / "audit" / "summary.json").read_text(encoding="utf-8"))
    assert summary["gates"]["verdict"] in ("pass", "fail", "inconclusive")
    assert summary["coverage"]["consumed_min"] >= 1 and summary["coverage"]["used_as_retain"] == 0
    assert (run / "export" / "model.safetensors").exists() and (run / "export" / "config.json").exists()
    assert (run / "report.html").exists()


@pytest.mark.parametrize("name", SCRIPTS)
def test_example(name: str, tmp_path: Path) -> None:
    done = call(str(EXAMPLES / name), str(tmp_path / "run"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    check(tmp_path / "run")
    if name == "own_method.py":  # what ran is named where it is recorded
        assert "own_method.py" in (tmp_path / "run" / "ledger.jsonl").read_text(encoding="utf-8")


def test_notebook(tmp_path: Path) -> None:
    book = json.loads((EXAMPLES / "digits.ipynb").read_text(encoding="utf-8"))
    assert book["nbformat"] == 4 and {cell["cell_type"] for cell in book["cells"]} == {"markdown", "code"}
    assert all(not cell["outputs"] for cell in book["cells"] if cell["cell_type"] == "code")
    code = "\n".join("".join(cell["source"]) for cell in book["cells"] if cell["cell_type"] == "code")
    # in a thread, as some notebooks run their cells: no signal may be needed
    lines = f"import threading\nfailed = []\ndef cells():\n    try: exec({code!r}, {{}})\n"
    lines += "    except BaseException as error: failed.append(error)\n"
    lines += "thread = threading.Thread(target=cells); thread.start(); thread.join()\nif failed: raise failed[0]\n"
    done = call("-c", lines, cwd=tmp_path, OUT=str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    check(tmp_path / "run")


def test_own_parts_from_the_command_line(tmp_path: Path) -> None:
    """Encoder, data, method and objective of the examples in one run with an own attack, then the audit again."""
    attack = tmp_path / "attacks" / "own_attack.py"
    attack.parent.mkdir()
    attack.write_text(
        "from distunlearn.audit.attacks.embedding_norm import embedding_norm\n\n\n"
        "def own_norm(signals, seed):\n    return embedding_norm(signals, seed)\n",
        encoding="utf-8",
    )
    settings = [
        f"encoder.name={EXAMPLES / 'own_encoder.py'}:Encoder", "encoder.image_size=8", "encoder.stem=standard",
        "encoder.args={}", "encoder.embed_dim=64", "encoder.mean=[0.3]", "encoder.std=[0.35]",
        f"data.source={EXAMPLES / 'own_dataset.py'}:Digits",
        f"method.name={EXAMPLES / 'own_method.py'}:Dissolve", "method.weight=0.5",
        f"objective.name={EXAMPLES / 'own_objective.py'}:Aligned", f"audit.gates.also=[{attack}:own_norm]",
        *(s for s in TINY if "view_pairs" not in s),
    ]  # fmt: skip
    sets = [part for value in settings for part in ("--set", value)]
    run = tmp_path / "run"
    done = call("-m", "distunlearn", "run", "digits", "--out", str(run), *sets, cwd=tmp_path)
    assert done.returncode in (0, 6, 7), done.stderr
    check(run)
    found = json.loads((run / "audit" / "summary.json").read_text(encoding="utf-8"))
    assert found["attacks"]["own_norm"]["original"] == found["further_attacks"]["embedding_norm"]["original"]
    assert "own_norm" in found["gates"] and "own norm" in (run / "report.html").read_text(encoding="utf-8").lower()
    (run / "audit" / "summary.json").unlink()
    again = call("-m", "distunlearn", "audit", str(run), cwd=tmp_path)
    assert again.returncode == done.returncode, again.stderr
    recorded = (run / "ledger.jsonl").read_text(encoding="utf-8")
    assert all(name in recorded for name in ("own_encoder.py", "own_method.py", "own_objective.py", "own_attack.py"))
    summary = json.loads((run / "shards" / "summary.json").read_text(encoding="utf-8"))
    assert list(summary["info"]["source_code"]) == ["own_dataset.py"]

"""Files of a finished run that were changed afterwards: `audit` and `report` refuse them, whoever changed what.

Every case forges a copy of one finished tiny run. Who forges everything alike is not caught here: digests show that
files belong together, not who wrote them.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny

from distunlearn.cli.main import main
from distunlearn.engine import fault_injection
from distunlearn.verify.ledger import next_link
from distunlearn.verify.run import DONE, STATE
from distunlearn.verify.secret import SECRET, commitment, make_secret


def change(path: Path, edit: Callable[[dict], object]) -> None:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def omit_gates(run: Path) -> None:
    """Whatever did not pass is left out, and the rest called a pass."""

    def edit(summary: dict) -> None:
        gates = summary["gates"]
        for name in [name for name, gate in gates.items() if name != "verdict" and gate["verdict"] != "pass"]:
            del gates[name]
            summary["attacks"].pop(name, None)
        gates["verdict"] = "pass"

    change(run / "audit" / "summary.json", edit)


def ship_another_encoder(run: Path) -> None:
    shutil.copy(run / "original/export/model.safetensors", run / "export/model.safetensors")


def ship_another_with_its_digest(run: Path) -> None:
    ship_another_encoder(run)
    digests = json.loads((run / "original" / DONE).read_text())["export"]
    change(run / DONE, lambda done: done.update(export=digests))


def ship_other_settings_of_the_encoder(run: Path) -> None:
    change(run / "export/config.json", lambda config: config["pretrained_cfg"].update(mean=[0.0]))


def forget_nothing(run: Path) -> None:
    """The original encoder in the place of the two others, digests patched."""
    digests = {name: json.loads((run / "original" / DONE).read_text())[name] for name in ("state", "export")}
    for place in (".", "retrained"):
        shutil.copy(run / "original" / STATE, run / place / STATE)
        shutil.copytree(run / "original/export", run / place / "export", dirs_exist_ok=True)
        change(run / place / DONE, lambda done: done.update(digests))
    ledger(run, lambda lines: [line | ({"digest": digests["state"]} if line.get("final") else {}) for line in lines])


def weights_that_no_training_left(run: Path) -> None:
    """Other weights with all their digests, but not in the ledger."""
    for name in (STATE, DONE):
        shutil.copy(run / "retrained" / name, run / name)
    shutil.copytree(run / "retrained/export", run / "export", dirs_exist_ok=True)
    change(run / DONE, lambda done: done.update(phase="unlearn", steps=6))


def swap_weights(run: Path) -> None:
    shutil.copy(run / "retrained" / STATE, run / STATE)


def widen_margins(run: Path) -> None:
    text = (run / "run.yaml").read_text()
    assert "view_agreement: 0.06" in text
    (run / "run.yaml").write_text(text.replace("view_agreement: 0.06", "view_agreement: 0.9"))


def better_scores(run: Path) -> None:
    change(run / "audit/scores-unlearned.json", lambda scores: [
        row.update(view_agreement=0.0) for row in scores["samples"].values() if row["role"] == "forget"
    ])  # fmt: skip


def fewer_images(run: Path) -> None:
    """An image whose score stands out leaves the raw scores."""
    change(run / "audit/scores-unlearned.json", lambda scores: scores["samples"].popitem())


def ledger(run: Path, edit: Callable[[list[dict]], list[dict]]) -> None:
    """Edited, and chained anew, as a forger who knows of the chain would."""
    path = run / "ledger.jsonl"
    lines = edit([json.loads(line) for line in path.read_text().splitlines()])
    path.write_text("")
    for number, line in enumerate(lines):
        link = dict(zip(("n", "prev"), next_link(path, line["prev"] if number == 0 else None), strict=True))
        with path.open("a") as file:
            file.write(json.dumps({**line, **link}) + "\n")


def is_step(line: dict) -> bool:
    return line["event"] == "step" and line["phase"] == "unlearn"


def forge_one_line_for_all_steps(run: Path) -> None:
    def edit(lines: list[dict]) -> list[dict]:
        ids = sorted({i for line in lines if is_step(line) for i in line["forget"]})
        forged = {"event": "step", "phase": "unlearn", "step": 123456, "count": {}, "forget": ids * 2}
        kept = [line for line in lines if not is_step(line)]
        at = next(i for i, line in enumerate(kept) if line["event"] == "done" and line["phase"] == "unlearn")
        return [*kept[:at], forged, *kept[at:]]

    ledger(run, edit)


def drop_a_step(run: Path) -> None:
    ledger(run, lambda lines: [line for line in lines if not (is_step(line) and line["step"] == 3)])


def other_images_at_a_step(run: Path) -> None:
    """Every image as often as before, but at other steps than the seed gives."""

    def edit(lines: list[dict]) -> list[dict]:
        steps = [line for line in lines if is_step(line)]
        steps[0]["forget"], steps[1]["forget"] = steps[1]["forget"], steps[0]["forget"]
        return lines

    ledger(run, edit)


FORGERIES = {
    omit_gates: "audit/summary.json differs",
    ship_another_encoder: "what is exported is not what was",
    ship_another_with_its_digest: "does not hold the weights",
    ship_other_settings_of_the_encoder: "what is exported is not what was",
    forget_nothing: "is of other weights",
    swap_weights: "differs from the digest in done.json",
    weights_that_no_training_left: "the weights were put there afterwards",
    widen_margins: "settings were changed after the run began",
    better_scores: "audit/summary.json differs",
    fewer_images: "expected one list for all",
    forge_one_line_for_all_steps: "the ledger was changed",
    drop_a_step: "the ledger was changed",
}
AUDITED = {
    ship_another_encoder: "what is exported is not what was",
    forget_nothing: "are the same weights",
    widen_margins: "settings were changed after the run began",
    forge_one_line_for_all_steps: "the ledger was changed",
    other_images_at_a_step: "the ledger was changed",
}


@pytest.fixture
def run(finished_run, tmp_path: Path) -> Path:
    return shutil.copytree(finished_run()[0], tmp_path / "run")


def test_an_honest_run_is_reported(run, capsys):
    assert main(["report", str(run)]) == 0, capsys.readouterr().err


@pytest.mark.parametrize("forge", FORGERIES, ids=lambda forge: forge.__name__)
def test_report_refuses(run, capsys, forge):
    (run / "report.html").unlink()
    forge(run)
    assert main(["report", str(run)]) == 3
    assert FORGERIES[forge] in capsys.readouterr().err and not (run / "report.html").exists()


@pytest.mark.parametrize("forge", AUDITED, ids=lambda forge: forge.__name__)
def test_audit_refuses(run, forge):
    forge(run)
    done = tiny.command("audit", str(run))
    assert done.returncode == 3 and AUDITED[forge] in done.stderr, done.stderr[-1500:]


def test_the_variable_of_faults_does_nothing_outside_the_tests_and_is_named(monkeypatch):
    monkeypatch.setenv(fault_injection.VARIABLE, "skip@point=update,times=1000000")
    fault_injection._faults.cache_clear()
    assert fault_injection.reach("update", 0, "unlearn") is False
    assert fault_injection.asked() == {"asked": "skip@point=update,times=1000000", "active": False}
    fault_injection._faults.cache_clear()


def test_a_purge_record_confirms_no_guess(tmp_path):
    """The same list gives other commitments under other secrets, and never its plain digest."""
    content = b"people/jane.png"
    found = [commitment(make_secret(tmp_path / name), "purged ids", content) for name in ("a", "a", "b")]
    assert found[0] == found[1] != found[2] and hashlib.sha256(content).hexdigest() not in found
    assert (tmp_path / "a" / SECRET).stat().st_mode & 0o777 == 0o600

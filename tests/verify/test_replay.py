"""Levels 3 and 4: the verifier's own look at the encoders, and steps repeated bit for bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import test_contradictions as forgeries
from evidence_case import PASSPHRASE
from safetensors.numpy import load_file, save_file

from distunlearn.cli.main import main
from distunlearn.config.yaml import read_yaml
from distunlearn.data.loading.stream import RoleFeeder
from distunlearn.engine import loop
from distunlearn.run import replay
from distunlearn.verify.check import FAILS, HOLDS, INCOMPARABLE
from distunlearn.verify.commitment import run_rules
from distunlearn.verify.figures import judge, plain
from distunlearn.verify.run import DONE, FOLDERS, PHASES, STATE
from distunlearn.verify.scores import raw_scores, read_scores
from distunlearn.verify.states import BACKBONE, export_digests, read_tensors, state_digest


def asked(case, run: Path, *more: str, certificate: Path | None = None) -> tuple[int, list[str], str]:
    """Exit code, word of each level, all that was said; of everything that a verifier has."""
    done = case.command("verify", certificate or run / "evidence/certificate.json", "--trust", case.trust, "--run", run,
                        "--shards", run / "shards", *more, "--json", codes=(0, 6, 7, 8))  # fmt: skip
    found = json.loads(done.stdout)
    return done.returncode, [check["word"] for check in found["checks"]], done.stdout


def test_an_honest_run_is_repeated_bit_for_bit(case):
    code, words, said = asked(case, case.run, "--replay", "all")
    assert words == [HOLDS, "not checked", HOLDS, HOLDS, HOLDS], said
    assert "3 of 3 segments of unlearn" in said and "3 of 3 segments of retrain" in said and '"why": "equal"' in said
    assert code != 8


def touch_up(run: Path, encoder: str) -> None:
    """One weight of an encoder is another one, and every digest of the run says so: levels 0 to 2 cannot know."""
    folder = run / FOLDERS[encoder]
    state = load_file(folder / STATE)
    name = next(n for n in sorted(state) if n.startswith(BACKBONE) and state[n].ndim == 4)
    state[name] = state[name].copy()
    state[name].flat[0] += np.float32(1e-3)
    save_file(state, folder / STATE)
    export = load_file(folder / "export/model.safetensors")
    export[name.removeprefix(BACKBONE)] = state[name]
    save_file(export, folder / "export/model.safetensors", metadata={"format": "pt"})
    digest = state_digest(read_tensors(folder / STATE))
    old = json.loads((folder / DONE).read_text())["state"]
    forgeries.change(folder / DONE, lambda done: done.update(state=digest, export=export_digests(folder / "export")))
    forgeries.ledger(run, lambda lines: [json.loads(json.dumps(line).replace(old, digest)) for line in lines])
    for path in (run / "audit").glob("*.json"):
        path.write_text(path.read_text().replace(old, digest))


@pytest.mark.parametrize("encoder", ["unlearned", "retrained"])
def test_12_14_weights_that_no_training_made(case, tmp_path, encoder):
    run = case.copy(tmp_path)
    touch_up(run, encoder)
    case.command("certify", run, "--key", case.folder / "operator")
    code, words, said = asked(case, run, "--replay", "1")
    assert code == 8 and words[2] == HOLDS and words[4] == FAILS, said
    assert f"of {PHASES[encoder]}, repeated, give state" in said and "not made by these steps" in said
    assert words[3] == FAILS, "and the scores are those of other weights"


def test_9_17_other_images_at_a_step_than_the_schedule_gives(case, tmp_path):
    """Every image as often as before, and certified: coverage cannot know, the repeated steps do."""
    run = case.copy(tmp_path)
    forgeries.other_images_at_a_step(run)
    case.command("certify", run, "--key", case.folder / "operator")
    code, words, said = asked(case, run, "--replay", "1")
    assert code == 8 and words[2] == HOLDS and words[4] == FAILS and "steps 0 to 2 of unlearn, repeated" in said, said


def test_11_scores_that_were_made_up(case, tmp_path):
    """All three encoders alike for every image, so that every gap is small; certified, as the key's holder can."""
    run = case.copy(tmp_path)
    for name in PHASES:
        original = json.loads((run / "audit/scores-retrained.json").read_text())["samples"]
        forgeries.change(run / f"audit/scores-{name}.json", lambda scores, rows=original: scores.update(samples=rows))
    found = plain(judge(raw_scores(read_scores(run / "audit")), run_rules(read_yaml(run / "run.yaml"), run)))
    forgeries.change(run / "audit/summary.json", lambda summary: summary.update(found))
    case.command("certify", run, "--key", case.folder / "operator")
    code, words, said = asked(case, run)
    assert code == 8 and words[2] == HOLDS and words[3] == FAILS and "the scores were made up" in said, said


def test_15_code_that_was_changed(case, tmp_path):
    """A run without a commitment, whose ledger names code that is not what is installed here."""
    run = case.copy(tmp_path)
    (run / "evidence/commitment.json").unlink()
    forgeries.ledger(run, lambda lines: [
        line | ({"digest": "0" * 64} if line["event"] == "code" else {}) | ({"prev": None} if number == 0 else {})
        for number, line in enumerate(lines)
    ])  # fmt: skip
    found = case.check(run=None, export=None, commitment=None)
    for check in replay.further(run, run / "shards", "1").values():
        with pytest.raises(replay.EvidenceError, match="its code was changed"):
            check(found.predicate)


def _another_rate(monkeypatch) -> None:
    right = loop.learning_rate
    monkeypatch.setattr(loop, "learning_rate", lambda step, *rest: right(step, *rest) * (1.01 if step == 1 else 1))


def _another_batch(monkeypatch) -> None:
    right = RoleFeeder.rows_at
    monkeypatch.setattr(RoleFeeder, "rows_at", lambda self, step: right(self, 9 if step == 1 else step))


def _another_weight(monkeypatch) -> None:
    right = loop._Runner._step

    def step_and_touch(self, step):
        found = right(self, step)
        if step == 1:
            next(self.ctx.model.parameters()).data.view(-1)[0] += 1e-3
        return found

    monkeypatch.setattr(loop._Runner, "_step", step_and_touch)


@pytest.mark.parametrize("phase", replay.REPEATED)
@pytest.mark.parametrize("change", [None, _another_rate, _another_batch, _another_weight])
def test_12_13_14_one_step_that_is_not_the_declared_one(case, monkeypatch, phase, change):
    """What was trained otherwise in one step, by either phase, is not what the declared steps make."""
    monkeypatch.setattr(replay, "REPEATED", (phase,))
    check = replay.further(case.run, case.run / "shards", "1")[4]
    predicate = case.check(run=None, export=None).predicate
    if change is None:
        assert f"segments of {phase}" in check(predicate)
        return
    change(monkeypatch)
    with pytest.raises(replay.EvidenceError, match=f"of {phase}, repeated, give state .* not made by these steps"):
        check(predicate)


@pytest.mark.parametrize(("name", "here"), [("device", "ANOTHER"), ("threads", 2), ("torch", "2.0"), ("world", 2)])
def test_what_another_machine_makes_cannot_be_compared(case, monkeypatch, name, here):
    """Never a failure: another processor, another number of threads or processes rounds differently."""
    right = replay.numerics
    monkeypatch.setattr(replay, "numerics", lambda *args: right(*args) | {name: here})
    found = replay.further(case.run, case.run / "shards", "1")
    with pytest.raises(replay.Incomparable, match=f"{name} .* there, {here} here"):
        found[4](case.check(run=None, export=None).predicate)
    assert INCOMPARABLE == "cannot be compared"


def test_checkpoints_that_are_not_kept_are_made_again(case, tmp_path):
    """Without them a segment is repeated from the start of its training."""
    run = case.copy(tmp_path)
    shutil.rmtree(run / "checkpoints")
    shutil.rmtree(run / "retrained/checkpoints")
    _, words, said = asked(case, run, "--replay", "2")
    assert words[4] == HOLDS, said


def test_replay_says_what_it_needs(case, monkeypatch, capsys):
    monkeypatch.setenv("DISTUNLEARN_PASSPHRASE", PASSPHRASE)
    assert main(["verify", str(case.path), "--replay", "3"]) == 2
    assert main(["verify", str(case.path), "--run", str(case.run), "--shards", "x", "--replay", "some"]) == 2
    assert "a number of segments or all" in capsys.readouterr().err

"""A certified run whose dose was chosen: what the certificate says of it, what is chosen and repeated again, cheats.

The audit is of tier 0, so that gates without a retrained encoder are certified and computed again, too.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import test_contradictions as forgeries
import tiny
from evidence_case import PASSPHRASE, REFERENCE, Case
from safetensors.numpy import load_file
from test_replay import asked, touch_up

from distunlearn.verify.check import FAILS, HOLDS
from distunlearn.verify.countersign import countersign
from distunlearn.verify.dose import SCORES, read_looks
from distunlearn.verify.ledger import read_ledger
from distunlearn.verify.run import STATE

GRID = [0.0, 0.4, 1.0, 1.4]
AUTO = ("method.dose=auto", f"dose.grid={GRID}", "dose.aim=half", "dose.views=2", "dose.loss_share=1e9",
        "dose.knn_points=100", "dose.enough=20", "data.watch=40", "audit.tier=0", "pretrain.epochs=40",
        "pretrain.checkpoint_every=60")  # fmt: skip


class Drawn(Case):
    """With a nonce that is always the same, so that the choice is: members stand out, and a dose above 0 is chosen."""

    def ask(self, *extra: str) -> None:
        self.command("commit", "digits", "--out", self.run, *tiny.settings(*extra))
        request = shutil.copy(self.run / "evidence/commitment.request.json", self.folder)
        with mock.patch("secrets.token_hex", return_value="5" * 64):
            countersign(Path(request), self.folder / "officer", PASSPHRASE, self.register, REFERENCE)


@pytest.fixture(scope="module")
def dosed(tmp_path_factory) -> Case:
    case = Drawn(tmp_path_factory.mktemp("dosed")).make(*AUTO)
    assert case.check().predicate.dose.dose > 0, "nothing to interpolate: choose another nonce"
    return case


def test_the_certificate_says_what_the_dose_was_chosen_by(dosed):
    found = dosed.check()
    assert [check.word for check in found.checks[:3]] == [HOLDS] * 3, str(found)
    part, run = found.predicate.dose, dosed.run
    done = {place: json.loads((run / place / "done.json").read_text()) for place in ("original", "full_dose", ".")}
    assert part.rules.grid == GRID and part.rules.aim == "half" and part.dose in GRID
    assert part.low <= part.best <= part.high and part.images == {"retain": 72, "forget": 24, "watch": 40}
    assert (part.original, part.full) == (done["original"]["state"], done["full_dose"]["state"])
    assert done["."]["dose"] == part.dose and "dose/scores.npz" in found.predicate.private
    assert found.predicate.states.keys() == {"original", "unlearned"} and len(found.predicate.figures.gates) >= 2
    ends = [load_file(run / place / STATE) for place in ("original", "full_dose", ".")]
    for name, start in ends[0].items():  # oracle: the line between the two ends, in float64
        if start.dtype == np.float32 and name.startswith("model."):
            line = start.astype(np.float64) + part.dose * (ends[1][name].astype(np.float64) - start)
            assert np.allclose(ends[2][name], line, rtol=0, atol=1e-6), name


def test_level_4_repeats_the_interpolation(dosed):
    code, words, said = asked(dosed, dosed.run, "--replay", "3")
    assert words == [HOLDS, "not checked", HOLDS, HOLDS, HOLDS] and code != 8, said
    assert "3 of 3 segments of unlearn" in said and "retrain" not in said.partition('"level": 4')[2]


@pytest.mark.parametrize("certified", [False, True])
def test_27_a_dose_that_the_scores_do_not_give(dosed, tmp_path, certified):
    """The other end of the line is kept; signed before it was changed, or after."""
    run = dosed.copy(tmp_path)
    other = next(dose for dose in reversed(GRID) if dose != dosed.check().predicate.dose.dose)
    forgeries.change(run / "done.json", lambda done: done.update(dose=other))
    if certified:
        assert "was kept" in dosed.command("certify", run, "--key", dosed.folder / "operator", codes=(3,)).stderr
    else:
        found = dosed.check(run=run, export=None)
        assert found.exit_code == 8 and "one of them was changed" in found.checks[2].why, str(found)


def test_27_a_dose_that_was_picked_on_images_of_the_audit(dosed, tmp_path):
    """The scores name the images that were watched: images of the audit are refused, also where all is consistent."""
    run = dosed.copy(tmp_path)
    audited = json.loads((run / "audit/scores-unlearned.json").read_text())["samples"]
    holdout = sorted(i for i, row in audited.items() if row["role"] == "holdout")
    with np.load(run / SCORES) as kept:
        arrays = dict(kept)
    arrays["watch_ids"] = np.array(holdout[: len(arrays["watch_ids"])])
    np.savez(run / SCORES, **arrays)
    assert set(read_looks(run / SCORES)[1]["watch"]) <= set(audited)
    said = dosed.command("certify", run, "--key", dosed.folder / "operator", codes=(3,)).stderr
    assert "was chosen on images of the audit" in said


def test_27_scores_that_were_made_up_for_another_dose(dosed, tmp_path):
    """Scores, ledger, weights and digests agree and are signed: level 2 cannot know, the repeated look does."""
    run = dosed.copy(tmp_path)
    touch_up(run, "unlearned")
    dosed.command("certify", run, "--key", dosed.folder / "operator")
    code, words, said = asked(dosed, run, "--replay", "1")
    assert code == 8 and words[2] == HOLDS and words[4] == FAILS and "not made by these steps" in said, said


def test_rules_of_the_dose_are_those_that_were_declared(dosed, tmp_path):
    for edit in (lambda p: p["dose"]["rules"].update(aim="retained"), lambda p: p["dose"].update(seed=1),
                 lambda p: p.update(dose=None)):  # fmt: skip
        found = dosed.check(dosed.signed(edit))
        assert found.exit_code == 8 and found.checks[0].word == FAILS and "the dose" in found.checks[0].why, str(found)


def test_a_run_without_its_look_at_the_doses_is_not_certified(dosed, tmp_path):
    run = dosed.copy(tmp_path)
    shutil.rmtree(run / Path(SCORES).parent)
    assert dosed.command("certify", run, "--key", dosed.folder / "operator", codes=(3,)).returncode == 3
    assert any(line["event"] == "dose" for line in read_ledger(run / "ledger.jsonl"))

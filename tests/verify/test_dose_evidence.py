"""A dose that was chosen is chosen again from the scores that the run kept, and on watch images alone."""

from __future__ import annotations

import numpy as np
import pytest

from distunlearn.verify.dose import SCORES, DosePart, choose, dose_facts, read_looks
from distunlearn.verify.errors import EvidenceError

RULES = {"grid": [0.0, 0.5, 1.0], "aim": "half", "images": 64, "views": 2, "knn_points": 5.0, "loss_share": 0.9,
         "confidence": 0.9, "bootstrap": 200, "enough": 20}  # fmt: skip


@pytest.fixture
def kept(tmp_path):
    """Members stand out at dose 0, are like others at 0.5 and stand out the other way at 1."""
    draw = np.random.default_rng(0)
    shift = np.array([1.5, 0.0, -1.5])[:, None, None]
    arrays = {"retain": draw.normal(size=(3, 40, 2)) + 2, "forget": draw.normal(size=(3, 30, 2)) + shift,
              "watch": draw.normal(size=(3, 50, 2)), "chance": np.full(3, 5.0), "right": np.ones((3, 40))}  # fmt: skip
    arrays["retain"][1:] = arrays["retain"][0]
    ids = {f"{role}_ids": np.array([f"{role}{n}" for n in range(arrays[role].shape[1])])
           for role in ("retain", "forget", "watch")}  # fmt: skip
    (tmp_path / SCORES).parent.mkdir()
    np.savez(tmp_path / SCORES, features=np.array(["view_agreement", "bank_loss"]), **arrays, **ids)
    return tmp_path


def facts(folder, dose=None, audited=("holdout1",), **event):
    found = choose(read_looks(folder / SCORES)[0], type("Rules", (), RULES), 7)
    line = {"event": "dose", "rules": RULES, "seed": 7, "original": "0" * 64, "full": "1" * 64,
            "images": {"retain": 40, "forget": 30, "watch": 50},
            **{name: getattr(found, name) for name in ("dose", "best", "low", "high")}, **event}  # fmt: skip
    done = {"dose_images": 1, "dose": found.dose if dose is None else dose}
    requested = [f"forget{n}" for n in range(30)]
    return dose_facts(folder, [line], done, audited, requested)


def test_the_choice_follows_from_the_scores(kept):
    found = facts(kept)
    assert found["dose"] == 0.5 and DosePart.model_validate(found).rules.aim == "half"
    assert dose_facts(kept, [], {"dose": 0.7}, (), ()) is None, "a dose that was given is not chosen"


@pytest.mark.parametrize(("change", "sentence"), [
    ({"dose": 1.0}, "the scores give dose 0.5, and 1.0 was kept"),
    ({"best": 1.0}, "one of them was changed"),
    ({"seed": 8, "high": 0.1}, "one of them was changed"),
    ({"rules": {**RULES, "grid": [0.0, 0.5]}}, "has 3 doses, and 2 were declared"),
    ({"audited": ["watch7"]}, "was chosen on images of the audit"),
])  # fmt: skip
def test_27_another_dose_or_one_picked_on_audit_images_is_refused(kept, change, sentence):
    with pytest.raises(EvidenceError, match=sentence):
        facts(kept, **change)


def test_27_other_scores_are_refused(kept):
    (kept / SCORES).write_bytes((kept / SCORES).read_bytes()[:-40])
    with pytest.raises(EvidenceError, match="is not the file of scores"):
        facts(kept)

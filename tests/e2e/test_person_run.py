"""A request of 3 of 40 persons, from the list to the audit: what is told by person equals brute force on raw files."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tiny
from PIL import Image
from sklearn.metrics import roc_auc_score

from distunlearn.data.manifest.manifest import Manifest
from distunlearn.verify.statistics import draw_images

PERSONS, EACH, ASKED = 40, 6, (3, 11, 30)


@pytest.fixture(scope="module")
def forgotten(tmp_path_factory) -> tuple[Path, dict[str, int]]:
    """(run directory of a request of three persons, who is on each image)."""
    tmp_path = tmp_path_factory.mktemp("persons")
    rows = ["id,person"]
    for n in range(PERSONS * EACH):
        path = tmp_path / "images" / f"c{n % 4}" / f"{n:03d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(n).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((40, 36), Image.Resampling.BICUBIC).save(path)
        rows.append(f"c{n % 4}/{n:03d}.jpg,person {n // EACH}")
    (tmp_path / "persons.csv").write_text("\n".join(rows) + "\n")
    (tmp_path / "request.txt").write_text("".join(f"person {number}\n" for number in ASKED))
    out = tmp_path / "run"
    done = tiny.run(
        out, "data.source=imagefolder", f"data.root={tmp_path}/images", f"data.persons={tmp_path}/persons.csv",
        f"data.forget={tmp_path}/request.txt", "data.forget_by=person", "encoder.in_chans=3", "data.calibration=24",
        "data.third_party=24", "data.third_party_audit=24", "data.holdout=60", "unlearn.steps=8",
    )  # fmt: skip
    assert done.returncode in (0, 6, 7), done.stderr[-3000:]
    return out, {row.split(",")[0]: int(row.split()[-1]) for row in rows[1:]}


def test_three_of_forty_persons(forgotten):
    out, owner = forgotten
    manifest = Manifest.of_run(out)
    roles = {sample.id: sample.role for sample in manifest.samples}
    forget = [i for i, role in roles.items() if role == "forget"]
    assert sorted(forget) == sorted(i for i, number in owner.items() if number in ASKED)
    assert not {owner[i] for i, role in roles.items() if role == "holdout"} & set(ASKED)

    summary = json.loads((out / "audit/summary.json").read_text())
    numbers = dict(zip(forget, manifest.persons(forget).tolist(), strict=True))
    consumed = Counter(i for line in map(json.loads, (out / "ledger.jsonl").read_text().splitlines())
                       if line["event"] == "step" and line["phase"] == "unlearn" for i in line["forget"])  # fmt: skip
    least = {number: min(consumed[i] for i in forget if numbers[i] == number) for number in set(numbers.values())}
    assert {row["person"]: row["consumed_min"] for row in summary["person_coverage"]} == least
    assert [row["images"] for row in summary["person_coverage"]] == [EACH] * 3 and min(least.values()) >= 1

    told = summary["persons"]
    assert (
        told["forget"] == 3
        and told["are_units"] is False
        and told["holdout"] == len({owner[i] for i in roles if roles[i] == "holdout"})
    )
    scores = {name: json.loads((out / f"audit/scores-{name}.json").read_text()) for name in ("unlearned", "retrained")}
    sign = scores["unlearned"]["signs"]["view_agreement"]
    value = {e: {i: sign * row["view_agreement"] for i, row in found["samples"].items()} for e, found in scores.items()}
    held = [i for i, row in scores["unlearned"]["samples"].items() if row["role"] == "holdout"]

    def gap(gone: list[str], others: list[str]) -> float:
        truth = np.r_[np.ones(len(gone)), np.zeros(len(others))]
        aucs = [roc_auc_score(truth, [value[e][i] for i in (*gone, *others)]) for e in ("unlearned", "retrained")]
        return aucs[0] - aucs[1]

    found = told["attacks"]["view_agreement"]
    assert np.isclose(found["auc"], gap(forget, held))
    for row in found["each"]:
        own = [i for i in forget if numbers[i] == row["person"]]
        assert np.isclose(row["unlearned"] - row["retrained"], gap(own, held))
    samples = scores["unlearned"]["samples"]
    people = [sorted({samples[i]["person"] for i in side}) for side in (forget, held)]
    drawn = draw_images(len(people[0]), len(people[1]), 100, 0)
    sampled = []
    for counts in zip(drawn.positives, drawn.negatives, strict=True):
        sides = []
        for side, names, times in zip((forget, held), people, counts, strict=True):
            sides.append([i for name, k in zip(names, times.tolist(), strict=True) for _ in range(k)
                          for i in side if samples[i]["person"] == name])  # fmt: skip
        sampled.append(gap(*sides))
    assert np.allclose([found["low"], found["high"]], np.percentile(sampled, [5, 95]))
    page = (out / "report.html").read_text()
    assert "3 persons" in page and "person 11" not in page and "person 11" not in (out / "request.json").read_text()


def test_the_next_request_names_persons_too_and_an_earlier_one_is_refused(forgotten, tmp_path):
    out, owner = forgotten
    roles = {sample.id: sample.role for sample in Manifest.of_run(out).samples}
    asked = sorted({owner[i] for i, role in roles.items() if role == "retain"} - set(ASKED))[:2]
    (tmp_path / "next.txt").write_text("".join(f"person {number}\n" for number in asked))
    (tmp_path / "again.txt").write_text(f"person {asked[0]}\nperson {ASKED[0]}\n")

    def next_request(name: str):
        more = ("--set", f"data.forget={tmp_path / name}", "--set", "audit.tier=0")
        return tiny.command("run", "--previous", str(out), "--out", str(tmp_path / "second"), *more)

    refused = next_request("again.txt")
    assert refused.returncode == 3 and "an earlier request has forgotten already" in refused.stderr, refused.stderr
    assert next_request("next.txt").returncode in (0, 6, 7)
    later = {sample.id: sample.role for sample in Manifest.load(out / "shards", run=tmp_path / "second").samples}
    assert {owner[i] for i, role in later.items() if role == "forgotten"} == set(ASKED)
    assert sorted(i for i, role in later.items() if role == "forget") == sorted(
        i for i, number in owner.items() if number in asked and roles.get(i) == "retain"
    )
    assert not {owner[i] for i, role in later.items() if role == "holdout"} & {*ASKED, *asked}
    summary = json.loads((tmp_path / "second" / "audit/summary.json").read_text())
    assert len(summary["person_coverage"]) == 2 and summary["coverage"]["used_as_retain"] == 0

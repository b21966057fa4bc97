"""Requests in turn on one encoder: what was forgotten stays out, with and without a purge in between."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest
import tiny
import torch
import zygote
from safetensors.torch import load_file

from distunlearn.data.manifest.manifest import Manifest
from distunlearn.data.views.draws import id_hashes
from distunlearn.verify.chain import Chain

ENDED = (0, 6, 7)
STATE = "training_state.safetensors"


def again(previous: Path, out: Path, *settings: str):
    return tiny.command("run", "--previous", str(previous), "--out", str(out), *sets(*settings))


def sets(*settings: str) -> list[str]:
    return [part for value in settings for part in ("--set", value)]


def rows_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "ledger.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def chain(tmp_path_factory) -> list[Path]:
    """Three requests; the images of the first two are purged before the third."""
    folder = tmp_path_factory.mktemp("chain")
    one, two = folder / "one", folder / "two"
    done = tiny.run(one, "audit.tier=0", recipe="digits_moco")
    assert done.returncode in ENDED, done.stderr[-3000:]
    forget = Manifest.of_run(one).ids("forget")
    (folder / "gone.txt").write_text("\n".join(forget))
    done = again(one, two, "data.forget=12", "audit.tier=1")
    assert done.returncode in ENDED, done.stderr[-3000:]
    return [one, two]


def test_the_second_request_starts_from_what_the_first_one_left(chain):
    one, two = chain
    left, taken = load_file(one / STATE), load_file(two / "original" / STATE)
    assert left.keys() == taken.keys() and all(torch.equal(left[name], taken[name]) for name in left)
    assert {name.partition(".")[0] for name in left} == {"model", "momentum", "queue"}
    first, second = Manifest.of_run(one), Manifest.load(one / "shards", run=two)
    assert second.ids("forgotten") == first.ids("forget") and not set(second.ids("forget")) & set(first.ids("forget"))
    assert set(second.ids(("retain", "forget"))) == set(first.ids("retain"))
    for role in ("holdout", "calibration", "third_party", "third_party_audit"):
        assert second.ids(role) == first.ids(role), role
    queue = load_file(two / STATE)["queue.ids"]
    gone = torch.from_numpy(id_hashes([*first.ids("forget"), *second.ids("forget")]))
    assert torch.isin(queue, torch.from_numpy(id_hashes(second.ids("retain")))).any()  # control
    assert not torch.isin(queue, gone).any()


def test_no_earlier_image_is_in_a_later_batch_and_the_ledger_would_say_so(chain):
    one, two = chain
    gone = set(Manifest.of_run(one).ids("forget"))
    lines = rows_of(two)
    steps = [line for line in lines if line["event"] == "step"]
    assert {line["phase"] for line in steps} == {"unlearn", "retrain"}
    assert not any("misused" in line or gone & set(line["forget"]) for line in steps)
    summary = json.loads((two / "audit/summary.json").read_text())
    assert summary["coverage"]["used_as_retain"] == 0 and summary["coverage"]["requested"] == 12
    found = summary["earlier"]
    assert list(found) == ["1"] and found["1"]["images"] == 24
    assert set(found["1"]["view_agreement"]) == {"original", "unlearned", "retrained", "gap", "low", "high"}
    assert found["1"]["view_agreement"]["low"] <= found["1"]["view_agreement"]["gap"]
    scores = json.loads((two / "audit/scores-unlearned.json").read_text())["samples"]
    assert {i for i, row in scores.items() if row["role"] == "forgotten"} == gone


def test_the_chain_is_private_and_named_by_status_and_report(chain):
    one, two = chain
    for name in ("chain.json", "chain.key"):
        assert all(stat.S_IMODE((out / name).stat().st_mode) == 0o600 for out in chain)
    first, second = Chain.load(one), Chain.load(two)
    assert first.lineage == second.lineage and first.key == second.key and len(second.requests) == 2
    assert second.requests[1]["original"] == first.requests[0]["unlearned"]
    text = (two / "chain.json").read_text()
    assert not any(i in text for i in Manifest.of_run(one).by_id)
    status = json.loads(tiny.command("status", str(two)).stdout)
    assert status["chain"] == {"lineage": first.lineage, "request": 2, "images": [24, 12]}
    page = (two / "report.html").read_text()
    assert "request 2" in page.lower() and "24" in page


def test_a_third_request_on_purged_shards_by_two_processes(chain, tmp_path):
    one, two = chain
    third = tmp_path / "three"
    names = [Manifest.of_run(one).ids("forget"), Manifest.load(one / "shards", run=two).ids("forget")]
    for out in chain:
        done = tiny.command("purge", str(out), "--apply")
        assert done.returncode == 0, done.stderr
    words = ["run", "--previous", str(two), "--out", str(third), *sets("data.forget=8", "backend=ddp", "audit.tier=0")]
    group = zygote.shared().start(2, words)
    assert set(group.wait()) <= set(ENDED), group.said(0)[-3000:]
    left, taken = load_file(two / STATE), load_file(third / "original" / STATE)
    assert all(torch.equal(left[name], taken[name]) for name in left)
    manifest = Manifest.load(one / "shards", run=third)
    assert (
        not {i for ids in names for i in ids} & set(manifest.by_id) and len(manifest.ids("retain")) == 96 - 24 - 12 - 8
    )
    assert not any("misused" in line for line in rows_of(third))
    chain_now = Chain.load(third)
    assert [r["images"] for r in chain_now.requests] == [24, 12, 8]
    status = json.loads(tiny.command("status", str(one)).stdout)
    assert status["purged"] == 24
    for verb in ("report", "status"):  # of a purged run
        assert tiny.command(verb, str(one)).returncode == 0
    assert "purged from the shards after this audit: 24;" in (one / "report.html").read_text()


def test_what_the_next_request_may_not_ask_for(chain, tmp_path):
    two = chain[1]
    done = again(two, tmp_path / "x")
    assert done.returncode == 2 and "needs what to forget now" in done.stderr
    done = tiny.command("run", "digits", "--previous", str(two), "--out", str(tmp_path / "x"), *sets("data.forget=2"))
    assert done.returncode == 2 and "leave the recipe" in done.stderr
    done = again(tmp_path / "nowhere", tmp_path / "x", "data.forget=2")
    assert done.returncode == 3 and "not a run directory" in done.stderr
    assert not (tmp_path / "x").exists()


def test_the_next_request_may_be_a_job(chain, tmp_path):
    one, out = chain[0], tmp_path / "job"
    words = ("submit", "--previous", str(one), "--out", str(out), "--dry-run")
    done = tiny.command(*words, *sets("data.forget=5"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"-m distunlearn run --previous {one} --set data.forget=5" in done.stdout and not out.exists()
    done = tiny.command(*words)
    assert done.returncode == 2 and "needs what to forget now" in done.stderr


def test_a_classifier_goes_on_after_its_last_class_was_purged(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    short = ("audit.tier=0", "pretrain.epochs=1", "unlearn.steps=2", "data.forget=class:9")
    done = tiny.run(one, *short, recipe="digits_supervised")
    assert done.returncode in ENDED, done.stderr[-3000:]
    assert tiny.command("purge", str(one), "--apply").returncode == 0
    done = again(one, two, "data.forget=class:8")
    assert done.returncode in ENDED, done.stderr[-3000:]
    assert len(load_file(two / STATE)["model.projector.last.weight"]) == 10

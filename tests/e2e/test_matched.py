"""`unlearn.third_party_sampling=matched` from the command line: what is drawn, counted, planned, kept and refused."""

from __future__ import annotations

import json

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from distunlearn.engine.matched_sampling import _in_order

ENDED = (0, 6, 7)
MATCHED = "unlearn.third_party_sampling=matched"


def rows(out, phase="unlearn"):
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [line["values"] for line in lines if line["phase"] == phase]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    out = tmp_path_factory.mktemp("matched") / "base"
    done = tiny.run(out, MATCHED, "method.anchor_weight=1")
    assert done.returncode in ENDED, done.stderr[-3000:]
    assert "third-party images are drawn by how much they are like the forgotten ones" in done.stdout + done.stderr
    return out


def test_shares_are_kept_and_their_images_counted(base):
    facts = json.loads((base / "counterparts.json").read_text())
    shares = load_file(base / "counterparts.safetensors")["shares"]
    assert len(shares) == facts["available"] == 24 and float(shares.sum()) == pytest.approx(facts["images"], abs=1e-9)
    assert 1 <= facts["images"] <= facts["effective"] <= 24
    logged = next(row for row in rows(base) if "start/counterparts_images" in row)
    assert logged["start/counterparts_images"] == facts["images"]
    cost = json.loads((base / "audit/summary.json").read_text())["cost"]
    planned = json.loads((base / "plan.json").read_text())["phases"]["unlearn"]
    assert facts["looked_at"] == 5 * (24 + 72 + 24)
    assert cost["unlearn_images"] == planned["images"] + planned["calibration_images"]


def test_the_draw_changes_the_encoder_of_methods_that_take_third_party_images_alone(base, tmp_path):
    weights = {}
    for method in ("third_party", "held_out_distillation", "neg_grad"):
        for draw in ("uniform", "matched"):
            out = tmp_path / f"{method}-{draw}"
            done = tiny.command(
                "unlearn", "digits", "--out", str(out),
                *tiny.settings(
                    f"runtime.reuse={base}", f"method.name={method}", f"unlearn.third_party_sampling={draw}"
                ),
            )  # fmt: skip
            assert done.returncode == 0, done.stderr[-3000:]
            weights[method, draw] = load_file(out / "training_state.safetensors")
            takes = draw == "matched" and method != "neg_grad"
            assert (out / "counterparts.json").exists() is takes
    for method, same in (("third_party", False), ("held_out_distillation", False), ("neg_grad", True)):
        uniform, matched = weights[method, "uniform"], weights[method, "matched"]
        assert all(torch.equal(uniform[name], matched[name]) for name in uniform) is same, method


def test_shares_that_are_not_those_that_were_written_end_a_run(base, tmp_path):
    """A run that goes on reads what it drew by; another file in its place is noticed."""
    out = tmp_path / "run"
    arguments = ("unlearn", "digits", "--out", str(out), *tiny.settings(f"runtime.reuse={base}", MATCHED))
    assert tiny.command(*arguments).returncode == 0
    (out / "done.json").unlink()
    shares = load_file(out / "counterparts.safetensors")["shares"]
    save_file({"shares": shares / 2}, out / "counterparts.safetensors")
    ended = tiny.command(*arguments)
    assert ended.returncode == 3, ended.stderr[-2000:]
    assert "counterparts.safetensors is not what counterparts.json says" in ended.stderr


@pytest.mark.parametrize(("images", "world"), [(300, 1), (300, 2), (300, 3), (64, 3), (65, 2), (1, 2)])
def test_looks_of_all_ranks_come_back_in_the_order_of_the_images(images, world):
    values = torch.arange(images)[:, None]
    pieces = values.split(64)
    held = [pieces[rank::world] for rank in range(world)]
    gathered = torch.cat([piece for rank in held for piece in rank])
    assert torch.equal(_in_order(gathered, [len(rank) for rank in held]), values)
    assert torch.equal(gathered, values) is (world == 1 or images <= 65)  # elsewhere they come out of order

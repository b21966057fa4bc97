"""A short run to its report with every family of encoders, by `head` and `sketch`, alone and on two processes."""

from __future__ import annotations

import html
import json
import math
import sys
from pathlib import Path

import pytest
import tiny
import zygote

sys.path.insert(0, str(Path(__file__).parents[1] / "encoders"))

from families import FAMILIES  # noqa: E402

OWN = "own module"
USUAL = {("convnext_atto", "sketch", "single"), ("swin_tiny_patch4_window7_224", "sketch", "fsdp2")}
# Weights that are used past their own forward, and large enough for ZeRO-3 to free them between uses.
PAST_THEIR_FORWARD = ("beit_base_patch16_224", "eva02_tiny_patch14_224")
WIDE = {"embed_dim": 192, "num_heads": 3}
CASES = [
    *((name, evaluator, backend) for name in (*FAMILIES, OWN) for evaluator in ("head", "sketch")
      for backend in ("single", "fsdp2")),
    *((name, evaluator, "zero3") for name in PAST_THEIR_FORWARD for evaluator in ("head", "sketch")),
]  # fmt: skip
OWN_MODULE = """
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1, groups=2), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 16),
        )

    def forward(self, images):
        return self.body(images)
"""
LEFT_OUT = {name: bool(reasons) for name, (_, _, reasons) in FAMILIES.items()} | {OWN: True}


def encoder_settings(name: str, folder: Path, backend: str) -> list[str]:
    if name == OWN:
        (folder / "net.py").write_text(OWN_MODULE)
        place, size, args = f"{folder / 'net.py'}:Net", 32, {}
    else:
        place, (size, args, _) = name, FAMILIES[name]
        args = args | WIDE if backend == "zero3" else args
    return [
        f"encoder.name={place}", f"encoder.image_size={size}", f"encoder.args={json.dumps(args)}",
        "encoder.stem=standard", "encoder.embed_dim=null", "encoder.in_chans=1",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "evaluator", "backend"),
    [pytest.param(*case, marks=() if case in USUAL else pytest.mark.matrix, id="-".join(case)) for case in CASES],
)
def test_a_run_to_its_report(tmp_path, name, evaluator, backend):
    out, world = tmp_path / "run", 1 if backend == "single" else 2
    values = [
        *encoder_settings(name, tmp_path, backend), f"constraint.evaluator={evaluator}", f"backend={backend}",
        "pretrain.epochs=1", "unlearn.steps=3", "audit.relearn_steps=0",
    ]  # fmt: skip
    arguments = ["run", "digits", "--out", str(out), *tiny.settings(*values)]
    port = zygote.free_port()
    jobs = [
        (arguments, tiny.environment(**(zygote.launched(rank, world, port) if world > 1 else {})))
        for rank in range(world)
    ]
    group = zygote.shared().commands(jobs, 280)
    codes = group.wait()
    said = "\n".join(group.said(rank)[-3000:] for rank in range(world))
    assert set(codes) <= {0, 6, 7}, said
    assert (out / "report.html").exists() and (out / "export/model.safetensors").exists()
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [row["values"] for row in rows if row["phase"] == "unlearn" and "loss" in row["values"]]
    assert len(steps) == 3 and all(math.isfinite(values["loss"]) for values in steps)
    assert steps[0]["constraint_gradient"] > 0
    told = "left out:" in (out / "logs/unlearn.log").read_text()
    assert told == (evaluator == "sketch" and LEFT_OUT[name])
    named = json.loads((out / "plan.json").read_text())["not_probed"]
    assert named.keys() == ({"audit"} if LEFT_OUT[name] else set()) | ({"constraint"} if told else set())
    page = (out / "report.html").read_text()
    assert all(html.escape(part, quote=False) in page for parts in named.values() for part in parts)

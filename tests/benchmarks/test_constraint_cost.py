"""The counts of benchmarks/constraint.py: against counts by hand, against steps that compute, and the bounds."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

SCRIPTS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(SCRIPTS))

import constraint  # noqa: E402
from constraint_cost import LiveBytes, flops, peak_bytes, without_values  # noqa: E402
from constraint_report import BOUNDS  # noqa: E402
from constraint_step import ENCODERS, PRODUCTION, STEPS, Bench  # noqa: E402

from distunlearn.config.schema import EncoderConfig  # noqa: E402

TINY = {
    "resnet": EncoderConfig(
        name="resnet18", image_size=32, in_chans=3, stem="standard",
        args={"channels": [8, 8, 16, 16], "layers": [1, 1, 1, 1]},
    ),
    "vit": EncoderConfig(
        name="vit_tiny_patch16_224", image_size=32, in_chans=3, stem="standard",
        args={"patch_size": 8, "embed_dim": 24, "depth": 2},
    ),
}  # fmt: skip


def test_operations_of_a_linear_layer_by_hand():
    rows, p, d = 6, 5, 7
    layer, x = nn.Linear(p, d), torch.randn(rows, p, requires_grad=True)
    product = 2 * rows * p * d
    assert flops(lambda: layer(x)) == product
    assert flops(lambda: layer(x).sum().backward()) == 3 * product  # forward, by the input, by the weight
    assert flops(lambda: layer(x.detach()).sum().backward()) == 2 * product


def test_operations_of_a_product_added_in_place():
    """torch's own count takes no notice of it."""
    one, many = torch.zeros(6, 7), torch.zeros(3, 6, 7)
    assert flops(lambda: one.addmm_(torch.ones(6, 5), torch.ones(5, 7))) == 2 * 6 * 5 * 7
    assert flops(lambda: many.baddbmm_(torch.ones(3, 6, 5), torch.ones(3, 5, 7))) == 3 * 2 * 6 * 5 * 7


@pytest.mark.parametrize("groups", [1, 2])
def test_operations_of_a_convolution_by_hand(groups):
    """3 images of 4 x 9 x 7, 6 channels out, kernel 3 x 3, stride 2, padding 1: outputs of 5 x 4."""
    layer, x = nn.Conv2d(4, 6, 3, 2, 1, groups=groups), torch.randn(3, 4, 9, 7, requires_grad=True)
    product = 2 * 3 * (6 * 5 * 4) * (4 // groups * 3 * 3)
    assert flops(lambda: layer(x)) == product
    assert flops(lambda: layer(x).sum().backward()) == 3 * product
    assert flops(lambda: layer(x.detach()).sum().backward()) == 2 * product


def test_operations_of_attention_are_those_of_its_parts():
    """2 x 3 heads, 5 tokens of width 4: queries by keys, weights by values. Backward: four, and the former again."""
    q, k, v = (torch.randn(2, 3, 5, 4, requires_grad=True) for _ in range(3))
    product = 2 * (2 * 3) * 5 * 5 * 4
    for kernel, backward in ((SDPBackend.FLASH_ATTENTION, 5), (SDPBackend.MATH, 4)):
        with sdpa_kernel(kernel):
            assert flops(lambda: F.scaled_dot_product_attention(q, k, v)) == 2 * product
            whole = flops(lambda: F.scaled_dot_product_attention(q, k, v).sum().backward())
        assert whole == (2 + backward) * product


def test_live_bytes_by_hand():
    x = torch.zeros(1000)  # made before: does not count

    def run() -> torch.Tensor:
        kept = x + 1  # 4,000
        other = x.double()  # 8,000 more
        view = other[:10]  # no storage of its own
        other.add_(1)  # nor this
        del other, view
        return kept + x  # 4,000 after 8,000 are gone

    with LiveBytes() as live:
        result = run()
        assert live.now == 4000 and live.peak == 12000
        del result
        assert live.now == 0
    assert peak_bytes(run) == 12000


@pytest.mark.parametrize("encoder", TINY)
def test_tensors_without_values_count_as_those_with(encoder):
    real = Bench(TINY[encoder], 8)
    with without_values():
        hollow = Bench(TINY[encoder], 8)
    for step in ("plain", "sketch", "ghost_norm", "double_backward"):
        with without_values():
            run = hollow.step(step)
            counted = flops(run), peak_bytes(run)
        run = real.step(step)
        found = flops(run), peak_bytes(run)
        assert found[0] == counted[0] > 0, step
        # What operators make on the way may differ a little, which counts where everything is small.
        assert found[1] == pytest.approx(counted[1], rel=0.1), step


@pytest.mark.parametrize("encoder", [*ENCODERS, *(pytest.param(name, marks=pytest.mark.matrix) for name in PRODUCTION)])
def test_the_bounds_hold(encoder):
    """Constraint pairs = half the retain pairs; 1.6, 2.1 and 2.1 times the plain step."""
    assert BOUNDS == {"head": 1.6, "sliced": 2.1, "sketch": 2.1}
    with without_values():
        bench = Bench((ENCODERS | PRODUCTION)[encoder], 8)
        plain = flops(bench.step("plain"))
        for step, bound in BOUNDS.items():
            assert 1.49 < flops(bench.step(step)) / plain <= bound, step
        if encoder in ENCODERS:
            wide = flops(bench.step("sketch", sketch_out=64, sketch_in=64)) / plain
            assert wide > BOUNDS["sketch"]  # negative control: the probes' own work is in the count


@pytest.mark.matrix
def test_the_script_writes_its_document(tmp_path, monkeypatch):
    """In a small setting: every step is timed in every round, and the document says what was not measured."""
    document = tmp_path / "found" / "constraint.md"
    monkeypatch.setattr(constraint, "ENCODERS", {"resnet": TINY["resnet"]})
    monkeypatch.setattr(constraint, "PRODUCTION", {"vit": TINY["vit"]})
    monkeypatch.setattr(sys, "argv", ["constraint.py", "--rounds", "1", "--retain", "8", "--document", str(document)])
    threads = torch.get_num_threads()
    try:
        constraint.main()
    finally:
        torch.set_num_threads(threads)
    found = json.loads(document.with_suffix(".json").read_text(encoding="utf-8"))
    text = document.read_text(encoding="utf-8")
    assert set(found["timed"]) == {"resnet"} and set(found["counted"]) == set(TINY)
    for steps in found["timed"].values():
        assert set(steps) == set(STEPS) and all(len(samples) == 1 for samples in steps.values())
    assert "**not measured**" in text and text.count(": met") + text.count("MISSED") == 6

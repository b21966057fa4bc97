"""A plan made on tensors without values, against the same training on real tensors: images, and bytes alive."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "methods"))

from method_batches import batch  # noqa: E402
from parts import EVALUATORS, METHODS, OBJECTIVES, TRAINED, constraint_settings  # noqa: E402
from test_method_losses import config  # noqa: E402

from distunlearn.config.load import load_config  # noqa: E402
from distunlearn.config.schema import RunConfig  # noqa: E402
from distunlearn.encoders.model import MomentumEncoder, build_model  # noqa: E402
from distunlearn.engine.optimizer import make_optimizer  # noqa: E402
from distunlearn.methods.base import Method, missing  # noqa: E402
from distunlearn.methods.training import Pretrain  # noqa: E402
from distunlearn.objectives import KeyQueue, make_objective  # noqa: E402
from distunlearn.objectives.forward import Context  # noqa: E402
from distunlearn.plan.dry_run import Counted, LiveBytes, count_training  # noqa: E402
from distunlearn.plan.plan import make_plan  # noqa: E402

COUNTS = {"retain": 20, "forget": 6, "third_party": 9, "calibration": 10, "holdout": 5}
STEPS = 3
CLOSE = 0.15  # of the peak
NEEDS_VALUES = """
import distunlearn as du
from distunlearn.methods.training import Finetune

class Own(Finetune):
    name = "own"

    def loss(self, ctx, batches):
        out = super().loss(ctx, batches)
        out.loss.detach().numpy()
        return out
"""


def really(cfg: RunConfig, method: Method, steps: int) -> Counted:
    """The training itself, written out, on real tensors."""
    optim = cfg.unlearn if method.steps == "unlearn" else cfg.pretrain
    with LiveBytes() as live:
        model, objective = build_model(cfg, 3), make_objective(cfg.objective)
        momentum = MomentumEncoder(model) if objective.needs_momentum else None
        queue = KeyQueue(cfg.objective.queue_size, cfg.objective.output_dim) if objective.uses_queue else None
        if queue is not None:  # as training leaves it
            queue.push(torch.nn.functional.normalize(torch.randn(20, cfg.objective.output_dim)), torch.arange(20))
        optimizer = make_optimizer(optim, model)
        ctx = Context(cfg, objective, model, model, torch.device("cpu"), momentum, queue, accumulate=optim.accumulate)
        if "teacher" in method.needs_for(cfg):
            ctx.original = build_model(cfg, 3).eval().requires_grad_(False)
        method.calibrate(ctx, lambda role: batch(role, COUNTS[role]))
        calibration, ctx.images = ctx.images, 0
        for ctx.step in range(steps):
            for ctx.micro in range(optim.accumulate):
                sizes = {name: size // optim.accumulate for name, size in method.batch_sizes().items()}
                shown = {name: batch("retain" if name == "members" else name, size) for name, size in sizes.items()}
                (method.loss(ctx, shown).loss / optim.accumulate).backward()
            optimizer.step()
            optimizer.zero_grad()
            if momentum is not None:
                momentum.update(model, cfg.objective.momentum)
    return Counted(ctx.images, calibration, live.peak)


def compare(cfg: RunConfig, make: type[Method], steps: int = STEPS) -> None:
    planned = count_training(cfg, make(cfg), build_model(cfg, 3), steps, COUNTS)
    counted = really(cfg, make(cfg), steps)
    assert planned.images == counted.images > 0
    assert planned.calibration_images == counted.calibration_images
    assert planned.peak_bytes == pytest.approx(counted.peak_bytes, rel=CLOSE)


def pairs() -> list:
    """Every method with every objective; by default each method with one of them, in turn, and third_party with all."""
    found = []
    for row, name in enumerate(TRAINED):
        for column, objective in enumerate(OBJECTIVES):
            usual = name == "third_party" or (row % 4 == column and objective != "supervised")
            found.append(pytest.param(name, objective, marks=() if usual else pytest.mark.matrix))
    return found


@pytest.mark.parametrize(("name", "objective"), pairs())
def test_every_method_is_planned_as_it_trains(name, objective):
    cfg = config(name, objective)
    if missing(cfg, COUNTS):
        assert (name, objective) == ("alignment_calibration", "supervised")
    else:
        compare(cfg, METHODS[name])


@pytest.mark.parametrize("evaluator", EVALUATORS)
def test_every_evaluator_is_planned_with_its_step_checks(evaluator):
    cfg = config("third_party", "moco", anchor_weight=0.5)
    cfg = replace(cfg, constraint=constraint_settings(evaluator=evaluator, view_pairs=2))
    if hasattr(cfg.constraint, "check_every"):
        cfg = replace(cfg, constraint=replace(cfg.constraint, check_every=2))
    compare(cfg, METHODS["third_party"])


def test_pretraining_micro_batches_and_a_second_phase():
    cfg = config("scrub", max_share=0.5)
    compare(cfg, Pretrain)
    compare(cfg, METHODS["scrub"], steps=cfg.unlearn.steps)
    compare(replace(cfg, unlearn=replace(cfg.unlearn, accumulate=2)), METHODS["scrub"])


def test_moments_are_beside_the_activations():
    """Of a weight AdamW keeps two numbers, SGD and LARS with momentum one, and without momentum none."""
    cfg, model = config("finetune"), build_model(config("finetune"), 3)
    settings = {
        "adamw": {}, "sgd": {"optimizer": "sgd"}, "lars": {"optimizer": "lars"},
        "none": {"optimizer": "sgd", "momentum": 0.0},
    }  # fmt: skip
    peak = {
        name: count_training(
            replace(cfg, unlearn=replace(cfg.unlearn, **changes)), METHODS["finetune"](cfg), model, STEPS, COUNTS
        ).peak_bytes
        for name, changes in settings.items()
    }
    weights = sum(p.nbytes for p in model.parameters())
    found = {name: (bytes - peak["none"]) / weights for name, bytes in peak.items()}
    assert found == pytest.approx({"adamw": 2, "sgd": 1, "lars": 1, "none": 0}, abs=0.02)


def test_control_a_larger_batch_takes_more_memory_and_more_images():
    cfg = config("neg_grad")
    large = replace(cfg, unlearn=replace(cfg.unlearn, retain_batch=48))
    small, more = (count_training(c, METHODS["neg_grad"](c), build_model(c, 3), 2, COUNTS) for c in (cfg, large))
    assert more.images - small.images == 2 * 2 * (48 - 12)
    assert more.peak_bytes > (1 + CLOSE) * small.peak_bytes


def test_nothing_is_computed_and_no_generator_moves():
    cfg = config("third_party")
    before = torch.get_rng_state()
    model = build_model(cfg, 3)
    weights = [weight.clone() for weight in model.parameters()]
    count_training(cfg, METHODS["third_party"](cfg), model, 2, COUNTS)
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))


def test_a_bound_of_the_settings_ends_no_plan():
    cfg = config("neg_grad", ascent_bound=1e-6)
    assert count_training(cfg, METHODS["neg_grad"](cfg), build_model(cfg, 3), 2, COUNTS).images > 0


def test_code_that_needs_values_is_said_and_stops_no_plan(tmp_path):
    (tmp_path / "own.py").write_text(NEEDS_VALUES)
    planned = make_plan(load_config("digits", None, [f"method.name={tmp_path / 'own.py'}:Own"]))
    assert (
        "needs values" in planned["phases"]["unlearn"]["not_counted"] and "images" not in planned["phases"]["unlearn"]
    )
    assert planned["phases"]["retrain"]["share_of_retraining"] == 1.0


def test_a_method_that_trains_nothing_takes_nothing():
    cfg = config("none")
    assert count_training(cfg, METHODS["none"](cfg), build_model(cfg, 3), 0, COUNTS) == Counted()


def test_live_bytes_are_those_of_tensors_that_are_alive():
    with LiveBytes() as live:
        a = torch.zeros(1000)
        b = a + 1
        del b
        c = a.view(10, 100)  # no storage of its own
        d = c * 2
    assert live.live == 2 * 4000 and live.peak == 2 * 4000
    del a, c, d
    assert live.live == 0

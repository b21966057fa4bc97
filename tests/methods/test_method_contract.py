"""What every method keeps to, whoever wrote it: a new one falls into these tests by itself.

Its formula is checked by hand elsewhere (test_method_losses.py, test_third_party.py), its gradients on two ranks in
tests/dist/test_method_parity.py, whole runs in tests/e2e/test_method_runs.py; each of them asks for an entry.
"""

from __future__ import annotations

import copy
import io

import pytest
import safetensors.torch
import test_method_losses
import test_third_party
import torch
from method_batches import SIZES, batch, in_float64
from parts import METHODS, TRAINED
from test_method_losses import ALL_OBJECTIVES, BATCHES, config, context, gradients

from distunlearn.data.views.draws import id_hashes
from distunlearn.methods.base import missing

COUNTS = {**SIZES, "holdout": 5}


def fits(name: str, objective: str) -> bool:
    return not missing(config(name, objective), COUNTS)


PAIRS = [(name, objective) for name in TRAINED for objective in ALL_OBJECTIVES if fits(name, objective)]
every_pair = pytest.mark.parametrize(("name", "objective"), PAIRS)
every_method = pytest.mark.parametrize("name", TRAINED)


def begun(name: str, objective: str):
    """The method after its calibration, its context, and the batches that it asks for."""
    cfg = config(name, objective)
    ctx, method = context(cfg), METHODS[name](cfg)
    with in_float64():
        method.calibrate(ctx, batch)
    ctx.images = 0
    roles = {role: "retain" if role == "members" else role for role in method.batch_sizes()}
    return method, ctx, {role: BATCHES[shown] for role, shown in roles.items()}


def test_every_method_is_here():
    """Negative control of the lists: no method is left out, and none has an objective left over."""
    assert {name for name, _ in PAIRS} == set(TRAINED) == {n for n, e in METHODS.items() if e.steps != "none"}
    refused = [(n, o) for n in TRAINED for o in ALL_OBJECTIVES if (n, o) not in PAIRS]
    assert refused == [("alignment_calibration", "supervised")]


@every_pair
def test_only_the_images_that_it_asks_for_enter_and_are_counted(name, objective):
    method, ctx, batches = begun(name, objective)
    with in_float64():
        out = method.loss(ctx, batches)  # a role that it did not ask for would be missing here
    assert ctx.images > 0  # how many: tests/plan/test_dry_run.py
    assert set(out.consumed) <= set(batches) <= set(METHODS[name].needs)
    for role, ids in out.consumed.items():
        assert ids == batches[role].ids
    assert ("forget" in out.consumed) == ("forget" in batches) == method.forgets
    for role in set(batches) - set(out.consumed):  # shown, but in no loss: its images get no gradient
        assert role == "retain" and name == "grad_ascent"


@every_pair
def test_the_loss_is_finite_and_a_function_of_its_arguments(name, objective):
    method, ctx, batches = begun(name, objective)
    again = copy.deepcopy((method, ctx))
    with in_float64():
        first = method.loss(ctx, batches)
        torch.manual_seed(12345)  # no global generator is asked
        second = again[0].loss(again[1], batches)
    assert first.loss.shape == () and torch.isfinite(first.loss)
    assert float(first.loss.detach()) == float(second.loss.detach())
    pulled = gradients(first.loss, ctx)
    assert torch.isfinite(pulled).all() and pulled.norm() > 0
    assert torch.equal(pulled, gradients(second.loss, again[1]))
    figures = {key: float(value) for key, value in first.metrics.items()}
    assert figures == {key: float(value) for key, value in second.metrics.items()}
    assert all(torch.isfinite(torch.tensor(value)) for value in figures.values())


@every_method
def test_no_key_of_an_image_to_forget_enters_the_queue(name):
    method, ctx, batches = begun(name, "moco")
    before = set(ctx.queue.ids.tolist())
    retained = set(id_hashes(BATCHES["retain"].ids).tolist())
    with in_float64():
        for ctx.step in range(2):
            out = method.loss(ctx, batches)
    entered = set(ctx.queue.ids.tolist()) - before
    assert entered <= retained
    trained_on_retain = "retain" in out.consumed or "members" in out.consumed
    assert bool(entered) == trained_on_retain, "the keys of the images that are trained on enter"


@every_pair
def test_state_goes_through_a_file_and_gives_the_same_next_losses(name, objective):
    method, ctx, batches = begun(name, objective)
    with in_float64():
        method.loss(ctx, batches)
        saved = method.state_dict()
        assert all(isinstance(value, torch.Tensor) and value.device.type == "cpu" for value in saved.values())
        read = safetensors.torch.load(safetensors.torch.save({k: v.contiguous() for k, v in saved.items()}))
        other = METHODS[name](ctx.cfg)
        other.load_state_dict(read)
        again = other.state_dict()
        assert again.keys() == saved.keys() and all(torch.equal(again[key], saved[key]) for key in saved)
        losses = []
        for one in (method, other):
            own = copy.deepcopy(ctx)
            losses.append([float(one.loss(own, batches).loss.detach()) for own.step in (1, 2)])
    assert losses[0] == losses[1]


@every_method
def test_a_saved_state_does_not_follow_the_method(name):
    """A checkpoint is written while the next step runs."""
    method, ctx, batches = begun(name, "byol")
    with in_float64():
        method.loss(ctx, batches)
        saved = method.state_dict()
        file = io.BytesIO()
        torch.save(saved, file)
        for ctx.step in (1, 2):
            method.loss(ctx, batches)
    file.seek(0)
    held = torch.load(file, weights_only=True)
    assert all(torch.equal(saved[key], held[key]) for key in held)


@every_method
def test_what_it_needs_is_asked_for_before_anything_is_trained(name):
    entry = METHODS[name]
    for role in ("retain", "forget", "third_party", "calibration"):
        lacking = missing(config(name), COUNTS | {role: 0})
        assert bool(lacking) == (role in entry.needs), role
    assert not missing(config(name), COUNTS)
    assert ("forget" in entry.needs) == entry.forgets


@every_method
def test_its_formula_has_a_test_by_hand(name):
    """A method whose loss nobody has computed a second time is not finished."""
    own = name == "third_party" and hasattr(test_third_party, "test_steps_by_hand")
    named = [test for test in vars(test_method_losses) if test.startswith("test_") and name in test]
    assert own or named or name in test_method_losses.BY_HAND, f"no test of a loss by hand has {name} in its name"

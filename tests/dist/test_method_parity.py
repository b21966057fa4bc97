"""Every method on 2 processes against plain torch in one: two steps, weights and what the method itself has learned.

The ranks run this file as a script: one start for ddp, one for the backends that shard weights. Images to forget are
shared unevenly (4 and 5), and the forget term outweighs the utility.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from constraint_training import SIZES, Case, batch, fresh, trained
from parts import METHODS
from processes import launch
from toys import share, snapshot, update_error

from distunlearn.config.registry import METHOD, fitting
from distunlearn.config.schema import OptimizerConfig, RunConfig
from distunlearn.data.views.draws import id_hashes
from distunlearn.distributed.collectives import get_rank, get_world
from distunlearn.encoders.model import MomentumEncoder
from distunlearn.engine.backends import Backend, open_backend, zero
from distunlearn.engine.optimizer import make_optimizer
from distunlearn.methods import mixed_batch, random_target, sure
from distunlearn.objectives import KeyQueue, forward, make_objective
from distunlearn.objectives.forward import Context

pytestmark = pytest.mark.slow

CASES = [
    ("alignment_calibration", "simclr"), ("alignment_calibration", "byol"), ("alignment_calibration", "moco"),
    ("neg_grad", "simclr"), ("neg_grad", "moco"), ("grad_ascent", "byol"), ("scrub", "byol"), ("salun", "byol"),
    ("sure", "byol"), ("held_out_distillation", "byol"), ("random_target", "simclr"), ("l1_sparse", "simclr"),
    ("finetune", "simclr"), ("retrain", "byol"), ("third_party", "simclr"),
]  # fmt: skip
STARTS = {"ddp": ("ddp",), "sharded": ("fsdp2", "zero3")}
# What differs under sharded weights: changes after the step, a teacher, several forwards. The rest: pytest -m matrix.
SHARDED = [
    ("salun", "byol"),
    ("l1_sparse", "simclr"),
    ("sure", "byol"),
    ("alignment_calibration", "simclr"),
    ("third_party", "simclr"),
]
PRECISE = ("ddp", "fsdp2")  # DeepSpeed keeps float32
RATE, STEPS = 1e-2, 2
LIMIT = {torch.float64: 1e-9, torch.float32: 1e-3}
SETTINGS = {
    "forget_weight": 5.0, "alignment_weight": 5.0, "calibration_weight": 0.5, "l1_weight": 0.5, "mask_share": 0.4,
    "critic_lr": 0.1, "critic_width": 8, "max_share": 1.0, "climb_weight": 0.7,
}  # fmt: skip


def config(method: str, objective: str, backend: str) -> RunConfig:
    cfg = Case("head", "resnet", objective).config(backend)
    return replace(cfg, method=fitting(METHOD, method, **SETTINGS))


def warm(objective: str, folder: Path | None = None) -> dict[str, torch.Tensor]:
    """Weights after a short training: fresh ones tell images apart by little more than rounding."""
    if folder is None:
        return trained("resnet", objective, True)
    return torch.load(folder / f"warm-{objective}.pt", weights_only=True)


def contents(objective: str, weights: dict, dtype: torch.dtype, cfg: RunConfig):
    """An encoder a little away from its original, the original, the momentum encoder and the queue."""
    model = fresh(Case("head", "resnet", objective))
    model.load_state_dict(weights)
    original = copy.deepcopy(model).to(dtype).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.05 * weight.std(unbiased=False) * torch.randn(weight.shape, generator=generator))
    model = model.to(dtype)
    made = make_objective(cfg.objective)
    momentum = MomentumEncoder(original) if made.needs_momentum else None
    if momentum is not None:
        momentum.model.to(dtype).train()
    queue = None
    if made.uses_queue:
        queue = KeyQueue(40, 6, dtype=dtype)
        keys = torch.nn.functional.normalize(torch.randn(30, 6, generator=generator, dtype=torch.float64), dim=-1)
        queue.push(keys, torch.from_numpy(id_hashes([f"key-{i}" for i in range(30)])))
    return model, original, momentum, queue


def train(method, ctx: Context, dtype: torch.dtype, backward: Callable, update: Callable, state: Callable) -> dict:
    right = forward.make_view
    with mock.patch.object(forward, "make_view", lambda *args, **how: right(*args, **how).to(dtype)):
        started, states = method.calibrate(ctx, batch), [state()]
        ctx.rate = RATE
        for ctx.step in range(STEPS):
            roles = [role if role != "members" else "retain" for role in method.batch_sizes()]
            out = method.loss(ctx, {role: batch(role, ctx.step, share(SIZES[role])) for role in roles})
            backward(out.loss)
            update()
            states.append(state())
    kept = {k: v for k, v in method.state_dict().items() if not k.startswith("places")}
    metrics = {name: float(value) for name, value in out.metrics.items()}
    return {"states": states, "started": started, "state": kept, "metrics": metrics}


def plain(name: str, objective: str, dtype: torch.dtype) -> dict:
    """In one process without any part of the backends."""
    cfg = config(name, objective, "single")
    model, original, momentum, queue = contents(objective, warm(objective), dtype, cfg)
    optimizer = make_optimizer(OptimizerConfig(optimizer="sgd", lr=RATE, weight_decay=1e-2), model)
    ctx = Context(cfg, make_objective(cfg.objective), model, model, torch.device("cpu"), momentum, queue, original)
    method = METHODS[name](cfg)

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad()
        if method.adjusts:
            with torch.no_grad():
                for part, weight in model.named_parameters():
                    weight.copy_(method.adjust(ctx, part, weight, lambda whole: whole))
        if momentum is not None:
            momentum.update(model, 0.9)

    return train(method, ctx, dtype, torch.Tensor.backward, update, lambda: snapshot(model.state_dict()))


def spread(name: str, objective: str, kind: str, weights: dict, *, adjusted: bool = True) -> dict:
    """The same on a backend, by all its ranks."""
    cfg, dtype = config(name, objective, kind), torch.float64 if kind in PRECISE else torch.float32
    backend: Backend = open_backend(cfg)
    model, original, momentum, queue = contents(objective, weights, dtype, cfg)
    optimizer = make_optimizer(OptimizerConfig(optimizer="sgd", lr=RATE, weight_decay=1e-2), model)
    forward = backend.prepare(model, optimizer, 0.0)
    if momentum is not None:
        backend.follow(momentum)
    ctx = Context(
        cfg, make_objective(cfg.objective), model, forward, backend.device, momentum, queue, original,
        rank=backend.world.rank, world=backend.world.size, plain_forward=backend.plain_forward(),
    )  # fmt: skip
    backend.set_learning_rate(RATE)
    method = METHODS[name](cfg)

    def update() -> None:
        backend.step()
        if method.adjusts and adjusted:
            backend.adjust(functools.partial(method.adjust, ctx))
        if momentum is not None:
            backend.update_momentum(momentum, model, 0.9)

    try:
        return train(method, ctx, dtype, backend.backward, update, backend.full_state)
    finally:
        backend.release()


def alone(x: torch.Tensor, *_) -> torch.Tensor:
    """A gather that forgets the other ranks."""
    return x.detach()


# What is done wrong -> the case that shows it, and how it is done.
WRONG = {
    "the mean of this rank's images": (
        ("random_target", "simclr"), lambda: mock.patch.object(random_target, "image_mean", torch.mean), {}
    ),
    "a classifier of each rank's own": (
        ("sure", "byol"), lambda: mock.patch.object(sure, "all_gather_uneven", alone), {}
    ),
    "another partner on each rank": (
        ("alignment_calibration", "simclr"),
        lambda: mock.patch.object(mixed_batch, "random_words", lambda *a: torch.tensor([get_rank()])), {},
    ),
    "masked weights are not put back": (
        ("salun", "byol"), contextlib.nullcontext, {"adjusted": False}
    ),
}  # fmt: skip


def mistakes(kind: str) -> list[str]:
    """Those of the gathers are the same on all backends; what is done to weights is not."""
    return list(WRONG) if kind == "ddp" else ["masked weights are not put back"]


def main() -> None:
    folder, start, every = Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "every"
    zero.PERSISTENT = 0  # the encoders are small: without this their weights would stay gathered
    results: dict = {}
    for kind in STARTS[start]:
        for name, objective in CASES if every or kind == "ddp" else SHARDED:
            results[f"{kind} {name} {objective}"] = spread(name, objective, kind, warm(objective, folder))
        for mistake in mistakes(kind):
            (name, objective), patched, how = WRONG[mistake]
            with patched():
                results[f"{kind} {mistake}"] = spread(name, objective, kind, warm(objective, folder), **how)
    results["world"] = get_world()
    torch.save(results, folder / f"rank-{get_rank()}.pt")


@pytest.fixture(scope="module")
def references():
    return functools.cache(plain)


@pytest.fixture(
    scope="module", params=["ddp some", "sharded some", pytest.param("sharded every", marks=pytest.mark.matrix)]
)
def ran(request, tmp_path_factory):
    start, which = request.param.split()
    folder = tmp_path_factory.mktemp(start)
    for objective in {objective for _, objective in CASES}:
        torch.save(warm(objective), folder / f"warm-{objective}.pt")
    ranks = launch(__file__, 2, folder, start, which, timeout=1200)
    assert [r["world"] for r in ranks] == [2, 2]
    return STARTS[start], CASES if start == "ddp" or which == "every" else SHARDED, ranks


def error(found: dict, expected: dict) -> float:
    return max(update_error(found["states"][s], expected["states"][s], expected["states"][0]) for s in (1, STEPS))


def test_two_processes_train_as_one(ran, references):
    kinds, cases, ranks = ran
    wrong = {}
    for kind in kinds:
        dtype = torch.float64 if kind in PRECISE else torch.float32
        for name, objective in cases:
            expected = references(name, objective, dtype)
            found = [error(rank[f"{kind} {name} {objective}"], expected) for rank in ranks]
            if max(found) > LIMIT[dtype]:
                wrong[f"{kind} {name} {objective}"] = found
    assert not wrong, wrong


def test_masks_classifiers_and_figures_agree(ran, references):
    kinds, cases, ranks = ran
    for kind in kinds:
        precise = kind in PRECISE
        for name, objective in cases:
            expected = references(name, objective, torch.float64 if precise else torch.float32)
            for rank in ranks:
                found = rank[f"{kind} {name} {objective}"]
                assert found["started"] == pytest.approx(expected["started"])
                assert found["metrics"].keys() == expected["metrics"].keys() and found["state"].keys() == (
                    expected["state"].keys()
                )
                for key, value in expected["state"].items():
                    if value.dtype == torch.bool:
                        assert float((found["state"][key] != value).double().mean()) <= (0 if precise else 0.01)
                    else:
                        assert torch.allclose(found["state"][key], value, rtol=1e-6 if precise else 1e-2, atol=1e-3)
            first, second = (rank[f"{kind} {name} {objective}"]["state"] for rank in ranks)
            assert all(torch.equal(first[key], second[key]) for key in first)  # one mask, one classifier


@pytest.mark.parametrize("mistake", WRONG)
def test_negative_control(ran, references, mistake):
    kinds, _, ranks = ran
    name, objective = WRONG[mistake][0]
    for kind in kinds:
        if mistake not in mistakes(kind):
            continue
        dtype = torch.float64 if kind in PRECISE else torch.float32
        found = error(ranks[0][f"{kind} {mistake}"], references(name, objective, dtype))
        assert found > 5 * LIMIT[torch.float32], (kind, found)


if __name__ == "__main__":
    main()

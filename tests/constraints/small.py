"""A small ViT and a small ResNet, batches, and per-sample gradients by plain double backward, one image at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from parts import constraint_settings, objective_settings
from photo_batches import photo_batch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from distunlearn.config.schema import EncoderConfig, RunConfig
from distunlearn.constraints.distances.energy import energy_distance, surrogate, value_and_cotangent
from distunlearn.constraints.evaluators import Evaluator, make_evaluator
from distunlearn.constraints.evaluators.sketch import draw_probes
from distunlearn.constraints.evaluators.sliced import direction
from distunlearn.data.schedule import Batch
from distunlearn.encoders.model import EncoderOutput, MomentumEncoder, build_model
from distunlearn.methods.training import Finetune
from distunlearn.objectives import KeyQueue, make_objective
from distunlearn.objectives.forward import Context, embed, view_pair
from distunlearn.objectives.memory_bank import Bank

ENCODERS = {
    "resnet": EncoderConfig(
        name="resnet18", image_size=16, in_chans=1, stem="deep",
        args={"stem_width": 4, "channels": [4, 6, 8, 8], "layers": [1, 1, 1, 1]},
    ),
    "vit": EncoderConfig(
        name="vit_tiny_patch16_224", image_size=16, in_chans=1, stem="standard",
        args={"patch_size": 4, "embed_dim": 12, "depth": 2, "num_heads": 2, "class_token": False, "global_pool": "avg"},
    ),
    # Of ordinary width: what a step may be, and how large rounding is, depends on it.
    "wide resnet": EncoderConfig(
        name="resnet18", image_size=16, in_chans=1, stem="deep",
        args={"output_stride": 8, "stem_width": 16, "channels": [32, 64, 128, 256]},
    ),
    "wide vit": EncoderConfig(
        name="vit_tiny_patch16_224", image_size=16, in_chans=1, stem="standard",
        args={"patch_size": 4, "depth": 6, "class_token": False, "global_pool": "avg"},
    ),
}  # fmt: skip
SIZES = {"retain": 10, "forget": 4, "third_party": 5}


def config(encoder: str, evaluator: str, objective: str = "simclr", pairs: int = 1, **constraint) -> RunConfig:
    return RunConfig(
        encoder=ENCODERS[encoder],
        objective=objective_settings(name=objective, hidden_dim=10, output_dim=6, queue_size=32),
        constraint=constraint_settings(
            evaluator=evaluator, view_pairs=pairs, **({"sketch_out": 3, "sketch_in": 2} | constraint)
        ),
    )


def batch(role: str, count: int | None = None) -> Batch:
    count = count or SIZES[role]
    generator = torch.Generator().manual_seed(sum(map(ord, role)))
    return photo_batch(
        ids=[f"{role}-{i}" for i in range(count)],
        photos=torch.randint(0, 256, (count, 1, 16, 16), generator=generator, dtype=torch.uint8),
        epochs=np.zeros(count, dtype=np.int64),
        labels=torch.arange(count) % 3,
    )


def context(cfg: RunConfig, dtype: torch.dtype = torch.float64, autocast: bool = False) -> Context:
    """Running statistics and a queue with something in them; the model in `dtype`, its inputs cast."""
    model = build_model(cfg, 3)
    objective = make_objective(cfg.objective)
    momentum = MomentumEncoder(model) if objective.needs_momentum else None
    queue = KeyQueue(32, 6) if objective.uses_queue else None
    ctx = Context(cfg, objective, model, model, torch.device("cpu"), momentum, queue)
    for _ in range(3):
        Finetune(cfg).loss(ctx, {"retain": batch("retain")})
    model.to(dtype)
    if momentum is not None:
        momentum.model.to(dtype)
        momentum.model.forward = _casting(momentum.model.forward, dtype)

    def forward(images: Tensor) -> EncoderOutput:
        if not autocast:
            return model(images.to(dtype))
        with torch.autocast("cpu", torch.bfloat16):
            out = model(images.float())
        return EncoderOutput(*(part.float() for part in out))

    ctx.forward = forward
    ctx.images = 0
    return ctx


def _casting(forward: Callable, dtype: torch.dtype) -> Callable:
    return lambda images: forward(images.to(dtype))


def look(ctx: Context, images: Batch, **how):
    return embed(ctx, images, batchnorm="eval", **how)


def views(ctx: Context, images: Batch, pair: int = 0) -> list[Tensor]:
    """In float64, so that a step in the space of images is not rounded."""
    return [view.double() for view in view_pair(ctx, images, pair)]


def evaluator(cfg: RunConfig) -> Evaluator:
    return make_evaluator(cfg)


def step(it: Evaluator, ctx: Context, forget: Batch, third: Batch, keys: Bank | None, match: Callable = None):
    """One step of an evaluator: its features, compared by `match` (the energy distance), and what it makes of that."""
    compared = it.features(ctx, forget, third, keys)
    pair = (compared.forget, compared.third)
    return compared.pull(*(() if compared.forget is None else (match or energy)(*pair)))


def bank(ctx: Context) -> Bank | None:
    """Retain keys under running statistics, so that asking twice gives the same."""
    if ctx.queue is not None:
        return ctx.queue.bank(ctx.objective.temperature)
    if not ctx.objective.uses_bank:
        return None
    with torch.no_grad():
        return Bank(*ctx.objective.bank_keys(look(ctx, batch("retain"))), ctx.objective.temperature)


def energy(forget: Tensor, third: Tensor) -> tuple[Tensor, Tensor]:
    """Energy distance in one process, without scales."""
    phi, cotangent = value_and_cotangent(energy_distance, forget, third)
    pull = surrogate(forget, cotangent, 1)
    return phi, pull + (phi - pull).detach()


def flat(gradients) -> Tensor:
    return torch.cat([g.flatten() for g in gradients if g is not None])


def gradient(ctx: Context, term: Tensor) -> Tensor:
    """Of all parameters, a parameter without gradient counting 0."""
    weights = list(ctx.model.parameters())
    found = torch.autograd.grad(term, weights, allow_unused=True)
    return flat([torch.zeros_like(w) if g is None else g for g, w in zip(found, weights, strict=True)])


def constrained(cfg: RunConfig, ctx: Context):
    """The evaluator's step on the batches, and the gradient of its term."""
    ctx.cfg = cfg
    found = step(evaluator(cfg), ctx, batch("forget"), batch("third_party"), bank(ctx))
    return found, gradient(ctx, found.term)


def per_sample_gradients(ctx: Context, images: Batch, names: list[str], create_graph: bool) -> list[dict[str, Tensor]]:
    """d l_i / d weight of the named layers by autograd, every image in forwards of its own, running statistics."""
    weights = [ctx.model.get_submodule(name).weight for name in names]
    found, keys = [], bank(ctx)
    with sdpa_kernel(SDPBackend.MATH):
        for i in range(len(images)):
            one = images.part(slice(i, i + 1))
            losses = [
                ctx.objective.per_sample_loss(look(ctx, one, pair=pair), keys).sum()
                for pair in range(ctx.cfg.constraint.view_pairs)
            ]
            grads = torch.autograd.grad(sum(losses) / len(losses), weights, create_graph=create_graph)
            found.append(dict(zip(names, grads, strict=True)))
    return found


def reference(ctx: Context, features: Callable[[dict[str, Tensor]], Tensor], names: list[str]) -> tuple[Tensor, Tensor]:
    """Phi of features of per-sample gradients, and its gradient by double backward (third-party side held)."""
    forget = torch.stack([features(g) for g in per_sample_gradients(ctx, batch("forget"), names, True)])
    third = torch.stack([features(g) for g in per_sample_gradients(ctx, batch("third_party"), names, False)])
    phi = energy_distance(forget, third.detach())
    return phi.detach(), gradient(ctx, phi)


def features_of(name: str, ctx: Context) -> tuple[Callable[[dict[str, Tensor]], Tensor], list[str]]:
    """What evaluator `name` compares, written anew as a function of one sample's weight gradients; their layers."""
    layers = getattr(ctx.cfg.constraint, "layers", None)
    shape = constraint_settings("sketch", sketch_out=3, sketch_in=2, layers=layers)
    probes = draw_probes(shape, ctx, 0)
    names = list(probes.layers)

    def sketch(gradients: dict[str, Tensor]) -> Tensor:
        return torch.stack(
            [
                outer.T @ gradients[n].flatten(1) @ inner.flatten(1).T
                for n, inner, outer in zip(names, probes.ins, probes.outs, strict=True)
            ]
        )

    def sketched(gradients: dict[str, Tensor]) -> Tensor:
        s = sketch(gradients).flatten()
        return torch.cat([s.norm().log()[None], s])

    def number(gradients: dict[str, Tensor]) -> Tensor:
        return (sketch(gradients) * torch.cat(direction(probes, ctx.cfg.seed, 0))).sum()[None]

    def norm(gradients: dict[str, Tensor]) -> Tensor:
        return torch.cat([g.flatten() for g in gradients.values()]).norm().log()[None]

    table = {"sketch": sketched, "double_backward": sketched, "sliced": number, "ghost_norm": norm}
    return table[name], names


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b / a.norm() / b.norm())


def at(cfg: RunConfig, **constraint) -> RunConfig:
    return replace(cfg, constraint=replace(cfg.constraint, **constraint))

"""Time, memory and price of a run on GPUs that nobody has tried yet: `distunlearn plan --world N --gpu h100`.

The model is that of `costs.py`. Operations and activations are counted on the run's own encoder, on tensors without
values. How fast a GPU and its network are is taken from data sheets and from assumed shares of them, all of which are
printed beside the result: no GPU was measured, so every figure is an extrapolation.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from distunlearn.common.text import printable
from distunlearn.config.schema import RunConfig
from distunlearn.encoders.blocks import shard_units
from distunlearn.encoders.model import ContrastiveModel, build_model
from distunlearn.encoders.timm_names import is_resnet
from distunlearn.errors import ConfigError
from distunlearn.objectives import make_objective
from distunlearn.plan.cost_model import BACKENDS, Machine, Work, step_time
from distunlearn.plan.gpu_target import Target
from distunlearn.plan.images import images_per_step, phase_images

__all__ = ["GPUS", "Encoder", "Gpu", "check_target", "count_encoder", "estimate", "machine_of", "phases_of", "work_of"]

GIB = 1 << 30
NODE = 8  # GPUs of a node
LATENCY = 2e-5  # seconds of one hop of a collective, its kernel launch included
LINK_SHARE = 0.6  # of a link's data-sheet speed that a collective reaches
SWEEP_SHARE = 0.2  # of the memory's speed, per byte of weights: an AdamW step moves them and their moments 5 times
FIXED = 0.01  # seconds of a step that are none of the others: views, Python, kernel launches
MFU = {"vit": 0.35, "conv": 0.2}  # share of the data-sheet rate that training reaches
LABEL = (
    "extrapolation: computed by a model that no measurement has confirmed yet, from data-sheet speeds and assumptions "
    "named here; no GPU was measured"
)


@dataclass(frozen=True)
class Gpu:
    """Data-sheet figures. bf16, fp32: dense operations/s. memory: bytes. sweep: bytes/s of memory.

    link, network: bytes/s per GPU and direction within a node, and (assumed) between nodes. price: assumed, per hour.
    """

    bf16: float
    fp32: float
    memory: float
    sweep: float
    link: float
    network: float
    price: float


GPUS: Mapping[str, Gpu] = {
    "a100": Gpu(312e12, 19.5e12, 80e9, 2.0e12, 300e9, 25e9, 1.8),
    "h100": Gpu(989e12, 67e12, 80e9, 3.35e12, 450e9, 50e9, 3.0),
    "h200": Gpu(989e12, 67e12, 141e9, 4.8e12, 450e9, 50e9, 3.5),
    "l40s": Gpu(362e12, 91.6e12, 48e9, 0.864e12, 32e9, 25e9, 1.2),
}


@dataclass(frozen=True)
class Encoder:
    """What one image costs. forward: operations. activations: bytes, float32, kept for the backward.

    weights: bytes, float32, with the heads. units: parts that are sharded by themselves. batchnorms: how many.
    """

    kind: str
    forward: float
    activations: float
    weights: float
    units: int
    batchnorms: int


def count_encoder(cfg: RunConfig, classes: int | None = None) -> Encoder:
    """Count on tensors without values; the weights of the encoder are made once, nothing is computed."""
    model = build_model(cfg, classes if cfg.objective.name == "supervised" else None)
    units = len(list(shard_units(model)))
    norms = sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    weights = 4.0 * sum(p.numel() for p in model.parameters())
    hollow = copy.deepcopy(model).to("meta")
    forward, activations = _counted(hollow, cfg, images=4)
    kind = "conv" if is_resnet(cfg.encoder.name) else "vit"
    return Encoder(kind, forward, activations, weights, max(1, units), norms)


def _counted(model: ContrastiveModel, cfg: RunConfig, images: int) -> tuple[float, float]:
    """Operations of a forward, and bytes that it keeps, per image."""
    own = {id(t) for t in [*model.parameters(), *model.buffers()]}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        base = tensor if tensor._base is None else tensor._base
        if id(base) not in own:
            kept[id(base)] = base
        return tensor

    shape = (images, cfg.encoder.in_chans, cfg.encoder.image_size, cfg.encoder.image_size)
    with torch.enable_grad(), FlopCounterMode(display=False) as counter:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            x = model.backbone(torch.empty(shape, device="meta"))
            for head in (model.projector, model.predictor):  # not `forward`: there is no autocast without a device
                x = x if head is None else head.last(head.body(x))
    size = sum(t.numel() * t.element_size() for t in kept.values())
    return counter.get_total_flops() / images, size / images


def work_of(cfg: RunConfig, encoder: Encoder, method: str | None, world: int) -> Work:
    """One step of one of `world` processes; method None: pretraining.

    A pass with gradients counts as three forwards, one of the momentum encoder as one. Passes that an evaluator adds
    count as passes with gradients, which is a little too much.
    """
    objective = make_objective(cfg.objective)
    passes = images_per_step(cfg, method) / world
    followed = passes / 2 if objective.needs_momentum else 0.0
    forgets = method == "third_party"
    retain = cfg.unlearn.retain_batch if method in ("third_party", "finetune", "grad_ascent") else cfg.pretrain.batch
    return Work(
        flops={encoder.kind: encoder.forward * (3 * (passes - followed) + followed)},
        weights=encoder.weights,
        units=encoder.units,
        forwards=2 if forgets else 1,
        batchnorms=encoder.batchnorms if cfg.sync_batchnorm else 0,
        embeddings=4.0 * retain * objective.branches * cfg.objective.output_dim,
        momentum=encoder.weights if objective.needs_momentum else 0.0,
    )


def machine_of(gpu: Gpu, precision: str, world: int, kind: str, mfu: float) -> Machine:
    """The model's parameters of `world` GPUs, `NODE` in a node: between nodes the network is the slower link."""
    peak = gpu.bf16 if precision == "bf16" else gpu.fp32
    link = gpu.link if world <= NODE else min(gpu.link, gpu.network)
    return Machine({kind: mfu * peak}, SWEEP_SHARE * gpu.sweep, FIXED, LATENCY, LINK_SHARE * link)


def memory_of(cfg: RunConfig, encoder: Encoder, backend: str, world: int, method: str | None) -> float:
    """Bytes of one process: weights, gradients, two moments, momentum encoder, activations; no library or workspace."""
    weights = encoder.weights
    shards = {"zero1": (1, 1, world), "zero2": (1, world, world), "zero3": (world,) * 3, "fsdp2": (world,) * 3}
    parts = shards.get(backend, (1, 1, 1))
    momentum = make_objective(cfg.objective).needs_momentum
    state = weights / parts[0] + weights / parts[1] + 2 * weights / parts[2] + (weights if momentum else 0.0)
    passes = images_per_step(cfg, method) / world / (2 if momentum else 1)
    phase = cfg.pretrain if method in (None, "retrain") else cfg.unlearn
    half = 0.5 if cfg.precision == "bf16" else 1.0  # autocast keeps most activations in two bytes
    return state + passes * encoder.activations * half / phase.accumulate


def estimate(
    cfg: RunConfig, phases: Mapping[str, Mapping[str, float]], target: Target, classes: int | None = None
) -> dict[str, Any]:
    """Time, memory and price of every phase of a plan on the GPUs of `target`, and the fastest backend; plain JSON.

    phases: steps by phase, as `make_plan` gives them. classes: of a supervised encoder.

    Raises:
        ConfigError: an unknown GPU, numbers that cannot be, or more processes than images in a batch.
    """
    check_target(cfg, target)
    gpu, world = target.gpu, target.world or 1
    card = GPUS[gpu]
    encoder = count_encoder(cfg, classes)
    share, rate = target.mfu or MFU[encoder.kind], target.price or card.price
    machine = machine_of(card, cfg.precision, world, encoder.kind, share)
    methods = {"pretrain": None, "retrain": "retrain", "unlearn": cfg.method.name}
    names = ["single"] if world == 1 else [name for name in BACKENDS if name != "single"]
    found: dict[str, Any] = {}
    for phase, facts in phases.items():
        if not facts["steps"]:
            continue
        method = methods[phase]
        placed = {name: replace(cfg, backend=name) for name in names}  # some evaluators show images twice on some
        works = {name: work_of(placed[name], encoder, method, world) for name in names}
        times = {name: step_time(works[name], name, world, machine) for name in names}
        chosen = cfg.backend if cfg.backend in times else min(names, key=lambda name: times[name]["total"])
        images = phase_images(placed[chosen], method, int(facts["steps"]))
        hours = facts["steps"] * times[chosen]["total"] / 3600
        memory = {name: memory_of(placed[name], encoder, name, world, method) for name in names}
        found[phase] = {
            "backend": chosen,
            "step_seconds": {part: round(value, 6) for part, value in times[chosen].items()},
            "passes_per_second": round(images / facts["steps"] / times[chosen]["total"], 1),
            "hours": round(hours, 4),
            "gpu_hours": round(hours * world, 3),
            "cost": round(hours * world * rate, 2),
            "memory_gib": round(memory[chosen] / GIB, 2),
            "fits": memory[chosen] <= 0.9 * card.memory,
            "by_backend": {
                name: {"step_seconds": round(times[name]["total"], 6), "memory_gib": round(memory[name] / GIB, 2)}
                for name in names
            },
        }
    return {
        "label": LABEL,
        "gpu": gpu,
        "world": world,
        "assumptions": {
            "mfu": share, "dense_operations_per_second": card.bf16 if cfg.precision == "bf16" else card.fp32,
            "gpus_in_a_node": NODE, "link_bytes_per_second": machine.bandwidth, "latency_seconds": LATENCY,
            "fixed_seconds_per_step": FIXED, "price_per_gpu_hour": rate, "overlap_of_communication": 0,
            "operations_per_image_and_forward": encoder.forward,
        },
        "phases": found,
    }  # fmt: skip


def check_target(cfg: RunConfig, target: Target) -> None:
    """See `estimate` for what is raised; nothing is counted."""
    target.check()
    if target.gpu not in GPUS:
        raise ConfigError(f"--gpu is {printable(target.gpu, 40)!r}, expected one of {', '.join(GPUS)}.")
    world = target.world or 1
    sizes = {"pretrain.batch": cfg.pretrain.batch, "unlearn.retain_batch": cfg.unlearn.retain_batch}
    for key, size in sizes.items():
        if size < world:
            raise ConfigError(f"{key} is {size}, which {world} processes cannot share; raise it, or lower --world.")


def phases_of(cfg: RunConfig, steps: Mapping[str, int]) -> dict[str, dict[str, float]]:
    """`phases` of `estimate` from steps by phase, for a run whose data are not at hand."""
    methods = {"pretrain": None, "retrain": "retrain", "unlearn": cfg.method.name}
    return {
        name: {"steps": count, "images": count * images_per_step(cfg, methods[name])} for name, count in steps.items()
    }

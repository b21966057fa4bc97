"""The grids of benchmarks/forgetting.py: which cells there are, the settings of each, and what they will cost.

A cell is one method on one encoder: data set, objective, backbone, seed, method. The cells of one data set, objective,
backbone and seed are a group: they share the shards, the original and the retrained encoder of the base, which is
the method `none`. Groups of validation seeds hold only their base, audited at tier 0: they rank the attacks by power.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from forgetting_requests import write_request

from distunlearn.config.load import load_config
from distunlearn.config.recipes import SMALL_RESNET, SMALL_VIT
from distunlearn.config.registry import METHOD
from distunlearn.config.schema import EncoderConfig, RunConfig
from distunlearn.config.shape import digest
from distunlearn.data.prepare.forget_list import list_sha256
from distunlearn.data.prepare.roles import is_list
from distunlearn.encoders.model import build_model
from distunlearn.methods.base import method_class
from distunlearn.plan.dry_run import count_training
from distunlearn.plan.plan import make_plan

__all__ = ["GRIDS", "Cell", "Grid", "cell_config", "cell_digest", "estimate", "groups", "methods_of"]

BASE = "none"
OURS = "third_party"
LEFT_OUT = ("retrain",)  # the reference itself: its gap is 0 by definition
# Measured on the digits recipe: an audit took 41 s of processor time for three encoders and 1,400 images at 0.385 ms an
# image of training, and starting a run, reading its data and writing its report about 10 s.
AUDIT_PASSES = 26
START_SECONDS = 10.0


@dataclass(frozen=True)
class Cell:
    """One method on one encoder; `validation` cells only rank attacks."""

    dataset: str
    objective: str
    encoder: str
    seed: int
    method: str
    validation: bool = False
    variant: str = ""  # a changed setting of the method, as `Grid.variants` names it

    @property
    def setting(self) -> str:
        return f"{self.dataset}-{self.objective}-{self.encoder}"

    @property
    def group(self) -> str:
        return f"{self.setting}-{'validation' if self.validation else 'seed'}{self.seed}"

    @property
    def name(self) -> str:
        return f"{self.group}-{self.method}" + (f"-{self.variant}" if self.variant else "")


@dataclass(frozen=True)
class Grid:
    """What is crossed with what. settings: `key=value`, for all cells; by_name: for cells of a data set, objective or
    encoder of that name. measured: whether results of it exist; gpu: needs one. cap: CPU hours (GPU: hours)."""

    datasets: tuple[str, ...]
    objectives: tuple[str, ...]
    encoders: Mapping[str, EncoderConfig]
    seeds: tuple[int, ...]
    validation_seeds: tuple[int, ...]
    settings: tuple[str, ...]
    by_name: Mapping[str, tuple[str, ...]]
    cap: float
    gpu: bool = False
    methods: tuple[str, ...] | None = None  # None: all
    variants: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # of third_party, by name: settings
    plain: tuple[str, ...] = ()  # data sets without variants
    rates: Mapping[str, float] = field(default_factory=dict)  # by encoder: times a rate that was tuned on another one
    alike: int = 0  # images to forget that are alike, as `forgetting_requests` lists them; 0: as the settings say


SMOKE = (
    "data.members=96", "data.forget=24", "data.holdout=48", "data.calibration=24", "data.third_party=24",
    "data.third_party_audit=24", "pretrain.epochs=2", "pretrain.batch=32", "unlearn.steps=6", "unlearn.retain_batch=32",
    "unlearn.forget_batch=8", "unlearn.third_party_batch=8", "constraint.view_pairs=1", "audit.views=4",
    "audit.bootstrap=100", "audit.relearn_steps=2",
)  # fmt: skip
FORMER = (  # of the recipe `digits` when the grids were begun
    "data.members=700", "data.holdout=600", "data.third_party=300", "data.third_party_audit=100",
    "pretrain.epochs=400", "unlearn.lr=1e-3", "audit.views=10",
)  # fmt: skip
FORMER_THIRD_PARTY = ("method.gradient_weight=1.0", "method.output_weight=4.0", "method.climb_weight=0.0")
SMALL = (
    "data.forget=0.2", "pretrain.epochs=300", "unlearn.retain_batch=128", "unlearn.forget_batch=32",
    "unlearn.third_party_batch=32", "constraint.view_pairs=1",
)  # fmt: skip
# Learning rates are those of pretraining, but for methods with a tuned one. Steps: third_party with `head` stays below
# 25 % of the images of retraining on digits and 10 % on Fashion-MNIST, its calibration included.
SMALL_BY_NAME = {
    "resnet": ("unlearn.lr=4e-3",), "vit": ("pretrain.lr=1e-3", "unlearn.lr=1e-3"),
    "digits": ("unlearn.steps=200",), "fashion_mnist": ("unlearn.steps=100",),
}  # fmt: skip
CIFAR = ("data.source=cifar10", "encoder.in_chans=3", "views.saturation=0.4", "views.hue=0.1", "views.grayscale=0.2",
         "views.flip=0.5", "views.crop_scale_min=0.2")  # fmt: skip
RESNET18 = EncoderConfig(name="resnet18", image_size=32, in_chans=3, stem="deep", args={"output_stride": 8})

GRIDS: dict[str, Grid] = {
    "smoke": Grid(
        ("digits",), ("simclr",), {"resnet": SMALL_RESNET}, (0,), (10,), SMOKE, {}, 0.2,
        methods=("none", "finetune", "third_party"),
    ),
    # Two cores, at most 12 hours of them. Every figure in it is of this software's own small encoders.
    "small": Grid(
        ("digits", "fashion_mnist"), ("simclr", "moco"), {"resnet": SMALL_RESNET, "vit": SMALL_VIT}, (0, 1, 2), (100,),
        SMALL, SMALL_BY_NAME, 12.0, rates={"vit": 0.25},
    ),
    # Which part of the loss does what, and what the evaluators and other strangers change.
    "ablation": Grid(
        ("digits", "digits_fashion_strangers"), ("simclr",), {"resnet": SMALL_RESNET}, (0, 1, 2), (100,),
        ("data.forget=0.2", "pretrain.epochs=300"),
        {"digits_fashion_strangers": ("data.third_party_source=fashion_mnist",)}, 2.0,
        methods=("none", "third_party"), plain=("digits_fashion_strangers",),
        variants={
            "no-utility": ("method.task_weight=0",),
            "no-gradient": ("method.gradient_weight=0",),
            "no-output": ("method.output_weight=0",),
            "no-gradient-no-output": ("method.gradient_weight=0", "method.output_weight=0"),
            "no-confidence": ("method.confidence_weight=0",),
            "sketch": ("constraint.evaluator=sketch",),
            "ghost_norm": ("constraint.evaluator=ghost_norm",),
            "input_gp": ("constraint.evaluator=input_gp",),
        },
    ),
    # What samples of past steps and a longer warm-up change on the ViT; everything else as in `small`, nothing tuned.
    "memory": Grid(
        ("digits", "fashion_mnist"), ("simclr", "moco"), {"vit": SMALL_VIT}, (0, 1, 2), (100,),
        SMALL, SMALL_BY_NAME, 2.0,
        methods=("none", "third_party"),
        variants={
            "memory-warmup": ("constraint.memory_steps=16", "unlearn.warmup=0.3"),
            "memory": ("constraint.memory_steps=16",),
            "warmup": ("unlearn.warmup=0.3",),
        },
    ),
    # The ViTs of Fashion-MNIST with three times the images: by how much distributions of finite sets differ falls with
    # their sizes, and with it the least gap that a method can have which makes one look like the other. Settings are
    # those of `small`; of third_party also with a memory and a longer warm-up, and as in `memory`, from the start.
    "larger": Grid(
        ("fashion_mnist",), ("simclr",), {"vit": SMALL_VIT}, (0, 1, 2), (100,),
        (*SMALL, "data.members=3000", "data.holdout=1500", "data.third_party=1500", "data.third_party_audit=1500",
         "pretrain.epochs=250", "unlearn.steps=300"),
        {"vit": ("pretrain.lr=1e-3", "unlearn.lr=1e-3")}, 3.0,
        methods=("none", "third_party", "neg_grad", "alignment_calibration"),
        variants={
            "tuned-memory": ("constraint.memory_steps=16", "unlearn.warmup=0.3"),
            "memory-warmup": ("unlearn.lr=1e-3", "method.gradient_weight=1", "method.output_weight=4",
                              "method.confidence_weight=0.05", "constraint.memory_steps=16", "unlearn.warmup=0.3"),
        },
    ),
    # Requests as people make them: 100 of 2,000 images, not drawn at random but alike. Settings are those of `small`;
    # of third_party also with the memory and the warm-up of `memory`, and with an anchor, whose weight was chosen on
    # the ResNet's validation request. (Its results also hold a draw of third-party images like the forgotten ones.)
    "requests": Grid(
        ("fashion_mnist",), ("simclr",), {"resnet": SMALL_RESNET, "vit": SMALL_VIT}, (0, 1, 2), (100,),
        (*SMALL, "data.members=2000", "data.holdout=1000", "data.third_party=1500", "data.third_party_audit=1000",
         "pretrain.epochs=250", "unlearn.steps=150"),
        {key: SMALL_BY_NAME[key] for key in ("resnet", "vit")}, 4.0,
        methods=("none", "third_party", "neg_grad", "alignment_calibration"),
        variants={
            "memory": ("constraint.memory_steps=16", "unlearn.warmup=0.3"),
            "anchor": ("method.anchor_weight=10",),
        },
        alike=100,
    ),
    # Alignment Calibration (Wang et al., TMLR 2025): 45,000 members of CIFAR-10, 4,500 to forget, 800 epochs, 10 epochs
    # of unlearning (880 steps of 512 images). Non-members are the other 15,000 of both parts.
    "muc": Grid(
        ("cifar10",), ("simclr", "moco"), {"resnet18": RESNET18}, (0, 1, 2), (100,),
        (*CIFAR, "data.members=45000", "data.forget=4500", "data.holdout=10000", "data.calibration=1000",
         "data.third_party=3000", "data.third_party_audit=1000", "pretrain.epochs=800", "pretrain.batch=512",
         "pretrain.optimizer=sgd", "pretrain.lr=0.06", "pretrain.weight_decay=5e-4", "unlearn.steps=880",
         "unlearn.retain_batch=460", "unlearn.forget_batch=52", "unlearn.third_party_batch=52", "unlearn.lr=0.006",
         "unlearn.optimizer=sgd", "unlearn.weight_decay=5e-4", "objective.hidden_dim=512", "objective.output_dim=128",
         "precision=bf16", "audit.part_crops=128"),
        {"simclr": ("objective.temperature=0.5",), "moco": ("objective.temperature=0.1", "objective.queue_size=4096")},
        400.0, gpu=True,
    ),
    # Chen, Wang and Mi (Mathematics 2024): 10,000 members, 2,000 to forget, 1,600 epochs to overfit, 10 epochs of
    # unlearning. Their SVHN is no source of this software; their Adam has its learning rate here.
    "paper": Grid(
        ("cifar10", "cifar100"), ("moco", "supervised"), {"resnet18": RESNET18}, (0, 1, 2), (100,),
        (*CIFAR, "data.members=10000", "data.forget=2000", "data.holdout=10000", "data.calibration=1000",
         "data.third_party=3000", "data.third_party_audit=1000", "pretrain.epochs=1600", "pretrain.batch=256",
         "pretrain.lr=0.01", "unlearn.steps=320", "unlearn.retain_batch=256", "unlearn.forget_batch=64",
         "unlearn.third_party_batch=64", "precision=bf16", "audit.part_crops=128"),
        {"cifar100": ("data.source=cifar100",), "moco": ("objective.hidden_dim=512", "objective.output_dim=128")},
        300.0, gpu=True,
    ),
}  # fmt: skip


def methods_of(grid: Grid) -> list[str]:
    """The methods of a grid, the base first."""
    chosen = grid.methods or tuple(METHOD.table)
    return [BASE, *(name for name in chosen if name != BASE and name not in LEFT_OUT)]


def groups(grid: Grid) -> list[list[Cell]]:
    """All cells by group, each group's base first; validation groups before the others."""
    result = []
    for validation, seeds in ((True, grid.validation_seeds), (False, grid.seeds)):
        for seed in seeds:
            for dataset in grid.datasets:
                for objective in grid.objectives:
                    for encoder in grid.encoders:
                        names = [BASE] if validation else methods_of(grid)
                        group = [Cell(dataset, objective, encoder, seed, m, validation) for m in names]
                        if not validation and dataset not in grid.plain:
                            group += [Cell(dataset, objective, encoder, seed, OURS, variant=v) for v in grid.variants]
                        result.append(group)
    return result


def cell_config(
    cell: Cell,
    grid: Grid,
    roots: Mapping[str, str],
    tuned: Mapping[str, Mapping[str, Mapping[str, Any]]],
    reuse: Path | None = None,
    lists: Path = Path("runs"),
) -> RunConfig:
    """The settings of a cell.

    roots: folders of data sets by name. tuned: {data set, or `<data set>-<encoder>`: {method: {key: value}}}, chosen on
    other forget sets; those of the encoder win, and those of the data set alone have the rate that `rates` makes of it.
    reuse: run directory of the group's base. lists: where lists of images to forget are written, if the grid has them.

    Raises:
        ConfigError: see `load_config`.
    """
    encoder = grid.encoders[cell.encoder]
    plain = dataclasses.asdict(encoder)
    keys = ("name", "image_size", "in_chans", "stem", "args", "embed_dim")
    given = [f"encoder.{key}={json.dumps(plain[key])}" for key in keys]
    if cell.dataset != "fashion_mnist":
        given += [*FORMER, *(FORMER_THIRD_PARTY if cell.method == "third_party" else ())]
    given += [*grid.settings, *(s for name in (cell.dataset, cell.objective, cell.encoder)
                                for s in grid.by_name.get(name, ()))]  # fmt: skip
    given += [f"seed={cell.seed}", f"objective.name={cell.objective}", f"method.name={cell.method}"]
    given.append("runtime.threads=1")
    own = tuned.get(f"{cell.dataset}-{cell.encoder}")
    chosen, rate = (tuned.get(cell.dataset, {}), grid.rates.get(cell.encoder, 1)) if own is None else (own, 1)
    for key, value in chosen.get(cell.method, {}).items():
        scaled = value * rate if key == "unlearn.lr" else value
        given.append(f"{key}={json.dumps(scaled)}")
    given += grid.variants[cell.variant] if cell.variant else ()
    given += [f"audit.tier={0 if cell.validation else 1}", f"audit.keep_signals={str(cell.method == BASE).lower()}"]
    given += [f"data.root={roots[cell.dataset]}"] if cell.dataset in roots else []
    given += [f"runtime.reuse={reuse}"] if reuse else []
    if grid.alike:
        request = write_request(lists, cell.dataset, roots.get(cell.dataset), cell.seed, grid.alike)
        given.append(f"data.forget={request.resolve()}")
    return load_config("fashion_mnist" if cell.dataset == "fashion_mnist" else "digits", None, given, world=1)


def cell_digest(cfg: RunConfig) -> str:
    """Digest of what decides a cell's figures: without folders, so that results can move between machines."""
    data = cfg.data
    if is_list(data.forget):
        data = dataclasses.replace(data, forget=f"{list_sha256(str(data.forget))}.txt")
    return digest(dataclasses.replace(cfg, data=data))


def estimate(grid: Grid, cells: Sequence[tuple[Cell, RunConfig]]) -> dict[str, float]:
    """Expected seconds of processor time by cell name, from the seconds per image that are measured here and now.

    A cell costs its images (as `distunlearn plan` counts them), START_SECONDS, and its audit, where an audited image in
    an encoder costs as much as AUDIT_PASSES images of training. The base looks at all three encoders and keeps the
    signals of two, the other methods look at their own alone.
    """
    per_image: dict[str, float] = {}
    plans: dict[str, dict[str, Any]] = {}
    expected = {}
    for cell, cfg in cells:
        if cell.setting not in per_image:
            per_image[cell.setting] = seconds_per_image(cfg)
            alone = dataclasses.replace(cfg.runtime, reuse=None)
            plans[cell.setting] = make_plan(dataclasses.replace(cfg, runtime=alone))
        plan = plans[cell.setting]
        phases = plan["phases"]
        audited = sum(plan["roles"].get(r, 0) for r in ("retain", "forget", "third_party_audit", "holdout"))
        method = method_class(cfg)(cfg)
        images = 0
        if method.steps == "unlearn":
            model = build_model(cfg, plan["encoder"]["classes"])
            images = count_training(cfg, method, model, cfg.unlearn.steps, plan["roles"]).images
        if cell.method == BASE:
            images = phases["pretrain"]["images"] + (0 if cell.validation else phases["retrain"]["images"])
        encoders = 1 if cell.method != BASE else 2 if cell.validation else 3
        expected[cell.name] = per_image[cell.setting] * (images + encoders * AUDIT_PASSES * audited) + START_SECONDS
    return expected


def seconds_per_image(cfg: RunConfig, steps: int = 3) -> float:
    """Processor seconds per image that a training step passes through the encoder: views, forward and backward."""
    import numpy as np
    import torch

    from distunlearn.data.views.colour import make_view
    from distunlearn.encoders.model import build_model

    torch.set_num_threads(1)
    model = build_model(cfg, 10)
    batch = min(cfg.pretrain.batch, 128)
    shape = (batch, cfg.encoder.in_chans, cfg.encoder.image_size, cfg.encoder.image_size)
    images = torch.randint(0, 256, shape, dtype=torch.uint8)
    ids = [str(i) for i in range(batch)]
    taken = []
    for step in range(steps + 1):
        start = time.process_time()
        epochs = np.full(batch, step)
        views = [make_view(images, cfg.views, seed=0, epochs=epochs, ids=ids, view=view) for view in (0, 1)]
        model(torch.cat(views)).output.square().mean().backward()
        taken.append((time.process_time() - start) / (2 * batch))
    return statistics.median(taken[1:])

"""`torchrun ... -m distunlearn doctor RECIPE`: is this launch what it seems to be?

The processes of a live launch join as a run would and show what they really are: how many, where, on which device;
which images each is given in the first two steps, against those that one process would see; and how far one step of
the backend moves the weights, against the gradient that it was given.
"""

from __future__ import annotations

import os
import socket
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch

from distunlearn.common.text import printable
from distunlearn.config.schema import OptimizerConfig, RunConfig
from distunlearn.data.loading.image_store import ImageStore
from distunlearn.data.loading.stream import RoleFeeder
from distunlearn.data.manifest.manifest import Manifest, has_index
from distunlearn.data.manifest.request import has_request
from distunlearn.data.prepare.selection import draw_request
from distunlearn.data.views.crops import Cutter
from distunlearn.encoders.model import build_model
from distunlearn.engine.backends import Backend, open_backend
from distunlearn.engine.optimizer import make_optimizer
from distunlearn.engine.phases import make_feeders
from distunlearn.engine.provenance import require_one_run
from distunlearn.engine.run_directory import find_manifest, shards_folder
from distunlearn.methods.base import Method, method_class
from distunlearn.methods.training import Pretrain
from distunlearn.objectives.base import objective_class

STEPS = 2
LARGE = 100.0  # for a gradient that every usual clipping would cut
RATE = 1e-3
TOLERANCE = 0.01  # of the length of a step

Seen = dict[str, list[list[str]]]  # feeder -> step -> ids


def check_launch(cfg: RunConfig, out: Path) -> tuple[list[str], list[str]]:
    """Lines that describe the launch, and what is wrong with it; alike on every rank. Collective.

    Args:
        out: its shards, or those that the settings name, are read; without any, samples are not checked.

    Raises:
        ConfigError, RankLostError: as at the start of a run.
    """
    backend = open_backend(cfg)
    lines, problems = _processes(backend)
    folder = shards_folder(cfg, out)
    manifest = find_manifest(cfg, out) if has_index(folder) else None
    if manifest is not None and not has_request(out):
        manifest = draw_request(cfg.data, cfg.seed, manifest, foreign=cfg.encoder.checkpoint is not None)
    if not all(backend.world.gather_objects(manifest is not None)) or manifest is None:
        lines.append(f"samples: not checked, for not every process finds shards in {printable(folder)}; run prepare")
    else:
        require_one_run(backend.world, cfg, manifest)
        told, wrong = _samples(cfg, manifest, backend)
        lines, problems = lines + told, problems + wrong
    length, norm = _one_step(cfg, backend)
    clipped = abs(length / norm - 1) > TOLERANCE
    lines.append(f"step: a gradient of norm {norm:.4g} moves the weights by {length:.4g} times the learning rate")
    if clipped:
        problems.append(
            f"backend={cfg.backend} changes the length of gradients ({norm:.4g} to {length:.4g}) although no clipping "
            "is set; remove the clipping from the launcher's configuration"
        )
    return lines, problems


def _processes(backend: Backend) -> tuple[list[str], list[str]]:
    mine = {
        "host": socket.gethostname(), "pid": os.getpid(), "device": str(backend.device),
        "threads": torch.get_num_threads(), "announced": os.environ.get("WORLD_SIZE", "1"),
    }  # fmt: skip
    ranks = backend.world.gather_objects(mine)
    hosts = len({rank["host"] for rank in ranks})
    lines = [f"world: {len(ranks)} processes on {hosts} machines, backend {backend.cfg.backend}"]
    for n, r in enumerate(ranks):
        lines.append(f"rank {n}: process {r['pid']} on {r['host']}, {r['device']}, {r['threads']} threads")
    problems = [
        f"rank {n} was told WORLD_SIZE={r['announced']}, but the world has {len(ranks)} processes"
        for n, r in enumerate(ranks)
        if r["announced"] != str(len(ranks))
    ]
    places = Counter((rank["host"], rank["device"]) for rank in ranks if rank["device"] != "cpu")
    problems += [f"{n} processes share {device} of {host}" for (host, device), n in places.items() if n > 1]
    return lines, problems


def _feeders(cfg: RunConfig, manifest: Manifest, backend: Backend) -> Iterator[tuple[str, RoleFeeder]]:
    """Those of pretraining and of the method, by name."""
    store = ImageStore(manifest, Cutter.of(cfg), cfg.encoder.in_chans, 0, cfg.data.max_pixels)
    method = method_class(cfg)(cfg)
    trainings: list[tuple[str, Method, int]] = [("pretrain", Pretrain(cfg), cfg.pretrain.accumulate)]
    if method.steps != "none":
        accumulate = cfg.unlearn.accumulate if method.steps == "unlearn" else cfg.pretrain.accumulate
        trainings.append(("unlearn", method, accumulate))
    for phase, by, accumulate in trainings:
        for name, feeder in make_feeders(by, accumulate, store, manifest, backend.world).items():
            yield f"{phase}/{name}", feeder


def _samples(cfg: RunConfig, manifest: Manifest, backend: Backend) -> tuple[list[str], list[str]]:
    mine: Seen = {}
    whole: Seen = {}
    for name, feeder in _feeders(cfg, manifest, backend):
        mine[name] = [feeder.batch_at(step).ids for step in range(STEPS)]
        whole[name] = [feeder.cycle.at(step)[1] for step in range(STEPS)]
    everyone = backend.world.gather_objects(mine)
    lines = []
    for name in mine:
        counts = [sum(len(ids) for ids in seen[name]) for seen in everyone]
        lines.append(f"samples: {name}, first {STEPS} steps: {' + '.join(map(str, counts))} images")
    return lines, sample_problems(everyone, whole)


def sample_problems(everyone: list[Seen], whole: Seen) -> list[str]:
    """What is wrong with the ids that the ranks saw.

    Args:
        everyone: of each rank.
        whole: what one process alone would see.
    """
    problems = []
    for name, steps in whole.items():
        for step, expected in enumerate(steps):
            parts = [seen[name][step] for seen in everyone]
            sizes = [len(part) for part in parts]
            where = f"{name}, step {step}"
            if len(set(sizes)) > 1:
                problems.append(f"{where}: the ranks have batches of unequal size ({sizes})")
            found = Counter(i for part in parts for i in part)
            twice = found - Counter(expected)
            missing = Counter(expected) - found
            if twice and len(everyone) > 1 and all(part == parts[0] for part in parts):
                problems.append(f"{where}: every rank has the same images, so that each enters {len(parts)} times")
            elif twice:
                problems.append(f"{where}: {sum(twice.values())} images enter that one process would not see")
            if missing:
                problems.append(
                    f"{where}: {sum(missing.values())} of {len(expected)} images are seen by no rank; are they shared "
                    "out twice?"
                )
    return problems


def _one_step(cfg: RunConfig, backend: Backend) -> tuple[float, float]:
    """Length of the change of the weights by one step of plain descent over the learning rate, and gradient norm."""
    classes = 2 if objective_class(cfg).head == "classifier" else None
    model = build_model(cfg, classes).to(backend.device)
    optimizer = make_optimizer(OptimizerConfig(optimizer="sgd", lr=RATE, weight_decay=0.0), model)
    forward = backend.prepare(model, optimizer, clip=0.0)
    names = [name for name, _ in model.named_parameters()]
    before = backend.full_state()
    side = cfg.encoder.image_size
    generator = torch.Generator().manual_seed(cfg.seed)
    images = torch.rand(4, cfg.encoder.in_chans, side, side, generator=generator).to(backend.device)
    backend.set_learning_rate(RATE)
    with backend.micro_batch(last=True):
        loss = forward(images).output.square().mean()
        backend.backward(LARGE * loss)  # the gradient of a fresh encoder's is about 1
    norm = backend.grad_norm()
    backend.step()
    after = backend.full_state()
    square = sum(float((after[name].double() - before[name].double()).square().sum()) for name in names)
    backend.release()
    return square**0.5 / RATE, norm

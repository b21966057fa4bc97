"""One phase of a real run, timed step by step: what `throughput.py` and `scaling.py` measure.

Nothing is imitated: images of noise are written to PNG files, prepared into shards, and trained on by
`engine.phases`, with its ledger, metrics, finite checks and gradient norm. A step lasts from the end of one telemetry
line to the end of the next.
"""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from distunlearn.config.registry import EVALUATOR, METHOD, OBJECTIVE, fitting, settings_of
from distunlearn.config.schema import (
    DataConfig,
    EncoderConfig,
    PretrainConfig,
    RunConfig,
    RuntimeConfig,
    UnlearnConfig,
    ViewsConfig,
)
from distunlearn.engine import phases
from distunlearn.engine.metrics_log import Telemetry
from distunlearn.engine.session import Session, open_session
from distunlearn.run import pipeline

__all__ = ["ENCODERS", "VIEWS", "StepClock", "configuration", "prepared", "session", "train"]

ENCODERS = {
    "resnet18-64": EncoderConfig(name="resnet18", image_size=64, in_chans=3, stem="standard"),
    "vit_tiny16-64": EncoderConfig(name="vit_tiny_patch16_224", image_size=64, in_chans=3, stem="standard"),
    "resnet50-224": EncoderConfig(name="resnet50", image_size=224, in_chans=3, stem="standard"),
    "vit_base16-224": EncoderConfig(name="vit_base_patch16_224", image_size=224, in_chans=3, stem="standard"),
}

# Every operation of SimCLR's views is on.
VIEWS = ViewsConfig(
    crop_scale_min=0.2, flip=0.5, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, grayscale=0.2, blur=0.5
)
EPOCH = 4  # steps in an epoch: members are as many global batches


def configuration(
    encoder: EncoderConfig,
    batch: int,
    *,
    objective: str = "simclr",
    method: str = "pretrain",
    evaluator: str = "head",
    backend: str = "single",
    precision: str = "fp32",
    steps: int = 20,
    **other: Any,
) -> RunConfig:
    """A run of noise. batch: images of a global batch; forget and third-party are a quarter of it each.

    method: pretrain, or one of `method.name`. steps: of the phase that is timed. other: of `runtime`.
    """
    quarter = max(2, batch // 4)
    return RunConfig(
        data=DataConfig(
            source="imagefolder", members=EPOCH * batch, forget=batch, holdout=8, calibration=max(8, quarter),
            third_party=batch, third_party_audit=8, samples_per_shard=64, verify="size",
        ),
        encoder=encoder,
        objective=fitting(
            OBJECTIVE, objective, hidden_dim=512, output_dim=128, queue_size=4096, momentum=0.99, temperature=0.2
        ),
        views=VIEWS,
        pretrain=PretrainConfig(
            epochs=-(-steps // EPOCH) if method == "pretrain" else 1, batch=batch, checkpoint_every=10**6, lr=1e-4
        ),
        unlearn=UnlearnConfig(
            steps=steps, retain_batch=batch, forget_batch=quarter, third_party_batch=quarter,
            checkpoint_every=10**6, lr=1e-5,
        ),
        method=settings_of(METHOD, "third_party" if method == "pretrain" else method),
        constraint=settings_of(EVALUATOR, evaluator),
        backend=backend, precision=precision, runtime=RuntimeConfig(threads=1, **other),
    )  # fmt: skip


def prepared(cfg: RunConfig, folder: Path) -> RunConfig:
    """Write the images and shards of `cfg` below `folder`, unless they are there; returns cfg with data.shards set."""
    data, size = cfg.data, cfg.encoder.image_size
    root, shards = folder / "images", folder / "shards"
    cfg = replace(cfg, data=replace(data, root=str(root), shards=str(shards)))
    if not (shards / "index.arrow").exists():
        count = data.members + data.holdout + data.calibration + data.third_party + data.third_party_audit
        draws = np.random.default_rng(0)
        for number in range(count):
            path = root / f"class{number % 4}" / f"{number:05d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            coarse = Image.fromarray(draws.integers(0, 256, (8, 8, 3), dtype=np.uint8))
            coarse.resize((size, size), Image.Resampling.BICUBIC).save(path, compress_level=1)
        pipeline.prepare(cfg, folder)
    return cfg


@dataclass(frozen=True)
class Sample:
    """Seconds of one step: by the clock, and of this process's CPU."""

    seconds: float
    cpu: float


class StepClock(Telemetry):
    """Telemetry that also notes how long every step took, and calls `between(step)` after each, off the clock."""

    def __init__(self, folder: Path, is_main: bool, between: Callable[[int], None] | None = None) -> None:
        super().__init__(folder, is_main, stream=io.StringIO())
        self.samples: list[Sample] = []
        self.between = between
        self._start = (time.perf_counter(), time.process_time())

    def log(self, phase: str, step: int, values: Any) -> None:
        super().log(phase, step, values)
        if not any(key.startswith("start/") for key in values):
            now = time.perf_counter(), time.process_time()
            self.samples.append(Sample(now[0] - self._start[0], now[1] - self._start[1]))
            if self.between is not None:
                self.between(len(self.samples))
        self._start = time.perf_counter(), time.process_time()


@contextlib.contextmanager
def session(cfg: RunConfig, folder: Path, between: Callable[[int], None] | None = None) -> Iterator[Session]:
    """A session as the verbs open it, in `folder`, whose telemetry is a `StepClock`. cfg: as `prepared` returns it."""
    with open_session(cfg, folder) as run:
        run.telemetry.close()
        with StepClock(folder, run.backend.world.is_main, between) as clock:
            run.telemetry = clock
            yield run


def train(run: Session, method: str) -> list[Sample]:
    """Run the phase of `method` and return its steps' times; forgetting starts from an encoder of four steps."""
    clock = run.telemetry
    assert isinstance(clock, StepClock)
    if method != "pretrain":
        between, clock.between = clock.between, None
        phases.pretrain(run)
        clock.between = between
        clock.samples.clear()
        phases.unlearn(run)
    else:
        phases.pretrain(run)
    return clock.samples

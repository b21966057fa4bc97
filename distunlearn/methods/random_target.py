"""random_target: pull every forget image to where the original encoder puts some other image.

    L = L_task(retain) + forget_weight * mean_{i in forget, views} 1 - cos(h(x_i), t_i)

t_i is the original encoder's embedding of a retain image drawn once for every forget image (by seed and id). Our
reading, for encoders, of relabelling at random (Graves, Nagisetty and Ganesh, "Amnesiac Machine Learning", AAAI 2021):
where a classifier is given another image's label, an encoder is given another image's place. Guarantee: empirical.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from distunlearn.config.schema import MethodConfig, NonNegativeFloat, RunConfig
from distunlearn.data.schedule import Batch, permutation, random_words
from distunlearn.distributed.collectives import all_reduce_mean
from distunlearn.methods.base import Method, StepOutput
from distunlearn.methods.embeddings import apart, directions, original_directions
from distunlearn.methods.search_space import Log, Space
from distunlearn.methods.training import enqueue, task_loss
from distunlearn.objectives.forward import Context, image_mean
from distunlearn.objectives.memory_bank import normalise

TARGETS = 256  # retain images whose places are given away


@dataclass(frozen=True, kw_only=True)
class RandomTargetConfig(MethodConfig):
    """One weight."""

    name: str = "random_target"
    forget_weight: NonNegativeFloat = 1.0  # of the forget term


class RandomTarget(Method[RandomTargetConfig]):
    """See the module's text. State: the places [m, E], from which every image's is drawn."""

    name = "random_target"
    Config = RandomTargetConfig
    moves = "unevenly"
    summary = "pull forget samples to the places of other images"
    report = "moving the forgotten images to the places of other images, drawn at random"
    needs = ("retain", "forget", "teacher")
    space: ClassVar[Space] = {"unlearn.lr": Log(5e-5, 5e-3), "method.forget_weight": Log(0.1, 10.0)}

    def __init__(self, cfg: RunConfig) -> None:
        super().__init__(cfg)
        self.places = torch.zeros(0, 0)

    def calibrate(self, ctx: Context, sample: Callable[[str], Batch]) -> dict[str, float]:
        retain = sample("retain")
        chosen = permutation(len(retain), self.cfg.seed, "targets")[:TARGETS].tolist()
        self.places = normalise(original_directions(ctx, retain.pick(chosen)).mean(0))
        return {"targets": float(len(self.places))}

    def loss(self, ctx: Context, batches: Mapping[str, Batch]) -> StepOutput:
        retain, forget = batches["retain"], batches["forget"]
        task, retained = task_loss(ctx, retain)
        away = image_mean(apart(directions(ctx, forget), self.targets(forget.ids)), forget.sizes)
        enqueue(ctx, retained)
        metrics = {"task_loss": task.detach(), "target_distance": all_reduce_mean(away.detach())}
        consumed = {"retain": retain.ids, "forget": forget.ids}
        return StepOutput(task + self.settings.forget_weight * away, metrics, consumed)

    def targets(self, ids: list[str]) -> Tensor:
        """t_i of these images, [n, E]: always the same for an id."""
        rows = [int(random_words(1, self.cfg.seed, "target", i)[0] % len(self.places)) for i in ids]
        return self.places[torch.as_tensor(rows, dtype=torch.int64, device=self.places.device)]

    def state_dict(self) -> dict[str, Tensor]:
        return {"places": self.places.cpu().clone()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.places = state["places"].clone()

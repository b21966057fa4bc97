"""An objective of one's own: SimCLR that also pulls the two views of an image together.

    python examples/own_objective.py [OUT]
    distunlearn run digits --set objective.name=examples/own_objective.py:Aligned --out OUT

The sizes are those of a demonstration: under a minute on two cores, and too few steps for a verdict.
"""

import sys
from dataclasses import dataclass

from torch.nn.functional import cosine_similarity

import distunlearn as du
from distunlearn import api
from distunlearn.objectives.forward import image_mean
from distunlearn.objectives.simclr import SimCLR


@dataclass(frozen=True, kw_only=True)
class AlignedConfig(du.SimCLR):
    """One weight."""

    name: str = "aligned"
    alignment: float = 0.5  # weight of the distance between the views


class Aligned(SimCLR):
    """l_i = NT-Xent of image i + alignment * (1 - cosine of its two projections)."""

    name = "aligned"
    Config = AlignedConfig
    summary = "SimCLR that also pulls the views of an image together"

    def row_losses(self, b, bank=None):  # type: ignore[no-untyped-def]
        apart = 1 - cosine_similarity(b.output[0], b.output[1], dim=-1)
        return super().row_losses(b, bank) + self.settings.alignment * apart

    def task_loss(self, b, bank=None):  # type: ignore[no-untyped-def]
        return image_mean(self.row_losses(b, bank))


def main(out: str) -> None:
    """The objective on the digits."""
    settings = [
        f"objective.name={__file__}:Aligned", "objective.alignment=0.3", "pretrain.epochs=6", "unlearn.steps=15",
        "audit.views=4", "audit.bootstrap=200",
    ]  # fmt: skip
    api.run(du.load_config("digits", None, settings), out)
    run = du.open_run(out)
    print(run.verdict, run.figures["coverage"], run.report)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "runs/own_objective")

"""A method of one's own in twenty lines: push the two views of each forgotten image apart.

    python examples/own_method.py [OUT]
    distunlearn run digits --set method.name=examples/own_method.py:Dissolve --set method.weight=0.5 --out OUT

The sizes are those of a demonstration: under a minute on two cores, and too few steps for a verdict.
"""

import sys
from dataclasses import dataclass

import distunlearn as du
from distunlearn import api
from distunlearn.methods.training import retain_bank, task_loss
from distunlearn.objectives.forward import embed, image_mean


@dataclass(frozen=True, kw_only=True)
class DissolveConfig(du.MethodConfig):
    """One weight."""

    name: str = "dissolve"
    weight: float = 1.0  # of the agreement between the views of a forgotten image


class Dissolve(du.Method):
    """L = the encoder's own loss on retained images + weight * mean agreement of the views of forgotten ones."""

    name = "dissolve"
    Config = DissolveConfig
    summary = "make the views of forgotten images disagree"
    report = "making the views of each forgotten image disagree"

    def loss(self, ctx, batches):  # type: ignore[no-untyped-def]
        retain, forget = batches["retain"], batches["forget"]
        task, retained = task_loss(ctx, retain)
        branches = embed(ctx, forget, batchnorm="eval")
        agreement = image_mean(ctx.objective.output_features(branches, retain_bank(ctx, retained))[:, 0])
        metrics = {"task_loss": float(task.detach()), "agreement": float(agreement.detach())}
        consumed = {"retain": retain.ids, "forget": forget.ids}
        return du.StepOutput(task + self.settings.weight * agreement, metrics, consumed)


def main(out: str) -> None:
    """The method on the digits, as the command above."""
    settings = [
        f"method.name={__file__}:Dissolve", "method.weight=0.5", "pretrain.epochs=6", "unlearn.steps=15",
        "audit.views=4", "audit.bootstrap=200",
    ]  # fmt: skip
    api.run(du.load_config("digits", None, settings), out)
    run = du.open_run(out)
    print(run.verdict, run.figures["coverage"], run.report)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "runs/own_method")

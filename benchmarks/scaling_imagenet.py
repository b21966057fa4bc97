"""GPU-hours to forget 1 % of ImageNet-1k from a MoCo v3 ViT-B/16, against retraining: an estimate, nothing is run.

    python benchmarks/scaling_imagenet.py --gpu h100 --world 64

Prints what `distunlearn plan --gpu` would for such a run, without the data. Assumptions beside those that it prints:
1,281,167 training images, of which 12,811 are to forget; training and retraining take 300 epochs at a batch of 4,096
(as Chen, Xie and He, arXiv 2104.02057, train their ViTs); forgetting takes ten passes over the forget list.
"""

from __future__ import annotations

import argparse
import json

from distunlearn.config.schema import (
    ConstraintConfig,
    EncoderConfig,
    ObjectiveConfig,
    PretrainConfig,
    RunConfig,
    UnlearnConfig,
)
from distunlearn.plan.gpu_estimate import GPUS, estimate, phases_of
from distunlearn.plan.gpu_target import Target

IMAGES, EPOCHS, PASSES = 1_281_167, 300, 10
FORGET = IMAGES // 100


def configuration(evaluator: str, batch: int, precision: str = "bf16") -> tuple[RunConfig, dict[str, int]]:
    """The run and its steps by phase. batch: forget images of a step; retain is four times that."""
    cfg = RunConfig(
        encoder=EncoderConfig(name="vit_base_patch16_224", image_size=224, in_chans=3, stem="standard"),
        objective=ObjectiveConfig(name="mocov3", hidden_dim=4096, output_dim=256),
        pretrain=PretrainConfig(epochs=EPOCHS, batch=4096),
        unlearn=UnlearnConfig(
            steps=-(-PASSES * FORGET // batch), retain_batch=4 * batch, forget_batch=batch, third_party_batch=batch
        ),
        constraint=ConstraintConfig(evaluator=evaluator),
        backend="ddp", precision=precision,
    )  # fmt: skip
    retrain = -(-EPOCHS * (IMAGES - FORGET) // cfg.pretrain.batch)
    return cfg, {"unlearn": cfg.unlearn.steps, "retrain": retrain}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpu", choices=list(GPUS), default="h100")
    parser.add_argument("--world", type=int, default=64)
    parser.add_argument("--evaluators", nargs="+", default=["head", "sketch"])
    parser.add_argument("--forget-batch", type=int, default=256)
    args = parser.parse_args()
    for evaluator in args.evaluators:
        cfg, steps = configuration(evaluator, args.forget_batch)
        found = estimate(cfg, phases_of(cfg, steps), Target(gpu=args.gpu, world=args.world))
        print(json.dumps({"evaluator": evaluator, **found}, indent=1))


if __name__ == "__main__":
    main()

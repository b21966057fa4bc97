"""alignment_calibration: pull different forget images together, and push the views of the same one apart.

    L = [ sum_{r in retain} l_r + a sum_{i in forget} l_i* ] / (R + a F)
      + b * F / (R + F) * mean_{i in forget} cos(z_i, z_i+)

l_r is the encoder's own loss in one batch of R retain and F forget images; l_i* is the same loss with the second view
of *another* forget image as the partner; z_i and z_i+ are two views of one forget image (with a momentum encoder: query
and key, the gradient goes through the query). a = calibration_weight, b = alignment_weight.

Source: Wang, Lu, Zhang, Boenisch, Dziedzic, Yu and Gao, "MUC: Machine Unlearning for Contrastive Learning with
Black-box Evaluation", TMLR 2025 (arXiv 2406.03603), for SimCLR and MoCo, and the authors' code for the weights of the
sums. Ours: the other objectives; the partner is drawn from the other forget images of the global batch; R and F are
those of the batch, which the schedule fixes; the cosine is taken on running statistics and on views of its own.

Three defects of the published code cannot happen here: a batch without forget images (a mean over nothing), for the
schedule brings F of them to every step; sums normalised by each process's own counts, for R and F are counted over all
processes; held-out images among the retain images, for roles are disjoint. Guarantee: empirical.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from distunlearn.config.schema import MethodConfig, NonNegativeFloat
from distunlearn.data.schedule import Batch
from distunlearn.distributed.collectives import all_reduce_mean, gather_sizes, get_world
from distunlearn.methods.base import Method, StepOutput
from distunlearn.methods.mixed_batch import mixed_branches, row_losses, with_other_partners
from distunlearn.methods.search_space import Log
from distunlearn.methods.training import enqueue, retain_bank
from distunlearn.objectives.forward import Context, embed, image_mean


@dataclass(frozen=True, kw_only=True)
class AlignmentCalibrationConfig(MethodConfig):
    """Weights a and b of the module's text."""

    name: str = "alignment_calibration"
    alignment_weight: NonNegativeFloat = 1.0  # of the alignment of a forget image's views
    calibration_weight: NonNegativeFloat = 1.0  # of forget images with foreign partners


class AlignmentCalibration(Method[AlignmentCalibrationConfig]):
    """See the module's text."""

    name = "alignment_calibration"
    Config = AlignmentCalibrationConfig
    moves = "evenly"
    summary = "pull different forget images together, push views of the same one apart"
    report = (
        "alignment calibration: different forgotten images are pulled together, and the views of each are pushed apart"
    )
    needs = ("retain", "forget", "views")
    space = {
        "unlearn.lr": Log(5e-5, 5e-3),
        "method.alignment_weight": Log(0.1, 100.0),
        "method.calibration_weight": Log(0.1, 10.0),
    }

    def view_pairs(self, feeder: str) -> int:
        return 2 if feeder == "forget" else 1

    def loss(self, ctx: Context, batches: Mapping[str, Batch]) -> StepOutput:
        weights, retain, forget = self.settings, batches["retain"], batches["forget"]
        branches = mixed_branches(ctx, retain, forget)
        retained = branches.part(slice(0, len(retain)))._replace(sizes=retain.sizes)
        rows = row_losses(ctx, with_other_partners(ctx, branches, len(retain), forget.sizes))
        kept, moved = rows[: len(retain)], rows[len(retain) :]
        count_r, count_f = (sum(gather_sizes(len(b), rows.device, b.sizes)) for b in (retain, forget))
        weighed = count_r + weights.calibration_weight * count_f
        calibrated = (kept.sum() + weights.calibration_weight * moved.sum()) * (get_world() / weighed)
        alike = embed(ctx, forget, batchnorm="eval", pair=1)
        agreement = image_mean(ctx.objective.output_features(alike, retain_bank(ctx, retained))[:, 0], forget.sizes)
        loss = calibrated + weights.alignment_weight * count_f / (count_r + count_f) * agreement
        enqueue(ctx, retained)
        metrics = {
            "task_loss": all_reduce_mean(image_mean(kept.detach(), retain.sizes)),
            "calibration_loss": all_reduce_mean(image_mean(moved.detach(), forget.sizes)),
            "forget_agreement": all_reduce_mean(agreement.detach()),
        }
        return StepOutput(loss, metrics, {"retain": retain.ids, "forget": forget.ids})

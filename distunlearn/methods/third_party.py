"""third_party: make forgotten images look like images the model never met.

    L = task_weight       * (L_task(retain)   [ - climb_weight * mean over forget of l_i ])
      + gradient_weight   * Phi({g_i}_forget, sg {g_j}_third)
      + output_weight     * Phi({o_i}_forget, sg {o_j}_third)
      + confidence_weight * C(third)
    [ + anchor_weight     * mean over third-party views of 1 - cos(output and embedding, the original encoder's) ]

g_i is the gradient of the bank loss of sample i, averaged over `view_pairs` pairs of views, reached by one of
`constraints/evaluators` (default: in closed form at the last linear layer) and described by (log norm, sketch over the
third-party's spread); o_i is (view agreement of the outputs, closeness to the bank, loss, view agreement of the
embeddings): the last because an exported encoder is the backbone alone, which the head would otherwise shield from the
constraint. Phi is the distance `constraint.distance` (default: the energy distance as a U-statistic). Where a
permutation test says that third-party and calibration samples differ under the original encoder, their distance is the
target Phi*, and the term is on while its running mean is above it, so that a third party of another distribution does
not over-correct; else Phi* is 0 and the term stays on. With `constraint.memory_steps` the gradient of Phi is taken
against the samples of the last steps as well. The anchor holds the third party where the original encoder, which never
met it, had it. With `climb_weight` the forgotten images' own loss l_i in one batch with the retained ones is turned
round: a direction of little noise that takes most of the trace away, so that small weights of Phi, whose gradient is
noisy, suffice. L_task stays that of the retained images alone: as negatives the forgotten ones would be pushed away.

Source of the three parts and of the third-party idea: Chen, Wang and Mi, "Private Data Protection with Machine
Unlearning in Contrastive Learning Networks", Mathematics 12(24):4001, 2024; predecessor Wang and Chen, arXiv
2405.07317. The formulas are ours: by all that is known theirs penalise input gradients. Guarantee: empirical.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from distunlearn.common.device import on_device
from distunlearn.common.random import VIEW_EPOCHS
from distunlearn.config.schema import MethodConfig, NonNegativeFloat, PositiveFloat, RunConfig
from distunlearn.constraints.confidence import entropy_confidence, hinge_confidence
from distunlearn.constraints.cross_batch_memory import FeatureMemory
from distunlearn.constraints.distances.energy import DISTANCES, own_rows, permutation_test, surrogate
from distunlearn.constraints.evaluators import Features, evaluator_class, make_evaluator, require_pull
from distunlearn.constraints.moving_averages import PhiSwitch, RunningSpread
from distunlearn.data.schedule import Batch
from distunlearn.data.views.draws import id_hashes
from distunlearn.distributed.collectives import (
    all_gather_detached,
    all_reduce_mean,
    gather_sizes,
    mean_scale,
    sum_over_ranks,
)
from distunlearn.methods.base import Method, StepOutput
from distunlearn.methods.embeddings import apart
from distunlearn.methods.grad_ascent import require_bounded
from distunlearn.methods.mixed_batch import mixed_branches, row_losses
from distunlearn.methods.search_space import Log
from distunlearn.methods.training import enqueue, retain_bank
from distunlearn.objectives.base import Branches
from distunlearn.objectives.forward import Context, embed, image_mean
from distunlearn.objectives.memory_bank import Bank, normalise

CALIBRATION_EPOCH = VIEW_EPOCHS["calibration"][0]  # far from any training epoch: calibration sees views of its own
CALIBRATION_DRAWS = 4  # sketches, view pairs and banks averaged into Phi*
PERMUTATIONS = 499
RUNNING = (
    "spread_gradient", "spread_output", "switch_gradient", "switch_output", "memory_gradient", "memory_output",
)  # fmt: skip
SIGNIFICANCE = 0.01  # third-party and calibration count as different below this; else Phi* would be sampling noise


@dataclass(frozen=True, kw_only=True)
class ThirdPartyConfig(MethodConfig):
    """Weights of the loss, and what its confidence term and targets are."""

    name: str = "third_party"
    task_weight: NonNegativeFloat = 1.0  # of the encoder's own loss on retained images
    climb_weight: NonNegativeFloat = 0.0  # of that loss on forgotten images, turned round; 0: they are in Phi alone
    climb_bound: PositiveFloat = 50.0  # stop (exit 4) when that loss passes this
    gradient_weight: NonNegativeFloat = 1.0  # of the distance between per-sample gradients
    output_weight: NonNegativeFloat = 1.0  # of the distance between outputs (view agreement, bank similarities)
    confidence_weight: NonNegativeFloat = 0.1  # of the term that lowers the confidence on third-party images
    confidence_loss: Literal["hinge", "entropy"] = "hinge"  # form of that term
    confidence_quantile: Annotated[float, Field(gt=0, lt=1)] = 0.25  # of the original's confidence on calibration data
    anchor_weight: NonNegativeFloat = 0.0  # third-party images stay as the original encoder has them
    phi_target: Literal["calibrated", "zero"] = "calibrated"  # Phi*: third-party against calibration, or 0


class ThirdParty(Method[ThirdPartyConfig]):
    """The method of this package; see the module's text for the loss."""

    name = "third_party"
    Config = ThirdPartyConfig
    summary = "gradients, outputs and confidence like those of third-party images"
    report = (
        "third-party fine-tuning: the encoder learns to treat the forgotten images as it treats images it never saw"
    )
    needs = ("retain", "forget", "third_party", "calibration")
    space = {
        "unlearn.lr": Log(5e-5, 5e-3),
        "method.gradient_weight": Log(0.1, 10.0),
        "method.output_weight": Log(0.5, 20.0),
        "method.confidence_weight": Log(0.01, 0.5),
        "method.climb_weight": Log(0.01, 1.0),
    }

    def __init__(self, cfg: RunConfig) -> None:
        super().__init__(cfg)
        self.evaluator = make_evaluator(cfg)
        self.distance = DISTANCES[cfg.constraint.distance]
        self.spread_gradient = RunningSpread(cfg.constraint.spread_momentum)
        self.spread_output = RunningSpread(cfg.constraint.spread_momentum)
        self.switch_gradient = PhiSwitch(0.0, cfg.constraint.phi_momentum)
        self.switch_output = PhiSwitch(0.0, cfg.constraint.phi_momentum)
        self.memory_gradient = FeatureMemory(cfg.constraint.memory_steps)
        self.memory_output = FeatureMemory(cfg.constraint.memory_steps)
        self._climbed: Tensor | None = None  # forget loss of the latest step, where it is climbed
        self.threshold = torch.zeros(())
        self.pseudo_ids = torch.zeros(0, dtype=torch.int64)
        self.pseudo_labels = torch.zeros(0, dtype=torch.int64)

    @classmethod
    def needs_for(cls, cfg: RunConfig) -> tuple[str, ...]:
        return (*cls.needs, "teacher") if cfg.method.anchor_weight else cls.needs

    @classmethod
    def problems(cls, cfg: RunConfig) -> Iterator[str]:
        yield from evaluator_class(cfg).problems(cfg)

    def view_pairs(self, feeder: str) -> int:
        return 1 if feeder == "retain" else self.cfg.constraint.view_pairs

    def step_kind(self, step: int) -> Hashable:
        return self.evaluator.step_kind(step)

    # -- calibration ---------------------------------------------------------------------------------------------

    def calibrate(self, ctx: Context, sample: Callable[[str], Batch]) -> dict[str, float]:
        """Hinge threshold and Phi* from the original encoder, before anything changes.

        Every rank computes the same from the same images. `sample(role)` gives the images of a role.
        """
        third, calibration, retain = sample("third_party"), sample("calibration"), sample("retain")
        if ctx.objective.uses_labels:
            self._label_by_original(ctx, third, calibration)
            third, calibration = self._labelled(ctx, third), self._labelled(ctx, calibration)
        confidences: list[Tensor] = []
        phis: dict[str, list[Tensor]] = {"gradient": [], "output": []}
        p_values: dict[str, float] = {}
        for draw in range(CALIBRATION_DRAWS):
            epoch = CALIBRATION_EPOCH + draw
            with torch.no_grad():
                window = (np.arange(min(self._bank_images, len(retain))) + draw * self._bank_images) % len(retain)
                bank = self._calibration_bank(ctx, retain.pick(window.tolist()).at_epoch(epoch))
                found = [self.evaluator.describe(ctx, b.at_epoch(epoch), bank, draw) for b in (calibration, third)]
                (o_c, c_c), (o_t, _) = (self._outputs(ctx, pairs, bank) for _, pairs in found)
            g_c, g_t = (features for features, _ in found)
            self.spread_output.update(o_t)
            compared = {"output": (self._scale_out(o_c), self._scale_out(o_t))}
            if g_t is not None:
                self.spread_gradient.update(g_t)
                compared["gradient"] = (self._scale(g_c), self._scale(g_t))
            for name, (x, y) in compared.items():
                phis[name].append(self.distance(x, y, seed=self.cfg.seed, step=draw))
                if draw == 0:
                    p_values[name] = permutation_test(x, y, PERMUTATIONS, self.cfg.seed)
            confidences.append(c_c)
        self.threshold = torch.cat(confidences).quantile(self.settings.confidence_quantile)
        figures = {"confidence_threshold": float(self.threshold)}
        for name, switch in (("gradient", self.switch_gradient), ("output", self.switch_output)):
            if not phis[name]:  # a penalty compares no distributions and has no target
                continue
            measured = float(torch.stack(phis[name]).mean())
            differs = p_values[name] <= SIGNIFICANCE and self.settings.phi_target == "calibrated"
            switch.set_target(measured if differs else 0.0)
            figures |= {f"phi_star_{name}": switch.target, f"calibration_p_{name}": p_values[name]}
        return figures

    @property
    def _bank_images(self) -> int:
        return self.cfg.unlearn.retain_batch // self.cfg.unlearn.accumulate

    def _calibration_bank(self, ctx: Context, retain: Batch) -> Bank | None:
        """Bank of the original encoder's retain keys, alike on every rank (a queue holds them already).

        As many images as a micro-batch has: confidences fall with the size of the bank.
        """
        if ctx.queue is not None:
            return ctx.queue.bank(ctx.objective.temperature)
        if not ctx.objective.uses_bank:
            return None
        keys = ctx.objective.bank_keys(embed(ctx, retain, batchnorm="eval"))
        return Bank(*keys, ctx.objective.temperature)

    def _label_by_original(self, ctx: Context, *batches: Batch) -> None:
        """Supervised: strangers have no label of their own; theirs is what the original encoder predicts."""
        hashes, labels = [], []
        for batch in batches:
            with torch.no_grad():
                branches = embed(ctx, batch.at_epoch(CALIBRATION_EPOCH), batchnorm="eval")
            hashes.append(branches.ids)
            labels.append(branches.output.softmax(-1).mean(0).argmax(-1))
        self.pseudo_ids, self.pseudo_labels = torch.cat(hashes), torch.cat(labels)

    def _labelled(self, ctx: Context, batch: Batch) -> Batch:
        """The batch with the labels that the original encoder gave, where it gave any."""
        if not self.pseudo_ids.numel():
            return batch
        known = on_device(id_hashes(batch.ids), ctx.device)[:, None] == self.pseudo_ids[None]
        pseudo = self.pseudo_labels[known.int().argmax(1)]
        labels = torch.where(known.any(1), pseudo, on_device(batch.labels, ctx.device))
        return dataclasses.replace(batch, labels=labels)

    # -- one step ------------------------------------------------------------------------------------------------

    def loss(self, ctx: Context, batches: Mapping[str, Batch]) -> StepOutput:
        weights = self.settings
        retain, forget, third = batches["retain"], batches["forget"], batches["third_party"]
        # First: batch statistics change the buffers that the second forward saves.
        utility, task, retained, bank = self._utility(ctx, retain, forget)
        on = {"gradient": self.switch_gradient.active, "output": self.switch_output.active}  # before this step's Phi
        compared = self.evaluator.features(ctx, self._labelled(ctx, forget), self._labelled(ctx, third), bank)
        sizes = [gather_sizes(len(batch), ctx.device, batch.sizes) for batch in (forget, third)]
        found = compared.pull(*self._match_gradients(ctx, compared, sizes))
        pull = require_pull(ctx, found, on["gradient"] > 0) if ctx.step == 0 else None
        o_f, _ = self._outputs(ctx, found.forget, bank)
        o_t, c_t = self._outputs(ctx, found.third, bank)
        whole = all_gather_detached(o_f, sizes[0]), all_gather_detached(o_t, sizes[1])
        self.spread_output.update(whole[1])
        how = (self._scale_out, self.switch_output, self.memory_output)
        phi_o, output_term = self._match(ctx, o_f, whole, sizes, *how)
        confidence_term, active = self._confidence(ctx, found.third, bank, c_t, sizes[1])
        total = (
            weights.task_weight * utility
            + weights.gradient_weight * found.term
            + weights.output_weight * output_term
            + weights.confidence_weight * confidence_term
        )
        if weights.anchor_weight:
            moved = self._moved(ctx, third, found.third)
            total = total + weights.anchor_weight * moved
        enqueue(ctx, retained)
        metrics = {
            "task_loss": task,
            "phi_gradient": found.phi,
            "phi_output": phi_o,
            "gradient_term_on": on["gradient"],
            "output_term_on": on["output"],
            "confidence_term": confidence_term.detach(),
            "third_party_confidence": c_t.detach().mean(),
            "hinge_active_share": active,
            **found.metrics,
        }
        if self._climbed is not None:
            metrics["forget_loss"] = self._climbed
        if pull is not None:
            metrics["constraint_gradient"] = pull
        if weights.anchor_weight:
            metrics["third_party_drift"] = moved.detach()
        return StepOutput(total, metrics, {"retain": retain.ids, "forget": forget.ids, "third_party": third.ids})

    def _utility(self, ctx: Context, retain: Batch, forget: Batch) -> tuple[Tensor, Tensor, Branches, Bank | None]:
        """The first term, the task loss in it, detached, and the retained images' branches and bank.

        Raises:
            NumericsError: a step earlier, so that nothing waits for it, the forget loss passed `climb_bound`.
        """
        if self.settings.climb_weight:
            if self._climbed is not None:
                require_bounded(ctx, self.name, float(self._climbed), self.settings.climb_bound, "climb_bound")
            both = mixed_branches(ctx, retain, forget)
            retained = both.part(slice(0, len(retain)))._replace(sizes=retain.sizes)
            climbed = image_mean(row_losses(ctx, both)[len(retain) :], forget.sizes)
            self._climbed = all_reduce_mean(climbed.detach())
        else:
            retained, climbed = embed(ctx, retain, batchnorm="train"), None
        bank = retain_bank(ctx, retained)
        if ctx.queue is None and bank is not None:
            retained = retained._replace(gathered=bank.keys)
        task = ctx.objective.task_loss(retained, bank)
        utility = task if climbed is None else task - self.settings.climb_weight * climbed
        return utility, task.detach(), retained, bank

    def _moved(self, ctx: Context, third: Batch, pairs: list[Branches]) -> Tensor:
        """How far third-party outputs and embeddings have turned from the original encoder's, same views; in [0, 2]."""
        far = []
        for number, now in enumerate(pairs):
            with torch.no_grad():
                before = embed(ctx, third, batchnorm="eval", network=ctx.original, momentum=False, pair=number)
            for u, v in ((now.output, before.output), (now.embedding, before.embedding)):
                far.append(apart(normalise(u), normalise(v)))
        return image_mean(torch.stack(far).mean(0), third.sizes)

    def _outputs(self, ctx: Context, pairs: list[Branches], bank: Bank | None) -> tuple[Tensor, Tensor]:
        """Per sample, averaged over its pairs: outputs [n, q] and confidence [n]."""
        objective = ctx.objective
        outputs = [
            torch.cat(
                [
                    objective.output_features(b, bank),
                    torch.stack([objective.per_sample_loss(b, bank), _embedding_agreement(b)], dim=1),
                ],
                dim=1,
            )
            for b in pairs
        ]
        confidence = torch.stack([objective.confidence(b, bank) for b in pairs]).mean(0)
        return torch.stack(outputs).mean(0), confidence

    def _match_gradients(self, ctx: Context, compared: Features, sizes: Sequence[Sequence[int]]) -> tuple[Tensor, ...]:
        """`_match` of gradient features as the evaluator gives them; the third party's set the scale. () for none.

        sizes: forgotten and third-party images of every rank.
        """
        if compared.forget is None:
            return ()
        whole = all_gather_detached(compared.forget, sizes[0]), all_gather_detached(compared.third, sizes[1])
        self.spread_gradient.update(whole[1])
        if ctx.draw % (self.cfg.constraint.memory_steps + 1) == 0:  # `Context.projection` is new
            self.memory_gradient.clear()
        how = (self._scale, self.switch_gradient, self.memory_gradient)
        return self._match(ctx, compared.forget, whole, sizes, *how)

    def _scale(self, features: Tensor) -> Tensor:
        """Unit spread per coordinate; the sketch as a whole weighs as much as the log norm (or number) before it."""
        scaled = self.spread_gradient.scale(features)
        return torch.cat([scaled[:, :1], scaled[:, 1:] / max(1, features.shape[1] - 1) ** 0.5], dim=1)

    def _scale_out(self, features: Tensor) -> Tensor:
        return self.spread_output.scale(features)

    def _match(
        self,
        ctx: Context,
        forget: Tensor,
        whole: tuple[Tensor, Tensor],
        sizes: Sequence[Sequence[int]],
        scale: Callable[[Tensor], Tensor],
        switch: PhiSwitch,
        memory: FeatureMemory,
    ) -> tuple[Tensor, Tensor]:
        """Phi over the global batch, and the local term whose rank-mean gradient is that of Phi (`surrogate`).

        whole: features of forgotten and third-party images of all ranks. sizes: of both, of every rank.
        """
        scaled = scale(forget)
        draw: dict[str, Any] = {"world": ctx.world, "seed": self.cfg.seed, "step": ctx.draw}
        first_f, first_t = (sum(counts[: ctx.rank]) for counts in sizes)
        rows = slice(first_f, first_f + sizes[0][ctx.rank]), slice(first_t, first_t + sizes[1][ctx.rank])
        share, local = own_rows(self.distance, scale(whole[0]), scale(whole[1]), rows, **draw)
        phi = sum_over_ranks(share)
        if memory.steps:
            pooled = memory.pooled(*whole)
            memory.push(*whole)
            _, cotangent = own_rows(self.distance, scale(pooled[0]), scale(pooled[1]), rows, **draw)
            local = cotangent * (len(pooled[0]) / len(whole[0]))  # the mean is over this batch's samples again
        active = switch.active  # before this step's Phi enters the mean: see PhiSwitch.active
        switch.update(phi)
        pull = surrogate(scaled, local, ctx.world)
        return phi, active * (pull + (phi - pull).detach())  # Phi in value, the pull in gradient

    def _confidence(
        self, ctx: Context, third: list[Branches], bank: Bank | None, c: Tensor, sizes: Sequence[int]
    ) -> tuple[Tensor, Tensor | float]:
        """The term, and the share of third-party images whose confidence it lowers."""
        share = c.shape[0] * mean_scale(sizes)  # local mean -> this rank's part of the global mean, uneven or not
        if self.settings.confidence_loss == "entropy":
            terms = [entropy_confidence(ctx.objective.logits(b, bank)) for b in third]
            return share * torch.stack(terms).mean(), 1.0
        term, active = hinge_confidence(c, on_device(self.threshold, c.device, c.dtype))
        return share * term, all_reduce_mean(torch.as_tensor(share * active))

    # -- state ---------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        state = {
            "threshold": self.threshold.reshape(1),
            "pseudo_ids": self.pseudo_ids,
            "pseudo_labels": self.pseudo_labels,
        }
        for name in RUNNING:
            state |= {f"{name}.{key}": value for key, value in getattr(self, name).state_dict().items()}
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.threshold = state["threshold"][0]
        self.pseudo_ids, self.pseudo_labels = state["pseudo_ids"], state["pseudo_labels"]
        for name in RUNNING:
            part = {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}
            getattr(self, name).load_state_dict(part)


def _embedding_agreement(b: Branches) -> Tensor:
    """Cosine between the backbone's embeddings of both views, [n]; with one online branch, to the momentum's."""
    other = b.embedding[1] if len(b.embedding) > 1 else b.target_embedding[0]
    return (normalise(b.embedding[0]) * normalise(other)).sum(-1)

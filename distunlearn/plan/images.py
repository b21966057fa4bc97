"""Images that pass through an encoder, by phase."""

from __future__ import annotations

from collections.abc import Mapping

from distunlearn.config.schema import RunConfig
from distunlearn.constraints.evaluators import extra_images
from distunlearn.engine.matched_sampling import looked_at
from distunlearn.engine.session import CALIBRATION_LIMIT
from distunlearn.methods import METHODS, Contrastive
from distunlearn.methods.third_party import CALIBRATION_DRAWS
from distunlearn.objectives import make_objective

__all__ = ["ROLES", "calibration_images", "images_per_step", "phase_images"]


ROLES = ("forget", "third_party")  # feeders of the images that an evaluator sees


def images_per_step(cfg: RunConfig, method: str | None, step: int = 0) -> int:
    """Images through an encoder in a step: views of every feeder, momentum keys included (method None: pretraining)."""
    objective = make_objective(cfg.objective)
    views = objective.branches + (objective.branches if objective.needs_momentum else 0)
    entry = METHODS[method] if method else None
    if entry is not None and entry.build is None:
        return 0
    built = entry.build(cfg) if entry else Contrastive("pretrain", "members")
    if hasattr(built, "images_per_step"):
        return built.images_per_step(cfg, objective, step)
    sizes = built.batch_sizes(cfg)
    images = views * sum(sizes.values())
    if method == "third_party":
        images += views * (cfg.method.view_pairs - 1) * (sizes["forget"] + sizes["third_party"])
        images += objective.branches * sizes["retain"] if cfg.method.distill_weight else 0
        images += objective.branches * cfg.method.view_pairs * sizes["third_party"] if cfg.method.anchor_weight else 0
        images += cfg.method.view_pairs * extra_images(
            cfg, objective.branches, objective.needs_momentum, *map(sizes.get, ROLES)
        )
    return images


def calibration_images(cfg: RunConfig, counts: Mapping[str, int]) -> int:
    """Images through an encoder before the first step: the targets of `third_party`, the looks of a matched draw."""
    matched = cfg.unlearn.third_party_draw == "matched" and "third_party" in METHODS[cfg.method.name].needs
    return _target_images(cfg, counts) + (looked_at(counts) if matched else 0)


def _target_images(cfg: RunConfig, counts: Mapping[str, int]) -> int:
    """Images through an encoder for the targets of `third_party`; 0 for other methods."""
    if cfg.method.name != "third_party":
        return 0
    objective = make_objective(cfg.objective)
    views = objective.branches * (2 if objective.needs_momentum else 1)
    looked_at = sum(min(counts[role], CALIBRATION_LIMIT) for role in ("calibration", "third_party"))
    signed = objective.branches if cfg.constraint.evaluator == "sliced" else 0  # which shows them in two copies
    images = CALIBRATION_DRAWS * cfg.method.view_pairs * (views + signed) * looked_at
    if objective.uses_bank and not objective.uses_queue:
        images += CALIBRATION_DRAWS * views * (cfg.unlearn.retain_batch // cfg.unlearn.accumulate)
    return images + (objective.branches * looked_at if cfg.objective.name == "supervised" else 0)


def phase_images(cfg: RunConfig, method: str | None, steps: int) -> int:
    """Images through an encoder in a training of `steps`; a method may have a second phase without forget images."""
    entry = METHODS[method] if method else None
    built = entry.build(cfg) if entry and entry.build else None
    first = min(steps, built.forget_steps(cfg)) if hasattr(built, "forget_steps") else steps
    return first * images_per_step(cfg, method, 0) + (steps - first) * images_per_step(cfg, method, first)

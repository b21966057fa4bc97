"""Images that pass through an encoder, by phase."""

from __future__ import annotations

from collections.abc import Mapping

from distunlearn.config.schema import RunConfig
from distunlearn.engine.matched_sampling import looked_at
from distunlearn.engine.session import CALIBRATION_LIMIT
from distunlearn.methods import Method
from distunlearn.objectives import make_objective

__all__ = ["calibration_images", "phase_images"]


def phase_images(cfg: RunConfig, method: Method, steps: int) -> int:
    """Images through an encoder in a training of `steps`; a method may have a second phase without forget images."""
    if method.steps == "none":
        return 0
    objective = make_objective(cfg.objective)
    first = min(steps, method.forget_steps()) if method.forgets else steps
    return first * method.images_per_step(objective, 0) + (steps - first) * method.images_per_step(objective, first)


def calibration_images(cfg: RunConfig, method: Method, counts: Mapping[str, int]) -> int:
    """Images through an encoder before the first step: the method's calibration, the looks of a matched sampling."""
    sampled = {role: min(count, CALIBRATION_LIMIT) for role, count in counts.items()}
    calibration = method.calibration_images(make_objective(cfg.objective), sampled)
    sampling = method.sampling()
    return calibration + (0 if sampling is None else looked_at(counts[role] for role in sampling.roles))

"""What an audit costs: the images it shows to finished encoders, and what tier 2 and stress tests train besides."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distunlearn.audit.signals.collect import AUDITED, BANK_IMAGES, PER_ROLE
from distunlearn.audit.trainings.stress import COPIES, FEWEST_CLASSES, stress_names, thirds
from distunlearn.config.schema import RunConfig
from distunlearn.engine.phases import pretrain_steps
from distunlearn.objectives import make_objective

Trainings = tuple[list[int], int]  # images of every training from random weights; how many unlearnings


def audit_trainings(
    cfg: RunConfig, counts: Mapping[str, int], classes: Mapping[Any, int], phases: Mapping[str, Mapping[str, float]]
) -> dict[str, dict[str, float]]:
    """Steps and images of everything that `audit.tier` 2 and `audit.stress` train, by name; {} without them.

    Relearning (`audit.relearn_steps`) is not counted; looks at finished encoders: `audit_looks`.

    Args:
        counts: images by role. classes: members by label, as far as they have labels.
        phases: of the run itself, as `make_plan` gives them: what unlearning costs.

    Returns:
        {name: {"pretrain_steps", "unlearn_steps", "images", "share_of_retraining"}}; the first are of all trainings
        from random weights, the last is in trainings of the run's retrained encoder.
    """
    largest = max(classes.values()) if len(classes) >= FEWEST_CLASSES else None
    members, forget = counts["retain"] + counts["forget"], counts["forget"]
    planned: dict[str, Trainings] = {}
    if cfg.audit.tier == 2:  # shares of the forget images are uneven by one or so
        planned["shadows"] = [members - forget // 3] * cfg.audit.shadows, cfg.audit.shadows
    planned |= {name: STRESS[name](members, forget, largest) for name in stress_names(cfg.audit.stress)}
    return {name: _figures(cfg, *trainings, phases) for name, trainings in planned.items()}


def audit_looks(cfg: RunConfig, counts: Mapping[str, int]) -> dict[str, int]:
    """What the audit shows to finished encoders, those of stress tests left out.

    Args:
        counts: images by role.

    Returns:
        encoders; images: audited, of one encoder; passes: images that go forward through a network, of all encoders, as
        `audit/signals/collect.py` does it; backward: how many of them also go back, for gradients.
    """
    objective, audit = make_objective(cfg.objective), cfg.audit
    encoders = 2 if audit.tier == 0 else 2 + max(1, len(audit.reference))
    audited = {role: min(counts.get(role, 0), PER_ROLE) for role in AUDITED}
    images, probed = sum(audited.values()), sum(audited.values()) - audited["retain"]
    pairs, shown = audit.views // 2, objective.branches * (1 + objective.needs_momentum)
    keys = objective.branches * objective.needs_momentum
    each = audit.views + 1 + objective.uses_labels + pairs * keys  # views, plain, its own prediction, momentum keys
    each += shown + (1 + audit.part_crops if audit.part_crops else 0)  # the pair whose gradient is sketched, crops
    norms = 2 * pairs * objective.branches * probed  # as ghosts, and what ghosts leave
    bank = shown * min(BANK_IMAGES, audited["retain"]) if objective.uses_bank else 0
    return {
        "encoders": encoders,
        "images": images,
        "passes": encoders * (images * each + norms + bank),
        "backward": encoders * (images * objective.branches + norms),
    }


def _thirds(forget: int) -> list[int]:
    return [len(group) for group in thirds([""] * forget)]


def _worst_case(members: int, forget: int, largest: int | None) -> Trainings:
    least, _, most = _thirds(forget)
    return [members - most, members - least, members - least], 3  # a random request is of the size of the least


def _whole_class(members: int, forget: int, largest: int | None) -> Trainings:
    return ([], 0) if largest is None else ([members - largest], 1)


def _canaries(members: int, forget: int, largest: int | None) -> Trainings:
    copies = sum(size * (count - 1) for size, count in zip(_thirds(forget), COPIES, strict=True))
    return [members + copies], 1


def _sequential(members: int, forget: int, largest: int | None) -> Trainings:
    return [], 3


STRESS = {
    "worst_case": _worst_case, "whole_class": _whole_class, "canaries": _canaries, "sequential": _sequential,
}  # fmt: skip


def _figures(
    cfg: RunConfig, sets: list[int], unlearnings: int, phases: Mapping[str, Mapping[str, float]]
) -> dict[str, float]:
    steps = [pretrain_steps(cfg, size) for size in sets]
    trained, once, whole = phases["pretrain"], phases["unlearn"], phases["retrain"]
    found = {"pretrain_steps": sum(steps), "unlearn_steps": unlearnings * once["steps"]}
    if not all("images" in phase for phase in (trained, once, whole)):
        return found
    images = sum(steps) * trained["images"] // trained["steps"]  # every step of it has as many
    images += unlearnings * sum(once.get(part, 0) for part in ("images", "calibration_images", "dose_images"))
    return {**found, "images": images, "share_of_retraining": round(images / whole["images"], 4)}

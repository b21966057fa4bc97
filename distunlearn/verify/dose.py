"""Which dose: the one at which the images to forget look most like non-members that nothing else has seen.

    J(dose) = sum over features f of | AUC_f(forget, watch; dose) - aim_f |

over the doses at which the encoder keeps what it knows of the retained images. Pure functions of arrays; and the same
again from the scores that a run keeps, for whoever checks it.

Shapes: A = doses, F = features, B = bootstrap draws; r, n, m = images to retain, to forget, to watch.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from .errors import EvidenceError
from .forms import Count, Digest, Form, Number
from .records import open_plain
from .statistics import DOSE_UTILITY, Comparison, auc, auc_bootstrap, draw_images

SCORES = Path("dose") / "scores.npz"  # in the run directory
LOSS = "bank_loss"  # the feature that is a loss
SEEN = ("retain", "forget", "watch", "chance", "right")
KNOWN_FLOOR = 0.1  # of the loss of chance: an encoder that knows next to nothing has little to lose


class DoseRules(Form):
    """How a dose is chosen: `DoseConfig`, declared before the run."""

    grid: list[Number]
    aim: Literal["half", "retained"]
    images: Count
    views: Count
    knn_points: Number
    loss_share: Number
    confidence: Number
    bootstrap: Count
    enough: Count


class DosePart(Form):
    """A chosen dose in a certificate. seed: of the choice. original, full: state digests of the ends of the line.
    images: that were looked at, by role. dose, best, low, high: see `Choice`."""

    rules: DoseRules
    seed: Count
    original: Digest
    full: Digest
    images: dict[Literal["retain", "forget", "watch"], Count]
    dose: Number
    best: Number
    low: Number
    high: Number


@dataclass(frozen=True, eq=False)
class Looks:
    """What was seen of each image at each dose.

    retain, forget, watch: float64 [A, r, F], [A, n, F], [A, m, F]; higher or lower, a member differs.
    loss: float64 [A, r], of the retained images. chance: the loss of an encoder that knows nothing.
    right: float64 [A, r], 1 where a retained image has the class of most of its neighbours, NaN without a label.
    """

    retain: np.ndarray
    forget: np.ndarray
    watch: np.ndarray
    loss: np.ndarray
    chance: float
    right: np.ndarray


@dataclass(frozen=True, eq=False)
class Choice:
    """dose: what was chosen. best: where J is smallest. low, high: the bootstrap interval of `best` over images.

    auc: [A, F]. criterion: J, [A]. aims: [F]. allowed: bool [A].
    lost, lost_upper: what is gone of the retained images' loss, and its upper confidence bound, [A, 2]: in shares of
        what dose 0 is below chance; and in points of the accuracy of their neighbours, 0 without labels.
    """

    dose: float
    best: float
    low: float
    high: float
    auc: np.ndarray
    criterion: np.ndarray
    aims: np.ndarray
    lost: np.ndarray
    lost_upper: np.ndarray
    allowed: np.ndarray

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in vars(self).items()}


def read_looks(path: Path) -> tuple[Looks, dict[str, list[str]]]:
    """What a run saw at each dose, and the ids of the images by role.

    Raises:
        EvidenceError: it is no such file.
    """
    try:
        with open_plain(path) as handle, np.load(handle, allow_pickle=False) as found:
            arrays = {name: found[name].astype(np.float64) for name in SEEN}
            ids = {role: found[f"{role}_ids"].tolist() for role in SEEN[:3]}
            features = found["features"].tolist()
        return _looks(arrays, features), ids
    except (OSError, ValueError, KeyError, EOFError, IndexError, RuntimeError, zipfile.BadZipFile, zlib.error):
        raise EvidenceError(f"{path} is not the file of scores that a dose was chosen by; restore it.") from None


def _looks(arrays: Mapping[str, np.ndarray], features: Sequence[str]) -> Looks:
    loss = arrays["retain"][:, :, list(features).index(LOSS)]
    return Looks(arrays["retain"], arrays["forget"], arrays["watch"], loss, float(arrays["chance"][0]), arrays["right"])


def dose_facts(
    folder: Path, lines: Sequence[Mapping[str, Any]], done: Mapping[str, Any], audited: Collection[str],
    requested: Collection[str],
) -> dict[str, Any] | None:  # fmt: skip
    """`DosePart` of a run, chosen again from its scores; None: its dose was not chosen.

    Args:
        lines: of the ledger. done: `done.json` of the unlearned encoder.
        audited: ids of the images that the audit shows to the encoders. requested: of those to forget.

    Raises:
        EvidenceError: the choice does not follow from the scores, or was made on other images than it may see.
    """
    if "dose_images" not in done:
        return None
    event = next((line for line in reversed(lines) if line["event"] == "dose"), None)
    if event is None:
        raise EvidenceError("the ledger does not say by what the dose was chosen; it was changed.")
    looks, ids = read_looks(folder / SCORES)
    if set(ids["watch"]) & set(audited) or not set(ids["forget"]) <= set(requested):
        raise EvidenceError(
            "the dose was chosen on images of the audit, or on others than those to forget; a choice may see watch "
            "images alone, or its gates test nothing; unlearn again."
        )
    rules = DoseRules.model_validate(event["rules"])
    if len(looks.loss) != len(rules.grid):
        raise EvidenceError(f"{SCORES} has {len(looks.loss)} doses, and {len(rules.grid)} were declared.")
    found = choose(looks, rules, event["seed"])
    chosen = {name: getattr(found, name) for name in ("dose", "best", "low", "high")}
    facts = {**{name: event[name] for name in ("rules", "seed", "original", "full", "images")}, **chosen}
    if any(event[name] != value for name, value in chosen.items()) or done.get("dose") != found.dose:
        raise EvidenceError(
            f"the scores give dose {facts['dose']:g}, and {done.get('dose')} was kept (the ledger says "
            f"{event['dose']:g}); one of them was changed; unlearn again."
        )
    return facts


def choose(looks: Looks, cfg: DoseRules, seed: int, aim: str | None = None) -> Choice:
    """The dose for `cfg.grid`; aim: in place of `cfg.aim`.

    With fewer than `cfg.enough` watch images it is the smallest dose of the interval: of two that cannot be told apart,
    the one that changes less.
    """
    grid, features = np.array(cfg.grid), looks.forget.shape[2]
    lost, upper = _lost(looks, cfg, seed)
    allowed = (upper <= (cfg.loss_share, cfg.knn_points)).all(1) | (grid == 0)
    aims = np.full(features, 0.5)
    if (aim or cfg.aim) == "retained":
        aims = np.array([_auc(looks.forget[0, :, f], looks.retain[0, :, f]) for f in range(features)])
    draws = draw_images(looks.forget.shape[1], looks.watch.shape[1], cfg.bootstrap, seed)
    found = np.empty((len(grid), features))
    criteria = np.zeros((len(grid), cfg.bootstrap))
    for a in range(len(grid)):
        for f in range(features):
            comparison = Comparison.of(looks.forget[a, :, f], looks.watch[a, :, f])
            found[a, f] = auc(comparison)
            criteria[a] += np.abs(auc_bootstrap(comparison, draws) - aims[f])
    criterion = np.abs(found - aims).sum(1)
    best = grid[_smallest(criterion[:, None], allowed)[0]]
    drawn = grid[_smallest(criteria, allowed)]
    tail = (1 - cfg.confidence) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail], method="inverted_cdf")
    dose = best if looks.watch.shape[1] >= cfg.enough else min(best, low)
    return Choice(float(dose), float(best), float(low), float(high), found, criterion, aims, lost, upper, allowed)


def _auc(positives: np.ndarray, negatives: np.ndarray) -> float:
    return auc(Comparison.of(positives, negatives))


def _smallest(criteria: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    """Rows of the smallest values among those allowed, of each column; the first of equal ones."""
    return np.where(allowed[:, None], criteria, np.inf).argmin(0)


def _lost(looks: Looks, cfg: DoseRules, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean of what is lost and its upper bound by a bootstrap over images, which are paired, [A, 2]; see `Choice`."""
    known = max(looks.chance - looks.loss[0].mean(), KNOWN_FLOOR * looks.chance)
    labelled = np.isfinite(looks.right[0])
    generator, parts = np.random.default_rng([seed, DOSE_UTILITY]), []
    for values in ((looks.loss - looks.loss[0]) / known, 100 * (looks.right[:1] - looks.right)[:, labelled]):
        count = values.shape[1]
        if not count:
            parts.append((np.zeros(len(values)), np.zeros(len(values))))
            continue
        drawn = generator.multinomial(count, np.full(count, 1 / count), cfg.bootstrap) @ values.T / count
        parts.append((values.mean(1), np.quantile(drawn, cfg.confidence, axis=0)))
    return np.stack([mean for mean, _ in parts], axis=1), np.stack([upper for _, upper in parts], axis=1)

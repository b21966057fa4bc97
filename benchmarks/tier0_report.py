"""What gates without a retrained encoder say, beside what the retrained encoder says: tables, and the error rates.

    python benchmarks/tier0_report.py [--rates distunlearn/verify/tier0_rates.json]

Audited cells: those of `forgetting.py`, whose audits had a retrained encoder. Of them there are AUCs and their 95 %
intervals, which are brought to 90 %; reference groups are left out: they widen intervals, so without them more passes.
Cells with images: those of `tier0.py` and, of fair requests, of `forgetting_dose.py`; judged by the package's own code.
Encoders with one retrained encoder are not independent: intervals draw whole groups of them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distunlearn.verify.figures import JUDGED, Raw, Rules, judge
from distunlearn.verify.gates import equivalence, overall
from distunlearn.verify.reference_groups import Placed
from distunlearn.verify.statistics import Comparison

RESULTS = Path(__file__).parent / "results"
NARROWER = 1.6449 / 1.9600  # from 95 % to 90 %
DRAWS = 4000
SEEN = {
    "view_agreement": 1,
    "embedding_agreement": 1,
    "bank_loss": -1,
    "gradient_norm_head": -1,
}  # of cells with images
RULES = Rules(0, 500, 0.9, 0.06, 0.08, 2.5, tuple(SEEN), "", 0)


@dataclass(frozen=True)
class Seen:
    """One encoder. group: of the encoders that share a retrained one. gap, margin: by gate. first, second: verdicts of
    the gates without and with the retrained encoder."""

    group: str
    kind: str
    name: str
    gap: tuple[float, ...]
    margin: tuple[float, ...]
    first: tuple[str, ...]
    second: tuple[str, ...]

    @property
    def beyond(self) -> bool:
        return any(abs(gap) > margin for gap, margin in zip(self.gap, self.margin, strict=True))


# -- audited cells ---------------------------------------------------------------------------------------------------


def audited() -> tuple[list[Seen], list[Seen]]:
    """Unlearned encoders, and the retrained encoders as if they were such."""
    unlearned, retrained = [], {}
    for path in sorted(RESULTS.glob("forgetting-*/*.json")):
        content = json.loads(path.read_text())
        if "summary" not in content or content["cell"]["validation"] or content["summary"]["tier"] == 0:
            continue
        cell, attacks = content["cell"], content["summary"]["attacks"]
        kind = f"{cell['dataset']} {'alike' if 'requests' in path.parent.name else 'fair'} {cell['encoder']}"
        group = f"{path.parent.name}-{cell['dataset']}-{cell['objective']}-{cell['encoder']}-{cell['seed']}"
        gaps = [attacks[name]["gap"] for name in JUDGED]
        unlearned.append(
            Seen(group, kind, path.stem, tuple(gap["auc"] for gap in gaps), tuple(gap["margin"] for gap in gaps),
                 tuple(_to_chance(attacks[name], "unlearned", content) for name in JUDGED),
                 tuple(gap["verdict"] for gap in gaps))
        )  # fmt: skip
        itself = tuple(_to_chance(attacks[name], "retrained", content) for name in JUDGED)
        powered = tuple("pass" if attacks[name]["power"]["beats_chance"] else "inconclusive" for name in JUDGED)
        retrained[group] = Seen(group, kind, group, (0.0,) * 5, unlearned[-1].margin, itself, powered)
    return unlearned, list(retrained.values())


def _to_chance(attack: dict[str, Any], encoder: str, content: dict[str, Any]) -> str:
    auc, low, high = (attack[encoder][key] - 0.5 for key in ("auc", "auc_low", "auc_high"))
    ends = auc - NARROWER * (auc - low), auc + NARROWER * (high - auc)
    images = min(content["summary"]["images"][role] for role in ("forget", "holdout"))
    powered = attack["power"]["beats_chance"]
    return equivalence(auc, *ends, attack["gap"]["margin"], powered=powered, images=images).verdict


# -- cells with images -----------------------------------------------------------------------------------------------


def with_images() -> Iterator[tuple[Seen, Seen]]:
    """By encoder, the doses of a method and the retrained one: judged with reference groups, and without them."""
    for path in sorted((RESULTS / "tier0").glob("*-*-*-seed*-*.npz")):
        shared = np.load(path.parent / f"{path.stem.rpartition('-')[0]}.npz")
        cell, told = np.load(path), json.loads(str(shared["told"]))
        sides = {role: np.concatenate([shared[role], cell[role]]) for role in ("forget", "holdout")}
        codes = shared["code_forget"].astype(float), shared["code_holdout"].astype(float)
        kind = f"{told['dataset']} {told['kind']} {told['encoder']}"
        yield from _judged(told["name"], kind, path.stem, told["doses"], sides, shared["retain"], codes)
    for path in sorted((RESULTS / "forgetting-dose").glob("*-fair-*.npz")):
        cell = np.load(path)
        figures = json.loads(str(cell["figures"]))
        order = [0, len(figures["doses"]), *range(1, len(figures["doses"]))]
        sides = {role: cell[role][order] for role in ("forget", "holdout")}
        codes = np.zeros((sides["forget"].shape[1], 1)), np.zeros((sides["holdout"].shape[1], 1))
        name, group = path.stem, figures["group"]
        kind = f"{group['dataset']} fair {group['encoder']}"
        yield from _judged(group["name"], kind, name, figures["doses"][1:], sides, cell["retain"], codes)


def _judged(
    group: str, kind: str, name: str, doses: list[float], sides: dict[str, np.ndarray], retain: np.ndarray,
    codes: tuple[np.ndarray, np.ndarray],
) -> Iterator[tuple[Seen, Seen]]:  # fmt: skip
    """sides: [2 + doses, n, S]: the original, the retrained encoder, the doses."""
    signs = np.array(list(SEEN.values()))
    forget, holdout = (sides[role][:, :, : len(SEEN)].astype(float) * signs for role in ("forget", "holdout"))
    known = retain[:, : len(SEEN)].astype(float) * signs
    columns = [list(SEEN).index(signal) for signal in ("view_agreement", "bank_loss", "gradient_norm_head")]
    hardness = tuple(
        np.mean([1 - np.searchsorted(np.sort(others[:, c]), rows[:, c]) / len(others) for c in columns], axis=0)
        for rows, others in ((forget[0], known), (holdout[0], holdout[0]))
    )

    def raw(encoders: dict[str, int], placed: Placed | None) -> Raw:
        compared = {
            signal: {e: Comparison.of(forget[at, :, c], holdout[at, :, c]) for e, at in encoders.items()}
            for c, signal in enumerate(SEEN)
        }
        right = {e: {use: np.full(len(holdout[0]), np.nan) for use in ("knn", "linear_probe")} for e in encoders}
        return Raw(compared, right, forget.shape[1], holdout.shape[1], None, placed)

    placed = Placed((hardness[0], hardness[1]), codes)
    first_method = name.endswith("third_party")  # all methods of a group share the retrained encoder
    for at, dose in (*([(1, "retrained")] if first_method else []), *enumerate(doses, 2)):
        second = judge(raw({"original": 0, "unlearned": at, "retrained": 1}, None), RULES)["gates"]
        first = judge(raw({"original": 0, "unlearned": at}, placed), RULES)["gates"]
        alone = judge(raw({"original": 0, "unlearned": at}, _alone(placed)), RULES)["gates"]
        rest = tuple(second[s]["auc"] for s in SEEN), tuple(second[s]["margin"] for s in SEEN)
        words = [tuple(gates[s]["verdict"] for s in SEEN) for gates in (first, alone, second)]
        label = f"{name} {dose}"
        yield Seen(group, kind, label, *rest, words[0], words[2]), Seen(group, kind, label, *rest, words[1], words[2])


def _alone(placed: Placed) -> Placed:
    """Groups of images by chance: as if the request were a fair sample."""
    return Placed(
        (np.full(len(placed.hardness[0]), 0.5), np.full(len(placed.hardness[1]), 0.5)),
        (np.zeros((len(placed.places[0]), 1)), np.zeros((len(placed.places[1]), 1))),
    )


# -- tables ----------------------------------------------------------------------------------------------------------

Event = Callable[[Seen], tuple[int, int]]  # how often, of how many


def rate(seen: list[Seen], event: Event) -> dict[str, float | int | None]:
    """A rate and its 95 % interval over groups; where it is 0 (or 1), what so many groups rule out."""
    groups = sorted({one.group for one in seen})
    counts = np.array([np.sum([event(one) for one in seen if one.group == group], axis=0) for group in groups])
    counts = counts[counts[:, 1] > 0] if len(counts) else np.zeros((0, 2))
    hits, total = (int(side) for side in counts.sum(0)) if len(counts) else (0, 0)
    if not total:
        return {"hits": 0, "of": 0, "groups": 0, "rate": None, "low": None, "high": None}
    drawn = np.random.default_rng(0).multinomial(len(counts), np.full(len(counts), 1 / len(counts)), DRAWS) @ counts
    low, high = np.quantile(drawn[:, 0] / np.maximum(drawn[:, 1], 1), [0.025, 0.975])
    outside = 1 - 0.05 ** (1 / len(counts))  # with 95 % confidence
    low, high = (
        (low, max(high, outside)) if hits == 0 else (min(low, 1 - outside), high) if hits == total else (low, high)
    )
    found = {"rate": hits / total, "low": float(low), "high": float(high)}
    return {"hits": hits, "of": total, "groups": len(counts)} | {k: round(v, 4) for k, v in found.items()}


def whole(verdict: str, given: Callable[[Seen], bool]) -> Event:
    return lambda one: (int(given(one) and overall(one.first) == verdict), int(given(one)))


def each(verdict: str, given: Callable[[str, bool], bool]) -> Event:
    """Of the gates of which `given` (verdict with the retrained encoder, gap beyond the margin) holds."""

    def count(one: Seen) -> tuple[int, int]:
        kept = [
            first == verdict
            for first, second, gap, margin in zip(one.first, one.second, one.gap, one.margin, strict=True)
            if given(second, abs(gap) > margin)
        ]
        return sum(kept), len(kept)

    return count


def rates(seen: list[Seen]) -> dict[str, Any]:
    return {
        "encoders": len(seen), "groups": len({one.group for one in seen}),
        "false_pass": rate(seen, whole("pass", lambda one: one.beyond)),
        "wrong_passes": rate(seen, lambda one: (int(one.beyond), 1) if overall(one.first) == "pass" else (0, 0)),
        "pass_of_failed": rate(seen, whole("pass", lambda one: overall(one.second) == "fail")),
        "power": rate(seen, whole("pass", lambda one: overall(one.second) == "pass")),
        "false_fail": rate(seen, whole("fail", lambda one: not one.beyond)),
        "gate_false_pass": rate(seen, each("pass", lambda _, beyond: beyond)),
        "gate_power": rate(seen, each("pass", lambda second, _: second == "pass")),
        "gate_false_fail": rate(seen, each("fail", lambda second, _: second == "pass")),
    }  # fmt: skip


def table(title: str, seen: list[Seen]) -> str:
    kinds = {"all": seen} | {kind: [o for o in seen if o.kind == kind] for kind in sorted({o.kind for o in seen})}
    names = list(rates([]))[2:]
    lines = [
        f"\n## {title}\n",
        f"| kind | encoders (groups) | {' | '.join(names)} |",
        "| --- " * (2 + len(names)) + "|",
    ]
    for kind, those in kinds.items():
        found = rates(those)
        cells = [
            f"{f['hits']}/{f['of']}"
            + (f" ({100 * f['rate']:.0f} %: {100 * f['low']:.0f} to {100 * f['high']:.0f})" if f["of"] else "")
            for f in (found[name] for name in names)
        ]
        lines.append(f"| {kind} | {found['encoders']} ({found['groups']}) | {' | '.join(cells)} |")
    return "\n".join(lines)


def _percent(found: dict[str, Any]) -> str:
    return f"{100 * found['rate']:.0f} %: {100 * found['low']:.0f} to {100 * found['high']:.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", type=Path, help="where the error rates are written for the report of a run")
    args = parser.parse_args()
    unlearned, retrained = audited()
    print(table("Audited cells, without reference groups", unlearned))
    print(table("Retrained encoders in the place of unlearned ones, without reference groups", retrained))
    pairs = list(with_images())
    if pairs:
        print(table("Cells with images, with reference groups", [first for first, _ in pairs]))
        print(table("Cells with images, reference groups by chance", [second for _, second in pairs]))
    if args.rates:
        document = "benchmarks/results/2026-11-30-tier0.md"
        args.rates.write_text(json.dumps({"document": document} | rates(unlearned), indent=1) + "\n")


if __name__ == "__main__":
    main()

"""One HTML file that holds the whole report: text, tables and pictures, and no address of anything outside it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from distunlearn import __version__
from distunlearn.common.files import write_atomic
from distunlearn.engine.run_lock import owned
from distunlearn.errors import ConfigError
from distunlearn.report import evidence, facts, figures, texts
from distunlearn.report.assurance import assurance
from distunlearn.report.brief import brief, case
from distunlearn.report.data import RunFiles, Scores, checked_run, load_run, number, tree
from distunlearn.report.dose import dose_table

REPORT = "report.html"
SHOWN_ROLES = ("forget", "third_party_audit", "holdout")
LOG_SCALE = frozenset({"gradient_norm_network", "gradient_norm_head"})
LOW_IS_KNOWN = LOG_SCALE  # scores that are smaller for a known image
SECTION_OF_ITS_OWN = "gradient_norm_network"
MARGIN = 1.7  # a forest plot reaches at least this far, in units of its widest band,
FARTHEST = 8.0  # and at most this far


def write_report(run_dir: str | Path) -> Path:
    """Write `<run_dir>/report.html` and return its path.

    The same files give the same bytes; SOURCE_DATE_EPOCH, if set, adds a date. Whatever is missing is
    stated as "not evaluated". Raises DataError when the folder holds no run or a file of it is damaged, ConfigError
    when a process is at work in it.
    """
    target = Path(run_dir) / REPORT
    load_run(run_dir)  # which says that there is no run, before anything is claimed
    with owned(Path(run_dir)):
        write_atomic(target, render(checked_run(run_dir)))
    return target


def render(run: RunFiles) -> str:
    """The page as text."""
    rows = evidence.gates(run)
    covered, request = facts.coverage(run), facts.request(run)
    verdict, encoders = evidence.verdict(run, rows, covered["state"]), evidence.encoders(run)
    attacks = evidence.attack_table(run)
    method = tree(run.config, "method").get("name")
    return (
        environment()
        .get_template("report.html.j2")
        .render(
            version=__version__,
            written=written(),
            case=case(run),
            contents=texts.CONTENTS,
            brief=brief(run, request, covered, verdict["name"], rows),
            verdict=verdict,
            headline=evidence.headline(run),
            request=request,
            coverage=covered,
            gates=forest(rows),
            confidence=f"{100 * (number(run.config, 'audit', 'gates', 'confidence') or 0.9):g}",
            attacks=attacks,
            any_rate=any(cell["tpr"] != texts.NOT_EVALUATED for row in attacks for cell in row["cells"].values()),
            further=evidence.further_table(run),
            retained=evidence.retained_table(run),
            dose=_dose(run),
            stress=evidence.stress_table(run),
            distances=evidence.distances(run),
            level=evidence.level_sentence(run),
            distributions=_distributions(run),
            rocs=_rocs(run),
            utility=_utility(run),
            two_sample=evidence.two_sample(run),
            controls=evidence.controls(run),
            cost=_cost(run),
            provenance=facts.provenance(run),
            assurance=assurance(run.folder) if run.folder else ([], ""),
            levels=texts.LEVELS,
            encoders=encoders,
            tier=number(run.config, "audit", "tier"),
            third_party_method=method == "third_party",
            last_layer=method == "third_party" and tree(run.config, "constraint").get("evaluator") == "head",
            difference=facts.compared(run),
            limits=_limits(method, encoders),
            not_evaluated=texts.NOT_EVALUATED,
        )
    )


def _limits(method: Any, encoders: dict[str, Any]) -> list[tuple[str, str]]:
    """What the page does not show; of a retrained encoder and of the paper's method only where they are there."""
    left_out = {texts.RETRAINED_LIMIT} if "retrained" not in encoders else set()
    left_out |= {texts.OWN_FORMULAS} if isinstance(method, str) and method != "third_party" else set()
    return [(head, body) for head, body in texts.LIMITS if head not in left_out]


def environment() -> Environment:
    """Of the templates: every value is escaped, and one that is missing is an error."""
    made = Environment(
        loader=PackageLoader("distunlearn.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.globals["colours"] = figures.COLOURS
    made.filters["commands"] = _commands
    return made


def _commands(sentence: str) -> Markup:
    """A sentence with what stands in backticks as code, everything escaped."""
    parts = [escape(part) for part in sentence.split("`")]
    return Markup("").join(Markup("<code>{}</code>").format(p) if n % 2 else p for n, p in enumerate(parts))


def written() -> str | None:
    """The date of SOURCE_DATE_EPOCH; None when it is not set, so that the page depends on its inputs only."""
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    if epoch is None:
        return None
    try:
        return f"{datetime.fromtimestamp(int(epoch), timezone.utc):%Y-%m-%d}"
    except (ValueError, OverflowError, OSError):
        raise ConfigError("SOURCE_DATE_EPOCH is not a number of seconds; expected digits only, or unset it.") from None


def _picture(draw: Callable[..., bytes], *args: Any, **more: Any) -> str:
    return figures.data_uri(draw(*args, **more))


def forest(rows: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """The gate tables with one small picture a row and the scale below them."""
    result = {}
    for kind, unit in (("attacks", "difference of AUC"), ("utility", "percentage points")):
        widest = max((-row["band"][0] for row in rows[kind]), default=1.0)
        ends = [abs(row[end]) for row in rows[kind] for end in ("low", "high") if row[end] is not None]
        reach = widest * min(FARTHEST, max([MARGIN, *(1.08 * end / widest for end in ends)]))
        limits = (-reach, reach)
        drawn = []
        for row in rows[kind]:
            plot = None
            if row["low"] is not None and row["high"] is not None:
                plot = _picture(
                    figures.forest_row, row["value"], row["low"], row["high"], row["band"], limits, row["verdict"]
                )
            drawn.append(row | {"plot": plot})
        bands = sorted({abs(row["band"][0]) for row in rows[kind]})
        ticks = [sign * band for band in bands[-1:] for sign in ((-1, 1) if kind == "attacks" else (-1,))]
        result[kind] = {"rows": drawn, "axis": _picture(figures.forest_axis, ticks, limits, unit)}
    return result


def _distributions(run: RunFiles) -> list[dict[str, Any]]:
    """Per attack three panels with common axes, one an encoder; no picture where an encoder has no scores."""
    blocks = []
    for name in evidence.attack_names(run):
        if name not in texts.ATTACKS:
            continue  # pictures carry fixed words only
        title, question, label = texts.ATTACKS[name]
        log = name in LOG_SCALE
        values = {
            encoder: {role: scores.of(role, name) for role in SHOWN_ROLES} for encoder, scores in run.scores.items()
        }
        limits = figures.density_limits([array for roles in values.values() for array in roles.values()], log)
        panels = []
        for encoder in evidence.encoders(run):
            found = values.get(encoder, {})
            drawable = limits is not None and any(array.size >= 2 for array in found.values())
            plot = _picture(figures.density_panel, found, encoder, limits, label, log) if drawable else None
            panels.append({"encoder": encoder, "plot": plot, "seen": _medians(found)})
        own = name == SECTION_OF_ITS_OWN
        blocks.append({"name": name, "title": title, "question": question, "panels": panels, "own": own})
    return blocks


def _medians(found: Mapping[str, np.ndarray]) -> str:
    """What a picture of distributions shows, in numbers."""
    medians = [
        f"{texts.ROLES[role][0].lower()} {np.median(values):.3g}".replace("-", "−")
        for role in SHOWN_ROLES if (values := found.get(role, np.empty(0))).size
    ]  # fmt: skip
    return f"medians: {', '.join(medians)}"


def _dose(run: RunFiles) -> dict[str, Any] | None:
    """The table of doses and its curve."""
    table = dose_table(run)
    if table is None:
        return None
    points = [(row["at"], row["off_at"]) for row in table["rows"] if None not in (row["at"], row["off_at"])]
    said = ", ".join(f"{dose:g}: {off:.1f}" for dose, off in points) + f"; best {table['at']:g}"
    return table | {
        "said": said,
        "plot": _picture(figures.dose_curve, points, table["at"]) if len(points) > 1 else None,
    }


def _rocs(run: RunFiles) -> list[dict[str, Any]]:
    """One panel an attack, and a second with a logarithmic axis for the first of them."""
    panels = []
    for name in evidence.attack_names(run):
        if name not in texts.ATTACKS:
            continue
        curves = {}
        for encoder, scores in run.scores.items():
            curve = roc_curve(scores, name)
            if curve is not None:
                curves[encoder] = curve
        title = texts.ATTACKS[name][0]
        seen = ", ".join(f"{encoder} AUC {np.trapezoid(y, x):.3f}" for encoder, (x, y) in curves.items())
        panels.append({"title": title, "seen": seen, "plot": _picture(figures.roc_panel, curves) if curves else None})
        if len(panels) == 1 and curves:
            zoom = _picture(figures.roc_panel, curves, log=True)
            panels.append({"title": f"{title}, left edge", "seen": seen, "plot": zoom})
    return panels


def roc_curve(scores: Scores, name: str) -> tuple[np.ndarray, np.ndarray] | None:
    """False and true positive rates [n] of forget against holdout; None without both.

    An attack that is fitted crosswise has two fits, saved apart: its curve is the mean of theirs at equal false
    positive rates, so that the area is the mean of their areas, which is the AUC that the audit states.
    """
    folds = [fold for fold in (f"{name}_fold0", f"{name}_fold1") if scores.of("forget", fold).size]
    curves = []
    for column in folds or [name]:
        forget, holdout = scores.of("forget", column), scores.of("holdout", column)
        if not forget.size or not holdout.size:
            return None
        sign = -1.0 if name in LOW_IS_KNOWN else 1.0
        curves.append(_rates(sign * forget, sign * holdout))
    return curves[0] if len(curves) == 1 else _mean_curve(curves)


def _mean_curve(curves: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Mean true positive rate over every false positive rate of any curve; a jump keeps both its ends."""
    at = np.unique(np.concatenate([x for x, _ in curves]))
    lower = np.mean([_ends(x, y, at, "left") for x, y in curves], axis=0)
    upper = np.mean([_ends(x, y, at, "right") for x, y in curves], axis=0)
    return np.repeat(at, 2), np.stack([lower, upper], axis=1).ravel()


def _ends(x: np.ndarray, y: np.ndarray, at: np.ndarray, side: str) -> np.ndarray:
    """Values at `at` of a curve that may jump: where it enters (left) or leaves (right) the jump."""
    first, last = np.searchsorted(x, at, "left"), np.searchsorted(x, at, "right") - 1
    inside = np.interp(at, x, y)
    return np.where(last >= first, y[np.where(last >= first, first if side == "left" else last, 0)], inside)


def _rates(positives: np.ndarray, negatives: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    cuts = np.unique(np.concatenate([positives, negatives]))[::-1]
    true = np.searchsorted(np.sort(-positives), -cuts, side="right") / positives.size
    false = np.searchsorted(np.sort(-negatives), -cuts, side="right") / negatives.size
    return np.concatenate([[0.0], false]), np.concatenate([[0.0], true])


def _utility(run: RunFiles) -> list[dict[str, Any]]:
    rows = evidence.utility(run)
    everything = [value for row in rows for value in row["values"].values()]
    if not everything:
        return [row | {"plot": None, "said": ""} for row in rows]
    low, high = min(everything), max(everything)
    pad = max(2.0, 0.25 * (high - low))
    limits = (max(0.0, low - pad), min(100.0, high + pad))
    return [
        row
        | {
            "plot": _picture(figures.dots, row["values"], limits) if row["values"] else None,
            "said": ", ".join(f"{encoder} {value:.1f}" for encoder, value in row["values"].items()),
        }
        for row in rows
    ]


def _cost(run: RunFiles) -> dict[str, Any]:
    found = facts.cost(run)
    found["rows"] = [
        row | {"plot": _picture(figures.bars, row["values"]) if len(row["values"]) == 2 else None}
        for row in found["rows"]
    ]
    return found

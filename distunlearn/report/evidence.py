"""Verdict, gates, attacks, usefulness and controls: values for the page, from audit/summary.json.

A figure that is missing, not finite or not a number is "not evaluated" and never counts as a pass.
"""

from __future__ import annotations

import json
import math
from importlib.resources import files
from typing import Any

from distunlearn.report.data import ENCODER_NAMES, RunFiles, number, tree
from distunlearn.report.facts import brought, grounds, other_kind
from distunlearn.report.formatting import interval, p_value, percent, signed, text
from distunlearn.report.texts import ATTACKS, ENCODERS, NOT_EVALUATED, STRESS, UTILITY, VERDICTS, attack_words
from distunlearn.verify.figures import JUDGED
from distunlearn.verify.gates import FEWEST

MAX_ROWS = 40  # attacks that the report has no words for
DEFAULT_MARGINS = {"view_agreement": 0.06, "attack": 0.08, "utility_points": 2.5}
OTHERWISE = ("it treats held-out images", "one that was brought as such")  # compared with no retrained encoder
DECLARED = ("pass", "fail", "inconclusive")


def encoders(run: RunFiles) -> dict[str, tuple[str, str]]:
    """The encoders that were audited, with their names in words; all of them where nothing was."""
    seen = [name for name in ENCODER_NAMES if name in run.scores or name in tree(run.audit, "states")]
    seen += [name for name in ENCODER_NAMES if any(
        number(run.audit, part, figure, name, "auc") is not None
        for part in ("attacks", "further_attacks") for figure in tree(run.audit, part)
    )]  # fmt: skip
    return {name: words for name, words in ENCODERS.items() if not seen or name in seen}


def attack_names(run: RunFiles) -> list[str]:
    """The audited attacks: the known ones in their own order, then others by name."""
    return _ordered(tree(run.audit, "attacks"))


def _ordered(found: dict[str, Any]) -> list[str]:
    return [name for name in ATTACKS if name in found] + sorted(set(found) - set(ATTACKS))[:MAX_ROWS]


def gates(run: RunFiles) -> dict[str, list[dict[str, Any]]]:
    """Rows of the gate tables: `attacks` (difference of AUC) and `utility` (percentage points)."""
    attacks, useful = [], []
    for name in dict.fromkeys((*_declared(run), *attack_names(run))):
        gap = tree(run.audit, "attacks", name, "gap")
        margin = _margin(run, name if name == "view_agreement" else "attack")
        title, question, _ = attack_words(name)
        row = _row(title, gap, "auc", (-margin, margin), 3, 1.0)
        if row["verdict"] == "pass" and _power(run, name) != "pass":
            row |= _refused("the attack is not shown to work on the original encoder")
        attacks.append(row | {"question": question, "allowed": f"−{margin:g} to +{margin:g}"})
    points = _margin(run, "utility_points")
    for name, (title, question) in UTILITY.items():
        row = _row(title, tree(run.audit, "gates", name), "change", (-points, math.inf), 1, 100.0)
        if tree(run.audit, "utility", name) and number(run.audit, "utility", name, "original") is None:
            row["reason"] = "it takes labelled images of two classes or more, and there are none"
        useful.append(row | {"question": question, "allowed": f"lower end above −{points:g}"})
    return {"attacks": attacks, "utility": useful}


def _declared(run: RunFiles) -> list[str]:
    """Attacks that the settings declare as gates: one without figures is not evaluated, never left out."""
    also = tree(run.config, "audit", "gates").get("also")
    named = (str(name).rpartition(":")[2] for name in also) if isinstance(also, list) else ()
    return [*JUDGED, *named]


def _margin(run: RunFiles, key: str) -> float:
    declared = number(run.config, "audit", "gates", key)
    return declared if declared is not None and declared > 0 else DEFAULT_MARGINS[key]


def _row(
    title: str, gate: dict[str, Any], key: str, band: tuple[float, float], digits: int, scale: float
) -> dict[str, Any]:
    """One gate. Its verdict counts only with the finite interval that bears it out."""
    found = [number(gate, name) for name in (key, "low", "high")]
    value, low, high = (None if figure is None else scale * figure for figure in found)
    given, reason = gate.get("verdict"), gate.get("reason")
    shown = given if given in DECLARED and None not in found else "not_evaluated"
    judged = {"verdict": shown, "word": VERDICTS[shown][0], "reason": reason if isinstance(reason, str) else ""}
    if shown == "pass" and (low is None or high is None or not (band[0] <= low and high <= band[1])):
        judged = _refused("the audit file says pass, but the interval is not inside the allowed band")
    return judged | {
        "title": title,
        "value": value,
        "low": low,
        "high": high,
        "band": band,
        "shown": signed(value, digits),
        "interval": interval(low, high, digits, sign=True),
    }


def _refused(reason: str) -> dict[str, str]:
    """What a gate shows that claims a pass without the figures for it."""
    return {"verdict": "not_evaluated", "word": VERDICTS["not_evaluated"][0], "reason": reason}


def verdict(run: RunFiles, rows: dict[str, list[dict[str, Any]]], covered: str) -> dict[str, Any]:
    """The badge, one sentence about this run, notes that qualify it, and what each word means.

    covered: state of `facts.coverage`. Its failure takes a pass away.
    """
    declared = tree(run.audit, "gates").get("verdict")
    everything = [*rows["attacks"], *rows["utility"]]
    named = {name: [row["title"] for row in everything if row["verdict"] == name] for name in VERDICTS}
    unsettled = named["inconclusive"] + named["not_evaluated"]
    notes = [*other_kind(run), *_without_reference(run)]
    if declared == "fail" or named["fail"]:
        result = "fail"
        if declared != "fail":
            notes.append("The audit file does not say fail, but one of its checks does.")
    elif declared not in DECLARED:
        result = "not_evaluated"
    elif declared == "pass" and (unsettled or not named["pass"]):
        result = "inconclusive"
        notes.append("The audit file says pass, but its own figures do not bear that out; it is not counted as a pass.")
    elif declared == "pass" and covered == "fail":
        result = "inconclusive"
        notes.append("Every check came out inside its limits, but not every requested image was processed as it must.")
    elif declared == "pass" and run.checked.gaps:
        result = "inconclusive"
        notes += ["Every check came out inside its limits, but a pass needs all of the evidence.", *run.checked.gaps]
    else:
        result = declared
    meanings = [{"name": name, "word": word, "meaning": meaning} for name, (word, meaning) in VERDICTS.items()]
    asked = number(run.audit, "images", "forget")
    sentence = _sentence(result, named, unsettled, few=asked if asked is not None and asked <= FEWEST else None)
    if result == "pass" and grounds(run) != "retrained_encoder":
        sentence = sentence.replace("an encoder that never saw them", OTHERWISE[bool(brought(run))])
    return {"name": result, "word": VERDICTS[result][0], "sentence": sentence, "notes": notes, "meanings": meanings}


def _without_reference(run: RunFiles) -> list[str]:
    """Which evidence it is that needs no retrained encoder, and how often it was wrong where there was one."""
    if grounds(run) in ("retrained_encoder", "brought_encoders"):
        return brought(run)
    groups = tree(run.audit, "evidence")
    chosen = "; too few held-out images for groups that are chosen like it"
    if grounds(run) == "reference_groups":
        chosen = (
            f"; intervals are widened by what {groups.get('groups')} groups of {groups.get('images')} held-out images "
            "show, which were chosen to be as alike and as hard"
        )
    known = json.loads((files("distunlearn.verify") / "tier0_rates.json").read_text(encoding="utf-8"))
    passed, wrong, power, failed = (known[key] for key in ("wrong_passes", "false_pass", "power", "false_fail"))
    return [
        f"No encoder was retrained without the images. The request is compared with held-out images{chosen}. This is "
        "weaker evidence than a retrained encoder.",
        f"How often such checks are wrong was measured on {known['encoders']} encoders beside {known['groups']} "
        f"retrained ones ({known['document']}). {passed['of']} passed. Of {wrong['of']} that lie beyond a limit of "
        f"retraining {wrong['hits']} passed (95 %: at most {percent(wrong['high'], 0)}); of {power['of']} that "
        f"retraining clears {power['hits']} passed; of {failed['of']} within the limits {failed['hits']} failed.",
    ]


def _sentence(result: str, named: dict[str, list[str]], unsettled: list[str], few: float | None) -> str:
    """few: images of a request so small that none of its own checks can fail; None: it is larger."""
    if result == "pass":
        return (
            "In every check that was declared before the run, the unlearned encoder treats the forgotten images "
            "like an encoder that never saw them, within the agreed limits, and it has stayed useful."
        )
    if result == "fail":
        which = f": {_listed(named['fail'])}" if named["fail"] else ""
        return f"The request cannot be called fulfilled. At least one check is clearly outside its limits{which}."
    if result == "inconclusive" and few is not None:
        counted = "1 image is" if few == 1 else f"{few:.0f} images are"
        return (
            f"{counted} too few to say whether the request is fulfilled: no check of it can pass or fail. What was "
            "seen stands beside each check."
        )
    if result == "inconclusive":
        which = f" Not settled: {_listed(unsettled)}." if unsettled else ""
        return f"No check failed, but the evidence is not enough to say that the images were forgotten.{which}"
    return "This run holds no verdict of an audit, so nothing can be said about whether the images were forgotten."


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def headline(run: RunFiles) -> dict[str, str]:
    """The few figures beside the verdict: the first attack and kNN, before and after."""
    name = next(iter(attack_names(run)), "view_agreement")
    found = {encoder: number(run.audit, "attacks", name, encoder, "auc") for encoder in ENCODER_NAMES}
    useful = {encoder: number(run.audit, "utility", "knn", encoder) for encoder in ENCODER_NAMES}
    return {
        "attack": attack_words(name)[0],
        **{f"auc_{encoder}": text(value, 2) for encoder, value in found.items()},
        **{f"knn_{encoder}": percent(value) for encoder, value in useful.items()},
    }


def attack_table(run: RunFiles) -> list[dict[str, Any]]:
    """AUC with interval, true-positive rate at 1 % false positives and KS p-value, per attack and encoder."""
    table = []
    for name in attack_names(run):
        title, question, _ = attack_words(name)
        cells = {}
        for encoder in encoders(run):
            figures = tree(run.audit, "attacks", name, encoder)
            cells[encoder] = {
                "auc": text(number(figures, "auc")),
                "interval": interval(number(figures, "auc_low"), number(figures, "auc_high")),
                "tpr": percent(number(figures, "tpr_at_1pct_fpr")),
                "ks": p_value(number(figures, "ks_p")),
            }
        table.append({"name": name, "title": title, "question": question, "cells": cells})
    return table


def further_table(run: RunFiles) -> list[dict[str, Any]]:
    """Attacks without a gate: AUC of the three encoders and the gap to the retrained one."""
    found = tree(run.audit, "further_attacks")
    rows = []
    for name in _ordered(found):
        gap = tree(found, name, "gap")
        title, question, _ = attack_words(name)
        aucs = {encoder: text(number(found, name, encoder, "auc")) for encoder in ENCODER_NAMES}
        ends = interval(number(gap, "low"), number(gap, "high"), 3, sign=True)
        rows.append(
            {"title": title, "question": question, "aucs": aucs, "gap": signed(number(gap, "auc"), 3), "interval": ends}
        )
    return rows


def stress_table(run: RunFiles) -> list[dict[str, str]]:
    """One row a request of the stress tests that were run: view agreement, the worst gap, accuracy."""
    rows = []
    for path, (title, question) in STRESS.items():
        found = tree(run.audit, "stress", *path)
        attacks = {name: tree(found, "attacks", name) for name in tree(found, "attacks")}
        gaps = {name: abs(gap) for name, values in attacks.items() if (gap := number(values, "gap")) is not None}
        if not gaps:
            continue
        worst = max(sorted(gaps), key=gaps.__getitem__)
        before, after = (number(found, "utility", "knn", encoder) for encoder in ("original", "unlearned"))
        rows.append({
            "title": title,
            "question": f"{question} ({text(number(found, 'images', 'forget'), 0)} images)",
            **{encoder: text(number(attacks, "view_agreement", encoder)) for encoder in ENCODER_NAMES},
            "worst": attack_words(worst)[0],
            "gap": signed(number(attacks, worst, "gap"), 3),
            "interval": interval(number(attacks, worst, "low"), number(attacks, worst, "high"), 3, sign=True),
            "average": text(number(found, "average_gap"), 2),
            "knn": signed(None if before is None or after is None else 100 * (after - before), 1),
        })  # fmt: skip
    return rows


def retained_table(run: RunFiles) -> list[dict[str, Any]]:
    """AUC of telling retained from held-out images, by statistic, with its change by forgetting."""
    rows = []
    for name in tree(run.audit, "retained", "attacks"):
        found = tree(run.audit, "retained", "attacks", name)
        ends = interval(number(found, "low"), number(found, "high"), 3, sign=True)
        aucs = {encoder: text(number(found, encoder)) for encoder in ENCODER_NAMES}
        change = signed(number(found, "change"), 3)
        rows.append({"title": attack_words(name)[0], "aucs": aucs, "change": change, "interval": ends})
    return rows[:MAX_ROWS]


def level_sentence(run: RunFiles) -> str:
    """How far the whole of the unlearned encoder's curves has moved; empty where it has not, or nobody can say."""
    name = str(tree(run.audit, "level").get("farthest"))
    level = tree(run.audit, "level", "signals", name)
    moved, before = number(level, "unlearned"), number(level, "original")
    if moved is None or tree(run.audit, "level").get("kept") is not False:
        return ""
    return (
        "In this run the unlearned encoder sees all images differently from the retrained one: in "
        f"{name.replace('_', ' ')} unseen images lie {signed(moved, 2)} standard deviations from where they lie there "
        f"(before forgetting: {signed(before, 2)}). Its curves lie elsewhere as a whole, which is a finding of its own."
    )


def _level_row(run: RunFiles) -> tuple[str, str, str]:
    """Name, value and words of the signal in which the whole encoder moved farthest."""
    name = str(tree(run.audit, "level").get("farthest"))
    found = tree(run.audit, "level", "signals", name)
    words = (
        "standard deviations between unseen images here and in the retrained encoder, in "
        f"{name.replace('_', ' ')}, where they differ most; before forgetting "
        f"{signed(number(found, 'original'), 2)}. Beyond 0.3 the encoder sees all images differently"
    )
    return "Level of the whole encoder", signed(number(found, "unlearned"), 2), words


def distances(run: RunFiles) -> list[dict[str, str]]:
    """Single numbers against the retrained encoder: name, value, how to read it; without those not evaluated."""
    audit = run.audit
    steps = [_steps(tree(audit, "relearning", encoder)) for encoder in ("unlearned", "retrained")]
    measured = bool(tree(audit, "relearning", "unlearned"))
    rows = [
        ("Average gap", text(number(audit, "average_gap", "value"), 2), "points; mean over "
         f"{len(tree(audit, 'average_gap', 'gaps'))} checks of the difference to the retrained encoder; 0 is best"),
        _level_row(run),
        ("Tug of war (ToW)", text(number(audit, "tow", "tow")), "1: as accurate as the retrained encoder on retained, "
         "forgotten and unseen images"),
        ("Completeness (IAM)", text(number(audit, "iam", "unlearned")), "on a scale from "
         f"{text(number(audit, 'iam', 'unchanged'))} (nothing changed) to {text(number(audit, 'iam', 'as_retrained'))} "
         "(as retrained); above it: less known than to the retrained encoder"),
        ("Likeness to the retrained encoder (CKA)",
         text(number(audit, "similarity", "forget", "to_retrained", "unlearned")),
         "on the forgotten images; the original encoder has "
         f"{text(number(audit, 'similarity', 'forget', 'to_retrained', 'original'))}"),
        ("Steps to relearn", NOT_EVALUATED if not measured else steps[0],
         f"training steps until the forgotten images look as known as before; retrained: {steps[1]}"),
        ("Shadow encoders: U-LiRA", text(number(audit, "pooled", "u_lira_auc", "value")),
         "0.5: encoders that unlearned an image cannot be told from those that never saw it; by chance "
         f"{text(number(audit, 'pooled', 'u_lira_auc', 'chance_low'))} to "
         f"{text(number(audit, 'pooled', 'u_lira_auc', 'chance_high'))}"),
    ]  # fmt: skip
    return [{"name": name, "value": value, "meaning": words} for name, value, words in rows if value != NOT_EVALUATED]


def _steps(found: dict[str, Any]) -> str:
    """Between which two steps that were looked at the level was reached."""
    reached, at = number(found, "steps_to_relearn"), found.get("steps")
    looked = [step for step in at if number(step) is not None] if isinstance(at, list) else []
    if reached is None:
        return f"more than {max(looked):.0f}" if looked else NOT_EVALUATED
    before = [step for step in looked if step < reached]
    return f"{max(before) + 1:.0f} to {reached:.0f}" if before and max(before) + 1 < reached else f"{reached:.0f}"


def utility(run: RunFiles) -> list[dict[str, Any]]:
    """Accuracy in percent of each encoder and how it changed, for kNN and linear probe."""
    rows = []
    for name, (title, question) in UTILITY.items():
        found = [number(run.audit, "utility", name, encoder) for encoder in ENCODER_NAMES]
        before, after, yardstick = (None if value is None else 100 * value for value in found)
        values = dict(zip(ENCODER_NAMES, (before, after, yardstick), strict=True))
        rows.append(
            {
                "title": title,
                "question": question,
                "values": {encoder: value for encoder, value in values.items() if value is not None},
                "shown": {encoder: text(value, 1) for encoder, value in values.items()},
                "change": signed(None if before is None or after is None else after - before, 1),
                "change_interval": _points(tree(run.audit, "gates", name)),
                "gap": signed(None if yardstick is None or after is None else after - yardstick, 1),
                "gap_interval": _points(tree(run.audit, "utility", name, "gap")),
            }
        )
    return rows


def _points(figures: dict[str, Any]) -> str:
    """The interval of a change of accuracy, in percentage points."""
    low, high = number(figures, "low"), number(figures, "high")
    return interval(None if low is None else 100 * low, None if high is None else 100 * high, 1, sign=True)


def two_sample(run: RunFiles) -> list[dict[str, str]]:
    """The classifier that tries to tell forgotten from third-party images, for each encoder; [] where none was."""
    rows = [{"encoder": encoder} | _told_apart(tree(run.audit, "two_sample", encoder)) for encoder in encoders(run)]
    return rows if any(row["auc"] != NOT_EVALUATED for row in rows) else []


def controls(run: RunFiles) -> dict[str, Any]:
    """Power: does each attack work on the original encoder? Third-party against holdout: one kind of image?"""
    power = []
    for name in attack_names(run):
        figures = tree(run.audit, "attacks", name, "original")
        state = _power(run, name)
        word = {"pass": "yes", "inconclusive": "not shown", "not_evaluated": NOT_EVALUATED}[state]
        power.append({"title": attack_words(name)[0], "state": state, "word": word} | _told_apart(figures))
    alike = []
    for encoder in ENCODER_NAMES:
        figures = tree(run.audit, "controls", "third_party_against_holdout", encoder)
        if figures:
            alike.append({"title": f"{ENCODERS[encoder][0]} encoder"} | _told_apart(figures))
    return {"power": power, "third_party": alike}


def _power(run: RunFiles, attack: str) -> str:
    """Whether the interval of the attack's AUC on the original encoder leaves 0.5 out."""
    figures = tree(run.audit, "attacks", attack, "original")
    low, high = number(figures, "auc_low"), number(figures, "auc_high")
    if low is None or high is None:
        return "not_evaluated"
    return "pass" if low > 0.5 or high < 0.5 else "inconclusive"


def _told_apart(figures: dict[str, Any]) -> dict[str, str]:
    """Cells of a classifier that tells two groups of images apart: AUC, interval, p-value."""
    return {
        "auc": text(number(figures, "auc")),
        "interval": interval(number(figures, "auc_low"), number(figures, "auc_high")),
        "p": p_value(number(figures, "p")),
    }

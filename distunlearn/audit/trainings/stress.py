"""Stress tests (tier 3): the requests on which a method is most likely to fail. Reported, never judged.

worst_case    three requests of a third of the forget images each: those that the original encoder memorised most, a
              random third, and those it memorised least. The other two thirds are retained.
whole_class   one request: every member of the largest class. Attacked against held-out images of that class alone,
              for any other comparison would find the class.
canaries      the forget images are in the training data once, twice or four times over (a third of them each), and
              every copy is forgotten. Attacked one image each, by the number of its copies.
sequential    three requests one after the other, a third of the forget images each; every one starts from the encoder
              that the last one left, whose forgotten images are gone.

Every request has the run's own method, settings and seed, and an encoder retrained without its images. Memorisation is
SSLMem (Wang et al., ICLR 2024, arXiv 2401.12233) with the run's retrained encoder as the one without the image: atanh
of the mean cosine between views, original less retrained. Forget sets by memorisation: Zhao et al., NeurIPS 2024 (arXiv
2406.01257); canaries repeated k times: Carlini et al., "The Secret Sharer", USENIX Security 2019.

A test lives in `<run>/stress/<test>`; finished encoders are kept, and after an interruption the same command goes on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from distunlearn.audit.attacks.lira import alignment
from distunlearn.audit.signals.collect import Signals, encoder_view
from distunlearn.audit.signals.shares import shared_signals
from distunlearn.audit.trainings.stress_figures import accuracies, agreement, of_request, request_figures
from distunlearn.audit.trainings.sub_run import nested_session, with_copies, with_roles
from distunlearn.common.progress import Rounds
from distunlearn.data.manifest.manifest import Manifest
from distunlearn.data.manifest.records import UNUSED
from distunlearn.data.schedule import permutation
from distunlearn.engine import phases
from distunlearn.engine.phases import check_coverage
from distunlearn.engine.session import Session, load_for_all
from distunlearn.errors import DataError

COPIES = (1, 2, 4)  # of a canary; the first is the image itself
PARTS = 3
FEWEST = 6  # forget images: two a third
FEWEST_CLASSES = 3  # of the members, for one of them to be forgotten

Figures = dict[str, Any]


def stress_names(named: Sequence[str]) -> list[str]:
    """The tests that `audit.stress` names, in the order of TESTS."""
    return [name for name in TESTS if name in named]


def thirds(ids: Sequence[str]) -> list[list[str]]:
    """Three groups of neighbours, as even as can be."""
    borders = [len(ids) * part // PARTS for part in range(PARTS + 1)]
    return [list(ids[low:high]) for low, high in zip(borders[:-1], borders[1:], strict=True)]


def largest_request(names: Sequence[str], forget: int) -> int:
    """Forget images of the largest request among the tests, as far as the number of forget images says it."""
    sizes = [len(group) * copies for group, copies in zip(thirds([""] * forget), COPIES, strict=True)]
    return max([forget, sum(sizes)] if "canaries" in names else [forget])


def check_count(forget: int) -> None:
    """DataError if there are too few forget images to share among requests."""
    if forget < FEWEST:
        raise DataError(
            f"audit.stress shares {forget} forget images among requests, expected at least {FEWEST}; forget more, or "
            "leave audit.stress empty."
        )


def audit_stress(session: Session) -> Figures | None:
    """Train and measure what `audit.stress` names. All ranks train and look; the main one measures.

    Returns:
        {test: figures} on the main process, None elsewhere.

    Raises:
        DataError: fewer than FEWEST images to forget.
        CoverageError: a request whose unlearning missed one of its images.
    """
    check_count(len(session.manifest.ids("forget")))
    found, names = {}, stress_names(session.cfg.audit.stress)
    rounds = Rounds(len(names))
    for name in names:
        session.telemetry.note("audit", f"stress test {rounds.next()}: {name}")
        found[name] = TESTS[name](session)
    return found if session.world.is_main else None


# -- the tests -------------------------------------------------------------------------------------------------------


def _worst_case(session: Session) -> Figures:
    scores = session.world.broadcast_object(_memorisation(session))
    ids = sorted(scores, key=lambda i: (scores[i], i))
    least, _, most = thirds(ids)
    anyone = thirds([ids[row] for row in permutation(len(ids), session.cfg.seed, "stress random").tolist()])[0]
    result = {}
    for name, chosen in (("most", most), ("random", anyone), ("least", least)):
        manifest = with_roles(session.manifest, dict.fromkeys(ids, "retain") | dict.fromkeys(chosen, "forget"))
        figures = _request(session, f"worst_case-{name}", manifest)
        result[name] = {"memorisation": float(np.mean([scores[i] for i in chosen])), **figures}
    return result


def _memorisation(session: Session) -> dict[str, float] | None:
    """SSLMem of every forget image that can be decoded, on the main rank. Collective."""
    others = session.manifest.ids(("holdout", "third_party_audit"))
    manifest = with_roles(session.manifest, dict.fromkeys(others, UNUSED))
    seen = dataclasses.replace(session, manifest=manifest)
    original, retrained = (_look(session, session.out / name, seen) for name in ("original", "retrained"))
    if original is None or retrained is None:
        return None
    rows = original.of("forget")
    scores = alignment(original)[rows] - alignment(retrained)[rows]
    return {original.ids[row]: float(score) for row, score in zip(rows.tolist(), scores, strict=True)}


def _whole_class(session: Session) -> Figures:
    members = session.manifest.ids(("retain", "forget"))
    labels = session.manifest.labels(members)
    classes, counts = np.unique(labels[labels >= 0], return_counts=True)
    if len(classes) < FEWEST_CLASSES:
        return {
            "reason": f"the members carry labels of {len(classes)} classes, and at least {FEWEST_CLASSES} are needed"
        }
    largest = int(classes[np.argmax(counts)])
    roles = {i: "forget" if label == largest else "retain" for i, label in zip(members, labels.tolist(), strict=True)}

    def of_class(signals: Signals) -> np.ndarray:
        return (signals.roles != "holdout") | (signals.labels == largest)

    def of_others(signals: Signals) -> np.ndarray:
        return (signals.roles != "holdout") | (signals.labels != largest)

    manifest = with_roles(session.manifest, roles)
    return {"label": largest, **_request(session, "whole_class", manifest, attacked=of_class, useful=of_others)}


def _canaries(session: Session) -> Figures:
    ids = session.manifest.ids("forget")
    groups = thirds([ids[row] for row in permutation(len(ids), session.cfg.seed, "stress canaries").tolist()])
    copies = {i: count for group, count in zip(groups, COPIES, strict=True) for i in group}
    manifest = with_copies(session.manifest, copies)
    result: Figures = {}
    with nested_session(session, "stress/canaries", manifest) as nested:
        phases.pretrain(nested)
        phases.unlearn(nested, nested.out / "original")
        check_coverage(nested)
        signals = _look_at_three(session, nested, nested.out / "original", session.out / "retrained")

    def measure() -> None:
        useful = accuracies(signals, session.cfg)
        for group, count in zip(groups, COPIES, strict=True):
            kept = {e: s.at(of_request(s, set(group))) for e, s in signals.items()}
            result[str(count)] = request_figures(kept, useful, session.cfg)

    session.world.on_main(measure)
    return result


def _sequential(session: Session) -> Figures:
    ids = session.manifest.ids("forget")
    parts = thirds([ids[row] for row in permutation(len(ids), session.cfg.seed, "stress sequential").tolist()])
    folders: list[Path] = []
    for number, part in enumerate(parts):
        gone = [i for earlier in parts[:number] for i in earlier]
        later = [i for group in parts[number + 1 :] for i in group]
        roles = dict.fromkeys(gone, UNUSED) | dict.fromkeys(part, "forget") | dict.fromkeys(later, "retain")
        with nested_session(session, f"stress/sequential-{number + 1}", with_roles(session.manifest, roles)) as nested:
            phases.unlearn(nested, folders[-1] if folders else session.out / "original")
            check_coverage(nested)
            folders.append(nested.out)
    ends = {"original": session.out / "original", "retrained": session.out / "retrained", "at_once": session.out}
    looked = {name: _look(session, folder) for name, folder in ends.items()}
    stages = [_look(session, folder) for folder in folders]
    return session.world.on_main(lambda: _sequence_figures(parts, looked, stages, session)) or {}


def _sequence_figures(
    parts: Sequence[Sequence[str]], looked: Mapping[str, Any], stages: Sequence[Any], session: Session
) -> Figures:
    """Of every request after the last one, of all of them together, and of the run's own single request."""
    cfg = session.cfg
    reference = {name: looked[name] for name in ("original", "retrained")}
    ends = {"in_turn": stages[-1], "at_once": looked["at_once"]}
    encoders = {name: {**reference, "unlearned": signals} for name, signals in ends.items()}
    useful = {name: accuracies(signals, cfg) for name, signals in encoders.items()}

    def judged(name: str, chosen: set[str]) -> Figures:
        kept = {e: s.at(of_request(s, chosen)) for e, s in encoders[name].items()}
        return request_figures(kept, useful[name], cfg)

    everyone = {i for part in parts for i in part}
    return {
        "requests": [judged("in_turn", set(part)) for part in parts],
        "view_agreement_after": [[agreement(stage, set(part)) for part in parts] for stage in stages],
        "all": judged("in_turn", everyone),
        "at_once": judged("at_once", everyone),
    }


TESTS: dict[str, Callable[[Session], Figures]] = {
    "worst_case": _worst_case,
    "whole_class": _whole_class,
    "canaries": _canaries,
    "sequential": _sequential,
}


# -- one request -----------------------------------------------------------------------------------------------------

Rows = Callable[[Signals], np.ndarray]


def _request(
    session: Session, name: str, manifest: Manifest, attacked: Rows | None = None, useful: Rows | None = None
) -> Figures:
    """Forget what `manifest` says, starting from the run's original encoder, and compare with an encoder retrained so.

    attacked, useful: rows of the signals that attacks and accuracies may look at; None: all. {} but on the main rank.
    """
    with nested_session(session, f"stress/{name}", manifest) as nested:
        phases.retrain(nested)
        phases.unlearn(nested, session.out / "original")
        check_coverage(nested)
        signals = _look_at_three(session, nested, session.out / "original", nested.out / "retrained")

    def measure() -> Figures:
        kept = [{e: s.at(rows(s)) if rows else s for e, s in signals.items()} for rows in (attacked, useful)]
        return request_figures(kept[0], accuracies(kept[1], session.cfg), session.cfg)

    return session.world.on_main(measure) or {}


def _look(session: Session, folder: Path, of: Session | None = None) -> Signals | None:
    """What an attacker sees of an encoder with the run's own views, on the main rank. of: whose images. Collective."""
    encoder = encoder_view(session, load_for_all(folder, session))
    return shared_signals(session, encoder, str(folder.relative_to(session.out)), of)


def _look_at_three(session: Session, nested: Session, original: Path, retrained: Path) -> dict[str, Any]:
    """The encoders of a request, whose unlearned one lies in the nested session's folder."""
    folders = {"original": original, "unlearned": nested.out, "retrained": retrained}
    return {name: _look(session, folder, nested) for name, folder in folders.items()}

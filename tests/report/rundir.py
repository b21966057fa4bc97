"""Complete run directories without any training: synthetic signals, judged and written by the package's own code.

audit/ is written by `summarise` and `write_audit`, the shards' summary by `Manifest`, the ledger by `Ledger`, the
settings by `save_config`, so that a change of any format reaches the tests of the report at once.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from distunlearn.audit.signals.collect import Signals
from distunlearn.audit.summary import summarise, write_audit
from distunlearn.common.files import write_json
from distunlearn.config.load import save_config
from distunlearn.config.recipes import digits
from distunlearn.config.schema import RunConfig
from distunlearn.config.shape import digest
from distunlearn.data.manifest.manifest import Manifest, Sample, Shard
from distunlearn.data.manifest.records import FORGOTTEN
from distunlearn.engine.environment import environment
from distunlearn.engine.ledger import Ledger
from distunlearn.engine.loop import PhaseResult
from distunlearn.plan.plan import make_plan
from distunlearn.report.data import load_run
from distunlearn.report.render import render
from distunlearn.verify.ledger import coverage, read_ledger
from distunlearn.verify.run import DONE, FOLDERS, STATE
from distunlearn.verify.states import export_digests, read_tensors, state_digest

COUNTS = {"retain": 60, "forget": 40, "third_party": 20, "third_party_audit": 40, "calibration": 20, "holdout": 80}
AUDITED = ("retain", "forget", "third_party_audit", "holdout", FORGOTTEN)
CASES = {"pass": "Pass", "fail": "Fail", "inconclusive": "Inconclusive"}  # the word of each verdict on the page
CLASSES = 4
STEPS = 130
PAIRS = 6  # of the four views of an image

# How well each encoder knows the forgotten images, in units of the spread between images.
KNOWN = {
    "pass": {"original": 1.6, "unlearned": 0.0, "retrained": 0.0},
    "fail": {"original": 1.6, "unlearned": 1.5, "retrained": 0.0},
    "inconclusive": {"original": 0.0, "unlearned": 0.0, "retrained": 0.0},  # the attacks have no power
    "unknown": {"original": 1.6, "unlearned": -0.87, "retrained": 0.95},  # AUC 0.27 where retraining has 0.75
}


def settings() -> RunConfig:
    """The digits recipe with an audit that takes a moment."""
    cfg = digits()
    data = replace(
        cfg.data, members=COUNTS["retain"] + COUNTS["forget"],
        **{role: COUNTS[role] for role in ("forget", "holdout", "calibration", "third_party", "third_party_audit")},
    )  # fmt: skip
    unlearn = replace(cfg.unlearn, retain_batch=32, forget_batch=16, third_party_batch=16)
    pretrain = replace(cfg.pretrain, batch=32)
    audit = replace(cfg.audit, views=4, bootstrap=200)
    return replace(cfg, data=data, unlearn=unlearn, pretrain=pretrain, audit=audit)


def synthetic_signals(known: float, encoder: int, counts: dict[str, int] = COUNTS, seed: int = 3) -> Signals:
    """Signals of one encoder: images share their luck over encoders, `known` is what it remembers of forget."""
    audited = [role for role in AUDITED if role in counts]
    roles = np.repeat(audited, [counts[role] for role in audited])
    n = len(roles)
    shared, own = np.random.default_rng(seed), np.random.default_rng([seed, encoder])
    luck = shared.standard_normal(n)
    spread = shared.standard_normal((n, PAIRS))
    labels = shared.integers(0, CLASSES, n)
    centres = 1.2 * shared.standard_normal((CLASSES, 8))
    body = shared.standard_normal((n, 8))
    sketch = shared.standard_normal((n, 64))
    member = np.where(roles == "retain", 1.6, np.where(roles == "forget", known, 0.0))
    score = luck + member + 0.02 * own.standard_normal(n)
    norm = np.exp(-0.5 * score)
    return Signals(
        ids=[f"people/{role}-{row:04d}.png" for role in audited for row in range(counts[role])],
        roles=roles,
        labels=labels,
        embedding=(centres[labels] + body + 0.05 * own.standard_normal((n, 8))).astype(np.float32),
        embedding_cosines=np.tanh(0.8 + 0.2 * score[:, None] + 0.05 * spread),
        output_cosines=np.tanh(0.9 + 0.25 * score[:, None] + 0.05 * spread),
        bank_loss=np.exp(-0.4 * score),
        confidence=1 / (1 + np.exp(-score)),
        output=np.stack([np.tanh(0.8 + 0.2 * score), 0.5 + 0.01 * score], axis=1),
        gradient_norm_head=norm,
        gradient_norm_network=np.where(roles == "retain", np.nan, 30 * norm),
        gradient_sketch=norm[:, None] * sketch,
        layer_norms=np.log(norm)[:, None] + 0.1 * own.standard_normal((n, 5)),
        network_sketch=norm[:, None] * own.standard_normal((n, 64)),
        part_responses=np.zeros((n, 0), dtype=np.float32),
    )


def signals_of(case: str, counts: dict[str, int] = COUNTS, draw: int = 3) -> dict[str, Signals]:
    """Signals of the three encoders of a case."""
    return {name: synthetic_signals(known, i, counts, draw) for i, (name, known) in enumerate(KNOWN[case].items())}


def build_run(
    folder: Path,
    case: str = "pass",
    cfg: RunConfig | None = None,
    counts: dict[str, int] = COUNTS,
    draw: int = 3,
    labels: bool = True,
    **told: Any,
) -> Path:
    """A finished and audited run directory with the verdict `case`. draw: of its scores and weights.

    told: of `summarise`. With tier 0 there is no retrained encoder.
    """
    cfg = cfg or settings()
    names = ("original", "unlearned", *(("retrained",) if cfg.audit.tier else ()))
    folders = {encoder: FOLDERS[encoder] for encoder in names}
    folder.mkdir(parents=True)
    save_config(cfg, folder / "run.yaml")
    write_json(folder / "env.json", _environment())
    write_json(folder / "plan.json", _plan() | {"digest": digest(cfg)})
    manifest = _manifest(folder, counts)
    states = {
        encoder: _encoder(folder / place, number, draw) for number, (encoder, place) in enumerate(folders.items())
    }
    _ledger(folder, manifest, states["unlearned"])
    cost: dict[str, float | None] = {
        "pretrain_images": 420_000, "unlearn_images": 63_000, "retrain_images": 300_000,
        "pretrain_seconds": 140.0, "unlearn_seconds": 58.0, "retrain_seconds": 101.0,
    }  # fmt: skip
    if "retrained" not in folders:
        cost |= dict.fromkeys(("retrain_images", "retrain_seconds"))
    covered = coverage(read_ledger(folder / "ledger.jsonl"), manifest.ids("forget")).as_dict()
    signals = {name: found for name, found in signals_of(case, counts, draw).items() if name in folders}
    if not labels:
        signals = {name: replace(found, labels=np.full_like(found.labels, -1)) for name, found in signals.items()}
    summary, scores = summarise(signals, cfg, cost=cost, coverage=covered, states=states, **told)
    write_audit(folder / "audit", summary, scores)
    return folder


def _encoder(folder: Path, number: int, draw: int) -> str:
    """A finished encoder of one weight; returns its state digest."""
    (folder / "export").mkdir(parents=True)
    weight = np.full(3, number + 10 * draw, dtype=np.float32)
    save_file({"model.backbone.weight": weight, "model.head.weight": weight}, folder / STATE)
    save_file({"weight": weight}, folder / "export" / "model.safetensors")
    write_json(folder / "export" / "config.json", {"architecture": "none"})
    trained = asdict(PhaseResult(STEPS if number == 1 else 0, 63_000, 58.0, 2, {"phi_star_gradient": 0.01}))
    made = {"state": state_digest(read_tensors(folder / STATE)), "export": export_digests(folder / "export")}
    write_json(folder / DONE, {"phase": "unlearn", "digest": "0" * 64, **made, **trained})
    return made["state"]


@functools.cache
def _environment() -> dict[str, Any]:
    return environment()


@functools.cache
def _plan() -> dict[str, Any]:
    return make_plan(settings())


def _manifest(folder: Path, counts: dict[str, int]) -> Manifest:
    """index.arrow and summary.json of shards that hold nothing."""
    samples = [
        Sample(f"people/{role}-{row:04d}.png", "members-000000.tar", 512 * row, 100, "a" * 64, role, row % CLASSES)
        for role, count in counts.items()
        for row in range(count)
    ]
    files = {"members-000000.tar": Shard(512 * 10_000, "b" * 64, len(samples))}
    manifest = Manifest(folder / "shards", samples, files, facts={"forget_with_copy_in_retain": 0})
    (folder / "shards").mkdir()
    manifest.save(folder / "shards")
    manifest.save_request(folder)
    return manifest


def _ledger(folder: Path, manifest: Manifest, state: str) -> None:
    """Two attempts at forgetting, in which every requested image enters the loss twice. state: digest of the end."""
    forget = manifest.ids("forget")
    settings = hashlib.sha256((folder / "run.yaml").read_bytes()).hexdigest()
    ledger = Ledger(folder / "ledger.jsonl", facts={"settings": settings})
    for attempt, first, last in ((1, 0, 1), (2, 1, STEPS)):
        ledger.start("unlearn", first, attempt=attempt, world=1)
        for step in range(first, last):
            ids = {"retain": manifest.ids("retain"), "forget": forget if step < 2 else []}
            ledger.step("unlearn", step, ids, frozenset(forget))
    ledger.done("unlearn", STEPS, images=63_000)
    ledger.state("unlearn", STEPS, state, final=True)
    ledger.close()


# -- changing a run ---------------------------------------------------------------------------------------------------


def change_json(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Edit a JSON file in place; NaN is written as Python does, which is what a foreign tool might do."""
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


# -- reading a page ---------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """What a browser would make of the page: elements with attributes, and the visible text, by section."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.style = ""
        self.sections: dict[str, list[str]] = {}
        self._section, self._in_style = "", False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._in_style = tag == "style"
        if tag == "section":
            self._section = dict(attrs).get("aria-labelledby") or ""

    def handle_endtag(self, tag: str) -> None:
        self._in_style = self._in_style and tag != "style"

    def handle_data(self, data: str) -> None:
        if self._in_style:
            self.style += data
            return
        self.words.append(data)
        self.sections.setdefault(self._section, []).append(data)

    def text(self, section: str | None = None) -> str:
        """Visible text with single spaces, of the whole page or of one section."""
        found: Iterable[str] = self.words if section is None else self.sections.get(section, [])
        return " ".join(" ".join(found).split())

    def attributes(self, name: str) -> list[str]:
        """Values of an attribute over all elements."""
        return [value or "" for _, attrs in self.elements for key, value in attrs.items() if key == name]


def page(run: Path) -> Page:
    """The page of a run."""
    return Page(render(load_run(run)))


def verdict(found: Page) -> str:
    """The class of the verdict's box, after "verdict"."""
    boxes = [attrs["class"] for tag, attrs in found.elements if tag == "section" and "class" in attrs]
    return next(box.split()[1] for box in boxes if box and box.startswith("verdict "))

"""Several runs judged as one: the interval by brute force, what is refused, the page and the command line."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rundir import COUNTS, Page, build_run, settings, verdict

from distunlearn.cli.main import main
from distunlearn.config.load import save_config
from distunlearn.config.schema import RunConfig
from distunlearn.errors import ConfigError, DataError, DistunlearnError
from distunlearn.run import pipeline
from distunlearn.run.pool import pool
from distunlearn.verify.statistics import draw_images

SEEDS = (0, 1, 2)


def of_seed(folder: Path, seed: int, case: str = "pass", cfg: RunConfig | None = None) -> Path:
    return build_run(folder, case, replace(cfg or settings(), seed=seed), draw=seed + 3)


@pytest.fixture(scope="module")
def same(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three runs that judge the same images."""
    root = tmp_path_factory.mktemp("same")
    return [of_seed(root / str(seed), seed) for seed in SEEDS]


@pytest.fixture(scope="module")
def runs(same: list[Path], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The same, but that each judges images of its own, as seeds of a recipe do."""
    root = tmp_path_factory.mktemp("seeds")
    found = [shutil.copytree(run, root / run.name) for run in same]
    for seed, run in zip(SEEDS, found, strict=True):
        _rename(run, f"seed{seed}-")
    return found


def _rename(run: Path, prefix: str) -> None:
    """Other names for the held-out images, which no ledger names."""
    for path in (run / "audit").glob("scores-*.json"):
        content = json.loads(path.read_text())
        samples = content["samples"].items()
        content["samples"] = {(prefix if row["role"] == "holdout" else "") + name: row for name, row in samples}
        path.write_text(json.dumps(content))


def brute_force(runs: list[Path], shared: bool) -> tuple[float, float, float]:
    """The pooled difference of view agreement and its 90 % interval: images repeated as drawn, every pair compared."""
    values, drawn = [], []
    for number, run in enumerate(runs):
        sides = {}
        for encoder in ("unlearned", "retrained"):
            samples = json.loads((run / f"audit/scores-{encoder}.json").read_text())["samples"]
            rows = [samples[name] for name in sorted(samples)] if shared else list(samples.values())
            sides[encoder] = [
                np.array([row["view_agreement"] for row in rows if row["role"] == role])
                for role in ("forget", "holdout")
            ]
        draws = draw_images(COUNTS["forget"], COUNTS["holdout"], 200, 0 if shared else SEEDS[number])
        values.append(_share(*sides["unlearned"]) - _share(*sides["retrained"]))
        drawn.append([
            _share(*(np.repeat(side, times) for side, times in zip(sides["unlearned"], weights, strict=True)))
            - _share(*(np.repeat(side, times) for side, times in zip(sides["retrained"], weights, strict=True)))
            for weights in zip(draws.positives, draws.negatives, strict=True)
        ])  # fmt: skip
    low, high = np.percentile(np.mean(drawn, axis=0), [5, 95])
    return float(np.mean(values)), float(low), float(high)


def _share(forget: np.ndarray, holdout: np.ndarray) -> float:
    """Pairs in which the forgotten image scores higher, ties half."""
    return float(((forget[:, None] > holdout).mean() + (forget[:, None] >= holdout).mean()) / 2)


def test_the_interval_is_that_of_brute_force(runs: list[Path], same: list[Path], tmp_path: Path) -> None:
    for name, found, shared in (("seeds", runs, False), ("same", same, True)):
        told, _ = pool(found, tmp_path / name)
        gap = told["gates"]["view_agreement"]
        assert told["same_images"] is shared
        assert (gap["auc"], gap["low"], gap["high"]) == pytest.approx(brute_force(found, shared), abs=1e-12)
        alone = [
            json.loads((run / "audit/summary.json").read_text())["attacks"]["view_agreement"]["gap"] for run in found
        ]
        assert told["attacks"]["view_agreement"]["runs"] == pytest.approx([each["auc"] for each in alone])
        assert gap["high"] - gap["low"] < max(each["high"] - each["low"] for each in alone)
    assert abs(brute_force(same, True)[1] - brute_force(same, False)[1]) > 1e-4, (
        "sharing the draws is no matter of taste"
    )


def test_pool_says_one_verdict_in_file_page_and_terminal(runs: list[Path], tmp_path: Path, capsys) -> None:
    out = tmp_path / "pool"
    assert main(["pool", *map(str, runs), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert said.startswith("Verdict over 3 runs: Pass. ") and f"Report: {out / 'report.html'}" in said
    told = json.loads((out / "pool.json").read_text())
    assert told["gates"]["verdict"] == "pass" and [run["seed"] for run in told["runs"]] == list(SEEDS)
    page = Page((out / "report.html").read_text())
    assert verdict(page) == "pass"
    assert "drawn by chance Source" in page.text("runs"), "with no run's own seed"
    assert "Run 3, seed 2" in page.text("spread")
    assert f"{told['attacks']['view_agreement']['unlearned']['auc']:.3f}" in page.text("levels")
    assert "people/" not in page.text() and str(tmp_path) not in page.text()


def test_one_run_that_fails_far_enough_fails_the_pool(runs: list[Path], tmp_path: Path) -> None:
    bad = of_seed(tmp_path / "bad", 7, "fail")
    told, _ = pool([runs[0], bad], tmp_path / "pool")
    assert told["gates"]["verdict"] == "fail"


REFUSED = [
    ("one", ConfigError, "nothing to pool"),
    ("twice", ConfigError, "are one run"),
    ("copy", ConfigError, "are one run"),
    ("settings", ConfigError, "pretrain.lr: 0.004 there, 0.5 here"),
    ("request", ConfigError, "other requests"),
    ("encoder", ConfigError, "began with other encoders"),
    ("ledger", DataError, "The ledger is not there"),
    ("unaudited", DataError, "has not been audited"),
    ("into", ConfigError, "is a run directory"),
]


@pytest.mark.parametrize(("what", "error", "words"), REFUSED, ids=[row[0] for row in REFUSED])
def test_what_does_not_belong_together_is_refused(
    same: list[Path], tmp_path: Path, what: str, error: type[DistunlearnError], words: str
) -> None:
    first, other, out = same[0], tmp_path / "other", tmp_path / "pool"
    cfg = settings()
    if what in ("copy", "ledger", "unaudited"):
        shutil.copytree(same[0] if what == "copy" else same[1], other)
    if what == "ledger":
        (other / "ledger.jsonl").unlink()
    if what == "unaudited":
        (other / "audit/summary.json").unlink()
    if what == "settings":
        of_seed(other, 1, cfg=replace(cfg, pretrain=replace(cfg.pretrain, lr=0.5)))
    if what in ("request", "encoder"):
        data = {"forget": "list.txt"} if what == "request" else {"holdout_source": "digits"}
        changed = replace(cfg, data=replace(cfg.data, **data))
        if what == "encoder":
            handed_in = replace(cfg.encoder, checkpoint="weights.pt", mean=(0.5,), std=(0.5,))
            changed = replace(changed, encoder=handed_in)
        first = of_seed(tmp_path / "first", 0, cfg=changed)
        counts = COUNTS | {"forget": 41} if what == "request" else COUNTS
        build_run(other, "pass", replace(changed, seed=1), counts, draw=1)
    given = {"one": [first], "twice": [first, first], "into": same[:2]}.get(what, [first, other])
    with pytest.raises(error, match=words) as found:
        pool(given, same[2] if what == "into" else out)
    assert str(found.value).count("\n") == 0 and not out.exists()


def test_seeds_of_one_command_are_run_once_and_pooled(tmp_path: Path, monkeypatch, capsys) -> None:
    began = []

    def run(cfg: RunConfig, out: Path) -> int:
        began.append(cfg.seed)
        build_run(out, "pass", cfg, draw=cfg.seed + 3)
        (out / "report.html").write_text("")
        return 0

    monkeypatch.setattr(pipeline, "run", run)
    save_config(settings(), tmp_path / "settings.yaml")
    command = ["run", "--config", str(tmp_path / "settings.yaml"), "--seeds", "0,1", "--out", str(tmp_path / "out")]
    for _ in range(2):
        assert main(command) == 0
        assert capsys.readouterr().out.startswith("Verdict over 2 runs: Pass. ")
    assert began == [0, 1], "what is finished is kept"
    assert (tmp_path / "out/seed-1/audit/summary.json").exists() and (tmp_path / "out/report.html").exists()
    assert main([*command[:-4], "--seeds", "0,0", "--out", str(tmp_path / "x")]) == 2
    assert main([*command[:-4], "--seeds", "many", "--out", str(tmp_path / "x")]) == 2

"""The forgetting benchmark: its cells and settings, what it refuses, what its tables conclude, and a smoke grid."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from scipy import stats

SCRIPTS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(SCRIPTS))

import forgetting  # noqa: E402
import forgetting_grid  # noqa: E402
import forgetting_requests  # noqa: E402
from forgetting_grid import GRIDS, Cell, cell_config, cell_digest, groups, methods_of  # noqa: E402
from forgetting_report import average_gap, paired, rank_attacks, rows_of, t_interval, write_document  # noqa: E402
from parts import METHODS  # noqa: E402

from distunlearn.data.sources.decode import decode_image  # noqa: E402
from distunlearn.data.sources.sources import open_source  # noqa: E402

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def result(method: str, seed: int, gap: float, *, validation: bool = False, power: float = 0.2, code: int = 0) -> dict:
    """A cell's JSON file: every attack's AUC lies `gap` above the retrained encoder's 0.5, utility is as retrained."""
    attack = {"original": {"auc": 0.5 + power}, "unlearned": {"auc": 0.5 + gap}, "retrained": {"auc": 0.5}}
    weak = attack | {"original": {"auc": 0.51}}
    names = ("view_agreement", "encodermi_vector", "bank_loss", "gradient_norm_network")
    same = {"original": 0.9, "unlearned": 0.9, "retrained": 0.9}
    return {
        "cell": {"dataset": "digits", "objective": "simclr", "encoder": "resnet", "seed": seed, "method": method,
                 "validation": validation},
        "digest": "x", "exit_code": code, "verdict": "pass", "processor_seconds": 10.0,
        "environment": {"python": "3", "distunlearn": "0", "packages": {"torch": "2"}, "cpu": {"cores": 2}},
        "summary": {
            "attacks": dict.fromkeys(names, attack),
            "further_attacks": {"embedding_norm": weak, "rmia": attack | {"gap": {"auc": gap}}},
            "utility": {"knn": same, "linear_probe": same},
            "cost": {"unlearn_images": 1, "retrain_images": 10, "unlearn_seconds": 1.0, "retrain_seconds": 9.0},
            "tow": {"tow": 0.9}, "iam": {"unlearned": 0.8}, "relearning": {"gap": {"auc": 0.01}},
            "similarity": {"forget": {"to_retrained": {"unlearned": 0.9}}},
        },
    }  # fmt: skip


def test_every_method_but_the_reference_is_in_the_small_grid():
    names = methods_of(GRIDS["small"])
    assert names[0] == "none" and sorted(names) == sorted(set(METHODS) - {"retrain"})
    cells = [cell for group in groups(GRIDS["small"]) for cell in group]
    assert len({cell.name for cell in cells}) == len(cells)
    assert len(cells) == 2 * 2 * 2 * (3 * len(names) + 1)


def test_settings_of_cells_are_valid_and_their_digest_knows_no_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(forgetting_requests, "alike", lambda *key: ("fashion_mnist/train-000001",))
    for name, grid in GRIDS.items():
        roots = {d: str(tmp_path) for d in grid.datasets if d.startswith("cifar")}
        for group in groups(grid):
            cfg = cell_config(group[-1], grid, roots, {}, lists=tmp_path)
            assert cfg.audit.tier == (0 if group[-1].validation else 1), name
            assert (cfg.seed, cfg.objective.name) == (group[0].seed, group[0].objective)
    cell, grid = groups(GRIDS["small"])[-1][1], GRIDS["small"]
    plain = cell_config(cell, grid, {}, {})
    assert plain.data.forget == 0.2 and plain.encoder.name == "vit_tiny_patch16_224"
    reused = cell_config(cell, grid, {}, {}, tmp_path)
    assert cell_digest(plain) == cell_digest(reused)
    chosen = {cell.method: {"unlearn.lr": 1e-5}}
    tuned = cell_config(cell, grid, {}, {cell.dataset: chosen})
    assert tuned.unlearn.lr == 0.25e-5 and cell_digest(tuned) != cell_digest(plain)  # a ViT
    resnet = next(c for group in groups(grid) for c in group if c.encoder == "resnet" and c.method == cell.method)
    assert cell_config(resnet, grid, {}, {resnet.dataset: chosen}).unlearn.lr == 1e-5
    assert cell_digest(cell_config(cell, grid, {}, {"another": chosen})) == cell_digest(plain)
    searched = {f"{cell.dataset}-vit": {cell.method: {"unlearn.lr": 3e-5}}}  # on the ViT
    both = {cell.dataset: chosen, resnet.dataset: chosen, **searched}
    assert [cell_config(c, grid, {}, both).unlearn.lr for c in (cell, resnet)] == [3e-5, 1e-5]
    start = {cell.dataset: chosen, f"{cell.dataset}-vit": {}}  # the search chose what it had begun with
    assert cell_digest(cell_config(cell, grid, {}, start)) == cell_digest(plain)


def test_requests_are_alike_and_known_by_their_ids(tmp_path, monkeypatch):
    source = open_source("digits", None, 1 << 20)
    ids = forgetting_requests.alike("digits", None, 3, 40)
    assert len(set(ids)) == 40 and ids == forgetting_requests.alike("digits", None, 3, 40)
    assert ids != forgetting_requests.alike("digits", None, 4, 40)

    def spread(names) -> float:
        images = [decode_image(source.read(i)[0], i, 1 << 20, 1).double().flatten() for i in names]
        return float(torch.stack(images).var(0).sum())

    assert spread(ids) < 0.75 * spread([source.samples[i][0] for i in range(0, 1600, 40)])
    monkeypatch.setattr(forgetting_requests, "alike", lambda dataset, root, seed, count: (f"fashion_mnist/{seed}",))
    grid, cells = GRIDS["requests"], [group[0] for group in groups(GRIDS["requests"])]
    first, other = (next(c for c in cells if c.seed == seed and not c.validation) for seed in (0, 1))
    here, there = (cell_config(first, grid, {}, {}, lists=tmp_path / name) for name in ("here", "there"))
    assert Path(here.data.forget).read_text(encoding="utf-8") == "fashion_mnist/0\n" and here != there
    assert cell_digest(here) == cell_digest(there)
    Path(there.data.forget).write_text("fashion_mnist/1\n", encoding="utf-8")
    assert cell_digest(here) != cell_digest(there)
    assert cell_config(other, grid, {}, {}, lists=tmp_path).data.forget != here.data.forget


def test_variants_are_cells_of_their_own_and_change_what_they_say(tmp_path):
    grid = GRIDS["ablation"]
    cells = [cell for group in groups(grid) for cell in group]
    assert len({cell.name for cell in cells}) == len(cells) == 2 + 3 * (2 + len(grid.variants)) + 3 * 2
    varied = {cell.variant: cell_config(cell, grid, {}, {}) for cell in cells if cell.dataset == "digits"}
    assert set(varied) == {"", *grid.variants}
    assert varied["no-utility"].method.task_weight == 0 and varied[""].method.task_weight == 1
    assert varied["sketch"].constraint.evaluator == "sketch"
    assert len({json.dumps(forgetting_grid.dataclasses.asdict(cfg)) for cfg in varied.values()}) == len(varied)
    found = [result("none", 0, 0.2, validation=True), result("third_party", 0, 0.02), result("third_party", 0, 0.1)]
    found[2]["cell"]["variant"] = "no-gradient"
    rows = rows_of(found, ["view_agreement"])["digits-simclr-resnet"]
    assert set(rows) == {"third_party", "third_party (no-gradient)"}
    assert rows["third_party (no-gradient)"]["gaps"][0] == pytest.approx(100 * 0.1 / 3)


def test_published_settings():
    muc = cell_config(Cell("cifar10", "moco", "resnet18", 0, "none"), GRIDS["muc"], {"cifar10": "/x"}, {})
    assert (muc.data.members, muc.data.forget, muc.pretrain.epochs, muc.pretrain.lr) == (45000, 4500, 800, 0.06)
    assert muc.unlearn.steps == 10 * 88 and muc.objective.queue_size == 4096 and muc.objective.temperature == 0.1
    paper = cell_config(Cell("cifar100", "supervised", "resnet18", 0, "none"), GRIDS["paper"], {"cifar100": "/x"}, {})
    assert (paper.data.members, paper.data.forget, paper.pretrain.epochs) == (10000, 2000, 1600)
    assert paper.data.source == "cifar100" and paper.unlearn.steps * paper.unlearn.retain_batch >= 10 * 8000


def test_a_grid_above_its_cap_is_refused_before_anything_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(forgetting_grid, "seconds_per_image", lambda cfg: 1.0)
    monkeypatch.setattr(forgetting, "run_cell", None)
    with pytest.raises(SystemExit, match="above the cap"):
        forgetting.main(["--grid", "smoke", "--runs", str(tmp_path / "runs"), "--cap", "0.1"])
    assert not (tmp_path / "runs").exists()


def test_estimate_counts_images_as_the_plan_does(monkeypatch):
    monkeypatch.setattr(forgetting_grid, "seconds_per_image", lambda cfg: 1.0)
    monkeypatch.setattr(forgetting_grid, "AUDIT_PASSES", 0)
    monkeypatch.setattr(forgetting_grid, "START_SECONDS", 0)
    grid = GRIDS["smoke"]
    cells = [(cell, cell_config(cell, grid, {}, {})) for group in groups(grid) for cell in group]
    found = forgetting_grid.estimate(grid, cells)
    pretrain, retrain = 6 * 32 * 2, 5 * 32 * 2  # steps of 96 and of 72 images twice, two views
    assert found["digits-simclr-resnet-validation10-none"] == pretrain
    assert found["digits-simclr-resnet-seed0-none"] == pretrain + retrain
    assert found["digits-simclr-resnet-seed0-finetune"] == 6 * 32 * 2


@pytest.mark.parametrize("option", ["--tuned", "--root"])
def test_a_data_set_that_the_grid_has_not_is_refused(tmp_path, option):
    with pytest.raises(SystemExit, match="no data set fashion; it has digits, fashion_mnist"):
        forgetting.main(["--grid", "small", "--runs", str(tmp_path), option, f"fashion={tmp_path}/x.json"])


def test_a_gpu_grid_says_that_there_is_none(tmp_path, capsys):
    import torch

    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match="needs a GPU"):
            forgetting.main(["--grid", "muc", "--runs", str(tmp_path), "--root", "cifar10=/x"])
    forgetting.main(["--grid", "muc", "--root", "cifar10=/x", "--slurm"])
    script = capsys.readouterr().out
    assert f"--array=0-{len(groups(GRIDS['muc'])) - 1}" in script and '--group "$SLURM_ARRAY_TASK_ID"' in script
    assert "--slurm" not in script.splitlines()[-1]
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0


def test_paired_interval_is_that_of_a_paired_t_test():
    ours, other = {0: 1.0, 1: 2.0, 2: 1.5}, {0: 2.0, 1: 3.5, 2: 2.1, 7: 99.0}
    expected = stats.ttest_rel([2.0, 3.5, 2.1], [1.0, 2.0, 1.5]).confidence_interval(0.95)
    mean, low, high = paired(ours, other)
    assert (mean, low, high) == pytest.approx((3.1 / 3, expected.low, expected.high))
    assert t_interval([3.0])[0] == 3.0 and not t_interval([3.0])[1] == t_interval([3.0])[1]


def test_ranking_is_by_power_on_validation_cells_alone():
    results = [result("none", 100, 0.0, validation=True, power=0.3), result("none", 0, 0.0, power=0.01)]
    ranking = dict(rank_attacks(results))
    assert ranking["view_agreement"] == pytest.approx(0.3) and ranking["embedding_norm"] == pytest.approx(0.01)
    assert "rmia" not in ranking
    assert average_gap(result("x", 0, 0.06), ["bank_loss", "view_agreement"]) == pytest.approx(100 * 0.12 / 4)


def test_the_document_says_who_is_ahead_tied_and_behind(tmp_path):
    results = [result("none", 100, 0.0, validation=True)]
    gaps = {"third_party": (0.05, 0.06, 0.055), "worse": (0.15, 0.17, 0.155), "better": (0.01, 0.022, 0.014),
            "tied": (0.04, 0.07, 0.055), "broken": ()}  # fmt: skip
    results += [result(m, seed, gap) for m, values in gaps.items() for seed, gap in enumerate(values)]
    failed = result("broken", 0, 0.0, code=4)
    del failed["summary"]
    results.append(failed | {"verdict": None})
    path = tmp_path / "d.md"
    write_document(path, "small", results, "python benchmarks/forgetting.py")
    text = path.read_text()
    assert "| digits-simclr-resnet | better | tied | worse |" in text
    assert "| broken | no result |" in text and "exit 4" in text
    assert (tmp_path / "d-digits-simclr-resnet.png").read_bytes().startswith(b"\x89PNG")
    assert rows_of(results, ["bank_loss"])["digits-simclr-resnet"]["worse"]["gaps"][0] == pytest.approx(100 * 0.15 / 3)
    with pytest.raises(SystemExit, match="no validation cell"):
        write_document(path, "small", results[1:], "x")


def test_all_settings_together_are_paired_by_setting_and_seed(tmp_path):
    """Gaps of 4 attacks out of 6 figures: 100 * 4 / 6 of each AUC's distance; against scipy's paired test."""
    results = [result("none", 100, 0.0, validation=True)]
    own, other = (0.05, 0.06, 0.055, 0.03), (0.07, 0.06, 0.065, 0.09)
    for place, (ours, theirs) in enumerate(zip(own, other, strict=True)):
        for method, gap in (("third_party", ours), ("finetune", theirs), ("broken", 0.0)):
            made = result(method, place % 2, gap, code=4 if method == "broken" else 0)
            made["cell"]["encoder"] = ("resnet", "vit")[place // 2]
            if method == "broken":
                del made["summary"]
            results.append(made)
    path = tmp_path / "d.md"
    write_document(path, "small", results, "x", {"digits": {"finetune": {"unlearn.lr": 0.00123456}, "sure": {}}})
    text = path.read_text()
    scale = 100 * 4 / 6
    found = stats.ttest_rel([scale * v for v in other], [scale * v for v in own]).confidence_interval(0.95)
    mean = scale * (sum(other) - sum(own)) / 4
    minus = f"{mean:+.2f} [{found.low:+.2f}, {found.high:+.2f}]"
    assert f"| finetune | 4 | {scale * sum(other) / 4:.2f} | {minus} | 0.0 | 10.0 |" in text
    assert "| broken | 0 | no result | | | |" in text
    assert f"| third_party | 4 | {scale * sum(own) / 4:.2f} |  | 0.0 | 10.0 |" in text
    assert "| digits | finetune | `unlearn.lr=0.00123` |" in text and "| digits | sure | those of the grid |" in text


@pytest.mark.matrix
def test_smoke_grid_from_one_command(tmp_path):
    command = [sys.executable, str(SCRIPTS / "forgetting.py"), "--grid", "smoke", "--runs", str(tmp_path / "runs"),
               "--document", str(tmp_path / "smoke.md"), "--jobs", "2"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr[-3000:]
    files = sorted(path.name for path in (tmp_path / "runs/results").glob("*.json"))
    assert len(files) == 4 and json.loads((tmp_path / "runs/results" / files[0]).read_text())["summary"]
    text = (tmp_path / "smoke.md").read_text()
    assert "| third_party |" in text
    again = subprocess.run([*command, "--estimate"], capture_output=True, text=True, timeout=300)
    assert again.returncode == 0 and again.stdout.startswith("0 cells to run")

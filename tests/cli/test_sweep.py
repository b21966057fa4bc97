"""`distunlearn sweep`: who is forgotten when, equal budgets, the rule of choice, going on, SLURM arrays, tiny runs."""

from __future__ import annotations

import itertools
import json
import re
import sys
from pathlib import Path

import pytest
from parts import METHODS

from distunlearn.cli.main import main
from distunlearn.config.load import load_config
from distunlearn.data.manifest.manifest import Manifest
from distunlearn.data.prepare.draw import open_and_draw
from distunlearn.errors import ConfigError, DataError, StoppedError
from distunlearn.methods.search_space import Choice, Log, grid, random
from distunlearn.sweep import sweep as sweeping
from distunlearn.sweep.results import average_gap, choose, gaps, strongest
from distunlearn.sweep.sweep import Search, pending, plan_stage, prepare_sweep, run_sweep, run_task, write_results

sys.path.insert(0, str(Path(__file__).parents[1] / "e2e"))

from tiny import TINY, settings  # noqa: E402


def config(*extra: str):
    return load_config("digits", None, [*TINY, *extra])


def figures(gap: float | None, images: int = 100, original=(0.8, 0.45, 0.9)) -> dict:
    attacks = {
        name: {"original": {"auc": auc}, "gap": {"auc": None if gap is None else sign * gap}}
        for name, auc, sign in zip(("weak", "inverse", "strong"), original, (1, -1, 1), strict=True)
    }
    return {
        "attacks": attacks, "utility": {"knn": {"gap": {"accuracy": -0.02}}},
        "cost": {"unlearn_images": images, "retrain_images": 1000}, "coverage": {"requested": 24}, "verdict": "fail",
    }  # fmt: skip


# -- settings that are tried -------------------------------------------------------------------------------------------


def test_draws_are_a_function_of_seed_and_method_and_lie_in_their_range():
    space = {"unlearn.lr": Log(1e-4, 1e-2), "method.max_share": Choice((0.25, 0.5))}
    many = random(space, 400, 0, "a")
    assert many == random(space, 400, 0, "a") and many[:3] == random(space, 3, 0, "a")
    assert many[:3] != random(space, 3, 1, "a") and many[:3] != random(space, 3, 0, "b")
    rates = sorted(point["unlearn.lr"] for point in many)
    assert 1e-4 <= rates[0] < 1.2e-4 and 8e-3 < rates[-1] <= 1e-2 and 7e-4 < rates[200] < 1.4e-3
    assert {point["method.max_share"] for point in many} == {0.25, 0.5}


def test_a_grid_is_the_product_of_levels_or_a_part_of_it():
    space = {"unlearn.lr": Log(1e-4, 1e-2), "method.max_share": Choice((0.25, 0.5))}
    whole = grid(space, 10, 0, "a")
    levels = itertools.product((1e-4, 1e-3, 1e-2), (0.25, 0.5))
    assert whole == [dict(zip(space, point, strict=True)) for point in levels]
    part = grid(space, 4, 0, "a")
    assert len(part) == 4 and all(point in whole for point in part) and len({str(p) for p in part}) == 4


@pytest.mark.parametrize("method", METHODS)
def test_spaces_name_settings_that_exist_and_are_allowed(method):
    entry = METHODS[method]
    assert bool(entry.space) == (entry.steps == "unlearn")
    for point in [*random(entry.space, 3, 0, method), *grid(entry.space, 500, 0, method)]:
        config(f"method.name={method}", *(f"{key}={value}" for key, value in point.items()))


@pytest.mark.parametrize("search", ["random", "grid"])
def test_every_method_has_the_same_number_of_trials_and_starts_from_the_recipe(tmp_path, search):
    methods = tuple(name for name in METHODS if METHODS[name].space)
    prepare_sweep(config(), Search(methods, trials=5, search=search), tmp_path)
    tasks = plan_stage(tmp_path, "trials")
    assert [task.index for task in tasks] == list(range(5 * len(methods)))
    for method in methods:
        own = [task for task in tasks if task.method == method]
        assert len(own) == 5 and own[0].settings == {} and len({task.digest for task in own}) == 5
    assert len(plan_stage(tmp_path, "bases")) == 2


def test_what_cannot_be_tuned_runs_once(tmp_path):
    prepare_sweep(config(), Search(("none", "finetune"), trials=3), tmp_path)
    assert [task.method for task in plan_stage(tmp_path, "trials")] == ["none"] + 3 * ["finetune"]


# -- who is forgotten --------------------------------------------------------------------------------------------------


def forgotten(out: Path, overrides) -> set[str]:
    cfg = load_config(None, out / "settings.yaml", list(overrides))
    roles = open_and_draw(cfg.data, cfg.seed)[1].roles
    return {i for i, role in roles.items() if role == "forget"}


@pytest.mark.parametrize("forget", ["400", "0.4", "class:3"])
def test_no_reported_image_is_forgotten_in_the_validation(tmp_path, forget):
    cfg = config("data.members=1000", f"data.forget={forget}")
    prepare_sweep(cfg, Search(("finetune",), seeds=(0, 1)), tmp_path)
    validation, *reports = (forgotten(tmp_path, task.overrides) for task in plan_stage(tmp_path, "bases"))
    assert len(reports) == 2 and reports[0] != reports[1] and validation
    assert not validation & (reports[0] | reports[1])
    if forget != "class:3":
        assert len(validation) == len(reports[0]) == 400
    control = forgotten(tmp_path, ["seed=10", f"data.forget={forget}"])  # another seed alone would not do
    assert control & (reports[0] | reports[1])


def test_a_second_forget_set_needs_images(tmp_path):
    large = ["data.members=1000", "data.forget=950", "data.max_forget_share=1", "unlearn.retain_batch=32"]
    cfg = config(*large, "unlearn.steps=200")
    with pytest.raises(DataError, match="fewer than the 950"):
        prepare_sweep(cfg, Search(("finetune",)), tmp_path)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(("wrong", "said"), [
    ({"methods": ("finetun",)}, "--methods: method.name=finetun is not known; did you mean finetune"),
    ({"methods": ()}, "nothing"),
    ({"methods": ("none", "none")}, "twice"), ({"trials": 0}, "--trials is 0"), ({"seeds": ()}, "--seeds is empty"),
    ({"seeds": (1, 1)}, "twice"), ({"seeds": (10,)}, "--validation-seed is 10"), ({"attacks": 0}, "--attacks is 0"),
])  # fmt: skip
def test_a_sweep_that_cannot_be_is_refused(tmp_path, wrong, said):
    with pytest.raises(ConfigError, match=said):
        prepare_sweep(config(), Search(**{"methods": ("finetune",), **wrong}), tmp_path)
    assert not any(tmp_path.iterdir())


def test_another_sweep_does_not_go_into_the_folder(tmp_path):
    prepare_sweep(config(), Search(("finetune",)), tmp_path)
    prepare_sweep(config("runtime.threads=2"), Search(("finetune",)), tmp_path)  # spreads the work, changes no result
    longer = config("unlearn.steps=7")
    for cfg, sweep, differs in ((longer, Search(("finetune",)), "config"), (config(), Search(("none",)), "methods")):
        with pytest.raises(ConfigError, match=f"another sweep .*{differs}"):
            prepare_sweep(cfg, sweep, tmp_path)


# -- the rule ----------------------------------------------------------------------------------------------------------


def test_attacks_are_ranked_by_their_distance_from_chance():
    assert strongest(figures(0.1), 2) == ["strong", "weak"]
    assert strongest(figures(0.1, original=(0.6, 0.1, None)), 4) == ["inverse", "weak"]


def test_the_average_gap_is_that_of_absolute_differences():
    found = gaps(figures(0.1), ["strong", "inverse"])
    assert found == {"strong": 0.1, "inverse": 0.1, "knn": 0.02}
    assert average_gap(found) == pytest.approx((0.1 + 0.1 + 0.02) / 3)
    assert average_gap(gaps(figures(None), ["strong"])) is None and average_gap({}) is None
    for missing in (gaps(figures(0.1), ["gone"]), gaps(figures(float("nan")), ["weak"])):
        assert average_gap(missing) is None


def test_the_smallest_score_is_chosen_then_the_cheaper_then_the_earlier():
    def trial(index, gap, images=100, ended=True):
        return {"index": index, "figures": figures(gap, images) if ended else None}

    rows = [trial(0, 0.2), trial(1, 0.1, 300), trial(2, 0.1, 200), trial(3, 0.1, 200)]
    rows += [trial(4, None), trial(5, 0, 1, ended=False)]
    assert choose(rows, ["strong"])["index"] == 2
    assert choose(rows[:1] + rows[4:], ["strong"])["index"] == 0
    assert choose(rows[4:], ["strong"]) is None


def test_results_report_the_chosen_settings_and_not_the_best_report(tmp_path, monkeypatch):
    """By stand-ins: trial 1 wins the validation and loses the report."""
    prepare_sweep(config(), Search(("finetune", "neg_grad"), trials=3, seeds=(0, 1), attacks=1), tmp_path)
    ran = []

    def fake(folder, processes, extra):
        stage, index = folder.parent.name, int(folder.name)
        task = json.loads((tmp_path / f"{stage}.json").read_text())[index]
        ran.append((stage, index))
        gap = {"bases": 0.3, "reports": 0.25}.get(stage, {0: 0.2, 1: 0.05, 2: 0.1}.get(index, 0.4))
        ended = not (stage == "trials" and task["method"] == "neg_grad")
        found = figures(gap) if ended else None
        folder.parent.mkdir(exist_ok=True)
        (folder.parent / f"{index}.json").write_text(json.dumps({**task, "code": 6 if ended else 4, "figures": found}))
        return 0, ""

    monkeypatch.setattr(sweeping, "_start", fake)
    text = run_sweep(tmp_path, jobs=2).read_text()
    results = json.loads((tmp_path / "results.json").read_text())
    tuned, failed = results["methods"]["finetune"], results["methods"]["neg_grad"]
    assert results["attacks"] == ["strong"] and results["utilities"] == ["knn"]
    assert tuned["trial"] == 1 and tuned["settings"] == random(METHODS["finetune"].space, 2, 0, "finetune")[0]
    assert tuned["validation"] == pytest.approx(0.035) and tuned["default"] == pytest.approx(0.11)
    assert tuned["scores"] == pytest.approx([0.135, 0.135]) and tuned["score"] == pytest.approx(0.135)
    assert tuned["share"] == pytest.approx(0.1) and tuned["failed"] == 0
    assert failed["failed"] == 3 and failed["score"] is None and failed["trial"] is None and not failed["scores"]
    assert "no trial ended" in text and re.search(r"\| finetune \| 0\.1350 \|", text)
    assert ran.count(("reports", 0)) == 1 and ("reports", 2) not in ran and len(ran) == 3 + 6 + 2
    before = list(ran)
    run_sweep(tmp_path)
    assert ran == before  # all skipped
    (tmp_path / "trials" / "2.json").unlink()
    run_sweep(tmp_path)
    assert ran[len(before) :] == [("trials", 2)]
    path = tmp_path / "trials" / "1.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "digest": "0" * 64}))
    with pytest.raises(ConfigError, match="result of other settings"):
        pending(tmp_path, "trials", plan_stage(tmp_path, "trials"))


def test_without_a_report_the_choice_is_written_and_nothing_else_is_run(tmp_path, monkeypatch, capsys):
    """The report that follows goes on from there."""
    ran = []

    def fake(folder, processes, extra):
        stage, index = folder.parent.name, int(folder.name)
        task = json.loads((tmp_path / f"{stage}.json").read_text())[index]
        ran.append((stage, index))
        folder.parent.mkdir(exist_ok=True)
        found = figures({("trials", 1): 0.05}.get((stage, index), 0.2))
        (folder.parent / f"{index}.json").write_text(json.dumps({**task, "code": 6, "figures": found}))
        return 0, ""

    monkeypatch.setattr(sweeping, "_start", fake)
    args = ["sweep", "digits", "--out", str(tmp_path), "--methods", "[finetune]", "--trials", "3", "--seeds", "[0,1]"]
    assert main([*args, *settings(), "--no-report"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "chosen.json")
    assert sorted(ran) == [("bases", 0), ("trials", 0), ("trials", 1), ("trials", 2)]
    chosen = json.loads((tmp_path / "chosen.json").read_text())
    assert chosen == {"finetune": random(METHODS["finetune"].space, 2, 0, "finetune")[0]}
    assert not (tmp_path / "results.json").exists()
    assert main([*args, *settings(), "--no-report", "--dry-run"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "chosen.json")
    ran.clear()
    assert main([*args, *settings()]) == 0
    assert sorted(ran) == [("bases", 1), ("bases", 2), ("reports", 0), ("reports", 1)]
    assert (tmp_path / "results.json").exists()


def test_a_task_that_fails_ends_the_sweep_with_its_code(tmp_path, monkeypatch):
    prepare_sweep(config(), Search(("finetune",)), tmp_path)
    monkeypatch.setattr(sweeping, "_start", lambda *_: (75, "stopped by SIGTERM"))
    with pytest.raises(StoppedError, match="task 0 of .*stopped by SIGTERM"):
        run_sweep(tmp_path)


# -- SLURM -------------------------------------------------------------------------------------------------------------


def test_the_next_stage_is_an_array_of_the_tasks_that_are_left(tmp_path, capsys):
    args = ["sweep", "digits", "--out", str(tmp_path), "--methods", "[finetune]", "--trials", "3", "--dry-run"]
    args += settings()
    assert main([*args, "--jobs", "2", "--partition", "small"]) == 0
    text = capsys.readouterr().out
    assert "#SBATCH --array=0,1%2\n" in text and "#SBATCH --job-name=distunlearn-bases\n" in text
    assert f"out={tmp_path}/bases\n" in text and 'out="$out/$SLURM_ARRAY_TASK_ID"\n' in text
    assert '-m distunlearn sweep --task --out "$out" &\n' in text and "seed=" not in text
    for task in plan_stage(tmp_path, "bases"):
        path = tmp_path / "bases" / f"{task.index}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({**vars(task), "figures": figures(0.3)}))
    trial = plan_stage(tmp_path, "trials")[1]
    (tmp_path / "trials").mkdir()
    (tmp_path / "trials" / "1.json").write_text(json.dumps({**vars(trial), "figures": figures(0.1)}))
    assert main(args) == 0
    assert "#SBATCH --array=0,2\n" in capsys.readouterr().out


def test_a_launcher_is_not_needed(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["sweep", "digits", "--out", str(tmp_path / "sweep")]) == 2
    assert "give --processes N" in capsys.readouterr().err and not (tmp_path / "sweep").exists()


def test_a_task_that_is_none_is_refused(tmp_path, capsys):
    assert main(["sweep", "--task", "--out", str(tmp_path / "trials" / "7")]) == 3
    assert "is no task of a sweep" in capsys.readouterr().err


# -- tiny runs ---------------------------------------------------------------------------------------------------------


def test_a_tiny_sweep_from_end_to_end(tmp_path, monkeypatch):
    """Bases and trials in this process, the report by the command line as jobs start it."""
    real = sweeping._start

    def inside(folder, processes, extra):
        if folder.parent.name == "reports":
            return real(folder, processes, extra)
        run_task(folder, extra)
        return 0, ""

    monkeypatch.setattr(sweeping, "_start", inside)
    prepare_sweep(
        config("method.name=neg_grad", "method.ascent_bound=1e-6"), Search(("finetune", "neg_grad"), trials=1), tmp_path
    )
    run_sweep(tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    base, own = (Manifest.of_run(tmp_path / "bases" / name) for name in ("0", "1"))
    assert not set(base.ids("forget")) & set(own.ids("forget")) and len(base.ids("forget")) == 24
    ended, diverged = (json.loads((tmp_path / "trials" / f"{index}.json").read_text()) for index in (0, 1))
    assert ended["code"] in (0, 6, 7) and ended["error"] is None and ended["figures"]["coverage"]["requested"] == 24
    assert diverged["code"] == 4 and diverged["figures"] is None and "ascent_bound" in diverged["error"]
    for index in ("0", "1"):  # records stay, weights do not
        folder = tmp_path / "trials" / index
        assert (folder / "run.yaml").exists() and not (folder / "training_state.safetensors").exists()
        assert not (folder / "original").exists()
    tuned, failed = results["methods"]["finetune"], results["methods"]["neg_grad"]
    assert tuned["validation"] == average_gap(gaps(ended["figures"], results["attacks"])) == tuned["default"]
    assert tuned["score"] is not None and tuned["share"] > 0
    assert failed["failed"] == failed["tried"] == 1 and failed["score"] is None
    assert (tmp_path / "reports" / "0" / "training_state.safetensors").exists()
    before = (tmp_path / "results.json").read_bytes()
    assert write_results(tmp_path) == run_sweep(tmp_path) and (tmp_path / "results.json").read_bytes() == before

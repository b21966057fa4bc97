"""The dose: the line of weights, the choice on figures with a known answer, and whole tiny runs in this process."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file
from sklearn.metrics import roc_auc_score

from distunlearn.api import open_run
from distunlearn.audit.signals.collect import AUDITED
from distunlearn.config.load import load_config
from distunlearn.config.schema import DoseConfig
from distunlearn.config.shape import plain as plain_settings
from distunlearn.engine.dose.line import line
from distunlearn.engine.dose.looks import FEATURES, Viewer
from distunlearn.engine.phases import FEEDER_ROLES
from distunlearn.errors import ConfigError, DataError, EvidenceError
from distunlearn.methods.base import method_class
from distunlearn.plan.plan import make_plan
from distunlearn.run import pipeline
from distunlearn.verify.dose import Looks, choose
from distunlearn.verify.figures import JUDGED, Raw, Rules, judge
from distunlearn.verify.ledger import read_ledger
from distunlearn.verify.run import check_run, require_distinct
from distunlearn.verify.statistics import Comparison

GRID = DoseConfig().grid
WATCHED = [*tiny.TINY, "data.watch=24"]
AUTO = ("method.dose=auto", "dose.grid=[0,0.4,1,1.4]", "dose.views=2", "dose.loss_share=1e9", "dose.knn_points=100")

# -- the line --------------------------------------------------------------------------------------------------------


def states(seed: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Two states of one small network with a batch norm, whose variances shrink by a factor of 20."""
    generator = torch.Generator().manual_seed(seed)
    start = {
        "0.weight": torch.randn(5, 3, generator=generator),
        "1.running_mean": torch.randn(4, generator=generator),
        "1.running_var": torch.rand(4, generator=generator) + 1,
        "1.num_batches_tracked": torch.tensor(3),
    }
    end = {
        k: v + torch.randn(v.shape, generator=generator) if v.is_floating_point() else v + 4 for k, v in start.items()
    }
    end["1.running_var"] = start["1.running_var"] / 20
    return start, end


@pytest.mark.parametrize("dose", [0.0, 0.15, 0.5, 0.85, 1.0, 1.6])
def test_every_tensor_is_on_the_line(dose):
    start, end = states(0)
    for name, point in line(start, end, dose).items():
        found = point.whole()
        assert point.shape == tuple(found.shape) and found.dtype == start[name].dtype
        assert torch.equal(point.part(2, 3), found.flatten()[2:5]) or found.numel() < 5
        if not found.is_floating_point():
            assert found == (start if dose < 0.5 else end)[name]
            continue
        expected = start[name].double() + dose * (end[name].double() - start[name].double())
        if name.endswith("running_var"):
            assert (found > 0).all()
            if dose > 1:  # control: the plain line would leave them
                assert (expected < 0).all()
                continue
        torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)
        if dose in (0, 1):
            assert torch.equal(found, (start, end)[int(dose)][name])


# -- the choice ------------------------------------------------------------------------------------------------------


def half(**changes) -> DoseConfig:
    return DoseConfig(aim="half", **changes)


def looks(right: float, n: int = 200, m: int = 300, seed: int = 0, rise: float = 0.0, wrong: float = 0.0) -> Looks:
    """Forgotten images stand apart from non-members by a shift that is 0 at the dose `right`; members by the whole.

    rise: of the retained images' loss with the dose, in shares of what is known. wrong: share of them whose neighbours
    are of another class, with the dose.
    """
    generator = np.random.default_rng(seed)
    shift = 1.5 * (1 - np.array(GRID) / right)[:, None, None]
    people = generator.normal(size=(1, n, 2)) + shift + 0.05 * generator.normal(size=(len(GRID), n, 2))
    others = np.repeat(generator.normal(size=(1, m, 2)), len(GRID), 0)
    members = np.repeat(generator.normal(size=(1, 400, 2)) + 1.5, len(GRID), 0)
    loss = 1 + 4 * rise * np.array(GRID)[:, None] + np.zeros((len(GRID), 400)) + generator.normal(0, 1e-3, (1, 400))
    right = np.array([np.arange(400) >= 400 * wrong * dose for dose in GRID], dtype=np.float64)
    right[:, -50:] = np.nan
    return Looks(members, people, others, loss, 5.0, right)


@pytest.mark.parametrize("right", [0.3, 0.7, 1.2])
def test_the_dose_is_found_where_the_forgotten_look_like_non_members(right):
    found = choose(looks(right), half(), seed=0)
    nearby = sorted(GRID, key=lambda dose: abs(dose - right))[:3]
    assert found.dose == found.best and found.dose in nearby
    assert found.low <= found.best <= found.high and found.low > 0


def test_aucs_are_those_of_scikit_learn():
    seen = looks(0.7)
    found = choose(seen, half(), seed=0)
    for a in range(len(GRID)):
        for f in range(2):
            truth = np.r_[np.ones(200), np.zeros(300)]
            expected = roc_auc_score(truth, np.r_[seen.forget[a, :, f], seen.watch[a, :, f]])
            assert found.auc[a, f] == pytest.approx(expected, abs=1e-12)
    np.testing.assert_allclose(found.criterion, np.abs(found.auc - 0.5).sum(1))


def test_members_and_shuffled_labels_do_not_find_it():
    """Controls: with members in the place of the watch images nothing is forgotten; mixed up, no dose stands out."""
    seen = looks(0.7)
    on_members = choose(dataclasses.replace(seen, watch=seen.retain), half(), seed=0)
    assert on_members.dose == 0
    generator, gaps, spans = np.random.default_rng(5), [], []
    for draw in range(10):
        mixed = generator.permutation(np.concatenate([seen.forget, seen.watch], 1), axis=1)
        shuffled = dataclasses.replace(seen, forget=mixed[:, :200], watch=mixed[:, 200:])
        found = choose(shuffled, half(), seed=draw)
        gaps.append(abs(found.dose - 0.7))
        spans.append(found.high - found.low)
    right = choose(seen, half(), seed=0)
    assert np.mean(gaps) > 0.3 and np.median(spans) > 2 * (right.high - right.low)


def test_what_costs_too_much_is_not_chosen_and_zero_is_an_answer():
    cheap, dear = (choose(looks(0.7, rise=rise), half(loss_share=0.1), 0) for rise in (0.1, 0.4))
    assert cheap.dose == 0.7 and dear.dose == 0.2  # 0.4 * 0.2 is below the margin, 0.4 * 0.3 is not
    assert dear.allowed.tolist() == [dose <= 0.2 for dose in GRID]
    clumsy = choose(looks(0.7, wrong=0.1), half(knn_points=4), 0)
    expected = [100 * np.ceil(40 * dose - 1e-9) / 350 for dose in GRID]
    np.testing.assert_allclose(clumsy.lost[:, 1], expected)
    assert clumsy.dose == 0.2 and clumsy.lost_upper[3, 1] > 4 > clumsy.lost_upper[2, 1]  # 3 would be 3.4 +- 1.0 points
    worse = looks(-1.0)  # the method drives them further out
    found = choose(dataclasses.replace(worse, forget=worse.forget - 1.2), half(), 0)
    assert found.dose == 0 and (found.low, found.high) == (0, 0)


def test_few_watch_images_take_the_smallest_dose_of_the_interval():
    seen = looks(0.7, n=60, m=60)
    few, enough = (choose(seen, half(enough=enough), 0) for enough in (250, 60))
    assert few.low < few.best and few.dose == few.low and enough.dose == enough.best == few.best


def test_the_default_aim_is_how_the_forgotten_stand_among_the_retained():
    seen = looks(0.7)
    found, other = choose(seen, DoseConfig(), 0), choose(seen, DoseConfig(), 0, aim="half")
    truth = np.r_[np.ones(200), np.zeros(400)]
    expected = [roc_auc_score(truth, np.r_[seen.forget[0, :, f], seen.retain[0, :, f]]) for f in range(2)]
    np.testing.assert_allclose(found.aims, expected)
    np.testing.assert_allclose(found.criterion, np.abs(found.auc - found.aims).sum(1))
    assert (other.aims == 0.5).all() and (other.auc == found.auc).all()


def test_hard_images_are_not_driven_to_one_half():
    """Members of which the forgotten are the hard ones: retraining leaves them below 1/2, and so does the default."""
    seen = looks(0.7)
    hard = dataclasses.replace(seen, forget=seen.forget - 0.5)
    by_aim = {aim: choose(hard, DoseConfig(), 0, aim=aim).dose for aim in ("retained", "half")}
    assert by_aim["retained"] in (0.55, 0.7, 0.85) and by_aim["half"] < 0.55


# -- whole runs ------------------------------------------------------------------------------------------------------


def config(base: Path, *extra: str, recipe: str = "digits"):
    return load_config(recipe, None, [*WATCHED, f"runtime.reuse={base}", *extra], world=1)


def weights(out: Path, folder: str = ".") -> dict[str, torch.Tensor]:
    return load_file(out / folder / "training_state.safetensors")


def same(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A run that has watch images and was unlearned with the whole dose."""
    out = tmp_path_factory.mktemp("whole") / "run"
    cfg = load_config("digits", None, WATCHED, world=1)
    pipeline.prepare(cfg, out)
    pipeline.pretrain(cfg, out)
    pipeline.unlearn(cfg, out)
    return out


@pytest.fixture(scope="module")
def dosed(base, tmp_path_factory) -> Path:
    """Unlearned with a dose that was chosen."""
    out = tmp_path_factory.mktemp("dosed") / "run"
    pipeline.unlearn(config(base, *AUTO), out)
    return out


def test_a_run_keeps_the_share_that_it_chose_and_says_so(base, dosed):
    curve = json.loads((dosed / "dose/curve.json").read_text())
    done = json.loads((dosed / "done.json").read_text())
    (event,) = [line for line in read_ledger(dosed / "ledger.jsonl") if line["event"] == "dose"]
    ends = [json.loads((at / "done.json").read_text())["state"] for at in (base / "original", dosed / "full_dose")]
    assert [event["original"], event["full"]] == ends and event["dose"] == done["dose"] == curve["dose"]
    assert curve["features"] == list(FEATURES) and len(curve["criterion"]) == 4
    start, end, found = weights(base / "original"), weights(dosed, "full_dose"), weights(dosed)
    for name, value in found.items():
        if value.is_floating_point() and not name.endswith("running_var"):
            expected = start[name].double() + done["dose"] * (end[name].double() - start[name].double())
            torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)
    exported = load_file(dosed / "export/model.safetensors")
    assert all(torch.equal(value, found[f"model.backbone.{name}"]) for name, value in exported.items())
    planned = make_plan(config(base, *AUTO), dosed)["phases"]["unlearn"]
    parts = ("images", "calibration_images", "dose_images")
    assert done["images"] == sum(planned[part] for part in parts) and done["dose_images"] == planned["dose_images"]


def test_a_killed_choice_goes_on_and_comes_to_the_same(base, dosed, tmp_path, monkeypatch):
    look, calls = Viewer.look, []

    def failing(self, *args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return look(self, *args)

    monkeypatch.setattr(Viewer, "look", failing)
    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        pipeline.unlearn(config(base, *AUTO), out)
    assert not (out / "done.json").exists() and (out / "full_dose/done.json").exists()
    pipeline.unlearn(config(base, *AUTO), out)
    assert len(calls) == 3 + 2  # two of four doses were kept
    assert same(weights(out), weights(dosed)) and same(weights(out, "full_dose"), weights(dosed, "full_dose"))
    ours, theirs = (json.loads((at / "dose/curve.json").read_text()) for at in (out, dosed))
    assert {**ours, "seconds": 0} == {**theirs, "seconds": 0}


def test_watch_images_are_in_no_loss_and_in_no_audit(base, tmp_path):
    """Without them, and with others in their place, every weight and every score is the same."""
    assert not any("watch" in roles for roles in FEEDER_ROLES.values()) and "watch" not in AUDITED
    outs = []
    for name, *extra in (("none", "data.watch=0"), ("some", "data.watch=24"), ("control", "data.calibration=30")):
        cfg = load_config("digits", None, [*tiny.TINY, "audit.tier=0", *extra], world=1)
        pipeline.run(cfg, tmp_path / name)
        outs.append(tmp_path / name)
    none, some, control = outs
    assert same(weights(none, "original"), weights(some, "original")) and same(weights(none), weights(some))
    scores = [(out / "audit/scores-unlearned.json").read_text() for out in outs]
    assert scores[0] == scores[1] != scores[2]


def test_a_number_is_the_share_that_is_kept(base, dosed, tmp_path):
    pipeline.unlearn(config(base, "method.dose=0.25"), tmp_path)
    start, end = weights(base / "original"), weights(dosed, "full_dose")
    name = next(name for name in end if name.endswith("projector.last.weight"))
    torch.testing.assert_close(weights(tmp_path)[name], torch.lerp(start[name], end[name], 0.25))
    assert not (tmp_path / "dose").exists()


def test_dose_zero_leaves_the_encoder_and_says_so(base, tmp_path, capfd):
    pipeline.unlearn(config(base, *AUTO[:3], "dose.loss_share=0", "method.name=neg_grad", "unlearn.lr=0.05"), tmp_path)
    assert json.loads((tmp_path / "done.json").read_text())["dose"] == 0
    assert "nothing is forgotten" in capfd.readouterr().err
    assert same(weights(base / "original"), weights(tmp_path))


def test_dose_zero_is_told_from_a_swap():
    """Equal states are an error, but for a recorded dose of 0, which they must have; nothing else may be equal."""
    kept = {"original": "a", "unlearned": "a", "retrained": "b"}
    require_distinct(kept, "neg_grad", 0)
    for states, dose in ((kept, None), (kept, 0.5), ({**kept, "unlearned": "c"}, 0), ({**kept, "retrained": "a"}, 0)):
        with pytest.raises(EvidenceError):
            require_distinct(states, "neg_grad", dose)


def test_dose_zero_is_no_pass_whatever_the_figures():
    """Figures that pass every gate pass no more where the unlearned encoder is the original one."""
    generator = np.random.default_rng(0)

    def comparison(shift: float) -> Comparison:
        return Comparison.of(generator.normal(size=400) + shift, generator.normal(size=400))

    shifts = {"original": 1.5, "unlearned": 0.0, "retrained": 0.0}
    right = {encoder: {name: np.ones(400) for name in ("knn", "linear_probe")} for encoder in shifts}
    compared = {name: {encoder: comparison(shift) for encoder, shift in shifts.items()} for name in JUDGED}
    raw, rules = Raw(compared, right, 400, 400), Rules(0, 200, 0.9, 0.2, 0.2, 2.0, JUDGED, "neg_grad")
    assert judge(raw, rules)["gates"]["verdict"] == "pass"
    assert judge(raw, rules, unchanged=True)["gates"]["verdict"] == "inconclusive"


def test_a_run_of_dose_zero_is_audited_as_unchanged(tmp_path):
    """Its state is the original one, although MoCo's forgetting has filled the queue with other keys."""
    cfg = load_config("digits_moco", None, [*tiny.TINY, "audit.tier=0", "method.dose=0"], world=1)
    assert pipeline.run(cfg, tmp_path) == 7
    found = check_run(tmp_path, Rules.of(plain_settings(cfg)))
    assert found.states["original"] == found.states["unlearned"] and not found.gaps
    assert not same(weights(tmp_path, "full_dose"), weights(tmp_path))


def test_looking_at_a_finished_run_changes_nothing(base, tmp_path):
    shutil.copytree(base, tmp_path / "run")
    before = (tmp_path / "run/training_state.safetensors").read_bytes()
    run = open_run(tmp_path / "run")
    with pytest.raises(DataError, match="has looked at no doses"):
        run.dose  # noqa: B018
    found = run.look_at_doses()
    assert run.dose == found and found["grid"] == list(GRID) and found["full"] != found["original"]
    assert (tmp_path / "run/training_state.safetensors").read_bytes() == before


def test_without_watch_images_auto_is_refused(base, tmp_path):
    """With roles that are drawn at once; with a list, which may name watch images, when the list has been read."""
    with pytest.raises(ConfigError, match=r"needs watch images.*set data\.watch"):
        load_config("digits", None, [*tiny.TINY, "method.dose=auto"], world=1)
    listed = [*tiny.TINY, "data.members=null", tiny.named_roles(tmp_path), "method.dose=auto"]
    with pytest.raises(ConfigError, match=r"needs watch images.*set data\.watch"):
        make_plan(load_config("digits", None, listed, world=1), tmp_path / "run")


def test_by_default_the_whole_change_is_kept():
    cfg = load_config("digits", None, [], world=1)
    assert cfg.method.dose == 1 and cfg.data.watch == 0 and not method_class(cfg).dosed(cfg)

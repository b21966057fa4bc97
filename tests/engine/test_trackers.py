"""Experiment trackers: they get what metrics.jsonl gets, only from the main rank, and stop nothing when they fail."""

from __future__ import annotations

import importlib.util
import io
import math
import sys

import pytest
import tiny
from accelerate import state, tracking
from metrics_file import read_metrics
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from distunlearn.cli.main import main
from distunlearn.config.load import load_config
from distunlearn.engine.metrics_log import METRICS, Telemetry
from distunlearn.engine.trackers import require_trackers
from distunlearn.errors import ConfigError


def events(folder):
    """{tag: [(step, value), ...]} of one phase."""
    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    return {tag: [(e.step, e.value) for e in accumulator.Scalars(tag)] for tag in accumulator.Tags()["scalars"]}


def test_tensorboard_holds_what_metrics_jsonl_holds(tmp_path):
    with Telemetry(tmp_path, tracking=["tensorboard"], stream=io.StringIO()) as telemetry:
        for phase in ("pretrain", "unlearn"):
            telemetry.progress(phase, 5)
            for step in range(1, 6):
                telemetry.log(phase, step, {"loss": 1 / step, "count": step, "note": "text", "phi": math.nan})
    for phase in ("pretrain", "unlearn"):
        rows = [row for row in read_metrics(tmp_path) if row["phase"] == phase]
        found = events(tmp_path / "tensorboard" / phase)
        assert found.keys() == {"loss", "count"} and len(rows) == 5
        for tag, points in found.items():
            assert points == [(row["step"], pytest.approx(row["values"][tag], rel=1e-6)) for row in rows]


def test_steps_done_again_after_a_resume_count_once(tmp_path):
    for attempt, start, steps in (("one", 0, (1, 2, 3)), ("two", 2, (3, 4))):
        with Telemetry(tmp_path, attempt=attempt, tracking=["tensorboard"], stream=io.StringIO()) as telemetry:
            telemetry.progress("unlearn", 4, start=start)
            for step in steps:
                telemetry.log("unlearn", step, {"loss": float(step)})
    assert events(tmp_path / "tensorboard" / "unlearn") == {"loss": [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)]}


class Remembering(tracking.GeneralTracker):
    """In the place of a tracker that needs an account; fails at the step `fails_at`, or at "start" or "finish"."""

    name, requires_logging_directory = "wandb", False
    made: list[Remembering] = []
    fails_at: int | str | None = None

    def __init__(self, run_name: str, **kwargs: object) -> None:
        self.arguments, self.rows, self.ended = {"run_name": run_name, **kwargs}, [], False
        Remembering.made.append(self)

    @property
    def tracker(self):
        return self

    def _fail(self, now: int | str) -> None:
        if now == self.fails_at:
            raise OSError("no route to host")

    def start(self):
        self._fail("start")

    def log(self, values, step=None, **kwargs):
        self._fail(step)
        self.rows.append((step, values))

    def finish(self):
        self.ended = True
        self._fail("finish")


@pytest.fixture
def wandb(monkeypatch):
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "wandb", Remembering)
    monkeypatch.setattr(Remembering, "made", [])
    return Remembering


def write(folder, phases=("unlearn",), **more) -> str:
    stream = io.StringIO()
    with Telemetry(folder, tracking=["wandb", "tensorboard"], stream=stream, **more) as telemetry:
        for phase in phases:
            for step in (1, 2, 3):
                telemetry.log(phase, step, {"loss": float(step)})
    return stream.getvalue()


def test_every_phase_is_an_experiment_run_of_its_own(tmp_path, wandb):
    assert write(tmp_path / "mine", ("pretrain", "unlearn")) == ""
    assert [one.arguments["name"] for one in wandb.made] == ["mine-pretrain", "mine-unlearn"]
    for one in wandb.made:
        assert one.rows == [(step, {"loss": float(step)}) for step in (1, 2, 3)] and one.ended


@pytest.mark.parametrize("when", ["start", 2, "finish"])
def test_a_tracker_that_fails_is_one_warning_and_the_others_go_on(tmp_path, wandb, monkeypatch, when):
    monkeypatch.setattr(wandb, "fails_at", when)
    said = write(tmp_path)
    assert said.count("warning") == 1 and "wandb is off (OSError: no route to host)" in said
    assert len(wandb.made[0].rows) == {"start": 0, 2: 1, "finish": 3}[when]
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3]
    assert [step for step, _ in events(tmp_path / "tensorboard" / "unlearn")["loss"]] == [1, 2, 3]


def test_only_the_main_rank_writes(tmp_path, wandb):
    assert write(tmp_path / "run", is_main=False) == "" and not wandb.made and not (tmp_path / "run").exists()


def test_accelerates_state_is_not_touched(tmp_path, monkeypatch):
    """It would set the number of threads, and call every process of a CPU run the main one."""
    monkeypatch.setattr(state.PartialState, "_shared_state", {})
    with Telemetry(tmp_path, tracking=["tensorboard"], stream=io.StringIO()) as telemetry:
        telemetry.log("unlearn", 1, {"loss": 1.0})
    assert state.PartialState._shared_state == {}


def test_no_tracker_is_metrics_jsonl_alone(tmp_path):
    with Telemetry(tmp_path, stream=io.StringIO()) as telemetry:
        telemetry.log("unlearn", 1, {"loss": 1.0})
    assert [path.name for path in tmp_path.iterdir()] == [METRICS]


# -- the setting -----------------------------------------------------------------------------------------------------


def absent(monkeypatch, *names: str) -> None:
    right = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name in names else right(name, *more))


def test_a_tracker_that_is_not_installed_is_refused_before_anything_is_written(tmp_path, monkeypatch, capsys):
    absent(monkeypatch, "comet_ml")
    options = tiny.settings("tracking=[tensorboard,comet_ml]")
    assert main(["run", "digits", "--out", str(tmp_path / "run"), *options]) == 2
    said = capsys.readouterr().err
    assert "tracking names comet_ml, which is not installed" in said and "pip install comet-ml" in said
    assert said.strip().count("\n") == 0 and not (tmp_path / "run").exists()
    require_trackers(["tensorboard"])  # control


def test_unknown_trackers_are_refused_with_those_that_exist():
    with pytest.raises(ConfigError, match=r"tracking: found .*wandbb.*expected 'tensorboard', 'wandb'"):
        load_config("digits", None, ["tracking=[wandbb]"])
    assert load_config("digits", None, ["tracking=[]"]).tracking == ()
    assert load_config("digits", None, []).tracking == ("tensorboard",)


def test_every_name_of_the_setting_is_a_tracker_of_accelerate(tmp_path, monkeypatch):
    """Its arguments are those that accelerate's class takes; nothing is started."""
    from distunlearn.config.schema import Tracker
    from distunlearn.engine import trackers

    for name in Tracker.__args__:
        kind = tracking.LOGGER_TYPE_TO_CLASS[name]
        monkeypatch.setattr(kind, "start", lambda self: None)
        assert isinstance(trackers._started(name, tmp_path, "unlearn", 0), kind)
    assert "mlflow" not in sys.modules

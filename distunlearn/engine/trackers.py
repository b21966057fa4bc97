"""Experiment trackers, by accelerate's classes: what `tracking` names, each with one experiment run a phase.

accelerate's own start of them is not used: it makes a `PartialState`, which sets threads and devices and believes every
process of a CPU run to be the main one. Whoever makes `Trackers` is on the main rank.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from distunlearn.errors import ConfigError

PROJECT = "distunlearn"


def require_trackers(names: Sequence[str]) -> None:
    """Raise ConfigError unless the packages of all trackers are installed; a tracker's name is that of its package."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"tracking names {', '.join(missing)}, which is not installed; expected installed trackers: "
            f"pip install {' '.join(name.replace('_', '-') for name in missing)}, or leave it out of tracking."
        )


class Trackers:
    """The trackers of the phase at work, started with its first value; another phase ends them and starts its own.

    names: of `tracking`. folder: the run directory. warn: told once of each tracker that fails, which then is off.
    """

    def __init__(self, names: Sequence[str], folder: Path, warn: Callable[[str, str], None]) -> None:
        self._names, self._folder, self._warn = list(dict.fromkeys(names)), folder, warn
        self._phase = ""
        self._live: dict[str, Any] = {}

    def log(self, phase: str, start: int, step: int, values: Mapping[str, float]) -> None:
        """Finite numbers of `step`. phase: a file's name. start: steps that earlier attempts at the phase finished."""
        if phase != self._phase:
            self.close()
            self._phase = phase
            for name in list(self._names):
                self._guarded(name, functools.partial(self._start, name, start))
        for name, tracker in list(self._live.items()):
            self._guarded(name, functools.partial(tracker.log, dict(values), step=step))

    def close(self) -> None:
        """End the experiment runs; safe to call twice."""
        live, self._live = self._live, {}
        for name, tracker in live.items():
            self._guarded(name, tracker.finish)

    def _start(self, name: str, start: int) -> None:
        self._live[name] = _started(name, self._folder, self._phase, start)

    def _guarded(self, name: str, call: Callable[[], object]) -> None:
        """A tracker must never stop a run."""
        try:
            call()
        except Exception as error:
            self._live.pop(name, None)
            self._names.remove(name)
            self._warn(self._phase, f"warning: {name} is off ({type(error).__name__}: {error}); the run goes on")


def _started(name: str, folder: Path, phase: str, start: int) -> Any:
    from accelerate import tracking  # slow to import

    # accelerate's logger raises without a `PartialState`; messages of its trackers are about their own progress.
    tracking.logger = logging.getLogger("accelerate.tracking")
    run = f"{folder.resolve().name}-{phase}"
    arguments: dict[str, dict[str, Any]] = {
        "aim": {"run_name": run, "logging_dir": str(folder)},
        "clearml": {"run_name": run, "project_name": PROJECT},
        "comet_ml": {"run_name": PROJECT},
        "mlflow": {"experiment_name": PROJECT, "run_name": run},
        "swanlab": {"run_name": PROJECT, "experiment_name": run},
        # What an earlier attempt wrote beyond its last checkpoint is hidden.
        "tensorboard": {"run_name": phase, "logging_dir": str(folder / "tensorboard"), "purge_step": start + 1},
        "wandb": {"run_name": PROJECT, "name": run, "group": folder.resolve().name, "dir": str(folder)},
    }
    tracker = tracking.LOGGER_TYPE_TO_CLASS[name](**arguments[name])
    tracker.main_process_only = False  # no question to a `PartialState`: this is the main rank
    tracker.start()
    return tracker

"""Faults on demand, for tests: named points of the engine where a process can be made to fail.

    DISTUNLEARN_FAULT="kill@point=update,rank=1,step=3"        several are separated by ;

The variable works only in a process that has called `allow`, as those of the test suite do. Elsewhere it does nothing,
and the ledger of a run says that it was set.

Actions: `kill` (SIGKILL), `raise` (RuntimeError), `sleep` (seconds=N, default for ever), `stop` (SIGTERM to itself),
`nan` (the value at hand becomes NaN), `inf`, `skip` (the call that follows is left out). Conditions: `point`
(required, one of POINTS), `rank`, `step`, `phase`; what is left out matches everything. A fault fires once
(`times=N`: N times) and says so on standard error. Without the variable every call here returns at its first line.
"""

from __future__ import annotations

import functools
import os
import signal
import sys
import time
from dataclasses import dataclass, field

from torch import Tensor

from distunlearn.common.text import printable
from distunlearn.errors import ConfigError

VARIABLE = "DISTUNLEARN_FAULT"
ACTIONS = ("kill", "raise", "sleep", "stop", "nan", "inf", "skip")
POINTS = (
    "session",  # all ranks have agreed on what they run
    "start",  # a phase begins
    "data",  # before the batches of a micro-batch are read
    "loss",  # the loss of a micro-batch, before the check that it is finite
    "backward",  # before the backward of a micro-batch
    "gradient",  # gradients of the step, before the check
    "finite_check",  # before the ranks agree that a loss is finite
    "norm_check",  # the same of the gradient's norm
    "update",  # before the weights change
    "momentum",  # after the update, before the momentum encoder follows
    "ledger",  # before the step is written down
    "save",  # before a checkpoint
    "saved",  # after a checkpoint
    "dose",  # before a dose is looked at
    "finish",  # before the finished encoder is written
    "audit",  # before some images are shown to an encoder
)


@dataclass
class _Fault:
    action: str
    point: str
    conditions: dict[str, str]
    seconds: float = 1e9
    times: int = 1
    fired: int = field(default=0, init=False)

    def matches(self, point: str, at: dict[str, str]) -> bool:
        return (
            self.point == point and self.fired < self.times
            and all(at.get(name) == value for name, value in self.conditions.items())
        )  # fmt: skip


def _parse(text: str) -> list[_Fault]:
    faults = []
    for part in filter(None, text.split(";")):
        action, _, rest = part.strip().partition("@")
        values = dict(item.partition("=")[::2] for item in rest.split(",") if item)
        point = values.pop("point", "")
        seconds, times = float(values.pop("seconds", "1e9")), int(values.pop("times", "1"))
        if action not in ACTIONS or point not in POINTS or not values.keys() <= {"rank", "step", "phase"}:
            raise ConfigError(
                f"{VARIABLE} has {part!r}, expected action@point=... with an action of {', '.join(ACTIONS)} and a "
                f"point of {', '.join(POINTS)}; unset it: it is for tests only."
            )
        faults.append(_Fault(action, point, values, seconds, times))
    return faults


_allowed = False


def allow() -> None:
    """From now on this process and its forks do what the variable asks for."""
    global _allowed
    _allowed = True


def asked() -> dict[str, object]:
    """What the variable asks for, and whether it works; empty where it is not set."""
    text = os.environ.get(VARIABLE)
    return {"asked": printable(text, 200), "active": _allowed} if text else {}


@functools.cache
def _faults() -> list[_Fault]:
    return _parse(os.environ.get(VARIABLE, "")) if _allowed else []


def reach(point: str, step: int | None = None, phase: str = "") -> bool:
    """This process has come to `point`. True: leave out the call that follows."""
    if not _faults():
        return False
    fault = _next(point, step, phase)
    if fault is None:
        return False
    if fault.action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault.action == "stop":
        os.kill(os.getpid(), signal.SIGTERM)
    if fault.action == "sleep":
        time.sleep(fault.seconds)
    if fault.action == "raise":
        raise RuntimeError(f"injected at {point}")
    return fault.action == "skip"


def poison(point: str, value: Tensor, step: int | None = None, phase: str = "") -> Tensor:
    """`value` itself, or where a fault asks for it the same with NaN or infinity in every place."""
    if not _faults():
        return value
    fault = _next(point, step, phase)
    return value if fault is None else value * float(fault.action)


def poison_gradient(point: str, value: Tensor, step: int | None = None, phase: str = "") -> Tensor:
    """`value` itself, or where a fault asks for it an equal one whose gradient is NaN or infinite."""
    if not _faults():
        return value
    fault = _next(point, step, phase)
    if fault is None:
        return value
    value = value.clone()
    value.register_hook(lambda gradient: gradient * float(fault.action))
    return value


def _next(point: str, step: int | None, phase: str) -> _Fault | None:
    at = {"rank": os.environ.get("RANK", "0"), "step": str(step), "phase": phase}
    for fault in _faults():
        if fault.matches(point, at):
            fault.fired += 1
            where = f"rank {at['rank']}" + (f", {phase} step {step}" if phase else "")
            print(f"fault injected: {fault.action} at {point}, {where}", file=sys.stderr, flush=True)
            return fault
    return None

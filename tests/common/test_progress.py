"""What shows how long a phase still takes: nothing for work of a moment, a line every ten seconds for long work."""

from __future__ import annotations

import io
import sys

import pytest

from distunlearn.common import progress
from distunlearn.common.progress import Rounds, progress_of


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(progress, "time", made)
    return made


def work(clock: Clock, steps: int, seconds: float, unit: str = "") -> None:
    with progress_of("checking shards", unit) as show:
        for step in range(1, steps + 1):
            clock.now += seconds
            show(step, steps)


def test_work_of_a_moment_says_nothing(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    work(clock, 9, 1.0)
    assert capsys.readouterr() == ("", "")


def test_long_work_says_every_ten_seconds_how_long_it_still_takes(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    work(clock, 30, 2.0)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        f"checking shards: {step}/30  {left}"
        for step, left in ((5, "50 s left"), (10, "40 s left"), (15, "30 s left"), (20, "20 s left"),
                           (25, "10 s left"), (30, "took 1 min 00 s"))
    ]  # fmt: skip
    work(clock, 3, 50.0, "images")
    assert "1/3  0 images/s  1 min 40 s left" in capsys.readouterr().err


def test_a_terminal_has_a_bar_after_a_second(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", stream)
    work(clock, 3, 2.0)
    assert "3/3" in stream.getvalue() and "took 6 s" in stream.getvalue()


def test_other_processes_are_silent(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "is_main", lambda: False)
    work(clock, 30, 2.0)
    assert capsys.readouterr() == ("", "")


def test_trainings_that_were_finished_before_do_not_count(clock: Clock) -> None:
    rounds, said = Rounds(5), []
    for took in (0.1, 0.1, 100.0, 300.0, 0.0):
        said.append(rounds.next())
        clock.now += took
    assert said == ["1 of 5", "2 of 5", "3 of 5", "4 of 5, about 3 min 20 s left", "5 of 5, about 3 min 20 s left"]

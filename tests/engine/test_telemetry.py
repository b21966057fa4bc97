"""Telemetry: rows survive kills and resumes, text from outside is inert, a broken tracker stops nothing."""

from __future__ import annotations

import io
import json
import math
import re

import numpy as np
import pytest
import torch
from metrics_file import read_metrics

from distunlearn.common.progress import Progress, duration
from distunlearn.common.text import printable
from distunlearn.engine.metrics_log import METRICS, Telemetry


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def quiet(folder, **more):
    return Telemetry(folder, stream=io.StringIO(), **more)


def test_rows_are_written_flushed_and_read_back(tmp_path):
    with quiet(tmp_path, attempt="one") as telemetry:
        telemetry.log("unlearn", 1, {"loss": torch.tensor(0.5), "count": np.int64(3), "on": True, "name": "x"})
        row = json.loads((tmp_path / METRICS).read_text())  # readable while the run still goes on
        assert row["phase"] == "unlearn" and row["step"] == 1 and row["attempt"] == "one"
        assert isinstance(row["wall"], float)
        telemetry.log("unlearn", 2, {"loss": math.nan, "low": -math.inf})
    rows = read_metrics(tmp_path)
    assert rows[0]["values"] == {"loss": 0.5, "count": 3, "on": True, "name": "x"}
    assert math.isnan(rows[1]["values"]["loss"]) and rows[1]["values"]["low"] == -math.inf
    for line in (tmp_path / METRICS).read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_torn_last_line_is_left_out_and_cut_before_the_next_row(tmp_path):
    with quiet(tmp_path) as telemetry:
        telemetry.log("pretrain", 1, {"loss": 1.0})
    with (tmp_path / METRICS).open("a") as file:
        file.write('{"phase": "pretrain", "step": 2, "wal')
    assert [row["step"] for row in read_metrics(tmp_path)] == [1]
    with quiet(tmp_path, attempt="two") as telemetry:
        telemetry.log("pretrain", 2, {"loss": 0.9})
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]


def test_steps_done_again_after_a_resume_count_once(tmp_path):
    with quiet(tmp_path, attempt="one") as telemetry:
        for step in (1, 2, 3):
            telemetry.log("pretrain", step, {"loss": 1.0})
        telemetry.log("unlearn", 1, {"loss": 5.0})
        telemetry.log("unlearn", 1, {"phi": 6.0})  # two rows of one step and one attempt are both kept
    with quiet(tmp_path, attempt="two") as telemetry:
        telemetry.log("pretrain", 3, {"loss": 2.0})  # the checkpoint was at step 2
        telemetry.log("pretrain", 4, {"loss": 2.0})
    kept = [(row["phase"], row["step"], row["attempt"]) for row in read_metrics(tmp_path)]
    assert kept == [
        ("pretrain", 1, "one"),
        ("pretrain", 2, "one"),
        ("unlearn", 1, "one"),
        ("unlearn", 1, "one"),
        ("pretrain", 3, "two"),
        ("pretrain", 4, "two"),
    ]


def test_other_ranks_write_and_say_nothing(tmp_path, capsys):
    with Telemetry(tmp_path / "run", is_main=False) as telemetry:
        telemetry.log("unlearn", 1, {"loss": 1.0})
        telemetry.note("unlearn", "hello")
        with telemetry.progress("unlearn", 2) as bar:
            bar.update(2, 0.1, 10)
    assert not (tmp_path / "run").exists()
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_plain_lines_first_last_and_every_interval(tmp_path, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr("distunlearn.common.progress.time.monotonic", lambda: clock[0])
    with quiet(tmp_path, attempt="a1", interval=10.0) as telemetry:
        with telemetry.progress("unlearn", 40, start=10) as bar:
            for step in range(11, 41):
                clock[0] += 1.0
                bar.update(step, 1 / step, images=128 * step)
        text = telemetry.stream.getvalue()
    lines = text.splitlines()
    assert [int(re.search(r"(\d+)/40", line)[1]) for line in lines] == [11, 21, 31, 40]
    assert lines[0] == "unlearn: 11/40  loss 0.0909  128 images/s  29 s left"
    assert lines[-1] == "unlearn: 40/40  loss 0.0250  128 images/s  took 30 s"
    log = (tmp_path / "logs" / "unlearn.log").read_text().splitlines()
    assert len(log) == 4 and all(re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ attempt=a1 \d+/40 ", line) for line in log)


def test_plain_lines_go_to_standard_error(tmp_path, capsys):
    with Telemetry(tmp_path) as telemetry, telemetry.progress("audit", 1) as bar:
        bar.update(1)
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("audit: 1/1")


def test_logs_are_appended_across_attempts(tmp_path):
    for attempt in (0, 1):
        with quiet(tmp_path, attempt=attempt) as telemetry:
            telemetry.note("prepare", "written")
    lines = (tmp_path / "logs" / "prepare.log").read_text().splitlines()
    assert [line.split()[1] for line in lines] == ["attempt=0", "attempt=1"]


def test_terminal_gets_a_bar_and_the_log_plain_lines(tmp_path):
    terminal = Terminal()
    with Telemetry(tmp_path, stream=terminal) as telemetry:
        with telemetry.progress("pretrain", 3) as bar:
            assert bar.is_live
            for step in (1, 2, 3):
                bar.update(step, 0.5, images=4 * step)
            telemetry.note("pretrain", "shard [bold]checked[/bold]")
    assert "3/3" in terminal.getvalue() and "[bold]checked[/bold]" in terminal.getvalue()
    assert "1/3  loss 0.5000" in (tmp_path / "logs" / "pretrain.log").read_text()
    telemetry.close()  # twice is fine


HOSTILE = "x\x1b[2J\r\nforged: ok\x9b31m\u202eevil\u2028\x00"


def test_control_characters_are_inert_everywhere(tmp_path):
    stream = io.StringIO()
    with Telemetry(tmp_path, stream=stream, attempt=HOSTILE) as telemetry:
        telemetry.note(HOSTILE, HOSTILE)
        telemetry.log(HOSTILE, 1, {HOSTILE: HOSTILE, "loss": 1.0})
        with telemetry.progress(HOSTILE, 1) as bar:
            bar.update(1, 0.5)
    logs = [path for path in (tmp_path / "logs").iterdir()]
    assert len(logs) == 1 and re.fullmatch(r"[A-Za-z0-9_-]+\.log", logs[0].name)
    for text in (stream.getvalue(), logs[0].read_text(), (tmp_path / METRICS).read_text()):
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e\u2028]", text)
    assert not any(line.startswith("forged") for line in stream.getvalue().splitlines())
    assert len(read_metrics(tmp_path)) == 1


def test_printable_cuts_and_keeps_plain_text():
    assert printable("Größe 3 µm") == "Größe 3 µm"
    assert printable("a" * 500, 10) == "aaaaaaa..." and len(printable("\x00" * 500, 10)) == 10
    assert printable("a" * 10, 10) == "a" * 10


def test_duration_and_a_silent_bar():
    assert [duration(s) for s in (0, 59.4, 59.6, 3599.7)] == ["0 s", "59 s", "1 min 00 s", "1 h 00 min"]
    Progress("x", 1, 0, None).update(1, 0.5, 3)

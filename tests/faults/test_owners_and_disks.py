"""Owners of a run directory, disks that fail, records that are none: found from outside."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
from refused import refusal
from sizes import SMALL

from distunlearn.cli.main import main
from distunlearn.common import records

OWNER_ALONE = """
import sys
from distunlearn.engine.run_lock import Lease
Lease(sys.argv[1])
print(1, flush=True)
input()
"""


# -- owners ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "verb", ["report", "purge", "unlearn", "audit", "prepare", "run", "pretrain", "commit", "dose"]
)
def test_no_verb_works_beside_a_living_owner(run, capsys, verb):
    """Which is another process; nothing is written, and it is said who is there."""
    own = {"report": [str(run)], "purge": [str(run), "--apply"], "audit": [str(run)], "dose": [str(run)]}
    arguments = own.get(verb, ["digits", "--out", str(run), *tiny.settings()])
    with subprocess.Popen(
        [sys.executable, "-c", OWNER_ALONE, str(run)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as owner:
        assert owner.stdout.readline() == "1\n"
        (run / "plan.json").unlink(missing_ok=True)
        said = refusal(capsys, [verb, *arguments], run, code=2)
        assert f"in use by process {owner.pid} on " in said and not (run / "plan.json").exists()
        owner.communicate("")
    if verb == "report":  # control: it has gone
        assert main(["report", str(run)]) == 0


def test_a_run_whose_folder_is_deleted_ends_with_a_sentence(copied, forget):
    group = forget(copied, world=1, DISTUNLEARN_FAULT="sleep@point=ledger,step=1,seconds=4")
    limit = time.monotonic() + 60
    while not group.logs[0].exists() or "fault injected" not in group.said():
        assert time.monotonic() < limit
        time.sleep(0.05)
    shutil.rmtree(copied)
    assert group.wait() == [3]
    assert "is gone, it was moved or deleted while this run was at work" in group.said()
    assert "Traceback" not in group.said() and not copied.exists()


def test_a_run_that_another_reuses_must_be_finished(trained, tmp_path, capsys):
    begun = shutil.copytree(trained, tmp_path / "begun")
    (begun / "original" / "done.json").unlink()
    out = tmp_path / "run"
    for verb in ("run", "unlearn"):
        arguments = [verb, "digits", "--out", str(out), *tiny.settings(*SMALL, f"runtime.reuse={begun}")]
        assert "has no finished original encoder" in refusal(capsys, arguments, begun)
    assert not out.exists()


@pytest.mark.parametrize(
    ("mode", "group", "said"),
    [(0o700, 12345, None), (0o755, 12345, None), (0o770, 12345, "every member of the group 12345"), (0o770, 0, None),
     (0o777, 0, "every user of this machine")],
)  # fmt: skip
def test_a_folder_that_others_may_write_into_is_warned_of(copied, capsys, mode, group, said):
    """The user's own group, of nobody else, is no other."""
    if os.geteuid() != 0:
        pytest.skip("another group needs root")
    os.chown(copied, -1, group)
    copied.chmod(mode)
    assert main(["unlearn", "digits", "--out", str(copied), *tiny.settings(*SMALL)]) == 0
    told = capsys.readouterr().err
    assert (said in told and "warning: " in told) if said else "may be written by" not in told


# -- disks and damaged records ---------------------------------------------------------------------------------------


def test_a_torn_first_line_does_not_end_a_run_for_good(trained, tmp_path, forget, zygote):
    out = Path(shutil.copytree(trained, tmp_path / "run"))
    shutil.rmtree(out / "original")
    (out / "ledger.jsonl").write_text('{"event":"code","version":"0.')  # what a full disk left of the very first line
    for verb in ("pretrain", "unlearn", "unlearn"):
        group = zygote.start(1, [verb, "digits", "--out", str(out), *tiny.settings(*SMALL)])
        assert group.wait() == [0], group.said()
    first = json.loads((out / "ledger.jsonl").read_text().splitlines()[0])
    assert (first["event"], first["bytes"]) == ("cut", 29)


MALFORMED = [
    b"123", b"null", b'{"phase":"unlearn"}', b'{"event":"step","phase":"unlearn"}',
    b'{"event":"start","phase":"unlearn","step":"x"}', b'\xff\xfe{"event"', b'{"event":["step"]}',
    b'{"event":"step","phase":"unlearn","step":1,"count":{},"forget":[1]}', b'{"event":"code"}', b"[" * 5000,
]  # fmt: skip


@pytest.mark.parametrize("line", MALFORMED, ids=range(len(MALFORMED)))
@pytest.mark.parametrize("verb", ["status", "report"])
def test_lines_that_are_no_records_are_told_in_one_sentence(run, capsys, line, verb):
    with (run / "ledger.jsonl").open("ab") as ledger:
        ledger.write(line + b"\n")
    assert "ledger.jsonl, line " in refusal(capsys, [verb, str(run)], run)


BROKEN = {
    "cut": b'{"phase": "unl',
    "list": b"[]",
    "no digest": b'{"phase": "unlearn"}',
    "not UTF-8": b"\xff",
    "folder": None,
}


@pytest.mark.parametrize("content", BROKEN)
@pytest.mark.parametrize("name", ["done.json", "audit/summary.json"])
def test_a_damaged_record_is_told_in_one_sentence(run, capsys, name, content):
    (run / name).unlink()
    if BROKEN[content] is None:
        (run / name).mkdir()
    else:
        (run / name).write_bytes(BROKEN[content])
    for verb in ("status", "report"):
        assert name in refusal(capsys, [verb, str(run)], run)


@pytest.mark.parametrize("name", ["ledger.jsonl", "metrics.jsonl", "logs", "watch", "owner.json"])
def test_a_folder_in_the_place_of_a_file_or_the_other_way_round(copied, capsys, name):
    path = copied / name
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    path.write_text("") if name in ("logs", "watch") else path.mkdir()
    capsys.readouterr()
    assert main(["unlearn", "digits", "--out", str(copied), *tiny.settings(*SMALL)]) == 3
    said = capsys.readouterr().err
    assert name in said and "Traceback" not in said


FAILING = [(errno.ENOSPC, "ledger.jsonl"), (errno.EIO, "metrics.jsonl"), (errno.EDQUOT, "unlearn.log")]


@pytest.mark.parametrize(("number", "name"), FAILING)
def test_a_disk_that_fails_in_training_ends_it_with_3_and_the_file(copied, capsys, monkeypatch, number, name):
    """From the second line on; the next start goes on and ends as if nothing had been."""
    write, fired = os.write, []

    def failing(handle, data):
        if os.readlink(f"/proc/self/fd/{handle}").endswith(name):
            fired.append(1)
            if len(fired) > 1:
                raise OSError(number, os.strerror(number))
        return write(handle, data)

    monkeypatch.setattr(records.os, "write", failing)
    arguments = ["unlearn", "digits", "--out", str(copied), *tiny.settings(*SMALL)]
    assert main(arguments) == 3
    said = capsys.readouterr().err
    assert f"{name} cannot be written ({os.strerror(number)})" in said and "Traceback" not in said and len(fired) > 1
    monkeypatch.undo()
    assert main(arguments) == 0


WHOLE = [("unlearn", "rank-0000.json", errno.ENOSPC), ("unlearn", "done.json", errno.EIO),
         ("audit", "summary.json", errno.EDQUOT), ("report", "report.html", errno.EROFS)]  # fmt: skip


@pytest.mark.parametrize(("verb", "name", "number"), WHOLE)
def test_a_disk_that_fails_under_a_file_that_is_replaced_ends_it_with_3(
    request, capsys, monkeypatch, verb, name, number
):
    """Watch files, records, figures, the page: nothing half-written takes their place, and the next start goes on."""
    folder = request.getfixturevalue("copied" if verb == "unlearn" else "run")
    replace, fired = os.replace, []

    def failing(source, target, **more):
        if Path(target).name == name:
            fired.append(target)
            raise OSError(number, os.strerror(number), str(source))
        return replace(source, target, **more)

    monkeypatch.setattr(os, "replace", failing)
    arguments = [verb, str(folder)]
    if verb == "unlearn":
        arguments = [verb, "digits", "--out", str(folder), *tiny.settings(*SMALL)]
    before = {path: path.read_bytes() for path in folder.rglob(name)}
    assert main(arguments) == 3
    said = capsys.readouterr().err
    assert fired and name in said and os.strerror(number) in said and "Traceback" not in said, said
    assert before == {path: path.read_bytes() for path in folder.rglob(name)}
    monkeypatch.undo()
    assert main(arguments) in (0, 6, 7)


@pytest.fixture
def read_only(run):
    """A run on a file system that nobody can write to."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting needs root")
    place = run.parent / "mounted"
    place.mkdir()
    options = ["-o", "size=60m", "tmpfs", str(place)]
    if subprocess.run(["mount", "-t", "tmpfs", *options], capture_output=True).returncode:
        pytest.skip("nothing can be mounted here")
    try:
        shutil.copytree(run, place / "run")
        subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
        yield place / "run"
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_read_only_run_directory_ends_every_verb_with_a_sentence(read_only, capsys):
    same = ["digits", "--out", str(read_only), *tiny.settings()]
    for arguments in (["unlearn", *same], ["run", *same], ["audit", str(read_only)], ["report", str(read_only)]):
        assert "Read-only file system" in refusal(capsys, arguments, read_only)

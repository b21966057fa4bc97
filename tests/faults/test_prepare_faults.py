"""`prepare` and `index` that are killed, started twice, or lose a worker: the next one gives the same bytes."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
from forked import fork, killed_at
from hostile_tars import img2dataset, jpeg
from refused import SMALL, TINY, folder_of, plan, refusal, sets, tree

from distunlearn.cli.main import main
from distunlearn.config.schema import DataConfig
from distunlearn.data.loading.verify import read_sample, verify_shards
from distunlearn.data.prepare import write_shards
from distunlearn.data.prepare.index_shards import _work_folder, index_shards
from distunlearn.data.prepare.write_shards import prepare_shards
from distunlearn.errors import DataError


def killed_prepare(last: int, cfg: DataConfig, folder: Path, log: Path) -> int:
    events = ("open", "os.rename", "os.remove")
    return killed_at(last, lambda: prepare_shards(cfg, 0, folder), log, events, ".partial")


def test_s20_a_prepare_that_was_killed_goes_on_to_the_same_bytes(tmp_path, monkeypatch):
    cfg = replace(SMALL, samples_per_shard=8)
    whole, log = tmp_path / "whole", tmp_path / "log"
    assert killed_prepare(0, cfg, whole, log) == 0
    events = int(log.read_text())
    assert events > 20
    written: list[str] = []
    real = write_shards.HashingFile
    resumed = 0
    for point in sorted({1 + k * (events - 2) // 9 for k in range(10)}):
        folder = tmp_path / str(point) / "shards"
        assert killed_prepare(point, cfg, folder, log) == -signal.SIGKILL  # the kill came
        assert not folder.exists()  # nothing that could be taken for a whole set
        written.clear()
        with monkeypatch.context() as patch:
            patch.setattr(write_shards, "HashingFile", lambda path: (written.append(path.name), real(path))[1])
            prepare_shards(cfg, 0, folder)
        assert tree(folder) == tree(whole)
        assert [p.name for p in folder.parent.iterdir()] == ["shards"]
        resumed += len(written) < 8
    assert len(list(whole.glob("*.tar"))) == 8 and resumed >= 5  # shards that were whole were kept


def test_s20_what_changed_since_the_kill_is_written_anew(tmp_path):
    """A shard of the first attempt is kept only for the same images, unchanged, and only if its own bytes are right."""
    root, folder = tmp_path / "images", tmp_path / "shards"
    folder_of(root, jpeg(500), "more.jpg")
    cfg = DataConfig(
        source="imagefolder", root=str(root), members=None, forget=10, holdout=6, calibration=4, third_party=4,
        third_party_audit=4, samples_per_shard=8,
    )  # fmt: skip

    def stop(done: int, total: int) -> None:
        if done >= 40:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare_shards(cfg, 0, folder, progress=stop)
    partial = tmp_path / ".shards.partial"
    assert len(list(partial.glob("*.tar"))) == 5 and not folder.exists()
    first, second = sorted(partial.glob("*.tar"))[:2]
    with tarfile.open(first) as tar:
        changed = json.loads(tar.extractfile(tar.getmembers()[2]).read())["id"]
    (root / changed).write_bytes(jpeg(900))
    content = bytearray(second.read_bytes())
    content[700] ^= 1
    second.write_bytes(content)
    manifest = prepare_shards(cfg, 0, folder)
    verify_shards(manifest, deep=True)
    assert all(read_sample(manifest, i) == (root / i).read_bytes() for i in manifest.by_id)
    fresh = tmp_path / "fresh"
    prepare_shards(cfg, 0, fresh)
    assert tree(fresh) == tree(folder)


def test_s20_any_number_of_processes_writes_the_same_bytes(tmp_path):
    prepare_shards(SMALL, 0, tmp_path / "one")
    prepare_shards(replace(SMALL, prepare_workers=2), 0, tmp_path / "two")
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
    prepare_shards(SMALL, 1, tmp_path / "other")
    assert tree(tmp_path / "one") != tree(tmp_path / "other")


def test_a_worker_that_is_killed_ends_prepare_with_a_sentence(tmp_path):
    killed: list[int] = []

    def kill(done: int, total: int) -> None:
        for worker in [] if killed else multiprocessing.active_children():
            os.kill(worker.pid, signal.SIGKILL)
            killed.append(worker.pid)

    with pytest.raises(DataError, match="was killed.*data.prepare_workers"):
        prepare_shards(replace(SMALL, prepare_workers=2, samples_per_shard=4), 0, tmp_path / "shards", progress=kill)
    assert killed and not os.listdir(tmp_path)


def test_s21_a_second_prepare_into_the_same_folder_is_refused(tmp_path, capsys):
    """While one prepare is held still by a signal, in the middle of its work."""
    out = tmp_path / "run"
    arguments = ["prepare", "digits", "--out", str(out), *sets(*TINY)]

    stopped = []

    def hook(event: str, args: tuple) -> None:
        if event == "open" and str(args[0]).endswith("members-000001.tar") and not stopped:
            stopped.append(True)  # the shard is opened a second time, to read back where its images lie
            os.kill(os.getpid(), signal.SIGSTOP)

    first = fork(lambda: (sys.addaudithook(hook), os._exit(main(arguments))))
    assert os.WIFSTOPPED(os.waitpid(first, os.WUNTRACED)[1])  # it is in the middle
    try:
        assert "Another prepare is writing" in refusal(capsys, arguments, out)
    finally:
        os.kill(first, signal.SIGCONT)
        status = os.waitpid(first, 0)[1]
    assert os.waitstatus_to_exitcode(status) == 0
    assert main(plan(out)) == 0  # the first was not disturbed


def test_two_indexes_of_one_folder(tmp_path):
    img2dataset(tmp_path / "shards")
    with _work_folder(tmp_path / "shards"), pytest.raises(DataError, match="Another index works on"):
        index_shards(SMALL, tmp_path / "shards")

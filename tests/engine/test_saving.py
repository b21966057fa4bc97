"""Saving beside training: what is saved is the state at the time, and what goes wrong is told, on all ranks."""

from __future__ import annotations

import errno
import os
import shutil
import threading
import time

import pytest
import torch
from safetensors import SafetensorError

from distunlearn.config.schema import CheckpointConfig, RunConfig
from distunlearn.distributed.world import World
from distunlearn.engine.backends.base import Backend
from distunlearn.engine.checkpoint import async_save as module
from distunlearn.engine.checkpoint import format, tensors
from distunlearn.engine.checkpoint.async_save import Saver, agreed_checkpoint
from distunlearn.engine.checkpoint.format import latest_checkpoint
from distunlearn.engine.checkpoint.tensors import read_state
from distunlearn.engine.ledger import Ledger
from distunlearn.engine.preemption import StopRequest
from distunlearn.errors import DataError, NumericsError, RankLostError

LIMIT = 20  # seconds for what takes none


class Rank(World):
    """A rank whose fellow is a list of what it says."""

    said: tuple = ()

    def broadcast_object(self, value):
        return "common" if isinstance(value, str) else value

    def gather_objects(self, value):
        return [value, *self.said]

    def all_finite(self, value):
        return bool(torch.isfinite(value).all())


class Training:
    """One weight of 1000 equal numbers, which is all there is to save."""

    def __init__(self, folder, *, asynchronous=True, rank=0, world=1, sharded="auto"):
        self.folder, self.notes = folder / "checkpoints", []
        self.backend = Backend(RunConfig(), Rank(rank, world, torch.device("cpu")))
        model = torch.nn.Module()
        model.w = torch.nn.Parameter(torch.zeros(1000))
        self.backend.model, self.backend.optimizer = model, torch.optim.SGD(model.parameters(), 1.0, momentum=0.5)
        self.backend.optimizer.state[model.w] = {"momentum_buffer": torch.zeros(1000)}
        self.ledger = Ledger(folder / f"ledger-{rank}.jsonl")
        self.stop = StopRequest(folder)
        settings = CheckpointConfig(asynchronous=asynchronous, sharded=sharded)
        self.saver = Saver(self.folder, self.backend, settings, self.ledger, self.stop, self.notes.append)

    def set(self, value):
        with torch.no_grad():
            self.backend.model.w.fill_(value)
            next(iter(self.backend.optimizer.state.values()))["momentum_buffer"].fill_(value)

    def save(self, step, value=None):
        self.set(step if value is None else value)
        self.saver.save(
            step, {"queue.keys": self.backend.model.w.detach()[:3]}, {"digest": "d", "phase": "unlearn", "ranks": []}
        )

    def found(self):
        """The step of the newest checkpoint and the one number in all its tensors."""
        checkpoint, rejected = latest_checkpoint(self.folder)
        if checkpoint is None:
            return None
        assert not rejected
        everything = [module_whole(value).flatten() for value in read_state(checkpoint).values()]
        assert [len(part) for part in everything].count(1000) == 2
        return checkpoint.step, set(torch.cat(everything).tolist())


def module_whole(value):
    return value if isinstance(value, torch.Tensor) else value.whole()


class Gate:
    """Holds the writing of files up until it is opened."""

    def __init__(self, monkeypatch, name="write_pieces"):
        self.reached, self.open = threading.Event(), threading.Event()
        right = getattr(module, name)

        def held(*args, **kwargs):
            self.reached.set()
            assert self.open.wait(LIMIT)
            return right(*args, **kwargs)

        monkeypatch.setattr(module, name, held)


@pytest.fixture
def training(tmp_path):
    made = []

    def make(**settings):
        made.append(Training(tmp_path, **settings))
        return made[-1]

    yield make
    for one in made:
        one.saver.__exit__(None, None, None)
        one.ledger.close()
    assert not any(thread.name.startswith("save-") for thread in threading.enumerate())


def test_training_goes_on_and_what_is_saved_is_the_state_at_the_time(training, monkeypatch):
    one, gate = training(), Gate(monkeypatch)
    one.save(1)
    assert gate.reached.wait(LIMIT)
    one.set(99.0)  # the next step, before a byte is written
    assert one.found() is None and one.stop.reason is None and one.saver._job is not None
    gate.open.set()
    one.saver.wait()
    assert one.found() == (1, {1.0}) and one.saver._job is None
    one.saver.wait()  # nothing in flight: at once


def test_the_next_save_waits_for_the_one_in_flight(training, monkeypatch):
    one, gate = training(), Gate(monkeypatch)
    one.save(1)
    second = threading.Thread(target=one.save, args=(2,))
    second.start()
    second.join(0.3)
    assert second.is_alive() and one.found() is None
    gate.open.set()
    second.join(LIMIT)
    one.saver.wait()
    assert one.found() == (2, {2.0}) and (one.folder / "step-00000001").exists()


def test_synchronous_saves_are_over_when_the_call_returns(training):
    one = training(asynchronous=False)
    for step in (1, 2, 3):
        one.save(step)
        assert one.found() == (step, {float(step)})


def test_a_second_save_takes_no_more_memory(training):
    one, places = training(), []
    for step in (1, 2):
        one.save(step)
        one.saver.wait()
        places.append({name: kept.data_ptr() for name, kept in one.saver._buffers._kept.items()})
    assert places[0] == places[1] and len(places[0]) == 3


@pytest.mark.parametrize("error", [None, KeyboardInterrupt, NumericsError])
def test_whoever_leaves_waits_for_the_save_in_flight(training, monkeypatch, error):
    one, gate = training(), Gate(monkeypatch)
    threading.Timer(0.2, gate.open.set).start()
    try:
        with one.saver:
            one.save(1)
            assert not gate.open.is_set()
            if error is not None:
                raise error("for another reason")
    except BaseException as found:
        assert type(found) is error
    assert one.found() == (1, {1.0})


# -- what goes wrong -------------------------------------------------------------------------------------------------

PLACES = {"save_file": tensors, "sync_path": tensors, "replace": os, "mkdir": os}
CODES = (errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT)


@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize(("place", "code"), [*zip(PLACES, CODES, strict=True), ("save_file", "library")])
def test_a_full_or_broken_disk_is_an_error_and_the_checkpoint_before_stays(
    training, monkeypatch, place, code, asynchronous
):
    one, fired = training(asynchronous=asynchronous), []
    one.save(1)
    one.saver.wait()

    def broken(*args, **kwargs):
        fired.append(place)
        if code == "library":
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as fault:
        fault.setattr(PLACES[place], place, broken)
        text = "No space left" if code == "library" else os.strerror(code)
        with pytest.raises(DataError, match=rf"checkpoint of step 2 could not be written .*{text}.* is intact") as told:
            one.save(2)
            deadline = time.monotonic() + LIMIT
            while one.stop.reason is None:  # asked for at once, not at the next save
                assert time.monotonic() < deadline
                time.sleep(0.001)
            one.saver.wait()
    assert fired and one.stop.reason == "a checkpoint that could not be saved" and "\n" not in str(told.value)
    assert told.value.agreed
    assert one.found() == (1, {1.0})
    one.save(3)
    one.saver.wait()
    assert one.found() == (3, {3.0})
    assert sorted(os.listdir(one.folder)) == ["LATEST", "step-00000001", "step-00000003"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_not_saved(training, bad):
    one = training()
    one.save(1)
    one.save(2, bad)
    with pytest.raises(NumericsError, match="before step 2 is not saved: 1 of 1 tensors hold NaN or infinite"):
        one.saver.wait()
    assert one.found() == (1, {1.0}) and one.stop.reason


def test_a_directory_that_was_taken_over_is_not_committed_to(training, monkeypatch):
    one, asked = training(), []

    def taken():
        asked.append(True)
        if len(asked) > 1:  # between the first byte and the commit
            raise RankLostError("taken over")

    one.save(1)
    one.saver.wait()
    one.ledger.may_write = taken
    one.save(2)
    with pytest.raises(RankLostError, match="taken over"):
        one.saver.wait()
    assert len(asked) == 2 and one.found() == (1, {1.0})


def test_an_old_checkpoint_that_cannot_be_removed_is_noted_and_training_goes_on(training, monkeypatch):
    one, right = training(), shutil.rmtree

    def stubborn(path, *args, **kwargs):
        if str(path).endswith("step-00000001"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        right(path, *args, **kwargs)

    monkeypatch.setattr(shutil, "rmtree", stubborn)
    for step in (1, 2, 3, 4):
        one.save(step)
        one.saver.wait()
    assert one.notes and all("step-00000001 could not be removed" in note for note in one.notes)
    assert sorted(p.name for p in one.folder.glob("step-*")) == [f"step-0000000{n}" for n in (1, 3, 4)]
    assert one.found() == (4, {4.0}) and one.stop.reason is None


# -- two ranks -------------------------------------------------------------------------------------------------------


def both(training):
    return [training(rank=rank, world=2, sharded="always") for rank in range(2)]


def test_two_ranks_write_their_halves_and_the_main_one_commits(training):
    main, other = both(training)
    for step in (1, 2):
        for one in (main, other):
            one.save(step)
        for one in (main, other):
            one.saver.wait()
    assert main.found() == (2, {2.0})
    names = sorted(p.name for p in (main.folder / "step-00000002").iterdir())
    expected = [f"state-0000{rank}-of-00002.safetensors" for rank in range(2)]
    assert names == ["COMMIT.json", *expected]
    sizes = [(main.folder / "step-00000002" / name).stat().st_size for name in names[1:3]]
    assert max(sizes) < 1.1 * min(sizes)


def test_the_main_rank_does_not_commit_before_the_other_has_written(training, monkeypatch):
    main, other = both(training)
    main.save(1)
    time.sleep(0.3)
    assert main.found() is None
    gate = Gate(monkeypatch, "write_json")  # its files are there, but it has not said so
    other.save(1)
    assert gate.reached.wait(LIMIT)
    time.sleep(0.1)
    assert main.found() is None
    gate.open.set()
    main.saver.wait()
    assert main.found() == (1, {1.0})


def test_a_rank_that_cannot_write_stops_all_with_its_own_reason(training, monkeypatch):
    main, other = both(training)
    with monkeypatch.context() as fault:

        def broken(folder, pieces, rank, world, sharded):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        fault.setattr(module, "write_pieces", broken)
        other.save(1)
        with pytest.raises(DataError, match="No space left"):
            other.saver.wait()
    assert other.stop.reason and main.stop.reason is None
    main.save(1)
    monkeypatch.setattr(Rank, "said", (["DataError", "rank 1: No space left on device"],))
    began = time.monotonic()
    with pytest.raises(DataError, match="rank 1: No space left"):
        main.saver.wait()
    assert time.monotonic() - began < LIMIT and main.found() is None


def test_a_part_that_never_comes_ends_in_an_error(training, monkeypatch):
    monkeypatch.setattr(module, "PATIENCE", 0.2)
    main = training(rank=0, world=2, sharded="always")
    main.save(1)
    with pytest.raises(RankLostError, match="rank 1 did not write its part of the checkpoint of step 1 within"):
        main.saver.wait()
    assert main.found() is None


def test_a_rank_that_leaves_does_not_wait_for_the_lost_one(training):
    main = training(rank=0, world=2, sharded="always")
    began = time.monotonic()
    with pytest.raises(RankLostError, match="another"), main.saver:
        main.save(1)
        raise RankLostError("another one was lost")
    assert time.monotonic() - began < LIMIT and main.found() is None


@pytest.mark.parametrize(("kind", "weights", "world", "wanted", "expected"), [
    ("fsdp2", 10**9, 2, "auto", True), ("zero3", 10**9, 2, "auto", True), ("ddp", 10**9, 2, "auto", False),
    ("fsdp2", 1000, 2, "auto", False), ("fsdp2", 10**9, 1, "auto", False), ("fsdp2", 10**9, 2, "never", False),
    ("ddp", 1000, 2, "always", True), ("ddp", 1000, 1, "always", False),
])  # fmt: skip
def test_who_shards(training, monkeypatch, kind, weights, world, wanted, expected):
    one = training(world=world, sharded=wanted)
    monkeypatch.setattr(Backend, "num_weights", weights)
    one.backend.cfg = RunConfig(backend=kind)
    assert one.saver.is_sharded() is expected


# -- choosing --------------------------------------------------------------------------------------------------------


def test_a_ledger_that_lost_lines_is_noticed_and_one_that_grew_is_not(training):
    one = training()
    one.ledger.step("unlearn", 0, {"forget": ["a", "b"]}, frozenset("ab"))
    one.save(1)
    one.saver.wait()
    one.ledger.step("unlearn", 1, {"forget": ["c"]}, frozenset("abc"))
    assert agreed_checkpoint(one.folder, one.backend.world, one.ledger, one.notes.append).step == 1 and not one.notes
    text = one.ledger.path.read_text()
    for changed in (text[:20], text.replace('"a"', '"z"')):
        one.ledger.path.write_text(changed)
        with pytest.raises(DataError, match="no longer begins with what it held when .*step-00000001 was saved"):
            agreed_checkpoint(one.folder, one.backend.world, one.ledger, one.notes.append)


def test_every_rank_looks_at_its_share_and_one_that_is_damaged_is_passed_over_by_all(training):
    main, other = both(training)
    for step in (1, 2):
        for one in (main, other):
            one.save(step)
        for one in (main, other):
            one.saver.wait()
    path = main.folder / "step-00000002" / "state-00001-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    checkpoint = format.read_commit(path.parent)
    assert sorted(format.verified(checkpoint, rank, 2) for rank in range(2)) == [False, True]
    alone = Training(main.folder.parent)
    assert agreed_checkpoint(main.folder, alone.backend.world, alone.ledger, alone.notes.append).step == 1
    assert alone.notes == ["checkpoint step-00000002 does not match its COMMIT.json and is passed over"]
    main.folder.joinpath("step-00000001").chmod(0o777)
    agreed_checkpoint(main.folder, alone.backend.world, alone.ledger, alone.notes.append)
    assert "may be written by every user" in alone.notes[-1]
    alone.ledger.close()


def test_a_new_ledger_is_for_its_owner_alone(tmp_path):
    Ledger(tmp_path / "ledger.jsonl").close()
    assert (tmp_path / "ledger.jsonl").stat().st_mode & 0o777 == 0o600

"""A run directory has one owner: the attempt that claimed it last. Whoever lost it writes nothing more.

Every verb that writes there, or reads what may change meanwhile, claims it first. `owner.json` names the owner by a
token. Two cases have to be told apart when another attempt comes:

* Its owner is alive, since somebody started the run twice by mistake: the second is refused. Alive is a process that
  exists, as far as this one sees the same processes (one boot of one machine, one container). Anywhere else it is an
  owner that renewed its claim within the last `STALE` seconds.
* Its owner is dead, or SLURM holds it for dead and starts the same job again: the claim passes over. On a node that was
  only cut off the old attempt may live on; it finds another token before its next step or commit, and ends.

A launcher that starts its processes again within seconds may put the main one elsewhere: there a claim passes over as
soon as nobody has renewed it for a while.

Between the look at the token and the rename that commits, milliseconds remain in which both could write.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from distunlearn.common.files import NEW, write_json
from distunlearn.common.launcher import number
from distunlearn.common.text import printable
from distunlearn.errors import ConfigError, DataError, RankLostError
from distunlearn.verify.records import find_record

OWNER = "owner.json"
RENEWED = 15.0  # seconds
STALE = 120.0  # seconds
RESTARTED = 2 * RENEWED + 5  # seconds without a renewal, for a process that a launcher has started again
FIELDS = {"token": str, "host": str, "pid": int, "place": str}


class Lease:
    """Claimed when made, given back by `release`. Only the main rank makes one.

    Args:
        folder: the run directory; it exists.

    Raises:
        ConfigError: the owner is alive.
        DataError: the folder is gone, cannot be written to, or its file system has no locks.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = Path(folder)
        self._path = self._folder / OWNER
        self._ended = threading.Event()
        job = os.environ.get("SLURM_JOB_ID") or None
        self.owner: dict[str, Any] = {
            "token": uuid.uuid4().hex, "host": socket.gethostname(), "pid": os.getpid(), "born": born(os.getpid()),
            "place": _place(), "job": job, "restart": number("SLURM_RESTART_COUNT", 0) if job else None,
            "time": round(time.time(), 3),
        }  # fmt: skip
        try:
            self._claim()
        except OSError as error:
            raise DataError(
                f"{folder} cannot be claimed by a file {OWNER} ({error.strerror}); expected a folder that can be "
                "written to, on a file system with locks."
            ) from None
        threading.Thread(target=self._renew, name="lease", daemon=True).start()

    def _claim(self) -> None:
        end = time.monotonic() + (RESTARTED if number("TORCHELASTIC_RESTART_COUNT", 0) else 0.0)
        while True:
            with self._locked():
                before = owner_of(self._folder)
                if before is None or not self._lives(before):
                    self._write()
                    return
            if time.monotonic() > end or before["place"] == self.owner["place"]:
                raise ConfigError(
                    f"{self._folder} is in use by {_told(before)}; wait for it, end it (a file named stop in the "
                    f"folder does so after its step), or choose another --out. If no such process exists, delete "
                    f"{OWNER} there."
                )
            time.sleep(1.0)

    def check(self) -> None:
        """To be called before anything is written.

        Raises:
            RankLostError: another attempt has claimed the directory.
            DataError: it is gone.
        """
        now = owner_of(self._folder)
        if now is None and not self._folder.is_dir():
            self._ended.set()
            raise DataError(
                f"{self._folder} is gone, it was moved or deleted while this run was at work; nothing more is written: "
                "put it back, and the same command goes on, or start anew."
            )
        if now is None or now["token"] != self.owner["token"]:
            self._ended.set()
            whom = _told(now) if now else f"somebody who deleted {OWNER}"
            raise RankLostError(
                f"{self._folder} was taken over by {whom}; this attempt, process {os.getpid()}, writes no more."
            )

    def release(self) -> None:
        """Give the directory back; what another has claimed stays claimed."""
        self._ended.set()
        with contextlib.suppress(OSError), self._locked():  # a folder that is gone has nobody to be given back to
            now = owner_of(self._folder)
            if now is not None and now["token"] == self.owner["token"]:
                self._path.unlink()

    def _write(self) -> None:
        write_json(self._path, self.owner)

    def _lives(self, before: dict[str, Any]) -> bool:
        job = self.owner["job"]
        if job is not None and before.get("job") == job and before.get("restart") != self.owner["restart"]:
            return False  # SLURM has ended the attempt before
        if before["place"] == self.owner["place"]:
            return _exists(before)
        probe = self._folder / f".{OWNER}.now.{self.owner['token']}"
        os.close(os.open(probe, NEW, 0o600))  # the file server's own clock
        try:
            quiet = RESTARTED if number("TORCHELASTIC_RESTART_COUNT", 0) else STALE
            return probe.stat().st_mtime - self._path.stat().st_mtime < quiet
        finally:
            probe.unlink()

    def _renew(self) -> None:
        """In a thread of its own: an audit is busy for longer than a claim is good for."""
        while not self._ended.wait(RENEWED):
            with contextlib.suppress(OSError):
                now = owner_of(self._folder)
                if now is not None and now["token"] == self.owner["token"]:
                    os.utime(self._path)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        handle = os.open(self._folder, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)


@contextlib.contextmanager
def owned(folder: Path) -> Iterator[Lease]:
    """Claim a run directory for what happens in the block. Errors: see `Lease`."""
    lease = Lease(folder)
    try:
        yield lease
    finally:
        lease.release()


def refuse_if_owned(folder: Path) -> None:
    """ConfigError where a living process other than this one has claimed the run directory. Nothing is written."""
    before = owner_of(folder)
    if before is not None and before["pid"] != os.getpid() and _exists(before):
        raise ConfigError(f"{folder} is in use by {_told(before)}; wait for it, end it, or choose another --out.")


def owner_of(folder: Path) -> dict[str, Any] | None:
    """What `owner.json` says; None: nobody's, or not a claim."""
    try:
        return find_record(Path(folder) / OWNER, FIELDS)
    except DataError:
        return None


def _exists(owner: dict[str, Any]) -> bool:
    """Whether the owner's process does, as far as its id means something here."""
    return owner["place"] == _place() and born(owner["pid"]) == owner.get("born") is not None


def _told(owner: dict[str, Any]) -> str:
    job = f" (SLURM job {printable(owner['job'], 40)})" if owner.get("job") else ""
    return f"process {owner['pid']} on {printable(owner['host'], 80)}{job}"


def _place() -> str:
    """Names what a process id is one of: this boot of this machine, and within it this container."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    with contextlib.suppress(OSError):
        return f"{boot.read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    return socket.gethostname()


def born(pid: int) -> int | None:
    """When the process started, in the kernel's ticks: a number used again is another process. None: there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else int(fields[19])

"""A run directory has one owner: the attempt that claimed it last. Whoever lost it writes nothing more.

`owner.json` names the owner by a token. Two cases have to be told apart when another attempt comes:

* Its owner is alive, since somebody started the run twice by mistake: the second is refused. Alive is a process that
  exists, on this machine; on another one an owner that renewed its claim within the last `STALE` seconds.
* Its owner is dead, or SLURM holds it for dead and starts the same job again: the claim passes over. On a node that was
  only cut off the old attempt may live on; it finds another token before its next step or commit, and ends.

Between the look at the token and the rename that commits, milliseconds remain in which both could write.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from distunlearn.errors import ConfigError, RankLostError

OWNER = "owner.json"
RENEWED = 15.0  # seconds
STALE = 120.0  # seconds


class Lease:
    """Claimed when made, given back by `release`. Only the main rank makes one.

    Args:
        folder: the run directory; it exists.

    Raises:
        ConfigError: the owner is alive.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = Path(folder)
        self._path = self._folder / OWNER
        self._ended = threading.Event()
        job = os.environ.get("SLURM_JOB_ID")
        self.owner: dict[str, Any] = {
            "token": uuid.uuid4().hex, "host": socket.gethostname(), "pid": os.getpid(), "born": born(os.getpid()),
            "job": job, "restart": int(os.environ.get("SLURM_RESTART_COUNT", "0")) if job else None,
            "time": round(time.time(), 3),
        }  # fmt: skip
        with self._locked():
            before = _read(self._path)
            if before is not None and self._lives(before):
                raise ConfigError(
                    f"{folder} is in use by process {before['pid']} on {before['host']}"
                    + (f" (SLURM job {before['job']})" if before["job"] else "")
                    + f"; wait for it, end it (a file named stop in the folder does so after its step), or choose "
                    f"another --out. If no such process exists, delete {OWNER} there."
                )
            self._write()
        threading.Thread(target=self._renew, name="lease", daemon=True).start()

    def check(self) -> None:
        """To be called before anything is written.

        Raises:
            RankLostError: another attempt has claimed the directory.
        """
        now = _read(self._path)
        if now is None or now["token"] != self.owner["token"]:
            self._ended.set()
            whom = f"process {now['pid']} on {now['host']}" if now else f"somebody who deleted {OWNER}"
            raise RankLostError(
                f"{self._folder} was taken over by {whom}; this attempt, process {os.getpid()}, writes no more."
            )

    def release(self) -> None:
        """Give the directory back; what another has claimed stays claimed."""
        self._ended.set()
        with self._locked():
            now = _read(self._path)
            if now is not None and now["token"] == self.owner["token"]:
                self._path.unlink()

    def _write(self) -> None:
        temporary = self._folder / f".{OWNER}.{self.owner['token']}"
        temporary.write_text(json.dumps(self.owner) + "\n", encoding="utf-8")
        os.replace(temporary, self._path)

    def _lives(self, before: dict[str, Any]) -> bool:
        if before["job"] is not None and before["job"] == self.owner["job"]:
            return False  # SLURM runs a job once at a time
        if before["host"] == self.owner["host"]:
            return before["pid"] == os.getpid() or born(before["pid"]) == before["born"] is not None
        probe = self._folder / f".{OWNER}.now.{self.owner['token']}"
        probe.touch()  # the file server's own clock
        try:
            return probe.stat().st_mtime - self._path.stat().st_mtime < STALE
        finally:
            probe.unlink()

    def _renew(self) -> None:
        """In a thread of its own: an audit is busy for longer than a claim is good for."""
        while not self._ended.wait(RENEWED):
            with contextlib.suppress(OSError):
                now = _read(self._path)
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


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return found if {"token", "host", "pid", "born", "job"} <= found.keys() else None
    except (FileNotFoundError, ValueError, AttributeError):
        return None  # nobody's, or not a claim


def born(pid: int) -> int | None:
    """When the process started, in the kernel's ticks: a number used again is another process. None: there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else int(fields[19])

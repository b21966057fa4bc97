"""Work in forks of the test process: cheap to start, may kill itself, leaves this process as it is."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from collections.abc import Callable, Collection
from pathlib import Path


def fork(work: Callable[[], object]) -> int:
    """Process id of a fork of this process that does `work` and ends with 0, or 1 after an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of forks beside threads
        child = os.fork()
    if child:
        return child
    try:
        work()
        os._exit(0)
    finally:
        os._exit(1)


def killed_at(last: int, work: Callable[[], object], log: Path, watched: Collection[str], word: str) -> int:
    """Do `work` in a fork that kills itself at the `last` of the audit events `watched` on a path with `word` in it.

    Returns the exit code: less than 0 for a signal. With `last` 0 it lives, and `log` then holds how many there were.
    """

    def run() -> None:
        count = 0

        def hook(event: str, args: tuple) -> None:
            nonlocal count
            if event in watched and word in str(args[0] if args else ""):
                count += 1
                if count == last:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        work()
        total = count  # before the log is written
        log.write_text(str(total))

    return os.waitstatus_to_exitcode(os.waitpid(fork(run), 0)[1])

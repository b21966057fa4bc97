"""OpenMP's idle threads sleep, so that training keeps its speed where another process wants the same cores.

GNU's library (libgomp), which torch brings, lets idle threads spin a while before they sleep: beside another busy
process training was 10 times slower for it. `OMP_WAIT_POLICY=PASSIVE` ends that, but the library reads it once, when it
is loaded. `import distunlearn` sets it if torch is not loaded yet. If it is, a way is left: the library spins 300 times
shorter as soon as the process holds more OpenMP threads than there are cores. So a second team of threads is made that
never has work.
"""

from __future__ import annotations

import os
import threading
import warnings
from pathlib import Path

import torch

WORK = 1 << 16  # elements a thread, so that every thread of the second team is made
_done = False


def sleep_when_idle() -> None:
    """Let idle OpenMP threads sleep from now on; without effect where OMP_WAIT_POLICY says what they do."""
    global _done
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if _done or cores < 2 or "OMP_WAIT_POLICY" in os.environ:
        return
    _done = True
    if not _is_gnu():
        warnings.warn(
            "torch was imported before distunlearn, so that its idle threads spin, which slows training down on a busy "
            "machine; import distunlearn first, or set OMP_WAIT_POLICY=PASSIVE.",
            stacklevel=3,
        )
        return
    ready = threading.Event()
    threading.Thread(target=_hold_team, args=(cores, ready), name="openmp-team", daemon=True).start()
    ready.wait()


def _hold_team(threads: int, ready: threading.Event) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    torch.ones(threads * WORK).add_(1)
    torch.set_num_threads(before)
    ready.set()
    threading.Event().wait()  # the team ends with its thread


def _is_gnu() -> bool:
    try:
        return "libgomp" in Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False

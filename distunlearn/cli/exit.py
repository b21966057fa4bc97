"""How a command ends: one line on standard error and an exit code, whatever happened, on each rank its part of it."""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import traceback
from typing import NoReturn

from distunlearn.common.files import disk_trouble
from distunlearn.common.launcher import announced_rank, is_main
from distunlearn.common.text import printable
from distunlearn.errors import ConfigError, DistunlearnError, LaunchError, RankLostError, StoppedError

EXIT_INTERNAL = 70
EXIT_STOPPED = 75


def ended(error: BaseException) -> int:
    """Say what `error` means, and return the exit code."""
    error = disk_trouble(error) or error
    if isinstance(error, DistunlearnError):
        complain(error)
        if error.agreed:
            _leave_together()
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        if is_main():
            print("stopped; the same command goes on from the last checkpoint", file=sys.stderr)
        return EXIT_STOPPED
    from distunlearn.distributed.process_group import lost_rank

    if _is_out_of_memory(error):
        who = f"rank {announced_rank()}" if "RANK" in os.environ else "this process"
        told = printable(str(error).splitlines()[0], 200).rstrip(".")
        print(
            f"error: {who} ran out of memory ({told}); make the batches smaller, or set the phase's accumulate above "
            "1, runtime.activation_checkpointing=true or a backend that shards, or free the device.",
            file=sys.stderr,
        )  # by every rank: any may be the one
        return ConfigError.exit_code
    lost = lost_rank(error)
    if lost is None:
        if "RANK" in os.environ:
            print(f"rank {announced_rank()} failed:", file=sys.stderr)
        traceback.print_exception(error)
        return EXIT_INTERNAL
    print(f"error: {lost}", file=sys.stderr)  # by every rank: the main one may be the lost one
    return RankLostError.exit_code


def leave(code: int) -> NoReturn:
    """End a process that a launcher started, whose work is done and written, without the interpreter's own teardown.

    Threads of torch's process groups may let go of Python objects while that is under way. It has aborted a rank of
    fsdp2 over gloo after its last step (seen once, cause likely, not proven), and the launcher then ends the others.
    """
    atexit._run_exitfuncs()  # destroys the process group
    with contextlib.suppress(OSError):  # nobody reads any more
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def _is_out_of_memory(error: BaseException) -> bool:
    """Of a GPU, or of the machine where torch asked for it."""
    import torch

    told = isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate memory" in str(error)
    return isinstance(error, torch.OutOfMemoryError) or told


def complain(error: DistunlearnError) -> None:
    """One line on stderr. A bad config and what all ranks agreed on is said once; other errors may strike one rank."""
    # Names of files are anybody's. Only the list of all problems of a configuration has several lines.
    said = "\n".join(printable(line, 8000) for line in str(error).split("\n"))
    if is_main():
        print(said if isinstance(error, StoppedError) else f"error: {said}", file=sys.stderr)
    elif not error.agreed and (isinstance(error, LaunchError) or not isinstance(error, ConfigError)):
        print(f"rank {announced_rank()}: error: {said}", file=sys.stderr)


def _leave_together() -> None:
    """All ranks end alike; a launcher would end the main process, before it has said why, with the first to leave."""
    from distunlearn.distributed.process_group import wait_for_all

    wait_for_all()

"""Processes that start in no time: one process imports everything once and forks for each of them.

    with Zygote() as zygote:
        group = zygote.start(2, ["unlearn", "digits", ...], DISTUNLEARN_FAULT="kill@point=update,rank=1")
        codes = group.wait()

`shared()` is the one that a whole session of tests uses, by `tiny.command` and `processes.launch`; tests of starting
itself start their own processes. Run as a script it is the process that forks: it reads a group of jobs a line and
answers with their process ids, then with their exit codes.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Arguments = Sequence[str] | Sequence[Sequence[str]]
NOT_OURS = ("ACCELERATE_", "SLURM_", "TORCHELASTIC")  # variables of a surrounding launcher


class Group:
    """The processes of one start. codes, seconds: of each rank, when it has ended; filled by `wait`."""

    def __init__(self, zygote: Zygote, logs: list[Path]) -> None:
        self._zygote, self.logs = zygote, logs
        self.pids: list[int] = zygote.answer()["pids"]
        self.codes: list[int] = []
        self.seconds: list[float] = []

    def wait(self) -> list[int]:
        """Exit codes, negative for signals; a rank that is still there after the time limit is killed (-9)."""
        found = self._zygote.answer()
        self.codes, self.seconds = found["codes"], found["seconds"]
        return self.codes

    def alive(self) -> bool:
        """Whether every process is still there; one that has ended is gone within milliseconds."""
        return all(Path(f"/proc/{pid}").exists() for pid in self.pids)

    def said(self, rank: int = 0) -> str:
        return self.logs[rank].read_text(encoding="utf-8")


class Zygote:
    """The client's side."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._count = 0

    def __enter__(self) -> Zygote:
        variables = {k: v for k, v in os.environ.items() if not k.startswith(NOT_OURS)}
        variables |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "GLOO_SOCKET_IFNAME": "lo"}
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=variables
        )
        return self

    def __exit__(self, *error: object) -> None:
        self._process.stdin.close()
        self._process.wait(timeout=60)
        self._process.stdout.close()
        self._folder.cleanup()

    def start(self, world: int, arguments: Arguments, limit: float = 90, **variables: str | Sequence[str]) -> Group:
        """Start `distunlearn ARGUMENTS` on `world` ranks; what is a list of lists, or a list among the variables, has
        an entry for each rank. A world of 1 gets no launcher's variables.
        """
        port, jobs = free_port(), []
        for rank in range(world):
            own = {k: v if isinstance(v, str) else v[rank] for k, v in variables.items()}
            argv = arguments if isinstance(arguments[0], str) else arguments[rank]
            jobs.append({"argv": list(argv), "env": {**(launched(rank, world, port) if world > 1 else {}), **own}})
        return self._send(jobs, limit)

    def command(
        self, argv: Sequence[str], environment: Mapping[str, str], limit: float
    ) -> subprocess.CompletedProcess[str]:
        """`distunlearn ARGV` in this very environment and folder, as `subprocess.run` would have it."""
        job = {"argv": list(argv), "env": dict(environment), "whole": True, "cwd": os.getcwd(), "errors": True}
        group = self._send([job], limit)
        [code] = group.wait()
        errors = group.logs[0].with_suffix(".err").read_text(encoding="utf-8")
        if code == -signal.SIGKILL and group.seconds[0] >= limit:
            raise subprocess.TimeoutExpired(list(argv), limit, group.said(), errors)
        return subprocess.CompletedProcess(list(argv), code, group.said(), errors)

    def commands(self, jobs: Sequence[tuple[Sequence[str], Mapping[str, str]]], limit: float) -> Group:
        """`distunlearn ARGUMENTS` for each pair of arguments and environment."""
        described = [
            {"argv": list(argv), "env": dict(environment), "whole": True, "cwd": os.getcwd()}
            for argv, environment in jobs
        ]
        return self._send(described, limit)

    def scripts(self, script: str, jobs: Sequence[tuple[Sequence[str], Mapping[str, str]]], limit: float) -> Group:
        """`python SCRIPT ARGUMENTS` for each pair of arguments and environment. The first failure ends all: the others
        would wait for it in a collective.
        """
        described = [
            {"script": script, "argv": [script, *argv], "env": dict(environment), "whole": True, "cwd": os.getcwd()}
            for argv, environment in jobs
        ]
        return self._send(described, limit, together=True)

    def _send(self, jobs: list[dict[str, Any]], limit: float, *, together: bool = False) -> Group:
        self._count += 1
        logs = [Path(self._folder.name) / f"{self._count}-{rank}.log" for rank in range(len(jobs))]
        for job, log in zip(jobs, logs, strict=True):
            job["log"] = str(log)
        self._process.stdin.write(json.dumps({"jobs": jobs, "limit": limit, "together": together}) + "\n")
        self._process.stdin.flush()
        return Group(self, logs)

    def answer(self) -> dict[str, Any]:
        return json.loads(self._process.stdout.readline())


@functools.cache
def shared() -> Zygote:
    """The session's, started when it is first needed; it ends when its input ends, with this process."""
    return Zygote().__enter__()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def launched(rank: int, world: int, port: int) -> dict[str, str]:
    """The variables of torchrun."""
    return {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip


# -- the process that forks ----------------------------------------------------------------------------------------


def _serve() -> None:
    sys.modules["transformers"] = None  # type: ignore[assignment]  # an extra of the tests, which no run may need
    import matplotlib.backends.backend_svg  # noqa: F401
    import pytest  # noqa: F401
    import sklearn.linear_model  # noqa: F401
    import torch._dynamo  # noqa: F401
    import torch.distributed.fsdp  # noqa: F401

    import distunlearn.audit.summary
    import distunlearn.cli.main
    import distunlearn.engine.backends.ddp
    import distunlearn.engine.phases
    import distunlearn.report
    import distunlearn.run.pipeline  # noqa: F401
    from distunlearn.engine import fault_injection

    fault_injection.allow()
    _warm()
    for line in sys.stdin:
        request = json.loads(line)
        begun = time.monotonic()
        pids = [_fork(job) for job in request["jobs"]]
        print(json.dumps({"pids": pids}), flush=True)
        ended: dict[int, tuple[int, float]] = {}
        killed = False
        while len(ended) < len(pids):
            passed = time.monotonic() - begun
            failed = request["together"] and any(code for code, _ in ended.values())
            for pid in pids:
                if pid not in ended:
                    found, status = os.waitpid(pid, os.WNOHANG)
                    if found:
                        ended[pid] = (os.waitstatus_to_exitcode(status), round(passed, 2))
                    elif (passed > request["limit"] or failed) and not killed:
                        os.kill(pid, signal.SIGKILL)
            killed = passed > request["limit"] or failed
            time.sleep(0.005)
        codes, seconds = zip(*(ended[pid] for pid in pids), strict=True)
        print(json.dumps({"codes": codes, "seconds": seconds}), flush=True)


def _warm() -> None:
    """What the first run of a process does once, done before the forks: a quarter of a tiny run's time."""
    from io import BytesIO

    from matplotlib.figure import Figure
    from tiny import TINY

    from distunlearn.config.load import load_config
    from distunlearn.plan.plan import make_plan

    make_plan(load_config("digits", None, TINY))  # operations on tensors without values, traced and kept
    figure = Figure()
    figure.subplots().plot([0, 1])
    figure.savefig(BytesIO(), format="svg")  # fonts


def _fork(job: dict[str, Any]) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        if job.get("whole"):
            os.environ.clear()
        os.environ.update(job["env"])
        os.chdir(job.get("cwd", "."))
        log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        errors = os.open(job["log"][:-4] + ".err", os.O_WRONLY | os.O_CREAT | os.O_TRUNC) if job.get("errors") else log
        os.dup2(log, 1)
        os.dup2(errors, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        code = _ended(job)
        sys.stdout.flush()
        sys.stderr.flush()
        import atexit

        atexit._run_exitfuncs()
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    finally:
        os._exit(code)


def _ended(job: dict[str, Any]) -> int:
    """The exit code of a script, or of a command."""
    try:
        if "script" in job:
            import runpy

            sys.argv = list(job["argv"])
            sys.path[:0] = [
                str(Path(job["script"]).parent),
                str(Path(__file__).parents[1]),
            ]  # its own folder, and tests/
            runpy.run_path(job["script"], run_name="__main__")
            return 0
        from distunlearn.cli.main import main

        sys.argv = ["distunlearn", *job["argv"]]
        return _hooked(main, job) if job["env"].get("AUDIT_LOG") else main(job["argv"])
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)


def _hooked(main: Any, job: dict[str, Any]) -> int:
    """With Python's audit hook: every event that reaches outside, or executes what was data, on a line."""
    with open(job["env"]["AUDIT_LOG"], "a", encoding="utf-8") as file:
        watched = ("exec", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "socket.connect",
                   "socket.getaddrinfo", "pickle.find_class", "marshal.loads", "os.fork")  # fmt: skip

        def hook(event: str, values: tuple[Any, ...]) -> None:
            if event in watched:
                caller = sys._getframe(1)
                file.write(f"{event}\t{caller.f_code.co_filename}\t{str(values)[:200]!r}\n")

        sys.addaudithook(hook)
        code = main(job["argv"])
        file.flush()
    return code


if __name__ == "__main__":
    _serve()

"""The command line: parse, resolve the config, call the verb, turn errors into one line and an exit code.

Exit codes: 0 done; 2 usage or config; 3 data or coverage; 4 numerics; 5 a rank was lost; 6 an evidence gate
failed; 7 the evidence is inconclusive; 8 the evidence does not hold (`verify`); 75 stopped, resumable; 70 internal.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Union

import tyro

from distunlearn import __version__
from distunlearn.cli import evidence
from distunlearn.cli.arguments import unknown
from distunlearn.cli.convert import Convert
from distunlearn.cli.exit import EXIT_STOPPED, ended
from distunlearn.cli.exit import complain as _complain
from distunlearn.cli.init import Find, Init
from distunlearn.cli.output import Verb, collected
from distunlearn.cli.submit import Submit
from distunlearn.cli.sweep import Sweep
from distunlearn.cli.verbs import (
    Audit,
    Doctor,
    Dose,
    Index,
    LaunchFiles,
    List,
    Plan,
    Pool,
    Prepare,
    Pretrain,
    Purge,
    Report,
    Run,
    Schema,
    Status,
    Unlearn,
)
from distunlearn.common.launcher import is_main
from distunlearn.errors import ConfigError

VERBS = (
    Init, Find, Prepare, Index, Convert, Pretrain, Unlearn, Dose, Audit, Report, Run, Pool, Submit, Sweep, Status,
    Purge, Plan, List, Schema, Doctor, *evidence.VERBS,
)  # fmt: skip
NAMES: dict[str, Any] = {**{verb.__name__.lower(): verb for verb in VERBS}, "launch-files": LaunchFiles}
ONLY_PRINT = (Init, Find, Plan, List, Schema, Doctor, Status)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; `argv` defaults to the process's own arguments. Returns the exit code."""
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        code = _main(args)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader has gone. Without this the interpreter would complain once more when it flushes at exit.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_STOPPED if args and NAMES.get(args[0], Plan) not in ONLY_PRINT and "--help" not in args else 0
    return code


def _main(args: list[str]) -> int:
    if args == ["--version"]:
        print(f"distunlearn {__version__}")
        return 0
    if args and not args[0].startswith("-") and args[0] not in NAMES:
        return _unknown_verb(args[0])
    verb: Any = None
    with _quiet_system_exit() as parsing:
        verb = _parse(args)
    if verb is None:
        return parsing.code
    with collected(args[0], isinstance(verb, Verb) and verb.json) as told:
        try:
            told["exit_code"] = verb()
        except BrokenPipeError:
            raise
        except (Exception, KeyboardInterrupt) as error:
            told["exit_code"] = ended(error)
            told["error"] = str(error) or type(error).__name__
    return told["exit_code"]


def _unknown_verb(name: str) -> int:
    _complain(ConfigError(unknown("command", name, NAMES)))
    return ConfigError.exit_code


def _parse(args: list[str]) -> Any:
    """The verb that `args` ask for; SystemExit for --help and for usage errors, which tyro explains."""
    verbs = tuple(Annotated[verb, tyro.conf.subcommand(name=name)] for name, verb in NAMES.items())
    return tyro.cli(  # type: ignore[call-overload]
        Union[verbs],  # noqa: UP007  (a union made at run time has no X | Y form)
        prog="distunlearn",
        description="Make a contrastive image encoder forget images, on one process or many, and show the evidence. "
        "`distunlearn --version` prints the version.",
        args=args,
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.DisallowNone),
        console_outputs=is_main(),
    )


@dataclass
class _Parsing:
    code: int = 0


@contextlib.contextmanager
def _quiet_system_exit() -> Iterator[_Parsing]:
    """tyro ends the process by itself; a caller of `main` gets its code instead."""
    parsing = _Parsing()
    try:
        yield parsing
    except SystemExit as stop:
        parsing.code = stop.code if isinstance(stop.code, int) else 2


if __name__ == "__main__":
    sys.exit(main())

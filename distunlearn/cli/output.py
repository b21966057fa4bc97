"""What a command says: words for people, or with `--json` one object on standard output, by every verb in one way.

{"command": "audit", "exit_code": 7, "result": {...}}      "error": the sentence, where it ended with one
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any

import tyro

from distunlearn.common.launcher import is_main


@dataclass(frozen=True, kw_only=True)
class Verb:
    """A command. `__call__` says what it has to say by `tell`, and returns the exit code."""

    json: Annotated[bool, tyro.conf.FlagCreatePairsOff, tyro.conf.arg(help="one JSON object in place of words")] = False


class _Collected:
    """result: what verbs told. open: whether anybody collects."""

    open = False
    result: Any = None


def tell(words: str, result: Any) -> None:
    """Print `words` on the main process; with --json keep `result`, plain data, in their place."""
    if not _Collected.open:
        if is_main():
            print(words)
        return
    both = isinstance(result, dict) and isinstance(_Collected.result, dict)
    _Collected.result = _Collected.result | result if both else result


@contextmanager
def collected(command: str, wanted: bool) -> Iterator[dict[str, Any]]:
    """With --json: the object of a command, printed at the end; the body sets "exit_code", and "error" if any."""
    ended: dict[str, Any] = {"command": command}
    if not wanted:
        yield ended
        return
    _Collected.open, _Collected.result = True, None
    try:
        yield ended
        if is_main():
            print(json.dumps(ended | {"result": _Collected.result}, indent=2, ensure_ascii=False, default=str))
    finally:
        _Collected.open = False

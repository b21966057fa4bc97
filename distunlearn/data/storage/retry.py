"""What reading costs, and which failures of a disk, a network or an object store are worth another try."""

from __future__ import annotations

import asyncio
import itertools
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from distunlearn.common.text import printable
from distunlearn.errors import DataError

Wanted = TypeVar("Wanted")
FIRST_WAIT = 0.25  # seconds before a failed read is repeated; doubled each time
_BUSY = {408, 425, 429}  # HTTP: request timeout, too early, too many requests
# What does not get better: what is missing or forbidden, and mistakes of a program (certificates are ValueErrors).
_FINAL = (DataError, FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError,
          ValueError, TypeError, AttributeError, LookupError, ImportError, RuntimeError)  # fmt: skip
_FINAL_NAMES = re.compile("Credential|SSL|Certificate")  # of drivers that may not be installed


@dataclass
class Counts:
    """What reading and decoding cost so far: `images` decoded, `reads`, `bytes` read, failed reads `repeated`."""

    images: int = 0
    reads: int = 0
    bytes: int = 0
    repeated: int = 0

    def add(self, other: Counts) -> None:
        for name in ("images", "reads", "bytes", "repeated"):
            setattr(self, name, getattr(self, name) + getattr(other, name))


def patiently(
    wanted: Sequence[Wanted],
    ask: Callable[[list[Wanted]], list[Any]],
    retries: int,
    counts: Counts,
    refuse: Callable[[Wanted, Exception, str], Exception],
) -> list[Any]:
    """The answer to each of `wanted`; only what fails for a moment is asked for again.

    Args:
        ask: gives, for each that it is asked for, the answer or the exception in its place.
        retries: how often a failed request is repeated, after 0.25 s, 0.5 s, 1 s and so on.
        refuse: what to raise for one of `wanted` that failed for good, from its exception and " 3 times" (or "").
    """
    found: list[Any] = [None] * len(wanted)
    left = list(range(len(wanted)))
    for attempt in itertools.count():
        failed = []
        for place, answer in zip(left, ask([wanted[place] for place in left]), strict=True):
            if not isinstance(answer, Exception):
                found[place] = answer
            elif attempt < retries and is_transient(answer):
                failed.append(place)
            else:
                raise refuse(wanted[place], answer, f" {attempt + 1} times" if attempt else "") from answer
        if not failed:
            break
        counts.repeated += len(failed)
        left = failed
        time.sleep(FIRST_WAIT * 2**attempt)
    return found


def is_transient(error: BaseException) -> bool:
    """Whether a failed request may succeed if it is repeated; what a driver gives as its cause counts, too."""
    chain = list(_causes(error))
    if any(_FINAL_NAMES.search(cls.__name__) for link in chain for cls in type(link).__mro__):
        return False
    if any(isinstance(link, (TimeoutError, asyncio.TimeoutError, ConnectionError)) for link in chain):
        return True
    status = status_of(error)
    return not isinstance(error, _FINAL) if status is None else status in _BUSY or status >= 500


def status_of(error: BaseException) -> int | None:
    """The HTTP status from 400 to 599 that a driver's error states, itself or through its cause."""
    for link in _causes(error):
        found: Any = getattr(link, "status", None) or getattr(link, "status_code", None)
        response = getattr(link, "response", None)
        if isinstance(response, dict):  # botocore
            found = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        if type(link).__name__ == "HttpError":  # gcsfs
            found = getattr(link, "code", None)
        if str(found).isdecimal() and 400 <= int(found) < 600:
            return int(found)
    return None


def reason(error: BaseException) -> str:
    """What went wrong in a few words, without the queries of URLs, which may be signed."""
    status = status_of(error)
    if status is not None:
        return f"HTTP status {status}"
    if isinstance(error, (TimeoutError, asyncio.TimeoutError)) and not str(error):
        return "no answer in time"
    text = getattr(error, "strerror", None) or str(error)
    return printable(re.sub(r"\?\S+", "?...", str(text)), 160) or type(error).__name__


def _causes(error: BaseException) -> Iterator[BaseException]:
    link: BaseException | None = error
    for _ in range(8):
        if link is None:
            return
        yield link
        link = link.__cause__

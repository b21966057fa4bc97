"""Shards that lie in an object store, read by ranges through fsspec while their manifest is local.

All requests of a call are under way together, up to AT_ONCE; what fails for a moment is asked for again. A file system
belongs to the process that made it: the event loop and the connections behind it do not survive a fork.
"""

from __future__ import annotations

import asyncio
import errno
import functools
import importlib.util
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

from distunlearn.common.store_url import DRIVERS, scheme_of, url_problem
from distunlearn.common.text import printable
from distunlearn.data.manifest.records import Remote
from distunlearn.data.storage.retry import FIRST_WAIT, Counts, is_transient, reason, status_of
from distunlearn.errors import ConfigError, DataError

__all__ = ["FIX", "ObjectStore", "Remote", "Span"]

AT_ONCE = 32  # requests under way at once, in one process
TIMEOUT = 30.0  # seconds for an answer; with the usual retries a worker still answers within its own limit
SLOWEST = 1 << 20  # bytes a second that a store is given more time for
BLOCK = 8 << 20  # bytes of one request where a whole shard is read, of which AHEAD are under way
AHEAD = 4
FIX = "put the shard there that the manifest describes, or index the new ones"

Judge = Callable[["Span", Any], Exception | None]


@dataclass(frozen=True)
class Span:
    """Bytes [start, stop) of a shard. about: what they are, for messages."""

    shard: str
    start: int = 0
    stop: int = 0
    about: str = "all its bytes"


class ObjectStore:
    """The shards in a folder of an object store; not for several threads at once.

    Args:
        url: see `common.store_url`. retries: how often a failed request is repeated, after 0.25 s, 0.5 s, 1 s ...

    Raises:
        ConfigError: the URL is not taken, or the package that reads it is not installed.
    """

    def __init__(self, url: str, retries: int = 4) -> None:
        problem = url_problem(url)
        if problem is not None:
            raise ConfigError(f"data.store {problem}.")
        self.url = url.rstrip("/")
        self.retries = retries
        package = DRIVERS[scheme_of(url)]
        if package is not None and importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"data.store={printable(self.url)} is read by the package {package}, which is not installed; install "
                f"it with `pip install {package}`, or all drivers with `pip install distunlearn[stores]`."
            )

    def sizes(self, shards: Sequence[str], counts: Counts) -> list[int]:
        """Bytes of each shard.

        Raises:
            DataError: a shard is missing or may not be read, its size is not told, or the store fails for good.
        """
        return [int(info["size"]) for info in self.infos(shards, counts)]

    def infos(self, shards: Sequence[str], counts: Counts) -> list[dict[str, Any]]:
        """What the driver tells about each shard, `size` among it; errors as `sizes`."""
        return self._in_parts("info", [Span(shard, about="its size") for shard in shards], _judge_info, counts)

    def names(self, counts: Counts) -> list[str]:
        """Names of the .tar files in the folder, sorted; errors as `sizes`, and DataError if none is listed."""
        entries = self._patiently("ls", [Span("", about="the list of its shards")], lambda *_: None, counts)[0]
        if found := sorted({path.rpartition("/")[2] for path in entries if path.endswith(".tar")}):
            return found
        raise DataError(f"{printable(self.url)} lists no .tar files; give the folder that holds the shards.")

    def read(self, spans: Sequence[Span], counts: Counts) -> list[bytes]:
        """The bytes of each span, in the order given.

        Raises:
            DataError: a shard is missing, may not be read or ends too early; the store gives no ranges; or it still
                fails after all retries.
        """

        def judge(span: Span, data: bytes) -> Exception | None:
            counts.reads += 1
            counts.bytes += len(data)
            if len(data) == span.stop - span.start:
                return None
            if len(data) < span.stop - span.start:
                return self._short(span, len(data), counts)
            return DataError(
                f"{printable(self.url)} gives more of {span.shard} than the range that was asked for; use a store that "
                "serves ranges."
            )

        wanted = [place for place, span in enumerate(spans) if span.stop > span.start]
        found = [b""] * len(spans)
        answers = self._in_parts("cat_file", [spans[place] for place in wanted], judge, counts)
        for place, data in zip(wanted, answers, strict=True):
            found[place] = data
        return found

    def stream(self, shard: str, size: int, counts: Counts) -> Iterator[bytes]:
        """A whole shard of this size in pieces, in order; errors as `read`.

        A size that is not that of the object must have been refused before.
        """
        spans = [Span(shard, start, min(start + BLOCK, size)) for start in range(0, size, BLOCK)]
        for first in range(0, len(spans), AHEAD):
            yield from self.read(spans[first : first + AHEAD], counts)

    def _in_parts(self, method: str, spans: Sequence[Span], judge: Judge, counts: Counts) -> list[Any]:
        parts = (spans[first : first + AT_ONCE] for first in range(0, len(spans), AT_ONCE))
        return [answer for part in parts for answer in self._patiently(method, part, judge, counts)]

    def _patiently(self, method: str, spans: Sequence[Span], judge: Judge, counts: Counts) -> list[Any]:
        """The answers to one request a span, those that fail for a moment asked for again."""
        found: list[Any] = [None] * len(spans)
        left, wait = list(range(len(spans))), FIRST_WAIT
        for attempt in range(self.retries + 1):
            failed = []
            answers = self._ask(method, [spans[place] for place in left])
            for place, answer in zip(left, answers, strict=True):
                span = spans[place]
                error = answer if isinstance(answer, BaseException) else judge(span, answer)
                if error is None:
                    found[place] = answer
                elif is_transient(error) and attempt < self.retries:
                    failed.append(place)
                else:
                    raise self._refusal(span, error, attempt, counts) from error
            if not failed:
                return found
            counts.repeated += len(failed)
            left = failed
            time.sleep(wait)
            wait *= 2
        raise AssertionError("the last attempt returns or raises")

    def _ask(self, method: str, spans: Sequence[Span]) -> list[Any]:
        """One request a span, all at once if the driver can: answers, or the exceptions in their place."""
        files, folder = self._files()
        asked = [(f"{folder}/{span.shard}", _options(method, span)) for span in spans]
        if not files.async_impl:
            return [_tried(getattr(files, method), path, options) for path, options in asked]
        from fsspec.asyn import sync

        limit = TIMEOUT + sum(span.stop - span.start for span in spans) / SLOWEST

        async def answers() -> list[Any]:
            ask = getattr(files, f"_{method}")
            waiting = (asyncio.wait_for(ask(path, **options), limit) for path, options in asked)
            return await asyncio.gather(*waiting, return_exceptions=True)

        return sync(files.loop, answers)

    def _files(self) -> tuple[Any, str]:
        try:
            return _file_system(self.url, os.getpid())
        except Exception as error:  # drivers raise what they like about missing accounts, broken installations ...
            root = error.__cause__ or error
            raise ConfigError(
                f"data.store={printable(self.url)} cannot be opened ({type(root).__name__}: {reason(root)}); check the "
                "driver and its settings."
            ) from error

    def _short(self, span: Span, found: int, counts: Counts) -> Exception:
        """Fewer bytes than asked for: the object ends there, or the answer was cut off."""
        size = self.sizes([span.shard], counts)[0]
        if size < span.stop:
            return DataError(f"The shard {span.shard} in {printable(self.url)} ends at byte {size}, within "
                             f"{span.about} or after it; {FIX}.")  # fmt: skip
        return OSError(errno.EIO, f"{found} of {span.stop - span.start} bytes came")

    def _refusal(self, span: Span, error: BaseException, attempt: int, counts: Counts) -> DataError:
        """The sentence about a request that is not repeated (again)."""
        if isinstance(error, DataError):
            return error
        status, url = status_of(error), printable(self.url)
        what = f"shard {span.shard}" if span.shard else "folder"
        if status == 416 and isinstance(short := self._short(span, 0, counts), DataError):
            return short
        if status in (401, 403) or isinstance(error, PermissionError) or "Credentials" in type(error).__name__:
            return DataError(f"The {what} may not be read from {url} ({reason(error)}); check the "
                             "credentials that the driver finds in the environment.")  # fmt: skip
        if status == 404 or status is None and isinstance(error, FileNotFoundError) and not is_transient(error):
            return DataError(f"The {what} is missing from {url}; put it there, or correct data.store.")
        times = f" {attempt + 1} times" if attempt else ""
        return DataError(f"The {what} with {span.about} could not be read{times} from {url} "
                         f"({reason(error)}); check the network and the store.")  # fmt: skip


@functools.cache
def _file_system(url: str, pid: int) -> tuple[Any, str]:
    """The file system of a URL in the process `pid`, and the path of the folder in it.

    A forked process makes one of its own and never lets go of its parent's: closing that one would take sockets out of
    the event loop (an epoll instance) that both processes share.
    """
    from fsspec.core import url_to_fs

    files, folder = url_to_fs(url, skip_instance_cache=True)
    return files, folder if scheme_of(url).startswith("http") else unquote(folder)


def _options(method: str, span: Span) -> dict[str, Any]:
    if method == "cat_file":
        return {"start": span.start, "end": span.stop}
    return {"detail": False} if method == "ls" else {}


def _tried(function: Callable[..., Any], path: str, options: dict[str, Any]) -> Any:
    try:
        return function(path, **options)
    except Exception as error:
        return error


def _judge_info(span: Span, info: dict[str, Any]) -> Exception | None:
    if info.get("type") == "file" and info.get("size") is not None:
        return None
    return DataError(f"The store tells no size of the shard {span.shard}; use a store that does.")

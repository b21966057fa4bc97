"""Shards that lie in an object store, read by ranges through fsspec while their manifest is local.

All requests of a call are under way together, up to AT_ONCE; what fails for a moment is asked for again. A file system
belongs to the process that made it: the event loop and the connections behind it do not survive a fork.
"""

from __future__ import annotations

import errno
import functools
import importlib.util
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

from fsspec.core import url_to_fs

from distunlearn.common.store_url import DRIVERS, scheme_of, url_problem
from distunlearn.common.text import printable
from distunlearn.data.storage.retry import Counts, is_transient, patiently, reason, status_of
from distunlearn.errors import ConfigError, DataError

AT_ONCE = 32  # requests under way at once, in one process
TIMEOUT = 30.0  # seconds for an answer; with the usual retries a worker still answers within its own limit
SLOWEST = 1 << 20  # bytes a second that a store is given more time for
BLOCK = 8 << 20  # bytes of one request where a whole shard is read, of which AHEAD are under way
AHEAD = 4
FIX = "put the shard there that the manifest describes, or index the new ones"


@dataclass(frozen=True)
class Span:
    """Bytes [start, stop) of a shard. about: what they are, for messages."""

    shard: str
    start: int = 0
    stop: int = 0
    about: str = "all its bytes"


class ObjectStore:
    """The shards in a folder of an object store; not for several threads at once.

    Every method raises DataError for a shard that is missing or may not be read, and where the store fails for good.

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
        """Bytes of each shard; DataError also where the store does not tell."""
        return [int(info["size"]) for info in self.infos(shards, counts)]

    def infos(self, shards: Sequence[str], counts: Counts) -> list[dict[str, Any]]:
        """What the driver tells about each shard, `size` among it; errors as `sizes`."""

        def ask(spans: list[Span]) -> list[Any]:
            with ThreadPoolExecutor(AT_ONCE) as pool:
                return list(pool.map(lambda span: self._tried("info", span.shard), spans))

        found = patiently([Span(s, about="its size") for s in shards], ask, self.retries, counts, self._refusal)
        for shard, info in zip(shards, found, strict=True):
            if info.get("type") != "file" or info.get("size") is None:
                raise DataError(f"The store tells no size of the shard {shard}; use a store that does.")
        return found

    def names(self, counts: Counts) -> list[str]:
        """Names of the files in the folder, sorted; DataError if no .tar file is listed."""
        spans = [Span("", about="the list of its shards")]
        ask = lambda _: [self._tried("ls", "", detail=False)]  # noqa: E731
        entries = patiently(spans, ask, self.retries, counts, self._refusal)[0]
        found = sorted({path.rpartition("/")[2] for path in entries} - {""})
        if any(name.endswith(".tar") for name in found):
            return found
        raise DataError(f"{printable(self.url)} lists no .tar files; give the folder that holds the shards.")

    def read(self, spans: Sequence[Span], counts: Counts) -> list[bytes]:
        """The bytes of each span, in the order given; DataError also for a shard that ends too early."""

        def ask(spans: list[Span]) -> list[Any]:
            files, folder = self._files()
            paths = [f"{folder}/{span.shard}" for span in spans]
            starts, stops = [span.start for span in spans], [span.stop for span in spans]
            more = {"batch_size": AT_ONCE, **_limit(files, sum(stops) - sum(starts))} if files.async_impl else {}
            try:
                answers = files.cat_ranges(paths, starts, stops, **more)
            except Exception as error:
                return [error] * len(spans)
            return [self._judged(span, answer, counts) for span, answer in zip(spans, answers, strict=True)]

        return patiently(spans, ask, self.retries, counts, self._refusal) if spans else []

    def stream(self, shard: str, size: int, counts: Counts) -> Iterator[bytes]:
        """A whole shard of this size in pieces, in order; the size must have been compared before."""
        spans = [Span(shard, start, min(start + BLOCK, size)) for start in range(0, size, BLOCK)]
        for first in range(0, len(spans), AHEAD):
            yield from self.read(spans[first : first + AHEAD], counts)

    def _judged(self, span: Span, answer: Any, counts: Counts) -> Any:
        """The answer, or what is wrong with it."""
        if isinstance(answer, Exception):
            return answer
        counts.reads += 1
        counts.bytes += len(answer)
        wanted = span.stop - span.start
        if len(answer) < wanted:
            return OSError(errno.EIO, f"{len(answer)} of {wanted} bytes came")
        more = f"{printable(self.url)} gives more of {span.shard} than the range that was asked for"
        return answer if len(answer) == wanted else DataError(f"{more}; use a store that serves ranges.")

    def _tried(self, method: str, name: str, **options: Any) -> Any:
        files, folder = self._files()
        try:
            return getattr(files, method)(f"{folder}/{name}", **options, **_limit(files))
        except Exception as error:
            return error

    def _files(self) -> tuple[Any, str]:
        try:
            return _file_system(self.url, os.getpid())
        except Exception as error:  # drivers raise what they like about missing accounts, broken installations ...
            root = error.__cause__ or error
            raise ConfigError(
                f"data.store={printable(self.url)} cannot be opened ({type(root).__name__}: {reason(root)}); check the "
                "driver and its settings."
            ) from error

    def _refusal(self, span: Span, error: Exception, times: str) -> DataError:
        """The sentence about a request that is not repeated (again)."""
        if isinstance(error, DataError):
            return error
        status, url = status_of(error), printable(self.url)
        what = f"shard {span.shard}" if span.shard else "folder"
        if status in (401, 403) or isinstance(error, PermissionError) or "Credentials" in type(error).__name__:
            return DataError(f"The {what} may not be read from {url} ({reason(error)}); check the "
                             "credentials that the driver finds in the environment.")  # fmt: skip
        if status == 404 or status is None and isinstance(error, FileNotFoundError) and not is_transient(error):
            return DataError(f"The {what} is missing from {url}; put it there, or correct data.store.")
        fix = FIX if status == 416 or getattr(error, "errno", 0) == errno.EIO else "check the network and the store"
        return DataError(f"The {what} with {span.about} could not be read{times} from {url} ({reason(error)}); {fix}.")


@functools.cache
def _file_system(url: str, pid: int) -> tuple[Any, str]:
    """The file system of a URL in the process `pid`, and the path of the folder in it.

    A forked process makes one of its own and never lets go of its parent's: closing that one would take sockets out of
    the event loop (an epoll instance) that both processes share.
    """
    files, folder = url_to_fs(url, skip_instance_cache=True)
    return files, folder if scheme_of(url).startswith("http") else unquote(folder)


def _limit(files: Any, size: int = 0) -> dict[str, float]:
    """The option of drivers with an event loop for how long they may wait for an answer of `size` bytes."""
    return {"timeout": TIMEOUT + size / SLOWEST} if files.async_impl else {}

"""What reading costs, and which failures of a disk, a network or an object store are worth another try."""

from __future__ import annotations

import asyncio
import errno
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from distunlearn.common.text import printable

__all__ = ["FIRST_WAIT", "TRANSIENT", "Counts", "is_transient", "reason", "status_of"]

FIRST_WAIT = 0.25  # seconds before a failed read is repeated; doubled each time
# What may pass: a disk or a network file system that fails for a moment.
TRANSIENT = {
    errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EINTR, errno.EBUSY, errno.EREMOTEIO, errno.ENOLINK,
    errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ECONNRESET, errno.ECONNABORTED,
}  # fmt: skip
_BUSY = {408, 425, 429}  # HTTP: request timeout, too early, too many requests
# Classes of aiohttp, botocore, azure.core, requests and google.auth, by name: the drivers may not be installed.
_PASSING = {
    "ClientConnectionError", "ClientPayloadError", "EndpointConnectionError", "ConnectTimeoutError", "HTTPClientError",
    "IncompleteReadError", "ProxyConnectionError", "ServiceRequestError", "ServiceResponseError", "Timeout",
    "ChunkedEncodingError", "TransportError",
}  # fmt: skip
_FINAL = {"ClientSSLError", "SSLError", "SSLCertVerificationError"}  # a certificate does not get better


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


def is_transient(error: BaseException) -> bool:
    """Whether a failed request may succeed if it is repeated; what a driver gives as its cause counts, too."""
    chain = list(_causes(error))
    names = {cls.__name__ for link in chain for cls in type(link).__mro__}
    if names & _FINAL:
        return False
    if any(isinstance(link, (TimeoutError, asyncio.TimeoutError, ConnectionError)) for link in chain):
        return True
    status = status_of(error)
    if status is not None:
        return status in _BUSY or status >= 500
    return bool(names & _PASSING) or any(isinstance(link, OSError) and link.errno in TRANSIENT for link in chain)


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

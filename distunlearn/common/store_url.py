"""URLs of object stores: which are taken, and which package reads them. Nothing is imported or opened here."""

from __future__ import annotations

import re
from urllib.parse import unquote, urlsplit

# Scheme -> the package that fsspec needs for it.
DRIVERS: dict[str, str | None] = {
    "s3": "s3fs", "gs": "gcsfs", "az": "adlfs", "abfs": "adlfs", "http": "aiohttp", "https": "aiohttp", "file": None,
}  # fmt: skip
# A bucket, a host with a port, or a container (CONTAINER@ACCOUNT.dfs...), as a URL names them.
_PLACE = re.compile(r"(?:[\w$-]+@)?(?:[A-Za-z0-9$][A-Za-z0-9._-]*|\[[0-9A-Fa-f:.]+\])(?::\d{1,5})?", re.ASCII)


def scheme_of(url: str) -> str:
    """What stands before the first colon."""
    return url.partition(":")[0]


def url_problem(url: str) -> str | None:
    """Why a URL is not taken, as the end of a sentence that begins with its key; None if it is taken.

    The URL itself is not repeated, for it may hold a password.
    """
    if not url.isprintable() or re.search(r"[\s\\]", url):
        return "holds a space, a backslash or a control character; write it percent-encoded"
    if "::" in url:
        return "chains file systems with '::'; give the URL of one folder"
    scheme, colon, rest = url.partition("://")
    if not colon or scheme not in DRIVERS:
        found = f"begins with {scheme_of(url)[:20] + ':'!r}" if ":" in url else "is no URL"
        return f"{found}; expected {', '.join(name + '://' for name in DRIVERS)} and the folder of the shards"
    if "?" in rest or "#" in rest:
        return "has a query or a fragment, which may hold a secret; give the folder alone"
    place, _, path = rest.partition("/")
    if "@" in place and scheme not in ("az", "abfs") or re.search(r":.*@", place):
        return "holds a user or a password; leave it out, the drivers find credentials in the environment"
    if any(part in (".", "..") for part in re.split(r"[/\\]", unquote(path))):
        return "has a part '.' or '..'; give the folder without it"
    if scheme == "file":
        return None if not place and path else "is no absolute path; expected file:/// and the folder"
    try:
        named = _PLACE.fullmatch(place) and urlsplit(url).port != 0
    except ValueError:  # a port above 65535
        named = False
    return None if named else f"names no {'host' if scheme.startswith('http') else 'bucket'} that is one; correct it"

"""Text from outside (ids, paths, JSON values) made harmless before it reaches a terminal, a log or a page."""

from __future__ import annotations

import unicodedata

ESCAPED = frozenset({"Cc", "Cf", "Co", "Cs", "Zl", "Zp"})  # control, format (bidi), private, surrogate, separators


def printable(text: object, limit: int = 200) -> str:
    r"""Return `text` on one line, control and direction characters written as escapes, at most `limit` characters.

    A newline cannot forge a log line, ESC cannot drive a terminal, U+202E cannot turn text around.
    A text that is cut ends in an ellipsis of three dots (`limit` >= 4).

    >>> printable("a\x1b[31mb\nc")
    'a\\x1b[31mb\\nc'
    """
    raw = str(text)
    out: list[str] = []
    length = 0
    for char in raw[: limit + 1]:
        piece = char
        if unicodedata.category(char) in ESCAPED:
            piece = char.encode("unicode_escape").decode("ascii")
        out.append(piece)
        length += len(piece)
    joined = "".join(out)
    if length > limit or len(raw) > limit:
        return joined[: limit - 3] + "..."
    return joined

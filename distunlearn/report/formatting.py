"""Numbers as people read them. A figure that is missing is "not evaluated", never 0 and never blank."""

from __future__ import annotations

from distunlearn.common.progress import duration
from distunlearn.report.texts import NOT_EVALUATED


def text(value: float | None, digits: int = 3) -> str:
    """A fixed number of digits and a real minus sign; never a minus before zero.

    >>> text(-0.0001), text(-1.25, 1), text(None)
    ('0.000', '−1.2', 'not evaluated')
    """
    if value is None:
        return NOT_EVALUATED
    shown = f"{value:.{digits}f}" if abs(value) < 1e15 else f"{value:.2e}"
    return (shown[1:] if shown.startswith("-") and not float(shown) else shown).replace("-", "−")


def signed(value: float | None, digits: int = 3) -> str:
    """Like `text`, with a plus sign before what is above zero."""
    shown = text(value, digits)
    return f"+{shown}" if value is not None and float(shown.replace("−", "-")) > 0 else shown


def whole(value: float | None) -> str:
    """A count with narrow spaces between thousands."""
    if value is None or abs(value) >= 1e15:
        return text(value)
    return f"{value:,.0f}".replace(",", "\u202f").replace("-", "−")


def percent(share: float | None, digits: int = 1) -> str:
    """A share of 1 as percent."""
    return NOT_EVALUATED if share is None else f"{text(100 * share, digits)}\u00a0%"


def interval(low: float | None, high: float | None, digits: int = 3, sign: bool = False) -> str:
    """`low to high`; empty when one end is missing."""
    if low is None or high is None:
        return ""
    show = signed if sign else text
    return f"{show(low, digits)} to {show(high, digits)}"


def p_value(value: float | None) -> str:
    """A probability that chance alone would do this."""
    if value is None:
        return NOT_EVALUATED
    return "below 0.001" if value < 0.001 else text(value)


def seconds(value: float | None) -> str:
    """A length of time; below ten seconds with two digits, so that a short one is not "0 s".

    >>> seconds(0.042), seconds(0.0), seconds(9.6)
    ('0.042 s', '0 s', '10 s')
    """
    if value is None or not 0 <= value < 1e12:
        return text(value)
    return f"{value:.2g} s" if 0 < value < 9.5 else duration(value)

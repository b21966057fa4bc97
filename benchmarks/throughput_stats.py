"""Medians with intervals, and the texts that the throughput benchmarks share."""

from __future__ import annotations

import math
import statistics
import textwrap
from collections.abc import Sequence
from typing import Any

__all__ = ["Ratio", "interval", "paragraphs", "preamble", "ratio", "table"]

Ratio = dict[str, float]


def interval(values: Sequence[float], coverage: float = 0.95) -> tuple[float, float]:
    """Distribution-free interval of the median: two order statistics (Conover, "Practical nonparametric statistics").

    Covers with at least `coverage` for six or more independent values; below that it is smallest to largest.
    """
    ordered, n = sorted(values), len(values)
    assert n, "an interval of nothing"
    below, left_out = 0.0, 0  # how many may be cut at each end: P(Binomial(n, 1/2) <= left_out - 1) <= (1 - c) / 2
    while left_out < n // 2:
        below += math.comb(n, left_out) / 2**n
        if below > (1 - coverage) / 2:
            break
        left_out += 1
    cut = max(0, left_out - 1)
    return ordered[cut], ordered[n - 1 - cut]


def ratio(above: Sequence[float], below: Sequence[float]) -> Ratio:
    """Median over pairs of above / below, with its interval."""
    found = [a / b for a, b in zip(above, below, strict=True)]
    low, high = interval(found)
    return {"median": statistics.median(found), "low": low, "high": high, "pairs": len(found)}


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [list(header), ["---"] * len(header), *rows])


def shown(found: Ratio, digits: int = 3) -> str:
    return f"{found['median']:.{digits}f} ({found['low']:.{digits}f} to {found['high']:.{digits}f})"


OWN_LOAD = 2.5  # load average up to which a benchmark of two processes is taken to have had the machine to itself


def preamble(result: dict[str, Any]) -> list[str]:
    """Where and how the figures were made."""
    own = result["machine"]
    busy = (
        ": other work shared the machine, so that only ratios of steps that took turns are to be trusted, and seconds "
        "are longer than they would be on an idle machine"
    )
    idle = own["gpu"] or max(own["load_average"], result["load_after"]) <= OWN_LOAD
    packages = "".join(f", {name} {version}" for name, version in result.get("packages", {}).items())
    gpu = own["gpu"] or "no GPU"
    return [
        f"Date: {own['date']}. Commit {own['commit']}. Python {own['python']}, torch {own['torch']}, timm "
        f"{own['timm']}{packages}. Hardware: {own['cpu']['cores']} cores of an x86_64 CPU ({own['cpu']['model']}), "
        f"{own['memory_gib']} GiB, {gpu}; one thread a process. Load average {own['load_average']:.1f} at the start, "
        f"{result['load_after']:.1f} at the end{'' if idle else busy}. The run took {result['minutes']:.1f} minutes. "
        f"{'More than one GPU' if own['gpu'] else 'GPUs'}: **not measured**.",
        f"Command: `{result['command']}`",
    ]


def paragraphs(title: str, parts: Sequence[str]) -> str:
    """A document: running text is wrapped, tables, code and headings are left alone."""
    plain = ("|", "#", "`", "Command", "*", "- ", "![")
    text = [part.rstrip() if part.startswith(plain) else textwrap.fill(part, 118) for part in parts]
    return "\n\n".join([f"# {title}", *text]) + "\n"

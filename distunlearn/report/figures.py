"""The report's pictures: small panels as SVG, drawn by matplotlib without a display.

Panels carry fixed words only, never text from a run's files. Colours are Okabe and Ito's, which people
with any common colour blindness can tell apart; lines differ in dash and width as well as in colour.
The same arrays give the same bytes: ids inside the SVG are hashed with a fixed salt, no date is written.
"""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

COLOURS = {"original": "#D55E00", "unlearned": "#0072B2", "retrained": "#3d3d3d"}
VERDICT_COLOURS = {"pass": "#00695c", "fail": "#a63a00", "inconclusive": "#7a5c00"}
INK, MUTED, GRID, BAND = "#2b2f33", "#5f666d", "#e3e6e8", "#dcecea"
FONTS = "system-ui, 'Segoe UI', 'Helvetica Neue', Arial, 'DejaVu Sans', sans-serif"

STYLE: Any = {
    "svg.hashsalt": "distunlearn",
    "svg.fonttype": "none",  # text stays text: sharp, small, and set in the reader's own font
    "font.family": ["DejaVu Sans"],  # shipped with matplotlib: the same measurements everywhere
    "font.size": 9.5,
    "axes.edgecolor": "#9aa1a7",
    "axes.labelcolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.unicode_minus": True,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "text.color": INK,
    "text.parse_math": False,
    "lines.solid_capstyle": "round",
    "path.simplify": True,
}
GRID_POINTS = 160  # of a smoothed distribution
ROC_POINTS = 400  # most points of a ROC curve


def data_uri(svg: bytes) -> str:
    """Return an SVG as a `data:` address, so that the page needs no second file."""
    return "data:image/svg+xml;base64," + base64.b64encode(svg).decode("ascii")


def density_limits(samples: Sequence[np.ndarray], log: bool = False) -> tuple[float, float] | None:
    """Common limits [low, high] of the x axis of several panels: the central 99 % and a margin; None without data.

    log: the limits of log10 of the positive values.
    """
    parts = [_positive_log(sample) if log else sample for sample in samples]
    parts = [part for part in parts if part.size]
    if not parts:
        return None
    low = min(float(np.quantile(part, 0.005)) for part in parts)
    high = max(float(np.quantile(part, 0.995)) for part in parts)
    pad = 0.09 * (high - low) or 0.5
    return low - pad, high + pad


def density_panel(
    samples: Mapping[str, np.ndarray], encoder: str, limits: tuple[float, float], label: str, log: bool = False
) -> bytes:
    """Smoothed distributions of one score for one encoder.

    samples: role -> values [n], drawn for forget (filled, the encoder's colour), holdout (thin black)
    and third_party_audit (dashed). limits: from `density_limits`. label: fixed words under the axis.
    """
    grid = np.linspace(*limits, GRID_POINTS)
    with matplotlib.rc_context(STYLE):
        figure, axes = _panel(3.3, 2.2)
        curves = {}
        for role in ("holdout", "third_party_audit", "forget"):
            values = samples.get(role, np.empty(0))
            values = _positive_log(values) if log else values
            if values.size >= 2:
                curves[role] = _smooth(values, grid)
        colour = COLOURS[encoder]
        if "holdout" in curves:
            axes.plot(grid, curves["holdout"], color="#111111", linewidth=1.1)
        if "third_party_audit" in curves:
            axes.plot(grid, curves["third_party_audit"], color="#6b7280", linewidth=1.4, linestyle=(0, (3.5, 2)))
        if "forget" in curves:
            axes.fill_between(grid, curves["forget"], color=colour, alpha=0.22, linewidth=0)
            axes.plot(grid, curves["forget"], color=colour, linewidth=2.2)
        top = max((float(curve.max()) for curve in curves.values()), default=1.0)
        axes.set(xlim=limits, ylim=(0, 1.08 * top), xlabel=label)
        axes.yaxis.set_major_locator(NullLocator())
        axes.spines["left"].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        if log:
            axes.xaxis.set_major_locator(FixedLocator(_decade_ticks(*limits)))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda power, _: _plain_power(power)))
        return _svg(figure)


def roc_panel(curves: Mapping[str, tuple[np.ndarray, np.ndarray]], log: bool = False) -> bytes:
    """ROC curves: encoder -> (false positive rates [n], true positive rates [n]), both rising from 0 to 1.

    log: false positive rate from 0.2 % on a logarithmic axis, where an attacker who wants to be sure works.
    """
    with matplotlib.rc_context(STYLE):
        figure, axes = _panel(3.3, 3.0)
        line = np.geomspace(2e-3, 1, 60) if log else np.array([0.0, 1.0])
        axes.plot(line, line, color="#9aa1a7", linewidth=1, linestyle=(0, (1.5, 2)))
        widths = {"original": 1.8, "unlearned": 2.4, "retrained": 1.3}
        for encoder in ("original", "retrained", "unlearned"):
            if encoder in curves:
                x, y = _thin(*curves[encoder])
                dash = (0, (5, 1.6)) if encoder == "retrained" else "solid"
                axes.plot(x, y, color=COLOURS[encoder], linewidth=widths[encoder], linestyle=dash)
        axes.set(xlabel="non-members wrongly accused", ylabel="forgotten images found", ylim=(0, 1.01))
        axes.set_xlim((2e-3, 1) if log else (-0.005, 1))
        percent = FuncFormatter(lambda value, _: f"{100 * value:g} %")
        axes.yaxis.set_major_locator(FixedLocator([0, 0.25, 0.5, 0.75, 1]))
        if log:
            axes.set_xscale("log")
            axes.xaxis.set_minor_locator(NullLocator())
            axes.xaxis.set_major_locator(FixedLocator([0.002, 0.01, 0.1, 1]))
        else:
            axes.xaxis.set_major_locator(FixedLocator([0, 0.25, 0.5, 0.75, 1]))
        axes.xaxis.set_major_formatter(percent)
        axes.yaxis.set_major_formatter(percent)
        axes.grid(True, color=GRID, linewidth=0.7)
        axes.set_axisbelow(True)
        return _svg(figure)


def forest_row(
    value: float | None, low: float, high: float, band: tuple[float, float], limits: tuple[float, float], verdict: str
) -> bytes:
    """One interval [low, high] and its middle `value` against the allowed band, on the scale `limits`."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _strip(2.6, 0.34, limits)
        axes.set_ylim(-1, 1)
        axes.axvspan(max(band[0], limits[0]), min(band[1], limits[1]), color=BAND, linewidth=0)
        axes.axvline(0, color="#8a9399", linewidth=0.9)
        colour = VERDICT_COLOURS.get(verdict, MUTED)
        inset = 0.025 * (limits[1] - limits[0])  # an arrow at the very edge would be cut in half
        left, right = np.clip([low, high], limits[0] + inset, limits[1] - inset)
        axes.plot([left, right], [0, 0], color=colour, linewidth=2.4)
        ends = [(left, low < limits[0], "<"), (right, high > limits[1], ">")]
        if low > limits[1] or high < limits[0]:  # all of it lies beyond the picture: one arrow says so
            ends = ends[1:] if low > limits[1] else ends[:1]
        for place, beyond, arrow in ends:
            axes.plot([place], [0], marker=arrow if beyond else "|", color=colour, markersize=6, markeredgewidth=1.6)
        if value is not None and limits[0] <= value <= limits[1]:
            axes.plot([value], [0], "o", color=colour, markersize=6, markeredgecolor="white", markeredgewidth=1)
        return _svg(figure)


def forest_axis(edges: Sequence[float], limits: tuple[float, float], unit: str) -> bytes:
    """The scale under the rows of a forest plot, with 0 and `edges` as its numbers; unit: fixed words.

    Edges that would lie on one another on a wide scale give way to round numbers.
    """
    with matplotlib.rc_context(STYLE):
        figure, axes = _strip(2.6, 0.5, limits)
        axes.set_axis_on()
        axes.patch.set_visible(False)
        axes.set_position((0.02, 0.86, 0.96, 0.1))
        for side in ("left", "top", "right"):
            axes.spines[side].set_visible(False)
        axes.yaxis.set_major_locator(NullLocator())
        ticks = sorted({0.0, *(edge for edge in edges if limits[0] <= edge <= limits[1])})
        if min(map(abs, edges), default=limits[1]) < 0.3 * limits[1]:
            round_numbers = MaxNLocator(4, symmetric=True).tick_values(*limits)
            ticks = [tick for tick in round_numbers if abs(tick) <= 0.9 * limits[1]]
        axes.xaxis.set_major_locator(FixedLocator(ticks))
        signed = FuncFormatter(lambda value, _: f"{value:+g}".replace("-", "−") if value else "0")
        axes.xaxis.set_major_formatter(signed)
        axes.set_xlabel(unit, fontsize=9, labelpad=1)
        return _svg(figure)


def dots(values: Mapping[str, float], limits: tuple[float, float]) -> bytes:
    """Accuracy in percent of up to three encoders, a line for each, on the scale `limits`."""
    shapes = {"original": "o", "unlearned": "D", "retrained": "s"}
    with matplotlib.rc_context(STYLE):
        figure, axes = _panel(4.4, 1.35)
        rows = {encoder: -row for row, encoder in enumerate(name for name in shapes if name in values)}
        for encoder, row in rows.items():
            axes.axhline(row, color=GRID, linewidth=1.4, zorder=0)
            axes.plot(
                [values[encoder]], [row], shapes[encoder], color=COLOURS[encoder], markersize=8,
                markeredgecolor="white", markeredgewidth=1, zorder=2, clip_on=False,
            )  # fmt: skip
        axes.set(xlim=limits, ylim=(-len(rows) + 0.4, 0.6), xlabel="right answers, %")
        axes.yaxis.set_major_locator(NullLocator())
        axes.spines["left"].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        return _svg(figure)


def bars(values: Mapping[str, float]) -> bytes:
    """Horizontal bars from 0, one for each encoder given (retrained, unlearned); the numbers are in the page's text."""
    with matplotlib.rc_context(STYLE):
        names = [name for name in ("unlearned", "retrained") if name in values]
        figure, axes = _panel(4.4, 0.55 + 0.3 * len(names))
        axes.barh(
            range(len(names)), [values[name] for name in names], height=0.56, color=[COLOURS[name] for name in names]
        )
        words = {"unlearned": "forgetting", "retrained": "retraining"}
        axes.set_yticks(range(len(names)), [words[name] for name in names])
        axes.tick_params(axis="y", length=0)
        axes.invert_yaxis()
        axes.set_xlim(0, 1.02 * max(values.values()) or 1.0)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        shown = FuncFormatter(lambda value, _: f"{value:,.0f}".replace(",", " ") if value >= 10 else f"{value:g}")
        axes.xaxis.set_major_formatter(shown)
        return _svg(figure)


def dose_curve(points: Sequence[tuple[float, float]], chosen: float) -> bytes:
    """How far off the aim (points of AUC) the forgotten images are at each dose, and the dose that was chosen."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _panel(4.4, 2.0)
        x, y = zip(*sorted(points), strict=True)
        axes.plot(x, y, color=COLOURS["unlearned"], linewidth=2, marker="o", markersize=4)
        axes.axvline(chosen, color="#3d3d3d", linewidth=1.1, linestyle=(0, (4, 2)))
        axes.set(xlabel="dose (dashed: chosen)", ylabel="off the aim, points", ylim=(0, 1.1 * max(y) or 1.0))
        axes.grid(True, color=GRID, linewidth=0.7)
        axes.set_axisbelow(True)
        return _svg(figure)


def _panel(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0)
    return figure, axes


def _strip(width: float, height: float, limits: tuple[float, float]) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height))
    figure.patch.set_alpha(0)
    axes = figure.add_axes((0.02, 0.0, 0.96, 1.0))
    axes.set_axis_off()
    axes.set_xlim(limits)
    return figure, axes


def _svg(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))  # no metadata block, so no address and no time
    figure.savefig(buffer, format="svg", metadata=nothing)
    text = buffer.getvalue().decode("utf-8")
    text = text[text.index("<svg") :]  # without the document type, which names a remote file
    text = re.sub(r"'DejaVu Sans'", lambda _: FONTS.replace('"', "'"), text)
    return text.encode("utf-8")


def _smooth(values: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """Gaussian kernel estimate [len(grid)] of values [n]."""
    spread = min(float(values.std()), float(np.subtract(*np.quantile(values, [0.75, 0.25]))) / 1.34)
    width = max(0.9 * spread * values.size**-0.2, 0.006 * float(grid[-1] - grid[0]))
    density = np.zeros_like(grid)
    for chunk in np.array_split(values, max(1, values.size // 4096)):
        density += np.exp(-0.5 * ((grid[:, None] - chunk[None]) / width) ** 2).sum(axis=1)
    return density / (values.size * width * np.sqrt(2 * np.pi))


def _positive_log(values: np.ndarray) -> np.ndarray:
    return np.log10(values[values > 0])


def _decade_ticks(low: float, high: float) -> list[float]:
    """log10 of round numbers between 10^low and 10^high: 1, 2 and 5 of each decade, or any where the range is short."""
    powers = range(math.floor(low), math.ceil(high) + 1)
    choices = [[10.0], [10.0, 30.0], [10.0, 20.0, 50.0]]
    found: list[float] = []
    for digits in choices:
        found = [power - 1 + math.log10(digit) for power in powers for digit in digits]
        found = [tick for tick in found if low <= tick <= high]
        if len(found) >= 3:
            break
    if len(found) < 2:
        found = [math.log10(value) for value in MaxNLocator(4).tick_values(10**low, 10**high) if value > 0]
        found = [tick for tick in found if low <= tick <= high]
    return found[:: max(1, len(found) // 5)]


def _plain_power(power: float) -> str:
    """10^power as a plain number where that is short, else as a power of ten."""
    if -3 <= power <= 4:
        return f"{float(f'{10**power:.3g}'):g}"
    exponent = math.floor(power + 1e-9)
    digit = round(10 ** (power - exponent))
    raised = str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"10{raised}" if digit == 1 else f"{digit}·10{raised}"


def _thin(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if x.size <= ROC_POINTS:
        return x, y
    keep = np.unique(np.linspace(0, x.size - 1, ROC_POINTS).round().astype(int))
    return x[keep], y[keep]

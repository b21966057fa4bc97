"""The results of `scaling.py` as a document and a plot."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from throughput_stats import Ratio, paragraphs, preamble, ratio, shown, table

__all__ = ["document", "efficiency_plot", "efficiency", "speed_up"]

GOAL = 0.9


def efficiency(found: dict[str, Any], key: str) -> Ratio:
    """Weak: images/s of the backend's processes to that of as many independent ones. key: seconds or cpu."""
    rows = found["rounds"]
    together = [max(s[key] for s in row) if key == "seconds" else statistics.mean(s[key] for s in row)
                for row in rows["backend"]]  # fmt: skip
    alone = [statistics.harmonic_mean([s[key] for s in row]) for row in rows["independent"]]
    return ratio(alone, together)


def speed_up(found: dict[str, Any], key: str) -> Ratio:
    """Strong: step of one process with the global batch to that of the backend's slowest process (or their mean)."""
    rows = found["rounds"]
    pick = max if key == "seconds" else statistics.mean
    return ratio([row[0][key] for row in rows["one"]], [pick(s[key] for s in row) for row in rows["backend"]])


def scaling_rows(result: dict[str, Any]) -> list[list[str]]:
    rows = []
    for found in result["scaling"]:
        if "error" in found:
            rows.append([found["encoder"], found["backend"], str(found["batch"]), "failed", found["error"], "", "", ""])
            continue
        clock = efficiency(found, "seconds")
        step = statistics.median(max(s["seconds"] for s in row) for row in found["rounds"]["backend"])
        rows.append([
            found["encoder"], found["backend"], str(found["batch"]), f"{2 * found['batch'] / step:.1f}",
            shown(clock, 2), shown(efficiency(found, "cpu"), 2), shown(speed_up(found, "seconds"), 2),
            shown(speed_up(found, "cpu"), 2),
        ])  # fmt: skip
    return rows


def verdicts(result: dict[str, Any]) -> str:
    """The goal for ddp, in words."""
    words = []
    for found in result["scaling"]:
        if found["backend"] != "ddp" or "error" in found:
            continue
        for key, name in (("seconds", "the clock"), ("cpu", "CPU seconds")):
            own = efficiency(found, key)
            met = "met" if own["median"] >= GOAL else "MISSED"
            words.append(f"{found['encoder']}, by {name}: {own['median']:.2f}, {met}")
    return f"Goal: weak scaling of ddp >= {GOAL}. " + "; ".join(words) + "."


def document(result: dict[str, Any]) -> str:
    raw = []
    for found in result["scaling"]:
        for name, rows in found.get("rounds", {}).items():
            steps = "  ".join(" ".join(f"{s['seconds']:.3f}/{s['cpu']:.3f}" for s in row) for row in rows)
            raw.append(f"{found['encoder']} {found['backend']} {name}: {steps}")
    parts = [
        *preamble(result),
        "SimCLR pretraining, float32, one thread a process, gloo over loopback; whole steps of real runs. "
        "Groups of processes took turns step by step: two that do not communicate, one with the global batch, the two "
        "of the backend. Medians over rounds with a distribution-free 95 % interval. Weak efficiency: images/s of the "
        "backend's two processes to that of the two independent ones. Strong speed-up: step of one process with the "
        "global batch to that of the backend's two. Clock: the slowest process counts, its waiting for a core "
        "included; CPU: the processes' own CPU seconds, the work of communicating included, waiting not. "
        + (
            "Batch statistics were those of each process's own images (sync_batchnorm=false), as the independent "
            "processes have them."
            if result.get("local_batchnorm")
            else "Batch statistics were those of the global batch, which the independent processes do not need."
        ),
        verdicts(result),
        table(
            [
                "encoder",
                "backend",
                "batch a process",
                "images/s",
                "weak, clock",
                "weak, CPU",
                "strong, clock",
                "strong, CPU",
            ],
            scaling_rows(result),
        ),
        "Over nodes, and over GPUs of a node: **not measured** (docs/results.md says how to).",
        "## Raw numbers\n",
        "Seconds, clock / CPU; a round's processes stand together.",
        "```\n" + "\n".join(raw) + "\n```",
    ]
    return paragraphs("Scaling over processes", parts)


def efficiency_plot(result: dict[str, Any], path: Path) -> None:
    """Weak efficiency by backend, clock and CPU, with intervals."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = [f for f in result["scaling"] if "error" not in f]
    figure, axes = pyplot.subplots(figsize=(7, 3.2), layout="constrained")
    for shift, key, name in ((-0.1, "seconds", "by the clock"), (0.1, "cpu", "by CPU seconds")):
        ratios = [efficiency(f, key) for f in found]
        spans = [[r["median"] - r["low"] for r in ratios], [r["high"] - r["median"] for r in ratios]]
        places = [number + shift for number in range(len(found))]
        axes.errorbar(places, [r["median"] for r in ratios], yerr=spans, fmt="o", capsize=3, label=name)
    axes.axhline(1.0, color="grey", linewidth=0.8)
    axes.axhline(GOAL, color="grey", linewidth=0.8, linestyle=":")
    names = [f"{f['backend']}\n{f['encoder']}\n{f['batch']} images" for f in found]
    axes.set_xticks(range(len(found)), names, fontsize=6)
    axes.set_ylabel("weak efficiency, 2 processes")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)

"""The results of `throughput.py` as a document."""

from __future__ import annotations

import statistics
from typing import Any

from throughput_split import PARTS
from throughput_stats import paragraphs, preamble, table

__all__ = ["document"]

MIB = 2**20
GIGA = 1e9
ON_CPU = (
    "MFU: counted operations by the step's time and by the matrix rate that the same process measured right before and "
    "after, by the clock (by CPU seconds). On a shared machine the clock's figure is blurred, for the rate and the "
    'steps met different disturbances. Memory: peak resident memory of a process, libraries included. "Not counted": '
    "torch cannot count operations on shards; they are those of `single`."
)
ON_GPU = (
    "MFU: counted operations by the step's time and by the matrix rate that the same process measured right before and "
    "after (by the datasheet's dense peak of this precision, without sparsity). Operations of a compiled step are "
    "those of the same step as plain code. Memory: the peak that torch allocated on the GPU."
)


def name(cell: dict[str, Any]) -> list[str]:
    method = cell["method"] if cell["method"] != "third_party" else f"third_party/{cell['evaluator']}"
    backend = cell["backend"] if cell["world"] == 1 else f"{cell['backend']} x{cell['world']}"
    other = f"{', compiled' * cell['compile']}{', channels first' * (not cell['channels_last'])}"
    return [cell["encoder"], cell["objective"], method, backend, cell["precision"] + other]


def quartiles(values: list[float]) -> tuple[float, float, float]:
    low, middle, high = statistics.quantiles(values, n=4)
    return low, middle, high


def operations(result: dict[str, Any], found: dict[str, Any]) -> float | None:
    """Those of a step; a compiled step's are counted in the same step as plain code."""
    twin = {**found["cell"], "compile": False, "channels_last": True}
    same = [other["flops"] for other in result["cells"] if other["cell"] == twin]
    return found["flops"] or (same[0] if same else None)


def mfu(result: dict[str, Any], found: dict[str, Any]) -> str:
    """Share of the measured matrix rate by the clock (by CPU seconds), of cells whose operations were counted; on a GPU
    by the clock, and of the datasheet's peak.
    """
    flops, peak = operations(result, found), result.get("peaks", {}).get(found["cell"]["precision"])
    if not flops:
        return "not counted"
    clock, cpu = (statistics.median(s[key] for s in found["samples"]) for key in ("seconds", "cpu"))
    other = flops / clock / peak if peak else flops / cpu / found["matrix_rate"]
    return f"{flops / clock / found['matrix_rate']:.2f} ({other:.2f})"


def speed_rows(result: dict[str, Any]) -> list[list[str]]:
    rows = []
    for found in result["cells"]:
        rates = [found["images"] / s["seconds"] for s in found["samples"]]
        low, middle, high = quartiles(rates)
        cpu = statistics.median(s["cpu"] for s in found["samples"])
        counted = operations(result, found)
        flops = f"{counted / found['images'] / GIGA:.2f}" if counted else "not counted"
        memory = found["allocated_bytes"] or found["resident_bytes"]
        rows.append([
            *name(found["cell"]), f"{middle:.1f}", f"{low:.1f} to {high:.1f}", f"{found['images'] / cpu:.1f}", flops,
            mfu(result, found), f"{memory / MIB:,.0f}",
        ])  # fmt: skip
    return rows


def split_rows(result: dict[str, Any]) -> list[list[str]]:
    """Medians over steps of each part's share of its step, %."""
    rows = []
    for found in result["cells"]:
        shares = []
        for part in PARTS:
            own = [parts[part] / sum(parts.values()) for parts in found["parts"]]
            shares.append(f"{100 * statistics.median(own):.1f}")
        rows.append([*name(found["cell"]), *shares])
    return rows


def document(result: dict[str, Any]) -> str:
    failed = [f"- {' '.join(name(f['cell']))}: `{f['error']}`" for f in result["cells"] if "error" in f]
    result = {**result, "cells": [found for found in result["cells"] if "error" not in found]}
    head = ["encoder", "objective", "method", "backend", "precision"]
    raw = [
        f"{' '.join(name(found['cell']))}: " + " ".join(f"{s['seconds']:.3f}/{s['cpu']:.3f}" for s in found["samples"])
        for found in result["cells"]
    ]
    batch = result["cells"][0]["cell"]["batch"]
    parts = [
        *preamble(result),
        f"{batch} images a process and step ({batch} retain, and a quarter of that forgotten and as many third-party "
        "in `third_party`), two views each, all of SimCLR's operations. Every cell is a whole run of its own: real "
        "shards, ledger, metrics, finite checks, gradient norm. Cells ran one after another on a machine whose load "
        "changed: **compare cells with care**; pairs that took turns are in the documents of scaling. "
        'Images/s counts source images of the global batch: median and quartiles over steps. "By CPU" is the same '
        "with the process's own CPU seconds (for two processes: of rank 0, times the images of both).",
        "## Speed\n",
        ON_GPU if result["machine"]["gpu"] else ON_CPU,
        table(
            [*head, "images/s", "quartiles", "images/s by CPU", "GFLOP an image", "MFU", "memory, MiB"],
            speed_rows(result),
        ),
        "## Where a step's time goes, %\n",
        "Exclusive shares, medians over steps; what counts as what is in `benchmarks/throughput_split.py`. The data "
        'wait is the column "data".',
        table([*head, *PARTS], split_rows(result)),
        *(["## Cells that failed\n", "\n".join(failed)] if failed else []),
        "## Raw numbers\n",
        "Seconds of every step, clock / CPU; parts and memory are in the JSON file beside this one.",
        "```\n" + "\n".join(raw) + "\n```",
    ]
    return paragraphs("Images per second, and where the time goes", parts)

"""The results of `peers.py` as a document."""

from __future__ import annotations

import statistics
from typing import Any

from throughput_stats import paragraphs, preamble, ratio, shown, table

__all__ = ["document", "norm_rows", "step_rows"]

GOAL = 0.95
MISSING = "**Not measured** in this run."
MIB = 2**20


def column(samples: list[list[float]], which: int) -> list[float]:
    return [sample[which] for sample in samples]


def verdict(low: float) -> str:
    return f"{'met' if low >= GOAL else 'MISSED'}"


def step_rows(result: dict[str, Any]) -> list[list[str]]:
    """Ratio of images/s, ours to theirs, of every cell and peer."""
    rows = []
    for cell in result["steps"]:
        for peer, theirs in cell["theirs"].items():
            clock = ratio(column(theirs, 0), column(cell["ours"], 0))
            cpu = ratio(column(theirs, 1), column(cell["ours"], 1))
            rows.append([
                cell["encoder"], cell["objective"], peer, str(clock["pairs"]),
                f"{cell['batch'] / statistics.median(column(cell['ours'], 0)):.1f}",
                shown(clock), shown(cpu), verdict(clock["low"]),
            ])  # fmt: skip
    return rows


def norm_rows(result: dict[str, Any]) -> list[list[str]]:
    rows = []
    for found in result["norms"]:
        clock = ratio(column(found["seconds"]["theirs"], 0), column(found["seconds"]["ours"], 0))
        cpu = ratio(column(found["seconds"]["theirs"], 1), column(found["seconds"]["ours"], 1))
        live = found["live_bytes"]
        rows.append([
            found["network"], str(found["samples"]), shown(clock), shown(cpu),
            f"{live['ours'] / MIB:.1f} / {live['theirs'] / MIB:.1f} = {live['ours'] / live['theirs']:.2f}",
            f"{found['error']['ours']:.0e} / {found['error']['theirs']:.0e}", verdict(clock["low"]),
        ])  # fmt: skip
    return rows


def gather_rows(result: dict[str, Any]) -> list[list[str]]:
    rows = []
    for found in result["gathered"]:
        clock = ratio(found["seconds"]["theirs"], found["seconds"]["ours"])
        rows.append([
            found["peer"], str(found["images"]), str(found["dim"]),
            f"{1e3 * statistics.median(found['seconds']['ours']):.2f}", shown(clock),
            f"{found['difference'][0]:.0e} / {found['difference'][1]:.0e}", verdict(clock["low"]),
        ])  # fmt: skip
    return rows


def raw(result: dict[str, Any]) -> str:
    lines = []
    for cell in result["steps"]:
        for name, samples in {"ours": cell["ours"], **cell["theirs"]}.items():
            shown_samples = " ".join(f"{clock:.3f}/{cpu:.3f}" for clock, cpu in samples)
            lines.append(f"{cell['encoder']} {cell['objective']} {name}: {shown_samples}")
    return "```\n" + "\n".join(lines) + "\n```"


def document(result: dict[str, Any]) -> str:
    parts = [
        *preamble(result),
        "Ratios are speed of ours to theirs, above 1 ours is faster: the median over pairs that ran next to each "
        'other, with a distribution-free 95 % interval of the median. "Clock" decides; "CPU" is the same with the '
        "process's own CPU seconds, which other work on the machine disturbs less. Goal: lower bound >= "
        f"{GOAL}.",
        "## Training step\n",
        "Ours is the whole engine with its finite checks, gradient norm, ledger and metrics. Same backbone, batches "
        'and views on both sides; "default optimizer": theirs has torch\'s AdamW as its constructor makes it, ours '
        'the fused one; "same optimizer": both have the fused one; "own views": theirs makes its views from PIL '
        "images, with the operations and strengths of ours.",
        table(
            ["encoder", "objective", "peer", "pairs", "our images/s", "speed, clock", "speed, CPU", "goal"],
            step_rows(result),
        ),
        "solo-learn is **not installable** here: the newest version that the package index offered (1.0.2) pins "
        "torch 1.9.1, torchvision 0.10.1 and pytorch-lightning 1.4.7, which have no wheel for Python 3.11, and this "
        "package needs torch 2.11. Its loss function was loaded from its wheel by itself where a row names it; a step "
        "of its trainer was not measured.",
        "## Per-sample gradient norms over the whole network\n",
        "By `constraints/ghost.py` and by Opacus' ghost clipping (hooks and an ordinary backward, as usual there). "
        "Live memory is the peak of all tensors made within the call, MiB (ours / theirs). Error: largest relative "
        "difference to float64, sample by sample (ours / theirs).",
        table(["layers", "samples", "speed, clock", "speed, CPU", "live memory", "error", "goal"], norm_rows(result))
        if result["norms"]
        else MISSING,
        "## Gathered losses on two ranks\n",
        "Two processes over gloo, ours with what is small through shared memory, as its runs do; forward and backward "
        "from raw outputs; time of the slower rank. Difference: of the "
        "loss averaged over ranks, and of the gradient (relative).",
        table(["peer", "images a rank", "dim", "ours, ms", "speed, clock", "difference", "goal"], gather_rows(result))
        if result["gathered"]
        else MISSING,
        "## Raw numbers\n",
        "Seconds of every step, clock / CPU; the rest is in the JSON file beside this one.",
        raw(result),
    ]
    return paragraphs("Training steps, losses and gradient norms beside other packages", parts)

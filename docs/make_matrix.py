"""Print docs/matrix.md, made from the newest benchmarks/results/*-matrix.json, which the tests wrote.

    DISTUNLEARN_MATRIX=benchmarks/results/DATE-matrix.json OMP_NUM_THREADS=1 pytest -m matrix tests/dist/test_matrix.py
    python docs/make_matrix.py > docs/matrix.md

A test compares the committed page with what this prints.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from distunlearn.config.checks import cross_checks
from distunlearn.config.registry import EVALUATOR, settings_of
from distunlearn.config.schema import RunConfig, RuntimeConfig

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
HEAD = """\
# Evaluators, backends and features

What the tests ran, and how far it was from plain torch in one process without activation checkpointing and
compilation. This page is made by `python docs/make_matrix.py > docs/matrix.md` from
[{name}](../benchmarks/results/{name}); do not edit it by hand.

A cell is a training of {steps} SGD steps by the whole loss of `third_party` on a small ResNet or ViT, on {world}
processes (`single`: one) over gloo, with uneven shares. Differences are relative to the update of the weights: after
the first step, which is the gradient, and after the last. `single`, `ddp` and `fsdp2` ran in float64, where nothing
hides behind rounding. DeepSpeed keeps weights in float32: there weights, gradients, their exchange and the updates are
float32 and the layers compute in float64 ("mixed"), because with layers in float32 one process alone is further from
float64 than the limits allow. bf16 is compared with bf16, at a tenth of the learning rate: at the full one four steps
turned half a unit in the last place of the weights into another training. torch.compile ran with its tracing backend,
without generated machine code. GPUs, NCCL and more than {world} processes: not measured here. That float32 throughout
stays within what rounding does to one process is shown on four processes (`pytest -m matrix
tests/dist/test_constraint_parity.py`).

{cells} cells: {within} within the stated limits{floor}; {bad} beyond {both}.
{versions}
{note}
"""
FLOOR = """; {} beyond them, with layers in bf16 or float32, but
within what rounding does to one process (listed below)"""
LIMITS = """\
Limits: float64 1e-9 after the first and 1e-8 after the last step; mixed 2e-6 and 3e-5 for `head` and `input_gp`, 2e-4
for the others; bf16 0.05 and 0.5. Cells of float32 throughout, of which there are none where this page does not show
them, have the limits of "mixed", or twice what rounding does to plain torch in one process on the same training, and at
most 0.1 and 1. The penalty of `input_gp` has a weight of 0.006: at 0.01 four steps enlarged rounding a thousandfold.
"""
FEATURES: dict[str, Callable[[dict[str, Any]], bool]] = {
    "plain": lambda c: not (c["checkpointing"] or c["compile"] or c["bf16"]) and c["accumulate"] == 1,
    "activation checkpointing": lambda c: c["checkpointing"] and not c["bf16"],
    "torch.compile": lambda c: c["compile"] and not c["bf16"],
    "bf16": lambda c: c["bf16"] and not c["compile"],
    "all, with micro-batches": lambda c: c["accumulate"] > 1,
    "batch norm": lambda c: c["batchnorm"] and not c["bf16"],
    "without batch norm": lambda c: not c["batchnorm"] and not c["bf16"],
}
OF_BACKENDS = {
    "float64: single, ddp, fsdp2": lambda c: c["precision"] == "float64",
    "mixed": lambda c: c["precision"] == "mixed",
    "float32 throughout": lambda c: c["precision"] == "float32",
    "bf16 everywhere": lambda c: c["precision"] == "bf16",
}


def newest() -> Path:
    """The latest result by its date."""
    return max(RESULTS.glob("*-matrix.json"))


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def worst(cells: list[dict[str, Any]]) -> str:
    """Largest differences after the first and the last step; a cell beyond its limit is named."""
    if not cells:
        return "refused"
    text = f"{max(c['first'] for c in cells):.0e} / {max(c['last'] for c in cells):.0e}"
    return text if all(c["ok"] for c in cells) else f"**{text}**"


def by_rounding(cells: list[dict[str, Any]]) -> str:
    """The cells beyond the stated limits, with what rounding does to one process, once for like backends."""
    backends: dict[tuple[str, ...], list[str]] = {}
    for c in cells:
        if c["rounding"] is None:
            continue
        features = [name for name in ("batchnorm", "checkpointing", "compile", "bf16") if c[name]]
        features += [f"{c['accumulate']} micro-batches"] if c["accumulate"] > 1 else []
        figures = [f"{a:.0e} / {b:.0e}" for a, b in ((c["first"], c["last"]), c["rounding"])]
        key = (f"`{c['evaluator']}`", f"{c['encoder']}, {c['objective']}", ", ".join(features), *figures)
        backends.setdefault(key, []).append(c["backend"])
    rows = [[*key[:3], ", ".join(names), *key[3:]] for key, names in backends.items()]
    return table(["evaluator", "training", "features", "backends", "difference", "rounding of one process"], rows)


def attention(cells: list[dict[str, Any]]) -> str:
    """Which attention operators torch dispatched to in the first step."""
    kinds = {"fused only" if c["attention"] == ["flash"] else "unfused too" for c in cells if c["encoder"] == "vit"}
    assert len(kinds) == 1, kinds
    return kinds.pop()


def refusals() -> list[str]:
    """What a run says at its start where an evaluator or a feature cannot work."""
    found = []
    for evaluator, backend, precision, compiled in (
        ("double_backward", "fsdp2", "fp32", False), ("double_backward", "zero3", "fp32", False),
        ("sliced", "ddp", "bf16", False), ("head", "zero3", "fp32", True),
    ):  # fmt: skip
        cfg = RunConfig(backend=backend, precision=precision, constraint=settings_of(EVALUATOR, evaluator),
                        runtime=RuntimeConfig(compile=compiled))  # fmt: skip
        problems = cross_checks(cfg)
        found += [textwrap.fill(f"* {problem}.", 118, subsequent_indent="  ") for problem in problems]
    return found


def page(path: Path | None = None) -> str:
    """The text of docs/matrix.md."""
    path = path or newest()
    result = json.loads(path.read_text(encoding="utf-8"))
    cells = result["cells"]
    evaluators = list(dict.fromkeys(c["evaluator"] for c in cells))
    backends = list(dict.fromkeys(c["backend"] for c in cells))
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    bad = sum(not c["ok"] for c in cells)
    by_floor = [c for c in cells if c["rounding"] is not None and c["ok"]]
    assert all(c["precision"] in ("bf16", "float32") for c in by_floor)
    floor = len(by_floor)
    within = len(cells) - sum(c["rounding"] is not None or not c["ok"] for c in cells)
    note = textwrap.fill(result.get("note", ""), 118)
    parts = [
        HEAD.format(name=path.name, steps=result["steps"], world=result["world"], cells=len(cells), within=within,
                    floor=FLOOR.format(floor) if floor else "", both="both" if floor else "them", bad=bad,
                    versions=f"{versions}; {result['hardware']}.", note=note),
        LIMITS,
        "## By backend\n\nWorst of all encoders, objectives and features, without bf16, first / last step.\n",
        table(["evaluator", *backends], [
            [f"`{e}`", *(worst([c for c in cells if (c["evaluator"], c["backend"], c["bf16"]) == (e, b, False)])
                         for b in backends)]
            for e in evaluators
        ]),
    ]  # fmt: skip
    if by_floor:
        parts += ["## Judged by the rounding of one process\n", by_rounding(cells)]
    for title, chosen in OF_BACKENDS.items():
        parts.append(f"## By feature, {title}\n")
        rows = []
        if not any(chosen(c) for c in cells):
            parts[-1] = ""
            continue
        for e in evaluators:
            own = [c for c in cells if c["evaluator"] == e and chosen(c)]
            if own:
                rows.append([f"`{e}`", *(worst_or_none([c for c in own if has(c)]) for has in FEATURES.values()),
                             attention(own)])  # fmt: skip
        parts.append(table(["evaluator", *FEATURES, "attention"], rows))
    parts.append("## What says so at the start\n")
    parts.append("\n".join(refusals()) + "\n")
    return "\n".join(parts)


def worst_or_none(cells: list[dict[str, Any]]) -> str:
    """As `worst`, where a feature may be without cells of this precision."""
    return worst(cells) if cells else "see the other table"


if __name__ == "__main__":
    print(page(), end="")

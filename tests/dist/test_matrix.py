"""Evaluator x backend x feature: every pair of choices in CI, all of them under the marker `matrix`.

    pytest -m matrix tests/dist/test_matrix.py       with DISTUNLEARN_MATRIX=FILE.json the errors are written there

A cell is a short training on 2 processes (`single`: on one) with checkpointing, compilation, bf16 or micro-batches,
compared with plain torch in one process without checkpointing and compilation. The ranks run this file as a script.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import platform
import random
import sys
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path

import pytest
import torch
from constraint_training import (
    ENCODERS,
    EVALUATORS,
    Case,
    errors,
    limits,
    plain,
    rounding,
    runs_on,
    sharded,
    warm,
    within,
)
from processes import launch

from distunlearn.distributed.collectives import get_rank, get_world
from distunlearn.encoders import compile

pytestmark = pytest.mark.slow

BACKENDS = ("single", "ddp", "fsdp2", "zero1", "zero2", "zero3")
COVERED = tuple(kind for kind in BACKENDS if kind != "zero2")
OBJECTIVES = ("simclr", "moco", "byol")
FACTORS = {
    "backend": BACKENDS, "evaluator": EVALUATORS, "encoder": tuple(ENCODERS), "objective": OBJECTIVES,
    "batchnorm": (True, False), "checkpointing": (False, True), "compile": (False, True), "bf16": (False, True),
    "accumulate": (1, 2),
}  # fmt: skip
FEATURES = ({}, {"checkpointing": True}, {"compile": True}, {"bf16": True},
            {"checkpointing": True, "compile": True, "bf16": True, "accumulate": 2})  # fmt: skip
STEPS = 4
COMMAND = "DISTUNLEARN_MATRIX=FILE OMP_NUM_THREADS=1 pytest -m matrix tests/dist/test_matrix.py"
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
Cell = tuple[str, Case]  # backend, training


def precision_of(kind: str, case: Case) -> str:
    """Nothing hides behind rounding but in bf16, which is what it is; DeepSpeed keeps its weights in float32."""
    if case.bf16:
        return "float32"
    return "mixed" if kind.startswith("zero") else "float64"


# -- which cells -----------------------------------------------------------------------------------------------------


def pairs_of(choice: dict) -> set[tuple]:
    return set(itertools.combinations(sorted((k, str(v)) for k, v in choice.items()), 2))


def choices(kind: str, case: Case) -> dict:
    """What the matrix varies: a training may have further settings, which are left as they are."""
    return {name: value for name, value in {"backend": kind, **asdict(case)}.items() if name in FACTORS}


def cell_of(choice: dict) -> Cell:
    return choice["backend"], Case(**{k: v for k, v in choice.items() if k != "backend"})


@functools.cache
def feasible() -> list[tuple[Cell, set[tuple]]]:
    """Every combination of choices that a run accepts, with the pairs in it.

    But for what is left to the marker `matrix`: compilation under DeepSpeed, of which a cell takes as long as all
    others to trace; and zero2, which differs from zero1 in where DeepSpeed keeps gradients between micro-batches.
    """
    found = []
    for values in itertools.product(*FACTORS.values()):
        choice = dict(zip(FACTORS, values, strict=True))
        kind, case = cell_of(choice)
        if kind in COVERED and runs_on(case, kind) and not (case.compile and kind.startswith("zero")):
            found.append(((kind, case), pairs_of(choice)))
    return found


@functools.cache
def covering() -> list[Cell]:
    """Few cells in which every pair of choices occurs that can occur: greedily, the same ones every time.

    First the pairs with compilation, in as few cells as that takes: tracing costs more than all else in a cell.
    """
    missing = set().union(*(pairs for _, pairs in feasible()))
    traced = {pair for pair in missing if ("compile", "True") in pair}
    order, chosen = random.Random(0), []
    for compiled, needed in ((True, traced), (False, missing - traced)):
        cells = [item for item in feasible() if item[0][1].compile == compiled]
        while missing & needed:
            fitting = [item for item in cells if item[1] & missing & needed]
            tried = order.sample(fitting, min(400, len(fitting)))
            cell, pairs = max(tried, key=lambda item: (len(item[1] & missing & needed), len(item[1] & missing)))
            chosen.append(cell)
            missing -= pairs
    return chosen


def every_cell(kind: str) -> list[Case]:
    """Evaluator x encoder x batch norm x feature; the objectives take turns."""
    objective = itertools.cycle(OBJECTIVES)
    cells = [
        Case(evaluator, encoder, next(objective), batchnorm, **feature)
        for evaluator, encoder, batchnorm, feature in itertools.product(EVALUATORS, ENCODERS, (True, False), FEATURES)
    ]
    return [case for case in cells if runs_on(case, kind)]


# -- running them ----------------------------------------------------------------------------------------------------


def main(folder: Path, kind: str, cells: Path) -> None:
    compile.COMPILER = "aot_eager"  # the same tracing without a compiler of C++
    cases = [Case(**values) for values in json.loads(cells.read_text())]
    for case in cases:
        warm(case)  # before there are other processes
    results = []
    for case in cases:
        results.append(sharded(case, kind, precision_of(kind, case), STEPS))
        torch._dynamo.reset()
    torch.save({"results": results, "world": get_world()}, folder / f"rank-{get_rank()}.pt")


@functools.cache
def reference(case: Case, precision: str) -> list[dict]:
    return plain(case, precision, STEPS)["states"]


def plainly(case: Case, precision: str) -> list[dict]:
    return reference(replace(case, checkpointing=False, compile=False), precision)


def run(kind: str, cases: list[Case], folder: Path, timeout: float) -> list[dict]:
    """What was found of every cell, the worse rank's errors."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cells.json").write_text(json.dumps([asdict(case) for case in cases]))
    world = 1 if kind == "single" else 2
    ranks = launch(__file__, world, folder, kind, str(folder / "cells.json"), timeout=timeout)
    assert [rank["world"] for rank in ranks] == [world] * world
    found = []
    for index, case in enumerate(cases):
        precision = precision_of(kind, case)
        pairs = [errors(rank["results"][index]["states"], plainly(case, precision)) for rank in ranks]
        first, last = (max(pair) for pair in zip(*pairs, strict=True))
        found.append(
            {
                **choices(kind, case),
                "precision": "bf16" if case.bf16 else precision,
                "first": first,
                "last": last,
                **judged((first, last), case, precision),
                "attention": ranks[0]["results"][index]["attention"],
            }
        )
    return found


def judged(found: tuple[float, float], case: Case, precision: str) -> dict:
    """Whether a cell is right, and by what: the stated limits alone, or what rounding does to one process."""
    stated = all(error <= limit for error, limit in zip(found, limits(case, precision), strict=True))
    needed = None if stated or precision != "float32" or case.bf16 else rounding(case, STEPS)
    return {"ok": within(found, case, precision, STEPS), "rounding": needed}


def failed(found: list[dict]) -> list[dict]:
    return [cell for cell in found if not cell["ok"]]


def test_the_covering_array_holds_every_pair_that_a_run_accepts():
    cells = covering()
    wanted = set().union(*(pairs for _, pairs in feasible()))
    held = [pairs_of(choices(kind, case)) for kind, case in cells]
    assert set().union(*held) == wanted
    assert set().union(*held[:-1]) != wanted  # control: the last one was chosen for a pair that no other has
    assert len(cells) < 60


@pytest.mark.parametrize("kind", COVERED)
def test_every_pair_of_choices(kind, tmp_path):
    cases = [case for backend, case in covering() if backend == kind]
    assert len(cases) >= len(EVALUATORS) - (kind in ("fsdp2", "zero3"))
    found = run(kind, cases, tmp_path, timeout=280)
    print(json.dumps(found))
    assert not failed(found)
    for cell in found:
        if cell["encoder"] == "vit":
            assert ("math" in cell["attention"]) == (cell["evaluator"] == "double_backward"), cell
            assert "flash" in cell["attention"]
    case = next(case for case in cases if not case.bf16)  # control: another constraint is told apart
    precision = precision_of(kind, case)
    other = replace(case, evaluator="head" if case.evaluator in ("sketch", "double_backward") else "sketch")
    assert not within(errors(plainly(other, precision), plainly(case, precision)), case, precision, STEPS)


def test_the_documented_matrix_is_this_one_and_has_no_failed_cell():
    result = json.loads(max(RESULTS.glob("*-matrix.json")).read_text())
    measured = ("precision", "first", "last", "ok", "rounding", "attention")
    cells = [{k: v for k, v in cell.items() if k not in measured} for cell in result["cells"]]
    assert cells == [choices(kind, case) for kind in BACKENDS for case in every_cell(kind)]
    assert not failed(result["cells"])


def one_cell_a_line(facts: dict, cells: list[dict]) -> str:
    head = json.dumps(facts, indent=1).removesuffix("\n}")
    return head + ',\n "cells": [\n' + ",\n".join("  " + json.dumps(cell) for cell in cells) + "\n ]\n}\n"


@pytest.mark.matrix
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("kind", BACKENDS)
def test_all_of_them(kind, tmp_path):
    found = run(kind, every_cell(kind), tmp_path, timeout=7000)
    if "DISTUNLEARN_MATRIX" in os.environ:
        path = Path(os.environ["DISTUNLEARN_MATRIX"])
        before = json.loads(path.read_text()) if path.exists() else {"cells": []}
        cells = [cell for cell in before["cells"] if cell["backend"] != kind] + found
        versions = {name: metadata.version(name) for name in ("torch", "deepspeed", "timm")}
        hardware = f"{platform.machine()} CPU, {os.cpu_count()} cores, one thread a process"
        facts = {"command": COMMAND, "steps": STEPS, "world": 2, "versions": versions, "hardware": hardware}
        path.write_text(one_cell_a_line(facts, cells))
    assert not failed(found)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))

"""The price of the gradient constraint: operations, time and memory of a third_party step by every evaluator.

    python benchmarks/constraint.py --document benchmarks/results/DATE-constraint.md
    python benchmarks/constraint.py --device cuda --precision bf16 --document ...     on a GPU: production shapes timed

Each figure is relative to a plain contrastive step on the retain images alone, and to `double_backward`, in one run.
Forgotten and third-party images are a quarter of the retain images each. What a step is: `constraint_step.py`.

Operations: counted by torch for matrix products, convolutions and attention, on tensors without values, so that
production shapes are covered on any machine (`constraint_cost.py`; the tests compare with a count by hand and with
the count of a step that really computes).
Time: steps take turns within a round, in an order drawn anew each round, and every figure is the median over rounds
of the ratio to the plain step of the same round. CPU seconds of the process stand beside the clock's, since other
work on the machine lengthens the latter.
Memory: on CPU the peak of live tensors made within the step (activations, gradients, what the constraint keeps;
not weights, not a kernel's workspace), on tensors without values; on a GPU also torch.cuda.max_memory_allocated above
what was allocated before the step.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from constraint_cost import flops, peak_bytes, without_values
from constraint_report import document, json_text, machine
from constraint_step import ENCODERS, PRODUCTION, STEPS, Bench


def counted(encoders: dict[str, Any], retain: int) -> dict[str, dict[str, dict[str, float]]]:
    """Operations and live bytes of every step, by encoder and step; always of float32 and the CPU's operators."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name, encoder in encoders.items():
        with without_values():
            bench = Bench(encoder, retain)
            for step in STEPS:
                run = bench.step(step)
                found.setdefault(name, {})[step] = {"flops": flops(run), "live_bytes": peak_bytes(run)}
                print(name, step, found[name][step], flush=True)
    return found


def timed(run: Callable[[], None], device: torch.device) -> dict[str, float]:
    """Seconds of one step by the clock and of this process's CPU; on a GPU also the peak of allocated bytes."""
    figures = {}
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    clock, cpu = time.perf_counter(), time.process_time()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
        figures["allocated_bytes"] = torch.cuda.max_memory_allocated() - before
    return {"seconds": time.perf_counter() - clock, "cpu_seconds": time.process_time() - cpu, **figures}


def measured(
    encoders: dict[str, Any], retain: int, rounds: int, device: str, precision: str, steps: Sequence[str] = STEPS
) -> dict[str, dict[str, list[dict[str, float]]]]:
    """All samples by encoder and step, one for each round; every step runs once before, unmeasured."""
    found: dict[str, dict[str, list[dict[str, float]]]] = {}
    order = random.Random(0)
    for name, encoder in encoders.items():
        bench = Bench(encoder, retain, device, precision)
        runs = {step: bench.step(step) for step in steps if allowed(step, precision)}
        for run in runs.values():
            run()
        for number in range(rounds):
            for step in order.sample(list(runs), len(runs)):
                bench.model.zero_grad(set_to_none=True)  # gradients of the step before are not this one's memory
                found.setdefault(name, {step: [] for step in runs})[step].append(timed(runs[step], bench.device))
            print(name, "round", number + 1, "of", rounds, flush=True)
    return found


def allowed(step: str, precision: str) -> bool:
    """`sliced` is refused in bf16."""
    return not (step == "sliced" and precision == "bf16")


def ratios(samples: dict[str, list[dict[str, float]]], step: str, to: str, key: str) -> dict[str, float]:
    """Median, smallest and largest over rounds of the ratio within a round."""
    found = [own[key] / other[key] for own, other in zip(samples[step], samples[to], strict=True)]
    return {"median": statistics.median(found), "smallest": min(found), "largest": max(found)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of the timed steps")
    parser.add_argument("--retain", type=int, help="retain images of a timed step, a multiple of 4 (cpu: 16, cuda: 64)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--encoders", nargs="+", metavar="TEXT", help="only those whose name holds one of these")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=STEPS, help="the steps that are timed")
    parser.add_argument("--counted", type=Path, help="take operations and live memory from this JSON of another run")
    parser.add_argument("--document", type=Path, help="write the results here, and as .json beside it")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a CUDA device, and torch finds none; leave it out to measure on the CPU")
    retain = args.retain or (16 if args.device == "cpu" else 64)
    if retain % 4 or retain < 8 or args.rounds < 1 or "plain" not in args.steps:
        parser.error("--retain must be a multiple of 4 and at least 8, --rounds at least 1, plain one of --steps")
    torch.set_num_threads(1)
    started = time.perf_counter()
    result: dict[str, Any] = {"command": " ".join(["python", "benchmarks/constraint.py", *sys.argv[1:]])}
    result |= {"machine": machine(args.device), "retain": retain, "rounds": args.rounds}
    result |= {"device": args.device, "precision": args.precision}
    encoders = ENCODERS if args.device == "cpu" else PRODUCTION
    if args.encoders:
        encoders = {name: encoder for name, encoder in encoders.items() if any(text in name for text in args.encoders)}
    if not encoders:
        parser.error(f"no encoder timed on {args.device} is named like {' or '.join(args.encoders)}")
    result["timed"] = measured(encoders, retain, args.rounds, args.device, args.precision, args.steps)
    result["time_ratios"] = {
        name: {
            step: {f"{key} to {to}": ratios(samples, step, to, key)
                   for to in ("plain", "double_backward") if to in samples for key in samples[step][0]}
            for step in samples
        }
        for name, samples in result["timed"].items()
    }  # fmt: skip
    if args.counted:
        other = json.loads(args.counted.read_text(encoding="utf-8"))
        result |= {"counted": other["counted"], "counted_by": f"{other['command']}, {other['machine']['commit']}"}
    else:
        result["counted"] = counted(ENCODERS | PRODUCTION, 16)
    result["minutes"] = (time.perf_counter() - started) / 60
    text = document(result)
    if args.document:
        args.document.parent.mkdir(parents=True, exist_ok=True)
        args.document.write_text(text, encoding="utf-8")
        args.document.with_suffix(".json").write_text(json_text(result), encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()

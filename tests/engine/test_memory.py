"""Freed memory is kept: large tensors of a step come from pages that the process has already."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import resource, sys, torch
from distunlearn.config.load import load_config
from distunlearn.engine.backends import open_backend
torch.set_num_threads(1)
if sys.argv[1] == "run":
    open_backend(load_config("digits", None, ["runtime.threads=1"], world=1))

def step():
    x = torch.ones(24 << 20)  # 96 MiB
    return (x * 2).sum().item() + (x + 1).relu().sum().item()

for _ in range(8):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(mode: str) -> int:
    """Pages that three steps of three tensors made the system map."""
    done = subprocess.run([sys.executable, "-c", SCRIPT, mode], capture_output=True, text=True, timeout=120, check=True)
    return int(done.stdout)


def test_a_run_maps_no_page_twice_and_without_it_every_tensor_is_mapped_anew():
    kept, given_back = faults("run"), faults("plain")
    print(f"pages mapped: {kept}, control {given_back}")
    assert given_back > 300  # 295,000 of 4 KiB, or some 600 of 2 MiB
    assert kept <= given_back / 5  # 0 once the heap has its final shape; now and then one more tensor of twelve

"""Freed memory is kept: large tensors of a step come from pages that the process has already."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import resource, sys, torch
from distunlearn.config_io import load_config
from distunlearn.engine.backends import open_backend
torch.set_num_threads(1)
if sys.argv[1] == "run":
    open_backend(load_config("digits", None, ["threads=1"], world=1))

def step():
    x = torch.ones(24 << 20)  # 96 MiB
    return (x * 2).sum().item() + (x + 1).relu().sum().item()

for _ in range(2):
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


def test_a_run_maps_no_page_twice():
    assert faults("run") < 100


def test_control_without_it_every_tensor_is_mapped_anew():
    assert faults("plain") > 300  # 200,000 of 4 KiB, or some 400 of 2 MiB

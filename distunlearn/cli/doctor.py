"""`distunlearn doctor`: the environment as text that can be pasted into a bug report.

No secret leaves: of variables of known families the names are shown, and the values of those that are known to be no
secret and do not look like one; user names and passwords are cut out of URLs. The home folder is written as ~.
"""

from __future__ import annotations

import importlib
import os
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distunlearn.engine.environment import _failure, _shorten, environment

if TYPE_CHECKING:
    from distunlearn.config.schema import RunConfig

OLDEST_TORCH = (2, 11)


def doctor_text(folder: Path = Path(".")) -> str:
    """The report of `distunlearn doctor`: the environment, whether `folder` can be written to, and warnings."""
    facts = environment()
    torch = facts["torch"]
    writable = _write_problem(folder)
    lines = [
        "Paste the text below into a bug report; secrets are left out.",
        "",
        f"- distunlearn: {facts['distunlearn']}",
        f"- python: {facts['python']}",
        f"- platform: {facts['platform']}",
        f"- cpu: {facts['cpu']['model']}, {facts['cpu']['cores']} cores",
        f"- memory: {facts['memory_gib']} GiB",
    ]
    if "error" in torch:
        lines.append(f"- torch: {torch['error']}")
    else:
        lines += [
            f"- gpus: {'; '.join(torch['gpus']) or 'none'}",
            f"- torch: {torch['version']} ({torch['build']}), {torch['threads']} threads",
            f"- torch.distributed: {', '.join(torch['distributed']) or 'not available'}",
        ]
    lines.append(f"- {_shorten(str(folder.absolute()))}: {writable or 'can be written to'}")
    lines += ["- packages:", *(f"  {name}: {version or 'missing'}" for name, version in facts["packages"].items())]
    lines += ["- variables:", *(f"  {name}={value}" for name, value in facts["variables"].items())]
    warnings = [*_warnings(facts), *([f"{folder} {writable}"] if writable else [])]
    lines += ["- warnings:", *(f"  {warning}" for warning in warnings or ["none"])]
    return "\n".join(lines)


def launch_text(cfg: RunConfig, folder: Path) -> tuple[str, bool]:
    """The part of the report about a live launch, and whether it is sound. Collective.

    Raises:
        ConfigError, RankLostError: the processes do not come together as a run.
    """
    from distunlearn.run.launch_check import check_launch

    lines, problems = check_launch(cfg, folder)
    told = [*(f"  {line}" for line in lines), "- problems of the launch:"]
    return "\n".join(["- launch:", *told, *(f"  {problem}" for problem in problems or ["none"])]), not problems


def _warnings(facts: dict[str, Any]) -> list[str]:
    found = [f"{name} is not installed; pip install {name}" for name, ver in facts["packages"].items() if ver is None]
    if os.environ.get("DISTUNLEARN_FAULT"):
        found.append("DISTUNLEARN_FAULT is set: it works in the test suite only; unset it")
    torch = facts["torch"]
    if "error" in torch:
        return [*found, torch["error"]]
    numbers = re.match(r"(\d+)\.(\d+)", torch["version"])
    if numbers and (int(numbers[1]), int(numbers[2])) < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        found.append(f"torch {torch['version']} is too old; {oldest} or newer is needed")
    try:
        importlib.import_module("torchvision")
    except Exception as error:
        found.append(
            f"{_failure('torchvision', error)}: torch and torchvision are of different builds (CPU-only and CUDA, or "
            "another version); reinstall both together with pip install --force-reinstall torch torchvision"
        )
    if torch["gpus"] and "nccl" not in torch["distributed"]:
        found.append("there are GPUs but torch has no NCCL; several processes would talk over gloo, slowly")
    return found


def _write_problem(folder: Path) -> str | None:
    """Why nothing can be written to `folder` (or where it would be made); None if it can."""
    place = folder.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        with tempfile.TemporaryFile(dir=place):
            return None
    except OSError as error:
        return f"cannot be written to ({error.strerror})"

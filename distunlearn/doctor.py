"""`distunlearn doctor`: the environment as text that can be pasted into a bug report.

No secret leaves: only variables of known families are shown, those whose names sound like a credential without
their values, and user names and passwords are cut out of URLs. The home folder is written as ~.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import platform
import re
import tempfile
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distunlearn import __version__
from distunlearn.text import printable

if TYPE_CHECKING:
    from distunlearn.config import RunConfig

__all__ = ["doctor_text", "environment", "launch_text", "redact"]

PACKAGES = (
    "torch", "torchvision", "timm", "accelerate", "deepspeed", "webdataset", "scikit-learn", "transformers",
    "safetensors", "numpy", "scipy", "pillow", "pydantic", "pyyaml", "tyro", "rich", "tensorboard", "matplotlib",
    "jinja2",
)  # fmt: skip
OLDEST_TORCH = (2, 11)

# Families of variables that change what a run does. Anything else in the environment is nobody's business.
SHOWN = re.compile(
    r"(?:CUDA|NVIDIA_VISIBLE|NCCL|GLOO|TORCH|PYTORCH|TORCHINDUCTOR|OMP|MKL|OPENBLAS|KMP|ACCELERATE|FSDP|DS|DEEPSPEED|"
    r"SLURM|WDS|HF|HUGGINGFACE|TRANSFORMERS|WANDB|AWS|LC)_\w+|PYTHON[A-Z]+|LANG|TZ|"
    r"RANK|LOCAL_RANK|WORLD_SIZE|LOCAL_WORLD_SIZE|MASTER_ADDR|MASTER_PORT|TMPDIR|VIRTUAL_ENV|CONDA_DEFAULT_ENV|"
    r"(?:HTTPS?|ALL|NO)_PROXY",
    re.IGNORECASE,
)
SECRET = re.compile(
    r"TOKEN|SECRET|PASS|CREDENTIAL|AUTH|COOKIE|SESSION|SIGNATURE|JWT|(?:^|_)(?:KEY|PWD|PAT)(?:_|$)|API_?KEY|^AWS_|"
    r"^WANDB_",
    re.IGNORECASE,
)
USERINFO = re.compile(r"([a-z][a-z0-9+.-]*://)\S*@", re.IGNORECASE)  # greedy: a password may hold / and @
QUERY = re.compile(r"([?&#;][^=&#;\s]+=)[^&#;\s]+")
HIDDEN = "<set, not shown>"


def environment() -> dict[str, Any]:
    """Everything about this machine that a result may depend on, as plain JSON; secrets are left out.

    Keys: distunlearn, python, platform, packages, cpu, memory_gib, torch (build, threads, gpus, distributed
    backends; or why it does not import), variables.
    """
    return {
        "distunlearn": __version__,
        "python": platform.python_version(),
        "platform": _platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "cpu": {"model": _cpu_model(), "cores": _cores()},
        "memory_gib": _memory_gib(),
        "torch": _torch(),
        "variables": {name: redact(name, value) for name, value in sorted(os.environ.items()) if SHOWN.fullmatch(name)},
    }


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
    from distunlearn.launch_check import check_launch

    lines, problems = check_launch(cfg, folder)
    told = [*(f"  {line}" for line in lines), "- problems of the launch:"]
    return "\n".join(["- launch:", *told, *(f"  {problem}" for problem in problems or ["none"])]), not problems


def redact(name: str, value: str) -> str:
    """`value` of the variable `name`, fit to be shown: hidden if it may be a secret, else without URL credentials."""
    if SECRET.search(name):
        return HIDDEN
    value = QUERY.sub(r"\1...", USERINFO.sub(r"\1...@", value)) if "://" in value else value
    if name.upper().endswith("_PROXY") and "://" not in value and "@" in value:
        value = f"...@{value.rpartition('@')[2]}"
    return printable(_shorten(value), 200)


def _shorten(text: str) -> str:
    home = os.path.expanduser("~").rstrip("/")
    return re.sub(rf"(?<![\w./-]){re.escape(home)}(?=/|$|:)", "~", text) if len(home) > 1 else text


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _platform() -> str:
    """As `platform.platform()`, which starts a program to find out."""
    kernel, libc = os.uname(), "".join(platform.libc_ver())
    return f"{kernel.sysname}-{kernel.release}-{kernel.machine}{f'-with-{libc}' if libc else ''}"


def _cores() -> int:
    """Cores this process may use, which a container or a scheduler may have cut down."""
    with contextlib.suppress(AttributeError):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def _memory_gib() -> float:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (OSError, ValueError):
        return 0.0


def _torch() -> dict[str, Any]:
    try:
        torch = importlib.import_module("torch")
    except Exception as error:  # a broken install fails in many ways, and telling which is what doctor is for
        return {"error": _failure("torch", error)}
    gpus = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            gpus.append(f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
    if getattr(torch.version, "hip", None):
        build = f"ROCm {torch.version.hip}"
    dist, backends = torch.distributed, []
    if dist.is_available():
        names = (("gloo", "is_gloo_available"), ("nccl", "is_nccl_available"), ("mpi", "is_mpi_available"))
        backends = [name for name, probe in names if getattr(dist, probe)()]
    return {
        "version": torch.__version__,
        "build": build,
        "threads": torch.get_num_threads(),
        "gpus": gpus,
        "distributed": backends,
    }


def _failure(name: str, error: BaseException) -> str:
    return printable(f"import {name} fails ({type(error).__name__}: {_shorten(str(error))})", 300)


def _warnings(facts: dict[str, Any]) -> list[str]:
    found = [f"{name} is not installed; pip install {name}" for name, ver in facts["packages"].items() if ver is None]
    if os.environ.get("DISTUNLEARN_FAULT"):
        found.append("DISTUNLEARN_FAULT is set: runs will fail on purpose; it is for tests only")
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

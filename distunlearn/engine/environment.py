"""What a run ran on: machine, packages and variables, without secrets."""

from __future__ import annotations

import contextlib
import importlib
import os
import platform
import re
from importlib import metadata
from pathlib import Path
from typing import Any

from distunlearn import __version__
from distunlearn.common.text import printable

PACKAGES = (
    "torch", "torchvision", "timm", "accelerate", "deepspeed", "webdataset", "scikit-learn",
    "safetensors", "numpy", "scipy", "pillow", "pydantic", "ruamel.yaml", "tyro", "rich", "tensorboard", "matplotlib",
    "jinja2",
)  # fmt: skip


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

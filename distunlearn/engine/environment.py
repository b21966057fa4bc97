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
FAMILIES = re.compile(
    r"(?:CUDA|CUBLAS|CUDNN|NVIDIA|NCCL|GLOO|TORCH[A-Z]*|PYTORCH|ATEN|INDUCTOR|TRITON|TIMM|NPY|XLA|OMP|MKL|OPENBLAS|KMP|"
    r"ONEDNN|DNNL|ACCELERATE|MEGATRON_LM|PARALLELISM_CONFIG|FSDP|DS|DEEPSPEED|OMPI|PMI|PMIX|MPI|MV2|SLURM|SRUN|GROUP|"
    r"ROLE|LOCAL|WDS|GOPEN|HF|HUGGINGFACE|TRANSFORMERS|WANDB|AWS|LC|DISTUNLEARN)_\w+|\w+_VISIBLE_(?:DEVICES|CORES|MODULES)|"
    r"ZE_AFFINITY_MASK|FORK_LAUNCHED|NODE_RANK|PYTHON[A-Z]+|LANG|TZ|RANK|WORLD_SIZE|MASTER_ADDR|MASTER_PORT|TMPDIR|"
    r"LD_PRELOAD|LD_LIBRARY_PATH|VIRTUAL_ENV|CONDA_DEFAULT_ENV|(?:HTTPS?|ALL|NO)_PROXY",
    re.IGNORECASE,
)

# Of those the ones whose values are shown: settings of libraries, launchers and schedulers, none of which is a secret.
# A name that is not here is recorded without its value, for nobody knows what an organisation keeps in it.
SHOWN = frozenset(
    """
    CUDA_VISIBLE_DEVICES CUDA_DEVICE_ORDER CUDA_LAUNCH_BLOCKING CUDA_HOME CUDA_MODULE_LOADING CUBLAS_WORKSPACE_CONFIG
    NVIDIA_VISIBLE_DEVICES NVIDIA_DRIVER_CAPABILITIES NVIDIA_TF32_OVERRIDE
    NCCL_DEBUG NCCL_DEBUG_SUBSYS NCCL_SOCKET_IFNAME NCCL_SOCKET_FAMILY NCCL_IB_DISABLE NCCL_IB_HCA NCCL_IB_GID_INDEX
    NCCL_IB_TIMEOUT NCCL_NET NCCL_NET_GDR_LEVEL NCCL_P2P_DISABLE NCCL_P2P_LEVEL NCCL_SHM_DISABLE NCCL_ALGO NCCL_PROTO
    NCCL_NTHREADS NCCL_MIN_NCHANNELS NCCL_MAX_NCHANNELS NCCL_BUFFSIZE NCCL_CROSS_NIC NCCL_LAUNCH_MODE NCCL_CUMEM_ENABLE
    NCCL_NVLS_ENABLE GLOO_SOCKET_IFNAME
    TORCH_DISTRIBUTED_DEBUG TORCH_NCCL_ASYNC_ERROR_HANDLING TORCH_NCCL_BLOCKING_WAIT TORCH_NCCL_AVOID_RECORD_STREAMS
    TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC TORCH_CPP_LOG_LEVEL TORCH_SHOW_CPP_STACKTRACES TORCH_LOGS TORCH_HOME
    TORCH_ALLOW_TF32_CUBLAS_OVERRIDE TORCHDYNAMO_DISABLE TORCHINDUCTOR_CACHE_DIR TORCHINDUCTOR_MAX_AUTOTUNE
    TORCHELASTIC_RESTART_COUNT TORCHELASTIC_MAX_RESTARTS TORCHELASTIC_USE_AGENT_STORE PYTORCH_CUDA_ALLOC_CONF
    PYTORCH_ALLOC_CONF PYTORCH_JIT OMP_NUM_THREADS OMP_WAIT_POLICY OMP_PROC_BIND OMP_PLACES MKL_NUM_THREADS MKL_CBWR
    OPENBLAS_NUM_THREADS KMP_AFFINITY KMP_BLOCKTIME ONEDNN_MAX_CPU_ISA ATEN_CPU_CAPABILITY TIMM_FUSED_ATTN
    ACCELERATE_MIXED_PRECISION ACCELERATE_DYNAMO_BACKEND ACCELERATE_DYNAMO_MODE ACCELERATE_DYNAMO_USE_FULLGRAPH
    ACCELERATE_DYNAMO_USE_DYNAMIC ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION ACCELERATE_USE_CPU ACCELERATE_USE_FSDP
    ACCELERATE_USE_DEEPSPEED ACCELERATE_USE_MEGATRON_LM ACCELERATE_GRADIENT_ACCUMULATION_STEPS ACCELERATE_CPU_AFFINITY
    ACCELERATE_DOWNCAST_BF16 ACCELERATE_DEBUG_MODE ACCELERATE_TORCH_DEVICE ACCELERATE_USE_PARALLELISM_CONFIG
    FSDP_VERSION FSDP_SHARDING_STRATEGY FSDP_RESHARD_AFTER_FORWARD FSDP_OFFLOAD_PARAMS FSDP_ACTIVATION_CHECKPOINTING
    DS_ACCELERATOR DS_BUILD_OPS DS_SKIP_CUDA_CHECK
    SLURM_JOB_ID SLURM_JOBID SLURM_ARRAY_JOB_ID SLURM_ARRAY_TASK_ID SLURM_RESTART_COUNT SLURM_NNODES SLURM_JOB_NUM_NODES
    SLURM_JOB_NODELIST SLURM_NTASKS SLURM_NTASKS_PER_NODE SLURM_TASKS_PER_NODE SLURM_STEP_ID SLURM_STEP_NUM_TASKS
    SLURM_PROCID SLURM_LOCALID SLURM_NODEID SLURM_CPUS_PER_TASK SRUN_CPUS_PER_TASK SLURM_CPUS_ON_NODE
    SLURM_JOB_CPUS_PER_NODE SLURM_MEM_PER_NODE SLURM_GPUS_ON_NODE SLURM_GPUS_PER_NODE SLURM_JOB_PARTITION SLURM_JOB_QOS
    SLURM_JOB_START_TIME SLURM_JOB_END_TIME SLURM_CLUSTER_NAME
    WDS_SECURE WDS_VERBOSE_CACHE HF_HOME HF_HUB_CACHE HF_HUB_OFFLINE HF_ENDPOINT TRANSFORMERS_OFFLINE WANDB_MODE
    WANDB_DIR AWS_REGION AWS_DEFAULT_REGION AWS_PROFILE AWS_ENDPOINT_URL LC_ALL LC_CTYPE LANG TZ
    PYTHONPATH PYTHONHASHSEED PYTHONUNBUFFERED PYTHONOPTIMIZE PYTHONNOUSERSITE PYTHONSAFEPATH PYTHONDONTWRITEBYTECODE
    RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE GROUP_RANK GROUP_WORLD_SIZE ROLE_RANK ROLE_WORLD_SIZE MASTER_ADDR
    MASTER_PORT TMPDIR VIRTUAL_ENV CONDA_DEFAULT_ENV
    HTTP_PROXY HTTPS_PROXY ALL_PROXY NO_PROXY DISTUNLEARN_FAULT DISTUNLEARN_MASTER_ADDR
""".split()
)

# Values that look like a secret, whatever their name: known kinds of keys, something named like one, long random text.
SECRET = re.compile(
    r"\b(?:hf|sk|pk|gh[pousr]|glpat|xox[abprs]|AKIA|ASIA)[-_]?[A-Za-z0-9_-]{10,}|\beyJ[\w-]{6,}|\bbearer\b|\bbasic\s|"
    r"-----BEGIN|(?:\b|_)(?:pass\w*|pwd?|token|secret|credential|auth\w*|\w*key)\s*[=:]|"
    r"(?<![\w./-])(?=\w*\d)(?=\w*[A-Za-z])[A-Za-z0-9+_]{24,}(?![\w./-])",
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
        "variables": {
            name: redact(name, value) for name, value in sorted(os.environ.items()) if FAMILIES.fullmatch(name)
        },
    }


def redact(name: str, value: str) -> str:
    """`value` of the variable `name`, fit to be shown: hidden if it may be a secret, else without URL credentials."""
    if name.upper() not in SHOWN:
        return HIDDEN
    value = QUERY.sub(r"\1...", USERINFO.sub(r"\1...@", value)) if "://" in value else value
    if name.upper().endswith("_PROXY") and "://" not in value and "@" in value:
        value = f"...@{value.rpartition('@')[2]}"
    if SECRET.search(value):
        return HIDDEN
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

"""What runs: the digest of the code, own and from outside, its record in the ledger, and that all ranks run the same.

A run may go on under other code only if the settings say so (`runtime.accept_code_change`), and the ledger then has a
line for each code that worked on it.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from distunlearn import __version__
from distunlearn.common.plugins import loaded
from distunlearn.common.text import printable
from distunlearn.config.schema import RunConfig
from distunlearn.config.shape import marked, settings
from distunlearn.data.manifest.manifest import Manifest
from distunlearn.distributed.world import World
from distunlearn.engine import fault_injection
from distunlearn.engine.ledger import Ledger
from distunlearn.errors import ConfigError, RankLostError
from distunlearn.verify.ledger import read_ledger

SHOWN = 5


def code_digest() -> str:
    """sha256 (hex) over all Python files of the package, and over what the run has taken from outside it."""
    outside = [part.sha256 for part in loaded()]
    return hashlib.sha256(" ".join([_own_digest(), *outside]).encode()).hexdigest() if outside else _own_digest()


@functools.cache
def _own_digest() -> str:
    """sha256 (hex) over the names and bytes of all Python files of the package."""
    root = Path(__file__).parents[1]
    total = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        total.update(f"{path.relative_to(root).as_posix()}\0".encode())
        total.update(hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()


def require_one_run(world: World, cfg: RunConfig, manifest: Manifest) -> None:
    """All ranks have the same settings, images and roles, code and torch. Collective.

    Raises:
        RankLostError: they have not; on every rank, with the differences.
    """
    if world.size == 1:
        return
    local = set(marked(cfg, "local"))
    facts = {key: value for key, value in settings(cfg).items() if key not in local}
    facts |= {
        "shards and roles": manifest.fingerprint,
        "code": f"{__version__} {code_digest()[:12]}",
        "torch": torch.__version__,
        "default dtype": str(torch.get_default_dtype()),
    }
    everyone = world.gather_objects(facts)
    for rank, found in enumerate(everyone):
        keys = [key for key in {**everyone[0], **found} if everyone[0].get(key) != found.get(key)]
        if not keys:
            continue
        told = "; ".join(f"{k}: {_show(everyone[0].get(k))} and {_show(found.get(k))}" for k in keys[:SHOWN])
        more = f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else ""
        error = RankLostError(
            f"rank 0 and rank {rank} do not run the same ({told}{more}); start all processes with the same settings, "
            "shards and installation."
        )
        error.agreed = True
        raise error


def start_facts(cfg: RunConfig, out: Path, world: World) -> dict[str, Any]:
    """What the ledger names at the start of every attempt: digest of run.yaml, what rounding depends on, faults."""
    settings = hashlib.sha256((out / "run.yaml").read_bytes()).hexdigest()
    facts: dict[str, Any] = {"settings": settings, "numerics": numerics(cfg, world)}
    asked = fault_injection.asked()
    return facts | ({"faults": asked} if asked else {})


def numerics(cfg: RunConfig, world: World) -> dict[str, str | int]:
    """What rounding depends on."""
    return {
        "torch": torch.__version__,
        "safetensors": metadata.version("safetensors"),
        "device": _device(),
        "threads": torch.get_num_threads(),
        "world": world.size,
        "backend": cfg.backend,
        "precision": cfg.precision,
        "default dtype": str(torch.get_default_dtype()),
    }


def _device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else torch.backends.cpu.get_cpu_capability()


def code_line(lines: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The last line of the ledger that says under which code the run works."""
    return next((line for line in reversed(lines) if line.get("event") == "code"), None)


def require_same_code(ledger: Ledger, accept: bool) -> None:
    """To be called on the main rank before anything is trained: the run goes on under the code it began under.

    Args:
        ledger: the run's; it is written to.
        accept: another code is recorded instead of refused.

    Raises:
        ConfigError: the code is another one.
    """
    before, now = code_line(read_ledger(ledger.path)), code_digest()
    if before is not None and before["digest"] == now:
        return
    if before is not None and not accept:
        raise ConfigError(
            f"this run began under distunlearn {printable(before['version'], 40)} (code {before['digest'][:12]}), and "
            f"this is {__version__} (code {now[:12]}); go on with that installation, or set "
            "runtime.accept_code_change=true, which the ledger will record."
        )
    ledger.code(__version__, now, [part._asdict() for part in loaded()])


def _show(value: Any) -> str:
    return printable(repr(value), 60)

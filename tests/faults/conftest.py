"""What the fault tests share: processes that start fast, and a run whose original encoder is trained."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import tiny
from sizes import SMALL
from zygote import Zygote


@pytest.fixture(scope="session")
def zygote():
    with Zygote() as zygote:
        yield zygote


@pytest.fixture(scope="session")
def trained(zygote, tmp_path_factory) -> Path:
    """A run directory with shards and a trained original encoder."""
    out = tmp_path_factory.mktemp("trained") / "run"
    for verb in ("prepare", "pretrain"):
        group = zygote.start(1, [verb, "digits", "--out", str(out), *tiny.settings(*SMALL)])
        assert group.wait() == [0], group.said()
    return out


@pytest.fixture
def run(finished_run, tmp_path) -> Path:
    """A copy of a whole finished run."""
    return Path(shutil.copytree(finished_run()[0], tmp_path / "run"))


@pytest.fixture
def copied(trained, tmp_path) -> Path:
    """A copy of it, to forget in."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.fixture(scope="session")
def forget(zygote):
    """Start to forget in a run directory, on two ranks if not told otherwise."""

    def start(out: Path, *extra: str, world: int = 2, limit: float = 90, last: tuple[str, ...] = (), **variables):
        """last: more settings for the last rank alone."""
        backend = "backend=ddp" if world > 1 else "backend=single"
        settings = [tiny.settings(*SMALL, backend, *extra, *(last if r == world - 1 else ())) for r in range(world)]
        return zygote.start(world, [["unlearn", "digits", "--out", str(out), *s] for s in settings], limit, **variables)

    return start

"""What holds for all tests and the processes that they start, and the runs that they share."""

import os
from pathlib import Path

import pytest

# oneDNN's AMX kernels (torch 2.14) leave the weight gradient of a bf16 3 x 3 convolution on 1 x 1 maps unwritten: NaN,
# on machines that have AMX. Read when the first kernel is made, so set before torch is used.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")


def pytest_collection_modifyitems(items):
    """SLURM's tests first: with several processes one of them is busy with these for minutes."""
    items.sort(key=lambda item: item.get_closest_marker("slurm") is None)


def pytest_sessionfinish(session):
    """The process that tests fork from ends with the session."""
    import zygote  # here: what has to be set before torch is used is set

    if zygote.shared.cache_info().currsize:
        zygote.shared().__exit__()
        zygote.shared.cache_clear()


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory):
    """recipe -> (folder of a finished tiny run, exit code), made once a session, to be looked at, copied and reused."""
    import tiny

    found: dict[str, tuple[Path, int]] = {}

    def finished(recipe: str = "digits") -> tuple[Path, int]:
        if recipe not in found:
            out = tmp_path_factory.mktemp(recipe) / "run"
            done = tiny.run(out, "audit.keep_signals=true", recipe=recipe)
            assert done.returncode in (0, 6, 7), done.stderr[-3000:]
            found[recipe] = out, done.returncode
        return found[recipe]

    return finished


@pytest.fixture(scope="session")
def case(tmp_path_factory):
    """The certified run that tests of evidence look at and copy: `evidence_case.Case`."""
    from evidence_case import Case

    return Case(tmp_path_factory.mktemp("evidence")).make()

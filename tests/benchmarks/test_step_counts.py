"""What one step asks of network and host, counted as rank 0 of 64 processes: upper bounds that it must not pass."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import scaling  # noqa: E402
from scaling import BEFORE_BACKWARD, Step, configuration, count_step, counting, fake_group  # noqa: E402

from distunlearn.constraints.distances.energy import value_and_cotangent  # noqa: E402
from distunlearn.distributed.collectives import all_gather_detached  # noqa: E402
from distunlearn.engine.backends import zero  # noqa: E402
from distunlearn.methods import third_party  # noqa: E402

WORLD = 64
UNITS = 13  # the 12 blocks of the vision transformer, and the rest


def counted(encoder: str, backend: str, evaluator: str, world: int = WORLD, **other: Any) -> Step:
    cfg = configuration(encoder, backend, evaluator, world, **other)
    return count_step(cfg, world, pretrain=evaluator == "pretrain")


@pytest.fixture(scope="module")
def sketch() -> Step:
    return counted("vit12", "fsdp2", "sketch")


def test_a_step_of_sharded_weights(sketch):
    assert sketch.total(places=("momentum encoder",)) == 0
    # weights: 4 forwards and 3 backwards of the online encoder, 2 forwards of the momentum encoder
    assert sketch.total(kind="all_gather") <= 9 * UNITS + 8
    assert sketch.total(kind="reduce_scatter") == UNITS
    assert sketch.total(kind="all_reduce") <= 12
    assert sketch.total(kind="broadcast") == sketch.total("objects") == 0
    assert sketch.total("reads", places=BEFORE_BACKWARD) == 0
    # after it: sound everywhere, all figures, the norm, that it is sound everywhere, what the ledger is told
    assert sketch.total("reads") <= 5


def test_a_rank_holds_its_share_of_the_momentum_encoder(sketch):
    """P / W weights, and of each weight a row at most beyond that; whole under ddp (control)."""
    assert 0 < sketch.momentum_weights <= sketch.weights / WORLD + sketch.momentum_rows < sketch.weights / 10
    whole = counted("vit12", "ddp", "pretrain", 4)
    assert whole.momentum_weights > 10 * sketch.momentum_weights


def test_zero3_gathers_weights_for_the_momentum_encoder_together(monkeypatch):
    """Eight of ten elements, of which a rank has three; the ninth is on every rank. `tests/dist/test_backends.py`
    compares what comes of it with one process. Without DeepSpeed, which keeps its first process group for good.
    """
    backend = object.__new__(zero.Zero)
    backend.world = SimpleNamespace(size=4)
    weights = {
        f"w{n}": SimpleNamespace(
            ds_persist=n == 3, data=torch.ones(2, 5), ds_tensor=torch.full((3,), n), ds_numel=10, ds_shape=(2, 5)
        )
        for n in range(9)
    }
    for together, collectives in ((80, 1), (79, 2), (20, 4), (1, 8)):  # the last: each on its own, as before
        monkeypatch.setattr(zero, "TOGETHER", together)
        step = Step()
        with fake_group(4), counting(step, ["momentum encoder"]):
            found = backend._whole_weights(weights)
        assert step.total() == step.total(kind="all_gather") == collectives
        assert found.keys() == weights.keys() and {value.shape for value in found.values()} == {(2, 5)}


def test_a_step_of_whole_weights_but_for_batch_statistics():
    step = counted("resnet50", "ddp", "head", sync_batchnorm=False)
    assert step.total() <= 35 and step.total("objects") == 0
    assert step.total("reads", places=BEFORE_BACKWARD) == 0


def test_bytes_reduced_do_not_grow_with_the_ranks():
    """Batch statistics and gradients; what is gathered (keys of all images) does."""
    few, many = (counted("vit12", "ddp", "pretrain", world) for world in (4, 64))
    assert few.total("sizes", kind="all_reduce") == many.total("sizes", kind="all_reduce") > 0
    assert few.total("sizes", kind="all_gather") < many.total("sizes", kind="all_gather") < 200_000


def phi_of(world: int, images: int, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(scaling, "IMAGES", images)
    return counted("vit12", "ddp", "head", world).phi


def test_a_rank_computes_its_rows_of_phi_alone(monkeypatch):
    """A W-th of all pairs for the same N images of a role: N^2 k / W, three times (forgotten with third-party ones, and
    each with themselves). At 1,024 ranks, too. Control: whoever computes the distance whole takes as long on any W.
    """
    alone = phi_of(1, 8, monkeypatch)
    widths = alone / (3 * 8**2)
    assert alone > 0 and widths == int(widths), "no other distances are in it"
    assert [phi_of(world, 8 // world, monkeypatch) * world for world in (2, 4)] == [alone, alone]
    assert phi_of(1024, 2, monkeypatch) == 3 * 2048**2 / 1024 * widths

    def whole(distance: Any, x: torch.Tensor, y: torch.Tensor, rows: Any, world: int, **draw: int) -> Any:
        phi, cotangent = value_and_cotangent(distance, x, y, **draw)
        return phi / world, cotangent[rows[0]]

    monkeypatch.setattr(third_party, "own_rows", whole)
    assert phi_of(4, 2, monkeypatch) >= alone


def test_what_the_counters_miss_would_pass_every_bound():
    step, at, before = Step(), ["loss"], torch.ones(3)
    with fake_group(4), counting(step, at):
        x = torch.ones(3)
        dist.all_reduce(x)
        all_gather_detached(x)
        dist.all_gather([torch.empty(3) for _ in range(4)], x)
        assert float(x.sum()) and bool(x.any()) and x.tolist() and x[0].item() and x.cpu() is not None
        assert before.tolist()  # of an earlier step: nothing waits
    assert (step.total(), step.total(kind="all_gather"), step.total("sizes")) == (3, 2, 12 + 48 + 48)
    assert step.total("reads", places=BEFORE_BACKWARD) == 5

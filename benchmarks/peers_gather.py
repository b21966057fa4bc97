"""Gathered contrastive losses on several ranks: ours, lightly's and open_clip's; started by `peers.py`.

    torchrun --standalone --nproc_per_node 2 benchmarks/peers_gather.py OUT.json ROUNDS

Each side gets raw outputs, normalises them, takes its loss over the global batch and runs the backward. Before timing,
the loss (averaged over ranks) and the gradients of the two sides are compared. A round's time is that of the slowest
rank; sides take turns.
"""

from __future__ import annotations

import json
import random
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from distunlearn.distributed.collectives import gather_sizes, get_rank, mean_scale
from distunlearn.objectives.infonce import infonce
from distunlearn.objectives.memory_bank import normalise
from distunlearn.objectives.simclr import nt_xent
from distunlearn.objectives.tiled_softmax import Columns

TEMPERATURE = 0.2
SHAPES = [(128, 128), (512, 128), (512, 512)]  # images a rank, output dim

Loss = Callable[[Tensor], Tensor]


def two_towers(image: Tensor, text: Tensor) -> Tensor:
    """Contrastive loss of this rank's pairs (Radford et al., ICML 2021, figure 3) by `infonce`, both directions."""
    u, v = normalise(image), normalise(text)
    sizes = gather_sizes(u.shape[0], u.device)
    pairs = Columns(torch.arange(u.shape[0]) + sum(sizes[: get_rank()]))
    losses = infonce(torch.stack([u, v]), torch.stack([v, u]), pairs, TEMPERATURE, sizes)
    return losses.sum() * mean_scale(sizes) / 2


def lightly_loss() -> Loss:
    from lightly.loss import NTXentLoss

    criterion = NTXentLoss(temperature=TEMPERATURE, gather_distributed=True)
    return lambda z: criterion(z[0], z[1])


def open_clip_loss() -> Loss:
    from open_clip.loss import ClipLoss

    criterion = ClipLoss(
        local_loss=True, gather_with_grad=True, cache_labels=True, rank=dist.get_rank(),
        world_size=dist.get_world_size(),
    )  # fmt: skip
    return lambda z: criterion(F.normalize(z[0], dim=-1), F.normalize(z[1], dim=-1), 1 / TEMPERATURE)


PAIRS: dict[str, tuple[Loss, Callable[[], Loss]]] = {
    "lightly NTXentLoss": (lambda z: nt_xent(z, TEMPERATURE), lightly_loss),
    "open_clip ClipLoss": (lambda z: two_towers(z[0], z[1]), open_clip_loss),
}


def timed(loss: Loss, z: Tensor) -> float:
    """Seconds of forward and backward on the slowest rank."""
    z.grad = None
    dist.barrier()
    start = time.perf_counter()
    loss(z).backward()
    seconds = torch.tensor(time.perf_counter() - start)
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    return float(seconds)


def difference(ours: Loss, theirs: Loss, z: Tensor) -> tuple[float, float]:
    """Relative difference of the loss averaged over ranks, and of this rank's gradient."""
    values, grads = [], []
    for loss in (ours, theirs):
        z.grad = None
        value = loss(z)
        value.backward()
        mean = value.detach().clone()
        dist.all_reduce(mean)
        values.append(mean)
        grads.append(z.grad)
    return float((values[0] - values[1]).abs() / values[1].abs()), float((grads[0] - grads[1]).norm() / grads[1].norm())


def main() -> None:
    out, rounds = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning)  # torch renames what open_clip calls
    dist.init_process_group("gloo")
    order, found = random.Random(0), []
    for name, (ours, make) in PAIRS.items():
        theirs = make()
        for images, dim in SHAPES:
            generator = torch.Generator().manual_seed(dist.get_rank())
            z = torch.randn(2, images, dim, generator=generator).requires_grad_()
            off = difference(ours, theirs, z)
            samples: dict[str, list[float]] = {"ours": [], "theirs": []}
            for number in range(rounds + 3):
                for side in order.sample(["ours", "theirs"], 2):
                    seconds = timed(ours if side == "ours" else theirs, z)
                    if number >= 3:
                        samples[side].append(seconds)
            found.append({"peer": name, "images": images, "dim": dim, "difference": off, "seconds": samples})
    if dist.get_rank() == 0:
        out.write_text(json.dumps(found), encoding="utf-8")
    dist.barrier()  # gloo may abort a rank that takes its connections down while another is still at work
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

"""Embeddings as unit vectors, of the encoder in training and of the original one, and how far they are apart.

The embedding is what an exported encoder gives; heads would let a method move them alone. Running statistics: an
image's embedding does not depend on its batch-mates.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distunlearn.data.schedule import Batch
from distunlearn.objectives.forward import Context, embed
from distunlearn.objectives.memory_bank import normalise


def directions(ctx: Context, batch: Batch) -> Tensor:
    """Unit embeddings of the online views, with graph, [V, n, E]."""
    return normalise(embed(ctx, batch, batchnorm="eval", momentum=False).embedding)


@torch.no_grad()
def original_directions(ctx: Context, batch: Batch) -> Tensor:
    """The same views as the original encoder sees them, without graph."""
    return normalise(embed(ctx, batch, batchnorm="eval", momentum=False, network=ctx.original).embedding)


def apart(u: Tensor, v: Tensor) -> Tensor:
    """1 - cosine, averaged over the views, in [0, 2]: [V, n, E] twice -> [n]."""
    return (1 - (u * v).sum(-1)).mean(0)

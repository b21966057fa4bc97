"""Features of the last steps, against which the gradient of a distance is taken with less noise.

Where the two distributions have met, the gradient of Phi over one batch is noise alone, and with small batches larger
than that of the utility term. At a sample x it is a difference of two means of directions, to the other set and within
its own, each over one batch. Means over the batches of the last steps too have less variance; their samples get no
gradient and are of slightly older parameters. The idea is that of cross-batch memory (Wang et al., arXiv 1912.06798).

Sketches of gradients can only be pooled under one projection: it is kept for `steps` + 1 steps, and with a new one the
memory of gradients begins anew.

Only the gradient is taken so: Phi itself, which is reported and which switches the term, stays that of the batch,
without bias. An image that comes again within the memory meets an older copy of itself, which is no independent
sample: keep `steps` times the forget batch below the number of images to forget.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class FeatureMemory:
    """Two sets of features of at most `steps` past steps, newest first, as they came (not scaled).

    All ranks must be given the same (global) features and then hold the same state.

    Args:
        steps: >= 0; 0 keeps nothing.
    """

    def __init__(self, steps: int) -> None:
        assert steps >= 0, "a memory holds 0 steps or more"
        self.steps = steps
        self._held: list[tuple[Tensor, Tensor]] = []

    def pooled(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """This step's features followed by those held: [n, k] and [m, k] -> [N, k] and [M, k], without gradient."""
        xs, ys = zip((x, y), *self._held, strict=True)
        return torch.cat([each.detach().to(x) for each in xs]), torch.cat([each.detach().to(y) for each in ys])

    def push(self, x: Tensor, y: Tensor) -> None:
        """Hold this step's features, [n, k] and [m, k]; the oldest step leaves where there are more than `steps`."""
        self._held = [(x.detach().clone(), y.detach().clone()), *self._held][: self.steps]

    def clear(self) -> None:
        """Hold nothing."""
        self._held = []

    def state_dict(self) -> dict[str, Tensor]:
        """ "x" [N, k] and "y" [M, k], one step after the other, and "sizes" [steps held, 2]; empty where none is."""
        sizes = torch.tensor([[len(x), len(y)] for x, y in self._held], dtype=torch.int64).reshape(-1, 2)
        if not self._held:
            return {"x": torch.zeros(0, 0), "y": torch.zeros(0, 0), "sizes": sizes}
        xs, ys = zip(*self._held, strict=True)
        return {"x": torch.cat(xs).cpu(), "y": torch.cat(ys).cpu(), "sizes": sizes}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Inverse of `state_dict`, exact."""
        sizes = state["sizes"].tolist()
        xs, ys = (state[name].split([size[side] for size in sizes]) if sizes else () for side, name in enumerate("xy"))
        self._held = [(x.clone(), y.clone()) for x, y in zip(xs, ys, strict=True)]

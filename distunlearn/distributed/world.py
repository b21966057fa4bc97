"""The processes of a run, as one of them sees them: who it is, and how it talks with the others about plain data.

Methods marked *collective* must be called by all ranks in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from distunlearn import errors
from distunlearn.common.files import disk_trouble
from distunlearn.distributed.collectives import all_gather_detached, gather_sizes, sum_over_ranks
from distunlearn.distributed.meeting import Meeting
from distunlearn.distributed.plain_data import decode, encode
from distunlearn.errors import RankLostError

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """`rank` of `size` processes, which computes on `device`."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """True on the one rank that writes files."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all ranks. Collective."""
        if self.size > 1:
            dist.barrier()

    def broadcast_object(self, value: Any) -> Any:
        """The main rank's `value`, plain data (see `plain_data`), on every rank. Collective."""
        if self.size == 1:
            return value
        data = _tensor(encode(value) if self.is_main else b"", self.device)
        length = torch.tensor([len(data)], dtype=torch.int64, device=self.device)
        dist.broadcast(length, src=0)
        data = data if self.is_main else data.new_empty(int(length))
        dist.broadcast(data, src=0)
        return decode(_bytes(data))

    def gather_ids(self, ids: Mapping[str, list[str]]) -> dict[str, list[str]]:
        """The ids of all ranks under each name, in rank order. Collective; the names are alike on all ranks."""
        everyone = self.gather_objects(dict(ids))
        return {name: [i for part in everyone for i in part[name]] for name in ids}

    def gather_objects(self, value: Any) -> list[Any]:
        """Every rank's `value`, plain data, in rank order. Collective."""
        if self.size == 1:
            return [value]
        mine = _tensor(encode(value), self.device)
        sizes = gather_sizes(len(mine), self.device)
        return [decode(_bytes(part)) for part in all_gather_detached(mine, sizes).split(sizes)]

    def gather_bytes(self, data: bytes) -> list[bytes]:
        """Every rank's `data` in rank order on the main rank; nothing on the others. Collective."""
        if self.size == 1:
            return [data]
        sizes = gather_sizes(len(data), self.device)
        mine = torch.zeros(max(sizes), dtype=torch.uint8, device=self.device)
        mine[: len(data)] = _tensor(data, self.device)
        everyone = [torch.empty_like(mine) for _ in sizes] if self.is_main else None
        dist.gather(mine, everyone, dst=0)
        return [_bytes(part[:size]) for part, size in zip(everyone or (), sizes, strict=False)]

    def largest(self, numbers: Sequence[int]) -> list[int]:
        """The largest over the ranks, place by place, of `numbers`, equally many on each. Collective, and cheap."""
        found = torch.tensor(list(numbers), dtype=torch.int64, device=self.device)
        if self.size > 1:
            dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return found.tolist()

    def gather_numbers(self, numbers: Sequence[int]) -> list[list[int]]:
        """Every rank's `numbers`, equally many on each, in rank order. Collective."""
        mine = torch.tensor(list(numbers), dtype=torch.int64, device=self.device)
        return all_gather_detached(mine[None]).tolist()

    def on_main(self, work: Callable[[], T]) -> T | None:
        """What `work` returns on the main rank, None on the others, which wait for it, however long. Collective.

        Raises:
            DistunlearnError: what the main rank raised, on every rank.
            RankLostError: on the others, where the main rank failed otherwise.
        """
        result, error = None, None
        with Meeting(self):
            if self.is_main:
                try:
                    result = work()
                except Exception as found:
                    if self.size == 1:
                        raise
                    error = disk_trouble(found) or found
        told = self.broadcast_object(None if error is None else [type(error).__name__, str(error)])
        known = getattr(errors, told[0], None) if told else None
        if known is None and told:
            raise error or RankLostError(
                f"the main rank failed ({told[0]}) while rank {self.rank} waited; see what it said."
            )
        if known is not None:
            agreed: Any = error or known(told[1])
            agreed.agreed = True
            raise agreed
        return result

    def all_finite(self, value: Tensor) -> bool:
        """True if every element of every rank's `value` is finite; the same answer on all ranks. Collective."""
        return self.finite_and_sum(value, 0)[0]

    def finite_and_sum(self, value: Tensor, count: int) -> tuple[bool, int]:
        """`all_finite` of `value`, and the sum of `count` over the ranks. Collective."""
        wrong = ~torch.isfinite(value.detach()).all()
        if self.size == 1:
            return not bool(wrong), count
        both = torch.stack([wrong.to(self.device, torch.int64), torch.tensor(count, device=self.device)])
        unsound, total = sum_over_ranks(both).tolist()
        return not unsound, total

    def sum_on_main(self, numbers: Sequence[float]) -> list[float]:
        """The sums over the ranks of `numbers`, equally many on each, on the main rank; others get none. Collective."""
        found = torch.tensor(list(numbers), dtype=torch.float64, device=self.device)
        if self.size > 1:
            dist.reduce(found, dst=0)
        return found.tolist() if self.is_main else []


def _tensor(data: bytes, device: torch.device) -> Tensor:
    return (
        torch.frombuffer(bytearray(data), dtype=torch.uint8).to(device)
        if data
        else torch.empty(0, dtype=torch.uint8, device=device)
    )


def _bytes(data: Tensor) -> bytes:
    return data.cpu().numpy().tobytes()

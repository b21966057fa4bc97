"""What the ranks consumed at a step, for the ledger, by one sum over the ranks.

Ids follow from the schedule. With its figures, which are those of all, a rank sends how many images it had of each role
and a digest of those to forget; the main rank compares that with the schedule, and writes. The ids themselves travel
only where an image to forget came in under another role, or one could not be decoded.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Protocol

from distunlearn.config.schema import PretrainConfig, UnlearnConfig
from distunlearn.data.loading.stream import RoleFeeder
from distunlearn.distributed.world import World
from distunlearn.engine.ledger import Ledger
from distunlearn.engine.metrics_log import Telemetry
from distunlearn.errors import RankLostError

REPLACED = "replaced"  # figure, and name in the ledger, of images that cannot be decoded


def _words(ids: Sequence[str]) -> list[int]:
    """A digest of 16 bytes, 0 for no ids, as four numbers whose sums over many ranks are exact in float64."""
    if not ids:
        return [0] * 4
    digest = hashlib.sha256("\n".join(ids).encode()).digest()
    return [int.from_bytes(digest[at : at + 4], "big") for at in range(0, 16, 4)]


class Consumer(Protocol):
    """What is asked of a training phase; see `loop.Phase`."""

    name: str
    optim: PretrainConfig | UnlearnConfig
    feeders: Mapping[str, RoleFeeder]
    forget_ids: frozenset[str]
    names_forget: str
    refuse: Callable[[Collection[str]], None] | None


class Consumption:
    """Of one phase, in one attempt."""

    def __init__(self, phase: Consumer, world: World, ledger: Ledger, telemetry: Telemetry) -> None:
        self.phase, self.world, self.ledger, self.telemetry = phase, world, ledger, telemetry
        self.undecodable: set[str] = set()  # images found so far, on any rank, that others were taken for

    def strays(self, own: dict[str, list[str]]) -> int:
        """Of this rank's ids by role, how many the schedule alone does not tell: images that could not be decoded, and
        images to forget under another role."""
        named, forget = self.phase.names_forget, self.phase.forget_ids
        misused = sum(i in forget for role, ids in own.items() if named and role != named for i in ids)
        return len(own[REPLACED]) + misused

    def account(self, step: int, own: dict[str, list[str]], strays: int, figures: dict[str, float]) -> dict[str, float]:
        """Write down what all ranks consumed; the main rank is given the mean of every figure over the ranks.

        own: ids of this rank by role, `REPLACED` among them. strays: over all ranks. figures: the same ones on all
            ranks, whose shares of the batches are equal. Collective.

        Raises:
            RankLostError: on the main rank: a rank consumed what the schedule does not give it.
            DataError: see `_replaced`.
        """
        phase, world, named = self.phase, self.world, self.phase.names_forget
        found = world.sum_on_main([*figures.values(), *map(len, own.values()), *_words(own.get(named, []))])
        if found:
            figures = {name: total / world.size for name, total in zip(figures, found, strict=False)}
        if world.size == 1 or strays:
            consumed = world.gather_ids(own)
            counted = self._replaced(consumed)
            self.ledger.step(phase.name, step, consumed, phase.forget_ids, named)
            return {**counted, **figures}
        if found:
            numbers = [int(total) for total in found[len(figures) :]]
            count = dict(zip([role for role in own if role != REPLACED], numbers, strict=False))
            forgotten = {named: self._scheduled(step, count.get(named, 0), numbers[len(own) :])}
            self.ledger.step(phase.name, step, forgotten, phase.forget_ids, named, count)
        return figures

    def _scheduled(self, step: int, count: int, words: Sequence[int]) -> list[str]:
        """The ids to forget of this step's batches, rank by rank, if `count` is not 0.

        words: sum over the ranks of `_words` of what they had.

        Raises:
            RankLostError: they had others.
        """
        parts = self.phase.optim.accumulate
        draws = range(step * parts, (step + 1) * parts) if count else ()
        by_draw = [self.phase.feeders[self.phase.names_forget].ids_by_rank(d, self.world.size) for d in draws]
        ranks = [[i for ids in shares for i in ids] for shares in zip(*by_draw, strict=True)]
        if [sum(column) for column in zip(_words([]), *map(_words, ranks), strict=True)] != list(words):
            raise RankLostError(
                f"{self.phase.name}: at step {step} the ranks had other images to forget than the schedule gives them; "
                "start the run again from the last checkpoint."
            )
        return [i for ids in ranks for i in ids]

    def _replaced(self, consumed: dict[str, list[str]]) -> dict[str, float]:
        """Take the replaced images of a step to the log; the ledger counts them if there are any.

        Raises:
            DataError: too many, counted over all ranks.
        """
        if not consumed[REPLACED]:
            del consumed[REPLACED]
            return {}
        for sample_id in sorted(set(consumed[REPLACED]) - self.undecodable):
            self.telemetry.note(self.phase.name, f"image {sample_id!r} cannot be decoded; another takes its place")
        self.undecodable.update(consumed[REPLACED])
        if self.phase.refuse is not None:
            self.phase.refuse(self.undecodable)
        return {REPLACED: len(consumed[REPLACED])}

"""`zero1`, `zero2`, `zero3`: DeepSpeed shards optimizer state, then gradients, then weights.

DeepSpeed is imported here only, and its engine is used directly: accelerate's wrapper steps inside `backward`,
before anyone can look at the gradient. Weights, gradients and optimizer state are float32; bf16 is autocast around
the forward, as under the other backends, so that a momentum encoder has float32 weights to follow.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distunlearn.config.schema import RunConfig
from distunlearn.distributed.collectives import all_gather_detached, sum_over_ranks
from distunlearn.distributed.world import World
from distunlearn.encoders.model import MomentumEncoder
from distunlearn.engine.backends.base import Backend
from distunlearn.engine.backends.optimizer_state import check_state, counter, is_per_weight
from distunlearn.engine.backends.tensor_shards import Piece, Stored, part, whole
from distunlearn.errors import ConfigError, DataError, NumericsError

PERSISTENT = 100_000  # ZeRO-3: smaller parameters stay gathered between uses; their optimizer state is sharded
TOGETHER = 50_000_000  # ZeRO-3: elements of weights that one collective gathers for the momentum encoder


def zero_config(stage: int, *, micro_batch: int, clip: float, overlap: bool) -> dict[str, Any]:
    """DeepSpeed's settings; every number is written out, since "auto" needs a transformers model.

    Args:
        micro_batch: images per process and step; DeepSpeed counts with it and nothing else.
        clip: 0 for none. Left out, DeepSpeed would clip at 1.
        overlap: reduce gradients beside the backward; only on GPUs (on CPUs it races in ZeRO-3).
    """
    zero: dict[str, Any] = {"stage": stage, "overlap_comm": overlap, "reduce_bucket_size": 50_000_000}
    if stage < 3:
        zero["allgather_bucket_size"] = 50_000_000
    else:
        zero |= {
            "stage3_prefetch_bucket_size": 50_000_000,
            "stage3_param_persistence_threshold": PERSISTENT,
            "stage3_gather_16bit_weights_on_model_save": False,
        }
    return {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": clip,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": zero,
        "steps_per_print": 2**31 - 1,
    }


def _import_deepspeed(device: torch.device) -> Any:
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # DeepSpeed reads these even where the process group exists already.
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))
    os.environ.setdefault("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1"))
    # It calls functions of torch.distributed that newer versions of torch rename.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    try:
        import deepspeed.ops
    except ImportError as error:
        raise ConfigError(
            f"the backends zero1, zero2 and zero3 need deepspeed, which cannot be imported ({error}); install it, or "
            "set backend=fsdp2."
        ) from error
    if device.type == "cpu":
        # Without this DeepSpeed compiles its own all-reduce at the first use: most of a minute, and a compiler.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


class Zero(Backend):
    """Forwards go through the plain module, whose hooks DeepSpeed needs: `engine(...)` allows one forward a step."""

    channels_last = False

    def __init__(self, cfg: RunConfig, world: World, stage: int) -> None:
        super().__init__(cfg, world)
        self.stage = stage
        self._deepspeed = _import_deepspeed(world.device)

    def _forget(self) -> None:
        super()._forget()
        self._engine: Any = None
        self._named: dict[str, nn.Parameter] = {}

    def _wrap(self) -> Callable[[Tensor], Any]:
        self._named = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        settings = zero_config(
            self.stage,
            micro_batch=max(1, self.cfg.pretrain.batch // self.world.size),
            clip=self.clip,
            overlap=self.device.type == "cuda",
        )
        self._engine, *_ = self._deepspeed.initialize(
            model=self.model, optimizer=self.optimizer, config=settings, dist_init_required=False
        )
        self._prove()
        return self._engine.module

    def _prove(self) -> None:
        engine = self._engine
        world = self._deepspeed.comm.get_world_size()
        found = engine.zero_optimization_stage()
        if world != self.world.size or found != self.stage:
            raise ConfigError(
                f"DeepSpeed runs ZeRO stage {found} on {world} processes, expected stage {self.stage} on "
                f"{self.world.size}; start the run by torchrun."
            )
        total = sum(self._size(p) for p in self._named.values())
        mine = sum(flat.numel() for flat in self._flats())
        if self.world.size > 1 and mine >= total:
            raise ConfigError(
                f"backend=zero{self.stage} optimises {mine} of {total} weights on rank {self.world.rank} of "
                f"{self.world.size}, expected a part; set backend=ddp."
            )
        if (
            self.stage == 3
            and self.world.size > 1
            and any(p.ds_tensor.numel() >= p.ds_numel for p in self._named.values() if p.ds_numel > 1)
        ):
            raise ConfigError("backend=zero3 left a weight whole, expected a part on each rank; set backend=fsdp2.")

    @staticmethod
    def _size(parameter: nn.Parameter) -> int:
        return getattr(parameter, "ds_numel", parameter.numel())

    def _flats(self) -> list[Tensor]:
        """This rank's parts of the float32 weights, a flat tensor per group; the keys of the optimizer's state."""
        zero = self._engine.optimizer
        return zero.fp32_partitioned_groups_flat if self.stage == 3 else zero.single_partition_of_fp32_groups

    def release(self) -> None:
        if self._engine is not None:
            self._engine.destroy()
        super().release()

    # -- one step ------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        self._engine.set_gradient_accumulation_boundary(last)
        yield
        if not last:
            self._next_backward()

    def _next_backward(self) -> None:
        """DeepSpeed tells one backward from the next by the call of `engine(...)`, which is not used here."""
        self._engine.optimizer.clear_backward_seen_flag()

    def backward(self, loss: Tensor) -> None:
        """See `Backend.backward`; the scaling for accumulation is the caller's."""
        self._norm = None
        self._engine.backward(loss, scale_wrt_gas=False)

    def _gradients(self) -> list[Tensor]:
        """This rank's parts of the averaged gradients, between `backward` and `step`."""
        groups = self._engine.optimizer.averaged_gradients.values()
        return [gradient for group in groups if group is not None for gradient in group]

    def _measure_norm(self) -> float:
        norms = [torch.linalg.vector_norm(g.float()) for g in self._gradients()]
        square = torch.stack(norms).square().sum() if norms else torch.zeros((), device=self.device)
        return float(sum_over_ranks(square).sqrt())

    def step(self) -> None:
        """See `Backend.step`; DeepSpeed clips, by the same formula.

        Raises:
            NumericsError: DeepSpeed skipped the step because of a gradient that is not finite.
        """
        skipped = self._engine.skipped_steps
        self._engine.step()
        if self._engine.skipped_steps > skipped:
            raise NumericsError("a gradient is not finite; DeepSpeed skipped the step; lower the learning rate.")
        self._next_backward()
        self._norm = None

    def _gathered(self) -> contextlib.AbstractContextManager[Any]:
        """Within it all weights are whole; changes to them are lost."""
        if self.stage < 3:
            return contextlib.nullcontext()
        # A gradient taken without `backward` leaves weights gathered where a layer's input needs none.
        self._engine.optimizer.parameter_offload.release_backward_leftovers()
        parameters = list(self.model.parameters())
        return self._deepspeed.zero.GatheredParameters(parameters, modifier_rank=None)

    def _release(self) -> None:
        """Stage 3: no weight stays gathered that a forward left so."""
        with self._gathered():
            pass

    def adjust(self, change: Callable[[str, Tensor, Callable[[Tensor], Tensor]], Tensor]) -> None:
        """See `Backend.adjust`; the optimizer's own parts are nameless, so the weights change and it copies them."""
        if self.stage < 3:
            super().adjust(change)
        else:
            self._adjust_shards(change)
        self._engine.optimizer.refresh_fp32_params()

    @torch.no_grad()
    def _adjust_shards(self, change: Callable[[str, Tensor, Callable[[Tensor], Tensor]], Tensor]) -> None:
        """Stage 3: each rank changes its own part of every weight, and all of those that stay gathered."""
        self._release()
        for name, parameter in self._named.items():
            start, count = self._mine(parameter)
            mine = parameter.ds_tensor.flatten()[:count]
            mine.copy_(change(name, mine, lambda t, at=slice(start, start + count): t.flatten()[at]))  # type: ignore[misc]
            if parameter.data.numel() == parameter.ds_numel:  # gathered: smaller than PERSISTENT
                parameter.data.copy_(change(name, parameter.data, lambda t: t))

    def update_momentum(self, momentum: MomentumEncoder, model: nn.Module, m: float) -> None:
        """See `Backend.update_momentum`; the momentum encoder itself is whole on every rank."""
        if self.stage < 3:
            super().update_momentum(momentum, model, m)
        else:
            wanted = {name for name, _ in momentum.model.named_parameters()}
            momentum.update_from(self._whole_weights({n: p for n, p in model.named_parameters() if n in wanted}), m)

    @torch.no_grad()
    def _whole_weights(self, named: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        """Stage 3: weights by name, whole, by one collective for every `TOGETHER` elements, where DeepSpeed's own
        gathering takes one for each weight. Collective.
        """
        found = {name: weight.data for name, weight in named.items() if weight.ds_persist}  # they stay gathered
        apart = [name for name in named if name not in found]
        while apart:
            ends = itertools.accumulate(named[name].ds_numel for name in apart)
            count = max(1, sum(end <= TOGETHER for end in ends))
            names, apart = apart[:count], apart[count:]
            mine = [named[name].ds_tensor.flatten() for name in names]
            everyone = all_gather_detached(torch.cat(mine)).view(self.world.size, -1)  # of equal sizes: padded
            for name, parts in zip(names, everyone.split([own.numel() for own in mine], dim=1), strict=True):
                weight = named[name]
                found[name] = parts.reshape(-1)[: weight.ds_numel].view(weight.ds_shape)
        return found

    # -- state ---------------------------------------------------------------------------------------------------

    def weights(self, sharded: bool = False, of: nn.Module | None = None) -> Iterator[Piece]:
        if of is not None:
            yield from super().weights(sharded, of)
        elif sharded and self.stage == 3:
            for name, parameter in self.model.named_parameters():
                start, count = self._mine(parameter)
                yield Piece(name, parameter.ds_tensor.flatten()[:count], tuple(parameter.ds_shape), start)
            parameters = {name for name, _ in self.model.named_parameters()}
            for name, value in self.model.state_dict().items():
                if name not in parameters:
                    yield from self._pieces(name, value, sharded, alike=False)
        else:
            with self._gathered():
                yield from super().weights(sharded)

    def moments(self, sharded: bool = False) -> Iterator[Piece]:
        entries = self.optimizer.state.get(self._flats()[0]) or {}  # empty before the first step
        for name, parameter in self._named.items():
            for key, value in entries.items():
                if not is_per_weight(value):
                    # Counters are common to all parameters: each has been stepped equally often.
                    yield from self._pieces(f"{name}/{key}", torch.as_tensor(value), sharded, alike=False)
                    continue
                shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
                if sharded:
                    mine, start = self._part(parameter, key)
                    yield Piece(f"{name}/{key}", mine, shape, start)
                else:
                    yield Piece(f"{name}/{key}", self._whole_entry(parameter, key), shape)

    def load_full_state(self, state: Mapping[str, Stored], of: nn.Module | None = None) -> None:
        if of is not None:
            super().load_full_state(state, of)
            return
        if self.stage < 3:
            super().load_full_state(state)
        else:
            self._load_shards(state)
        self._engine.optimizer.refresh_fp32_params()  # the optimizer steps a copy of its own

    def _load_shards(self, state: Mapping[str, Stored]) -> None:
        """Stage 3: each rank reads its own part of every weight, and all of those that stay gathered."""
        self._release()
        weights = dict(self.model.named_parameters())
        if missing := [name for name in self.model.state_dict() if name not in state]:
            raise DataError(f"the checkpoint lacks {missing[0]!r}; resume with the encoder it was written with.")
        for name, parameter in weights.items():
            start, count = self._mine(parameter)
            parameter.ds_tensor.flatten()[:count].copy_(part(state[name], start, count))
            if parameter.data.numel() == parameter.ds_numel:  # gathered: smaller than PERSISTENT
                parameter.data.copy_(whole(state[name]).view(parameter.data.shape))
        self.model.load_state_dict({n: whole(t) for n, t in state.items() if n not in weights}, strict=False)

    def load_optimizer_state(self, state: Mapping[str, Any]) -> None:
        shapes = {n: tuple(getattr(p, "ds_shape", p.shape)) for n, p in self._named.items()}
        check_state(state, self.optimizer, shapes)
        saved = state["state"]
        self.optimizer.state.clear()
        if not saved:
            return
        sample = next(iter(saved.values()))
        for flat in self._flats():  # what DeepSpeed would make in its first step
            self.optimizer.state[flat] = {
                key: torch.zeros_like(flat) if is_per_weight(value) else counter(value, self.optimizer, flat.device)
                for key, value in sample.items()
            }
        for name, entries in saved.items():
            for key, value in entries.items():
                if is_per_weight(value):
                    mine, start = self._part(self._named[name], key)
                    mine.copy_(part(value, start, mine.numel()))

    def _mine(self, parameter: nn.Parameter) -> tuple[int, int]:
        """Stage 3: the first element of this rank's part of a weight, and how many there are without the padding."""
        size = parameter.ds_tensor.numel()
        start = min(self.world.rank * size, parameter.ds_numel)
        return start, min(size, parameter.ds_numel - start)

    def _part(self, parameter: nn.Parameter, key: str) -> tuple[Tensor, int]:
        """This rank's part of one optimizer tensor of `parameter`, a view, and where it starts in the flattened whole.

        DeepSpeed's own accessors fail in ZeRO-1 and 2 with more than one parameter group, and in ZeRO-3 where the
        last rank's part is padded (0.19.8).
        """
        if self.stage < 3:
            place = parameter._hp_mapping
            if place is None:  # all of it lies on other ranks
                return torch.empty(0, device=self.device), 0
            flat = self.optimizer.state[self._flats()[place.param_group_index]][key]
            inside = place.hp_fragment_address
            return flat.narrow(0, inside.start, inside.numel), place.lp_fragment_address.start
        mine = self._deepspeed.utils.safe_get_local_optimizer_state(parameter, key)
        start, count = self._mine(parameter)
        return mine[:count], start

    def _whole_entry(self, parameter: nn.Parameter, key: str) -> Tensor:
        mine, start = self._part(parameter, key)
        everything = torch.zeros(self._size(parameter), dtype=torch.float32, device=self.device)
        everything[start : start + mine.numel()] = mine
        dist.all_reduce(everything)  # the parts do not overlap
        return everything.view(getattr(parameter, "ds_shape", parameter.shape))

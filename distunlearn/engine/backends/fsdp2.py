"""`fsdp2`: weights, gradients and optimizer state sharded by torch's `fully_shard`, called directly.

accelerate's FSDP plugin gives no sharding at all on a CPU, without a word; called directly, the same code runs over
gloo and NCCL.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _BatchNorm

from distunlearn.distributed.collectives import sum_over_ranks
from distunlearn.encoders.blocks import shard_units
from distunlearn.encoders.model import MomentumEncoder
from distunlearn.engine.backends.base import Backend
from distunlearn.engine.backends.tensor_shards import Piece, Stored, part
from distunlearn.errors import ConfigError, DataError

MIXES = ("cuda",)  # devices whose autocast normalises in float32, whatever the type of the weights


class FSDP2(Backend):
    """Parameters are DTensors split along their first dimension; buffers are whole on every rank.

    With `runtime.mesh` = [copies, shards] the ranks of a copy, which follow one another, hold a part of each weight,
    and gradients are averaged over the copies, too (HSDP): only neighbours gather weights.
    """

    channels_last = False

    def _wrap(self) -> Callable[[Tensor], Any]:
        if self.cfg.runtime.bf16_gather and self.device.type not in MIXES:
            raise ConfigError(
                f"runtime.bf16_gather needs a GPU; on {self.device.type} a layer norm refuses weights of another type "
                "than its input; leave it out."
            )
        # Our models return views (a flattened pool) and nothing writes into them.
        warnings.filterwarnings("ignore", r"FSDP2-wrapped module .* returned a view tensor", UserWarning)
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        self._copies, self._shards = self.cfg.runtime.mesh or (1, self.world.size)
        shape = {"replicate": self._copies, "shard": self._shards} if self._copies > 1 else {"shard": self._shards}
        self._mesh = init_device_mesh(self.device.type, tuple(shape.values()), mesh_dim_names=tuple(shape))
        self._shard(self.model)
        self._prove(self.model)
        # `fully_shard` makes new parameters: the optimizer must step those, under their old settings.
        sharded = dict(self.model.named_parameters())
        for group in self.optimizer.param_groups:
            group["params"] = [sharded[names[parameter]] for parameter in group["params"]]
        self.optimizer.state.clear()
        return self.model

    def _shard(self, model: nn.Module) -> None:
        if self.world.size > 1:
            with torch.no_grad():
                for tensor in model.state_dict().values():
                    dist.broadcast(tensor, src=0)  # as DDP does: all ranks start from the main rank's weights
        for unit in shard_units(model):
            fully_shard(unit, mesh=self._mesh, mp_policy=self._precision(unit))
        fully_shard(model, mesh=self._mesh)

    def _precision(self, unit: nn.Module) -> MixedPrecisionPolicy:
        """How the weights of a block travel; what each rank keeps and steps is float32, and gradients are summed in it.

        Layers see what autocast would make of float32 weights, but for normalisations, whose weights are rounded.
        """
        if not self.cfg.runtime.bf16_gather or any(isinstance(module, _BatchNorm) for module in unit.modules()):
            return MixedPrecisionPolicy()
        return MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)

    def follow(self, momentum: MomentumEncoder) -> None:
        super().follow(momentum)
        self._shard(momentum.model)
        self._prove(momentum.model)

    def _prove(self, model: nn.Module) -> None:
        parameters = dict(model.named_parameters())
        world = self.world.size
        plain = [n for n, p in parameters.items() if not isinstance(p, DTensor) or p.device_mesh.size() != world]
        if plain:
            raise ConfigError(
                f"backend=fsdp2 left {len(plain)} of {len(parameters)} parameters unsharded in a world of {world} "
                f"({plain[0]} is the first); set backend=ddp."
            )
        local = sum(p.to_local().numel() for p in parameters.values())
        total = sum(p.numel() for p in parameters.values())
        if world > 1 and local >= total:
            raise ConfigError(
                f"backend=fsdp2 holds all {total} weights on rank {self.world.rank} of {world}, expected a part; set "
                "backend=ddp."
            )

    def _reshard(self, model: nn.Module | None = None) -> None:
        """A forward without backward leaves the root gathered, its parameters plain tensors; undo that."""
        for module in (self.model if model is None else model).modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def _measure_norm(self) -> float:
        self._reshard()
        norms = [torch.linalg.vector_norm(g.to_local()) for g in self._gradients() if g.to_local().numel()]
        square = torch.stack(norms).square().sum() if norms else torch.zeros((), device=self.device)
        return float((sum_over_ranks(square) / self._copies).sqrt())  # every copy has the whole gradient

    def step(self) -> None:
        self._reshard()
        super().step()

    @torch.no_grad()
    def adjust(self, change: Callable[[str, Tensor, Callable[[Tensor], Tensor]], Tensor]) -> None:
        """See `Backend.adjust`; each rank changes its own part."""
        self._reshard()

        def part(whole: Tensor, parameter: nn.Parameter) -> Tensor:
            return self._place(whole, parameter).to_local()

        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                local = parameter.to_local()
                local.copy_(change(name, local, functools.partial(part, parameter=parameter)))

    def update_momentum(self, momentum: MomentumEncoder, model: nn.Module, m: float) -> None:
        """See `Backend.update_momentum`; both encoders are cut alike, so that every rank moves its own part."""
        self._reshard()
        self._reshard(momentum.model)
        super().update_momentum(momentum, model, m)

    def weights(self, sharded: bool = False, of: nn.Module | None = None) -> Iterator[Piece]:
        self._reshard(of)
        yield from super().weights(sharded, of)

    def moments(self, sharded: bool = False) -> Iterator[Piece]:
        self._reshard()
        yield from super().moments(sharded)

    def _pieces(self, name: str, value: Tensor, sharded: bool, alike: bool) -> Iterator[Piece]:
        if not sharded or not isinstance(value, DTensor):
            yield from super()._pieces(name, value, sharded, alike)
        else:
            mine, copy = value.to_local().flatten(), self.world.rank // self._shards
            edges = [mine.numel() * number // self._copies for number in (copy, copy + 1)]  # each copy saves a part
            yield Piece(name, mine[edges[0] : edges[1]], tuple(value.shape), self._start(value) + edges[0])

    def load_full_state(self, state: Mapping[str, Stored], of: nn.Module | None = None) -> None:
        self._reshard(of)
        sharded = dict((self.model if of is None else of).named_parameters())
        super().load_full_state({n: self._place(t, sharded[n]) if n in sharded else t for n, t in state.items()}, of)

    def load_optimizer_state(self, state: Mapping[str, Any]) -> None:
        self._reshard()
        super().load_optimizer_state(state)

    def _whole(self, tensor: Tensor) -> Tensor:
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def _start(self, tensor: DTensor) -> int:
        """Where this rank's rows begin in the flattened whole; `fully_shard` cuts rows as torch.chunk does."""
        rows = tensor.shape[0]
        first = min(rows, self.world.rank % self._shards * -(-rows // self._shards))
        return first * (tensor.numel() // rows)

    def _place(self, value: Stored, parameter: nn.Parameter) -> Tensor:
        """Every rank cuts out its own part without communication."""
        if tuple(value.shape) != tuple(parameter.shape):
            raise DataError(
                f"the checkpoint holds a weight of shape {tuple(value.shape)}, expected {tuple(parameter.shape)}; "
                "resume with the encoder it was written with."
            )
        assert isinstance(parameter, DTensor)
        mine = parameter.to_local()
        local = part(value, self._start(parameter), mine.numel()).to(mine.device, copy=True).view(mine.shape)
        return DTensor.from_local(
            local, parameter.device_mesh, parameter.placements, run_check=False, shape=parameter.shape,
            stride=parameter.stride(),
        )  # fmt: skip

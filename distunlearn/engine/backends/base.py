"""The interface of all backends, and the backend `single`: one process, plain torch.

Gradients are averaged over the processes by every backend; losses are scaled accordingly (see
`distributed/collectives`). The order of a step is fixed: forwards and one `backward`, within `micro_batch` where a step
has several of them, then `grad_norm`, `step`. Methods marked *collective* are
called by all ranks in the same order.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from distunlearn.config.schema import RunConfig
from distunlearn.distributed.sync_batchnorm import convert
from distunlearn.distributed.world import World
from distunlearn.encoders.activation_checkpointing import checkpointed
from distunlearn.encoders.blocks import blocks, replace_forward
from distunlearn.encoders.compile import compiled
from distunlearn.encoders.model import EncoderOutput, MomentumEncoder
from distunlearn.engine.backends.optimizer_state import entries_of, nested, spread_state
from distunlearn.engine.backends.tensor_shards import Piece, Stored, whole

Forward = Callable[[Tensor], EncoderOutput]
CLIP_EPSILON = 1e-6  # of torch.nn.utils.clip_grad_norm_ and of DeepSpeed alike


class Backend:
    """One encoder in training at a time: `prepare`, any number of steps, `release`. `world`: the processes it is of."""

    channels_last = True  # on a GPU; not where weights are flattened or cut up

    # Between `prepare` and `release`:
    model: nn.Module  # as the methods see it, with the names of the plain encoder
    optimizer: torch.optim.Optimizer

    def __init__(self, cfg: RunConfig, world: World) -> None:
        self.cfg, self.world, self.device = cfg, world, world.device
        self._forget()

    def _forget(self) -> None:
        self.__dict__.pop("model", None)
        self.__dict__.pop("optimizer", None)
        self._undo: list[Callable[[], None]] = []
        self.clip = 0.0
        self._norm: float | None = None

    @property
    def is_prepared(self) -> bool:
        """True between `prepare` and `release`."""
        return "model" in self.__dict__

    # -- preparing -----------------------------------------------------------------------------------------------

    def synchronise(self, module: nn.Module) -> nn.Module:
        """Give `module` batch norms over the global batch where the run asks for them, and on a GPU the layout of
        weights that convolutions are fastest in; changes it in place.
        """
        module = convert(module, self.world.size, self.device.type) if self.cfg.sync_batchnorm else module
        if self.device.type == "cuda" and self.channels_last:
            module.to(memory_format=torch.channels_last)
        return module

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer, clip: float) -> Forward:
        """Take `model`, which is on `device`, and its optimizer into training. Collective.

        Args:
            clip: largest global gradient norm; 0 for none.

        Returns:
            What to call in place of the model: images [n, C, S, S] -> EncoderOutput, float32 whatever the precision.

        Raises:
            ConfigError: the backend did not become what it is named after (ranks, sharding).
        """
        assert not self.is_prepared, "release the prepared encoder first"
        self.model = self.synchronise(model)
        self.optimizer, self.clip = optimizer, clip
        module = self._wrap()
        self._change_blocks()
        return self._in_precision(module)

    def follow(self, momentum: MomentumEncoder) -> None:
        """Take the momentum encoder of the prepared one along: its device, its batch norms, its shards. Collective."""
        momentum.model = self.synchronise(momentum.to(self.device).model)  # type: ignore[assignment]

    def _change_blocks(self) -> None:
        """Compile blocks, and let them recompute their activations, where the run asks for it."""
        for part in blocks(self.model):
            if self.cfg.runtime.compile:
                self._undo.append(replace_forward(part, functools.partial(compiled, part)))
            if self.cfg.runtime.activation_checkpointing:
                self._undo.append(replace_forward(part, functools.partial(checkpointed, part)))

    def _wrap(self) -> Callable[[Tensor], Any]:
        """Spread `self.model` and `self.optimizer`; returns what runs the forward."""
        return self.model

    def _in_precision(self, module: Callable[[Tensor], Any]) -> Forward:
        """bf16: autocast around the forward alone; weights, outputs, losses and gradients stay float32."""
        if self.cfg.precision == "fp32":
            return module

        def forward(images: Tensor) -> EncoderOutput:
            with torch.autocast(self.device.type, torch.bfloat16):
                out = module(images)
            return type(out)(*(part.float() if isinstance(part, Tensor) else part for part in out))

        return forward

    def plain_forward(self) -> Forward:
        """The prepared encoder past any wrapper that averages gradients, for passes whose gradients reach no weight.

        Under ZeRO and FSDP2 it is what `prepare` returned: there the module itself gathers its weights.
        """
        return self._in_precision(self.model)

    def release(self) -> None:
        """Let go of the prepared encoder, so that another can be prepared; without one it does nothing."""
        for undo in reversed(self._undo):
            undo()
        if self._undo and self.cfg.runtime.compile:
            torch._dynamo.reset()  # the code is of this encoder; the next one would count as a change of it
        self._forget()

    # -- one step ------------------------------------------------------------------------------------------------

    def set_learning_rate(self, rate: float) -> None:
        """The rate of the next `step`."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def micro_batch(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Around the forwards and the one `backward` of a micro-batch; only after the `last` one of a step the
        gradients must be averaged over the ranks. A step of one batch needs none of it.
        """
        return contextlib.nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Gradients of the scalar `loss`, averaged over the ranks, added to those of the step so far. Collective."""
        self._norm = None
        loss.backward()

    def grad_norm(self) -> float:
        """L2 norm of the averaged gradient of all parameters, before clipping. Collective."""
        if self._norm is None:
            self._norm = self._measure_norm()
        return self._norm

    def _gradients(self) -> list[Tensor]:
        return [p.grad for p in self.model.parameters() if p.grad is not None]

    def _measure_norm(self) -> float:
        return float(torch.nn.utils.get_total_norm(self._gradients()))

    def step(self) -> None:
        """Clip, update the weights, drop the gradients. Collective."""
        if self.clip:
            factor = self.clip / (self.grad_norm() + CLIP_EPSILON)
            if factor < 1:
                for gradient in self._gradients():
                    gradient.mul_(factor)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._norm = None

    @torch.no_grad()
    def adjust(self, change: Callable[[str, Tensor, Callable[[Tensor], Tensor]], Tensor]) -> None:
        """After a `step`: replace every trained weight by change(name, weight, part). Collective.

        change: works element by element on what this rank holds of the weight; part(tensor) cuts the same out of a
            whole tensor of the weight's shape.
        """
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(change(name, parameter, functools.partial(self._place, parameter=parameter)))

    def update_momentum(self, momentum: MomentumEncoder, model: nn.Module, m: float) -> None:
        """Move the momentum encoder towards the trained one: m * old + (1 - m) * new. Collective."""
        momentum.update(model, m)

    # -- state ---------------------------------------------------------------------------------------------------

    @property
    def num_weights(self) -> int:
        """Elements of all parameters, over all ranks."""
        return sum(self._size(p) for p in self.model.parameters())

    @staticmethod
    def _size(parameter: nn.Parameter) -> int:
        return parameter.numel()

    def weights(self, sharded: bool = False, of: nn.Module | None = None) -> Iterator[Piece]:
        """Parameters and buffers under the plain encoder's names, one after the other, on `device`.

        of: the momentum encoder's model (see `follow`) instead of the encoder's.

        Whole on every rank, collectively; with `sharded` this rank's pieces alone, without communication: the pieces
        of all ranks make up the whole, each element once. A piece is good until the next one is asked for.
        """
        model = self.model if of is None else of
        parameters = {name for name, _ in model.named_parameters()}
        for name, value in model.state_dict().items():
            yield from self._pieces(name, value.detach(), sharded, alike=name in parameters)

    def moments(self, sharded: bool = False) -> Iterator[Piece]:
        """The optimizer's state under `parameter/key`, as `weights` does it."""
        for name, key, value in entries_of(self.optimizer, dict(self.model.named_parameters())):
            yield from self._pieces(f"{name}/{key}", value, sharded, alike=True)

    def _pieces(self, name: str, value: Tensor, sharded: bool, alike: bool) -> Iterator[Piece]:
        """A tensor that every rank has, or that `_whole` makes; where it is `alike` on all, each saves a part of it."""
        shape = tuple(value.shape)
        if not sharded:
            yield Piece(name, self._whole(value), shape)
        elif alike and value.dim() > 0:
            edges = [value.numel() * rank // self.world.size for rank in (self.world.rank, self.world.rank + 1)]
            yield Piece(name, value.flatten()[edges[0] : edges[1]], shape, edges[0])
        elif self.world.is_main:
            yield Piece(name, value, shape)

    def full_state(self, of: nn.Module | None = None) -> dict[str, Tensor]:
        """All parameters and buffers, whole, on the CPU, under the plain encoder's names. Collective. of: as above."""
        return {piece.name: piece.values.to("cpu", copy=True) for piece in self.weights(of=of)}

    def load_full_state(self, state: Mapping[str, Stored], of: nn.Module | None = None) -> None:
        """Inverse of `full_state`, and of `weights`; every rank brings the same tensors. Collective."""
        (self.model if of is None else of).load_state_dict({name: whole(value) for name, value in state.items()})

    def optimizer_state(self) -> dict[str, Any]:
        """Plain data, whole, on the CPU, and by parameter name: see `optimizer_state`. Collective."""
        entries = ((piece.name, piece.values.to("cpu", copy=True)) for piece in self.moments())
        return nested(type(self.optimizer).__name__, entries)

    def load_optimizer_state(self, state: Mapping[str, Any]) -> None:
        """Inverse of `optimizer_state`, and of `moments`; every rank brings the same. Collective.

        Raises:
            DataError: the state is of another optimizer or encoder.
        """
        spread_state(state, self.optimizer, dict(self.model.named_parameters()), self._place)

    def _whole(self, tensor: Tensor) -> Tensor:
        """A full tensor of a possibly sharded one."""
        return tensor

    def _place(self, value: Stored, parameter: nn.Parameter) -> Tensor:
        """A full tensor laid out as `parameter` is: its device, and its shards if it has any."""
        return whole(value).to(parameter.device, copy=True)

"""`ddp`: a whole copy of the encoder in every process, through accelerate."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DynamoBackend, TorchDynamoPlugin
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from distunlearn.engine.backends.base import Backend
from distunlearn.errors import ConfigError


class DDP(Backend):
    """Weights and optimizer are whole on every rank, so that saving, clipping and norms are those of `single`."""

    _module: Any
    _accelerator: Accelerator | None = None  # of the process: accelerate allows one configuration of it

    def _wrap(self) -> Callable[[Tensor], Any]:
        threads = torch.get_num_threads()
        if DDP._accelerator is None:
            # Precision and compilation are the settings' (see `_in_precision`, `encoders/compile.py`), whatever the
            # variables say that `accelerate launch` sets by its own configuration (ACCELERATE_DYNAMO_BACKEND ...).
            DDP._accelerator = Accelerator(
                cpu=self.device.type == "cpu", mixed_precision="no",
                dynamo_plugin=TorchDynamoPlugin(backend=DynamoBackend.NO),
            )  # fmt: skip
        module = DDP._accelerator.prepare_model(self.model)
        torch.set_num_threads(threads)  # accelerate sets a number of its own on a CPU
        if self.world.size > 1:
            self._prove(module)
            # With statistics over the global batch the buffers agree anyway; a broadcast between the two forwards of
            # one step would change what the second one sees. (As an argument its name depends on torch's version.)
            module.broadcast_buffers = False
        self._module = module
        return module

    def _forget(self) -> None:
        super()._forget()
        self._module = None

    def micro_batch(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        """See `Backend.micro_batch`; DDP averages what has gathered in the last backward."""
        if last or not isinstance(self._module, DistributedDataParallel):
            return contextlib.nullcontext()
        return self._module.no_sync()

    def _prove(self, module: Any) -> None:
        averaged = module.process_group.size() if isinstance(module, DistributedDataParallel) else 1
        if averaged != self.world.size:
            raise ConfigError(
                f"backend=ddp averages over {averaged} processes of {self.world.size} (accelerate returned a "
                f"{type(module).__name__}); start the run by torchrun, or unset the ACCELERATE_ variables."
            )

    def release(self) -> None:
        if DDP._accelerator is not None:
            DDP._accelerator.free_memory()
        super().release()

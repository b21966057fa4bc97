"""On a GPU convolutions keep their weights channels last; here the layout is forced on a CPU.

What is learned must be the same but for rounding, and what is saved must not know of it.
"""

from __future__ import annotations

import pytest
import torch

from distunlearn.common.tensors import write_tensors
from distunlearn.config.schema import EncoderConfig, RunConfig, RuntimeConfig
from distunlearn.encoders.model import MomentumEncoder, build_model
from distunlearn.engine.backends import open_backend
from distunlearn.engine.backends.base import Backend
from distunlearn.engine.optimizer import make_optimizer

CFG = RunConfig(
    encoder=EncoderConfig(
        name="resnet18", image_size=32, in_chans=3, args={"channels": [8, 16, 16, 16], "layers": [1, 1, 1, 1]}
    ),
    runtime=RuntimeConfig(threads=1),
)


@pytest.fixture
def forced(monkeypatch):
    """As `Backend.synchronise` does it on a GPU."""
    plain = Backend.synchronise
    monkeypatch.setattr(
        Backend, "synchronise", lambda self, module: plain(self, module).to(memory_format=torch.channels_last)
    )


def trained() -> tuple[dict[str, torch.Tensor], Backend]:
    torch.manual_seed(0)
    model, backend = build_model(CFG, None), open_backend(CFG)
    forward = backend.prepare(model, make_optimizer(CFG.pretrain, model), clip=0)
    momentum = MomentumEncoder(model)
    for _ in range(3):
        images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
        backend.backward(forward(images).output.square().sum())
        backend.step()
        backend.update_momentum(momentum, model, 0.5)
    return backend.full_state() | {f"momentum.{k}": v for k, v in momentum.state_dict().items()}, backend


def kernels(model: torch.nn.Module) -> list[torch.Tensor]:
    """Weights of convolutions in which the two layouts differ."""
    return [p for p in model.parameters() if p.dim() == 4 and p.shape[1] > 1 and p.shape[2] > 1]


def test_training_is_the_same_but_for_rounding(monkeypatch, forced):
    with monkeypatch.context() as undone:
        undone.undo()
        plain, _ = trained()
    last, backend = trained()
    assert kernels(backend.model), "an encoder without convolutions shows nothing"
    assert all(not w.is_contiguous() for w in kernels(backend.model)), "the layout is not the one that is tested"
    assert plain.keys() == last.keys()
    for name, value in plain.items():
        torch.testing.assert_close(last[name], value, rtol=2e-4, atol=2e-5, msg=name)


def test_what_is_saved_has_the_usual_layout_and_loads_into_either(tmp_path, forced):
    from safetensors.torch import load_file

    state, backend = trained()
    write_tensors(tmp_path / "state.safetensors", state)
    stored = load_file(tmp_path / "state.safetensors")
    assert all(torch.equal(stored[name], state[name]) for name in state)
    pieces = list(backend.weights(sharded=True))
    for piece in pieces:  # flat runs of elements are those of the tensor, in the order of its indices
        if piece.start is not None:
            flat = state[piece.name].contiguous().flatten()
            assert torch.equal(piece.values, flat[piece.start : piece.start + piece.values.numel()]), piece.name
    with torch.no_grad():
        for parameter in backend.model.parameters():
            parameter.zero_()
    backend.load_full_state({k: v for k, v in stored.items() if not k.startswith("momentum.")})
    assert all(torch.equal(value, state[name]) for name, value in backend.full_state().items())
    assert all(not w.is_contiguous() for w in kernels(backend.model)), "the layout stays"

"""Which batch norms `convert` replaces, what it keeps, and what it refuses; the numbers are in tests/dist."""

from __future__ import annotations

import copy

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from distunlearn.distributed.sync_batchnorm import SyncBatchNorm, convert
from distunlearn.encoders.model import batchnorm_mode
from distunlearn.errors import ConfigError


class Renorm(nn.BatchNorm2d):
    """A norm with behaviour of its own."""


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Sequential(BatchNormAct2d(3, act_layer=nn.PReLU)), nn.Flatten(),
        nn.Linear(3 * 16, 4), nn.BatchNorm1d(4, affine=False),
    )  # fmt: skip


def test_a_world_of_one_changes_nothing():
    model = network()
    before = list(model.modules())
    assert convert(model, 1) is model and list(model.modules()) == before


def test_names_parameters_and_buffers_stay_the_very_same_objects():
    model = network()
    parameters, state = dict(model.named_parameters()), model.state_dict()
    assert convert(model, 2) is model
    kinds = {type(m) for m in model.modules() if isinstance(m, _BatchNorm)}
    assert kinds == {SyncBatchNorm}
    assert list(dict(model.named_parameters())) == list(parameters)
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert model.state_dict().keys() == state.keys()
    assert all(t.data_ptr() == state[name].data_ptr() for name, t in model.state_dict().items())
    model.load_state_dict(network().state_dict())


def test_without_other_processes_values_are_those_of_the_original():
    """A process group of one is the identity, so that the merge of one part must be torch's own result."""
    model = network().double()
    synchronised = convert(copy.deepcopy(model), 2)
    x = torch.randn(5, 1, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(synchronised(x), model(x), rtol=0, atol=1e-12)
    torch.testing.assert_close(synchronised.state_dict(), model.state_dict(), rtol=0, atol=1e-12)
    synchronised.load_state_dict(model.state_dict())
    with batchnorm_mode(model, "eval"), batchnorm_mode(synchronised, "eval"):
        assert torch.equal(synchronised(x), model(x))
    assert (synchronised(x) - synchronised.eval()(x)).abs().max() > 1e-3  # the modes differ


def test_modules_in_use_twice_stay_one_and_conversion_twice_is_conversion_once():
    norm = nn.BatchNorm1d(2)
    model = convert(nn.Sequential(norm, nn.Linear(2, 2), norm), 2)
    assert model[0] is model[2] and isinstance(model[0], SyncBatchNorm)
    first = model[0]
    assert convert(model, 2)[0] is first
    assert isinstance(convert(norm, 2), SyncBatchNorm)


def test_the_mode_is_kept():
    model = network()
    model[1].eval()
    convert(model, 2)
    assert not model[1].training and model[5].training


def test_half_precision_comes_back_as_it_was_and_is_summed_in_float32():
    norm = convert(nn.BatchNorm2d(3), 2)
    x = (100 + torch.randn(4, 3, 8, 8)).bfloat16()
    y = norm(x)
    assert y.dtype == torch.bfloat16 and norm.running_mean.dtype == torch.float32
    expected = nn.BatchNorm2d(3)(x.float())
    assert (y.float() - expected).abs().max() < 0.05  # bfloat16 itself resolves 0.5 at 100


@pytest.mark.parametrize("norm", [Renorm(3), nn.LazyBatchNorm2d()])
def test_an_unknown_batch_norm_is_refused_by_name(norm):
    with pytest.raises(ConfigError, match=type(norm).__name__) as caught:
        convert(nn.Sequential(norm), 2)
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


def test_a_vector_is_no_batch():
    with pytest.raises(ValueError, match="at least 2 dimensions"):
        convert(nn.BatchNorm1d(3), 2)(torch.zeros(3))


def test_on_gpus_it_is_torchs_own():
    """Which needs a GPU to run: here only that nothing is lost on the way."""
    model = network()
    parameters, state = dict(model.named_parameters()), model.state_dict()
    act = model[2][0].act
    assert convert(model, 2, "cuda") is model
    assert all(isinstance(m, nn.SyncBatchNorm) for m in model.modules() if isinstance(m, _BatchNorm))
    assert all(p is parameters[name] for name, p in model.named_parameters()) and model[2][0].act is act
    assert all(t.data_ptr() == state[name].data_ptr() for name, t in model.state_dict().items())
    norm = nn.BatchNorm1d(2)
    twice = convert(nn.Sequential(norm, nn.Linear(2, 2), norm), 2, "cuda")
    assert twice[0] is twice[2] and convert(twice, 2, "cuda")[0] is twice[0]
    with pytest.raises(ConfigError, match="Renorm"):
        convert(nn.Sequential(Renorm(3)), 2, "cuda")

"""Forward, heads, momentum copy and BatchNorm modes against explicit references."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from encoder_configs import CLASSES, ENCODERS, HIDDEN, OBJECTIVES, OUT, RESNET18, images_for, run_config
from torch.nn.parallel import DistributedDataParallel

from distunlearn.encoders.backbone import create_args
from distunlearn.encoders.model import EncoderOutput, MomentumEncoder, batchnorm_mode, build_model
from distunlearn.errors import EncoderError

TIGHT = {"rtol": 0.0, "atol": 1e-12}
PREDICTING = ("mocov3", "byol")


def model_of(objective: str = "simclr", encoder=RESNET18):
    return build_model(run_config(encoder, objective), CLASSES)


# --- forward ---


@pytest.mark.parametrize("name", ENCODERS)
def test_the_embedding_is_timms_own(name):
    encoder = ENCODERS[name]
    model, images = model_of(encoder=encoder).eval(), images_for(encoder)
    theirs = timm.create_model(encoder.name, **create_args(encoder)).eval()
    theirs.load_state_dict(model.backbone.state_dict())
    with torch.no_grad():
        out, expected = model(images), theirs(images)
    assert isinstance(out, EncoderOutput)
    assert out.embedding.shape == (4, model.backbone.num_features) == expected.shape
    assert torch.equal(out.embedding, expected)
    assert out.embedding.std(0).max() > 1e-4, "an embedding that ignores its image would pass"


def reference_head(state: dict[str, torch.Tensor], name: str, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Linear, BatchNorm with batch statistics, ReLU, Linear, written out."""
    x = x @ state[f"{name}.body.0.weight"].T
    x = (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt()
    hidden = (x * state[f"{name}.body.1.weight"] + state[f"{name}.body.1.bias"]).clamp_min(0)
    return hidden, hidden @ state[f"{name}.last.weight"].T + state[f"{name}.last.bias"]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_heads_equal_a_reference_in_float64(objective):
    model, images = model_of(objective).double(), images_for(RESNET18, 6).double()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        out = model(images)
    classes = CLASSES if objective == "supervised" else OUT
    assert out.projection.shape == out.output.shape == (6, classes)
    torch.testing.assert_close((model.predictor or model.projector).last(out.hidden), out.output, **TIGHT)
    if objective == "supervised":
        hidden, projection = out.embedding, F.linear(out.embedding, state["projector.last.weight"])
        output = projection = projection + state["projector.last.bias"]
    else:
        hidden, projection = reference_head(state, "projector", out.embedding)
        output = projection
        if objective in PREDICTING:
            hidden, output = reference_head(state, "predictor", projection)
        assert out.hidden.shape == (6, HIDDEN)
    for found, expected in ((out.hidden, hidden), (out.projection, projection), (out.output, output)):
        torch.testing.assert_close(found, expected, **TIGHT)
    assert torch.equal(out.output, out.projection) == (objective not in PREDICTING)
    assert (model.predictor is not None) == (objective in PREDICTING)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("name", ENCODERS)
def test_every_weight_gets_a_gradient_through_the_output(name, objective):
    model = model_of(objective, ENCODERS[name])
    model(images_for(ENCODERS[name])).output.pow(2).sum().backward()
    assert [key for key, weight in model.named_parameters() if weight.grad is None] == []


def test_gradients_survive_ddp(tmp_path):
    """DDP refuses a second forward when a weight had no gradient in the first, which is what must not happen."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        for objective in OBJECTIVES:
            plain = model_of(objective)
            wrapped = DistributedDataParallel(plain)
            for _ in range(2):
                out = wrapped(images_for(RESNET18))
                assert isinstance(out, EncoderOutput)
                out.output.sum().backward()
        unused = DistributedDataParallel(model_of("byol"))
        with pytest.raises(RuntimeError, match="not used in producing loss"):
            for _ in range(2):
                unused(images_for(RESNET18)).projection.sum().backward()
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(2, 3, 32, 32),
        torch.zeros(2, 1, 32, 31),
        torch.zeros(2, 1, 64, 64),
        torch.zeros(1, 32, 32),
        torch.zeros(2, 1, 32, 32, dtype=torch.uint8),
    ],
)
def test_images_of_another_kind_are_refused(images):
    with pytest.raises(EncoderError, match=r"expected floats \[n, 1, 32, 32\]; set encoder.in_chans"):
        model_of()(images)


# --- momentum ---


@pytest.mark.parametrize("objective", ["moco", "byol"])
def test_the_moving_average_equals_a_float64_oracle(objective):
    model = model_of(objective)
    ema = MomentumEncoder(model)
    oracle = {name: weight.detach().double().clone() for name, weight in ema.model.named_parameters()}
    generator, momentum = torch.Generator().manual_seed(0), 0.9
    for step in range(20):
        with torch.no_grad():
            for weight in model.parameters():
                weight += 0.1 * torch.randn(weight.shape, generator=generator)
        named = dict(model.named_parameters())
        oracle = {name: momentum * old + (1 - momentum) * named[name].double() for name, old in oracle.items()}
        ema.update(model, momentum) if step % 2 else ema.update_from(named, momentum)
    for name, weight in ema.model.named_parameters():
        torch.testing.assert_close(weight.double(), oracle[name].detach(), rtol=1e-5, atol=1e-6)
        assert not torch.equal(weight, named[name]) and weight.dtype == torch.float32 and not weight.requires_grad
    assert "predictor" not in {name.split(".")[0] for name, _ in ema.model.named_parameters()}


def test_the_average_follows_a_low_precision_model_in_fp32():
    model = model_of("moco").bfloat16()
    ema = MomentumEncoder(model)
    start = ema.model.projector.last.weight.clone()
    with torch.no_grad():
        model.projector.last.weight.add_(1)
    expected = 0.999 * start.double() + 0.001 * model.projector.last.weight.detach().double()
    ema.update(model, 0.999)
    torch.testing.assert_close(ema.model.projector.last.weight.double(), expected, rtol=0.0, atol=1e-6)
    assert not torch.equal(ema.model.projector.last.weight, start), "bf16 would have rounded the step away"


def test_momentum_0_copies_and_1_keeps():
    model = model_of("byol")
    ema = MomentumEncoder(model)
    with torch.no_grad():
        model.projector.last.weight.fill_(7)
    ema.update(model, 1.0)
    assert not bool((ema.model.projector.last.weight == 7).any())
    ema.update(model, 0.0)
    assert torch.equal(ema.model.projector.last.weight, model.projector.last.weight)
    for wrong in (-0.1, 1.1):
        with pytest.raises(AssertionError, match="share"):
            ema.update(model, wrong)


def test_the_momentum_copy_is_independent_gives_no_gradient_and_keeps_its_own_statistics():
    model, images = model_of("byol"), images_for(RESNET18)
    ema = MomentumEncoder(model)
    model.backbone.bn1.running_mean.fill_(5)
    out = ema(images)
    assert not out.projection.requires_grad and torch.equal(out.projection, out.output)
    assert model.predictor is not None, "the copy loses its predictor, not the model"
    own = ema.model.backbone.bn1.running_mean
    assert bool((own != 0).any()), "its BatchNorms see its batches"
    kept = own.clone()
    ema.update(model, 0.0)
    assert torch.equal(own, kept) and bool((kept != 5).all())


def test_the_momentum_state_comes_back():
    model, images = model_of("mocov3"), images_for(RESNET18)
    ema = MomentumEncoder(model)
    ema(images)
    state = {key: value.clone() for key, value in ema.state_dict().items()}
    with torch.no_grad():
        model.projector.last.weight.add_(1)
    fresh = MomentumEncoder(model).to("cpu")
    assert not torch.equal(fresh.state_dict()["projector.last.weight"], state["projector.last.weight"])
    fresh.load_state_dict(state)
    assert all(torch.equal(value, state[key]) for key, value in fresh.state_dict().items())
    with pytest.raises(RuntimeError, match="projector.last.weight"):
        fresh.load_state_dict({key: value for key, value in state.items() if key != "projector.last.weight"})


def test_a_shard_is_refused():
    model = model_of("moco")
    ema = MomentumEncoder(model)
    named = dict(model.named_parameters())
    named["projector.last.weight"] = named["projector.last.weight"][:3]
    with pytest.raises(AssertionError, match="projector.last.weight is a shard"):
        ema.update_from(named, 0.9)


# --- BatchNorm modes ---


class SynchronisedNorm(torch.nn.modules.batchnorm._BatchNorm):
    def _check_input_dim(self, x: torch.Tensor) -> None: ...


def test_batchnorm_mode_switches_every_batchnorm_and_only_them():
    model = model_of("byol")
    model.backbone.bn1 = SynchronisedNorm(8)
    model.extra = torch.nn.Dropout(0.5)
    model.backbone.bn1.training = False
    before = {name: module.training for name, module in model.named_modules()}
    norms = {n for n, m in model.named_modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)}
    assert {"backbone.bn1", "projector.body.1", "predictor.body.1"} <= norms
    for mode in ("train", "eval"):
        with batchnorm_mode(model, mode):
            for name, module in model.named_modules():
                assert module.training == (mode == "train" if name in norms else before[name]), name
        assert {name: module.training for name, module in model.named_modules()} == before
    with pytest.raises(KeyError), batchnorm_mode(model, "eval"):
        raise KeyError
    assert {name: module.training for name, module in model.named_modules()} == before
    with pytest.raises(AssertionError, match="train or eval"), batchnorm_mode(model, "frozen"):
        pass


def test_in_eval_mode_an_image_does_not_depend_on_its_batch_mates_and_statistics_stay():
    model, images = model_of("byol"), images_for(RESNET18)
    statistics = model.backbone.bn1.running_mean.clone()
    with torch.no_grad(), batchnorm_mode(model, "eval"):
        torch.testing.assert_close(model(images).output[:2], model(images[:2]).output, rtol=1e-5, atol=1e-6)
    assert torch.equal(model.backbone.bn1.running_mean, statistics)
    with torch.no_grad(), batchnorm_mode(model, "train"):
        assert (model(images).output[:2] - model(images[:2]).output).abs().max() > 1e-2
    assert not torch.equal(model.backbone.bn1.running_mean, statistics)


def test_an_average_that_has_arrived_stays_exactly_where_it_is():
    """m * w + (1 - m) * w would drift by rounding."""
    model = model_of()
    momentum = MomentumEncoder(model)
    for _ in range(3):
        momentum.update(model, 0.99)
    weights = dict(model.named_parameters())
    assert all(torch.equal(ema, weights[name]) for name, ema in momentum.model.named_parameters())
    drifted = [w for w in weights.values() if not torch.equal(0.99 * w + (1 - 0.99) * w, w)]
    assert drifted, "the numbers of this encoder would not show it"

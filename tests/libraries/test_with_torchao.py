"""Quantization of layers with weight norm, by torchao and by torch itself: it works, or it is an
error that leaves the layer as it is, and works after fold."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import wnkernel

from ..layers import APPLY
from ..small_models import embed_of_chat_tts, ramp

torchao = pytest.importorskip("torchao", reason="torchao is not installed (pip install torchao)")
quantization = pytest.importorskip("torchao.quantization", reason="this torchao cannot quantize")

WEIGHT_ONLY = ["Int8WeightOnlyConfig", "IntxWeightOnlyConfig", "Float8WeightOnlyConfig"]
DYNAMIC = ["Int8DynamicActivationInt8WeightConfig", "Int8DynamicActivationIntxWeightConfig"]
CONFIGS = [name for name in (*WEIGHT_ONLY, *DYNAMIC) if hasattr(quantization, name)]
all_configs = pytest.mark.parametrize("config", CONFIGS)
FOLD = r"^weight: expected a plain .* weight norm, got one of type .*Tensor; .*wnkernel\.fold"


@pytest.fixture(autouse=True)
def _as_is() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchao's and torch's, of what they are to drop
        yield


def quantize(model: nn.Module, config: str) -> nn.Module:
    quantization.quantize_(model, getattr(quantization, config)())
    return model


def heads() -> nn.Module:
    """ChatTTS's five heads: linear layers, at an eighth of their width."""
    torch.manual_seed(0)
    model = embed_of_chat_tts("torch", 96, 626, 2117).requires_grad_(False)
    wnkernel.convert(model)
    with torch.no_grad():
        for layer in (model.head_text, *model.head_code):
            layer.parametrizations.weight.original0.mul_(1.5)
    return model


def outputs(model: nn.Module) -> list[Tensor]:
    return [head(ramp(2, 96)) for head in (model.head_text, *model.head_code)]


def state(model: nn.Module) -> dict[str, Tensor]:
    return {key: t.clone() for key, t in model.state_dict().items()}


def assert_unchanged(model: nn.Module, before: dict[str, Tensor]) -> None:
    now = model.state_dict()
    assert list(now) == list(before)
    assert all(torch.equal(now[key], t) for key, t in before.items())


def assert_near(got: Tensor, want: Tensor) -> None:
    """As near as eight bits of each number allow."""
    assert (got - want).norm() < 0.05 * want.norm()


@all_configs
def test_unfolded_layers_are_an_error(config):
    model = heads()
    before, want = state(model), outputs(model)
    with pytest.raises(RuntimeError, match=FOLD):
        quantize(model, config)
    assert_unchanged(model, before)
    assert all(map(torch.equal, outputs(model), want))


@all_configs
def test_folded_layers_are_quantized(config):
    model, plain = heads(), nn.Linear(96, 626, bias=False)
    want = outputs(model)
    plain.weight = nn.Parameter(model.head_code[0].weight.detach().clone())
    wnkernel.fold(model)
    quantize(model, config)
    for got, exact in zip(outputs(model), want, strict=True):
        assert_near(got, exact)
        assert not torch.equal(got, exact)
    assert type(model.head_text.weight).__module__.startswith("torchao.")
    torch.testing.assert_close(outputs(model)[1], quantize(plain, config)(ramp(2, 96)))


def test_layers_quantized_before_the_error_are_not_in_the_way():
    model = nn.Sequential(nn.Linear(96, 64), wnkernel.weight_norm(nn.Linear(64, 32)))
    want = model(ramp(2, 96))
    with pytest.raises(RuntimeError, match=FOLD):
        quantize(model, "Int8WeightOnlyConfig")
    assert_near(model(ramp(2, 96)), want)
    wnkernel.fold(model)
    quantization.quantize_(
        model,
        quantization.Int8WeightOnlyConfig(),
        filter_fn=lambda m, _: isinstance(m, nn.Linear) and type(m.weight) is nn.Parameter,
    )
    assert_near(model(ramp(2, 96)), want)


def test_other_layers_of_a_model_are_quantized():
    model = nn.Sequential(nn.Linear(96, 64), wnkernel.weight_norm(nn.Linear(64, 32)))
    want, g = model(ramp(2, 96)), model[1].parametrizations.weight.original0
    quantization.quantize_(
        model,
        quantization.Int8WeightOnlyConfig(),
        filter_fn=lambda m, _: type(m) is nn.Linear,
    )
    assert_near(model(ramp(2, 96)), want)
    model(ramp(2, 96)).sum().backward()
    assert g.grad is not None


def aware(model: nn.Module) -> None:
    qat = pytest.importorskip(
        "torchao.quantization.qat", reason="this torchao has no quantization-aware training"
    )
    base = quantization.Int8DynamicActivationIntxWeightConfig()
    quantization.quantize_(model, qat.QATConfig(base, step="prepare"))


def float8(model: nn.Module) -> None:
    pytest.importorskip(
        "torchao.float8", reason="this torchao has no float8 training"
    ).convert_to_float8_training(
        model, module_filter_fn=lambda m, _: isinstance(m, nn.Linear) and m.out_features == 64
    )


@pytest.mark.parametrize("prepare", [aware, float8])
@pytest.mark.parametrize("kind", ["ours", "torch"])
def test_training_that_swaps_layers(prepare, kind):
    """They give the computed weight to a layer of theirs, in which torch refuses it."""
    model = nn.Sequential(APPLY[kind](nn.Linear(96, 64)))
    before, want = state(model), model(ramp(16, 96))
    with pytest.raises(TypeError, match=r"torch\.nn\.Parameter or None expected"):
        prepare(model)
    assert_unchanged(model, before)
    wnkernel.fold(model)
    prepare(model)
    assert_near(model(ramp(16, 96)), want)
    model(ramp(16, 96)).sum().backward()
    assert model[0].weight.grad is not None


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        norm = wnkernel.weight_norm
        self.first, self.last = norm(nn.Conv1d(4, 8, 3)), norm(nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).relu().transpose(1, 2))


def by_fx(model: nn.Module, x: Tensor) -> nn.Module:
    """torch's static quantization of a graph."""
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    prepared = prepare_fx(model, get_default_qconfig_mapping(engine()), (x,))
    prepared(x)
    return convert_fx(prepared)


def engine() -> str:
    found = [e for e in torch.backends.quantized.supported_engines if e != "none"]
    if not found:
        pytest.skip("this build of torch has no engine for quantized layers")
    return torch.backends.quantized.engine if "none" not in found else found[0]


@pytest.mark.parametrize("fused", [False, True])
def test_torchs_static_quantization_leaves_them_in_float(fused):
    model, x = Net().eval(), ramp(2, 4, 9)
    want = model(x)
    if fused:
        wnkernel.fuse(model)
    assert_near(by_fx(model, x)(x), want)
    assert torch.equal(model(x), want)
    wnkernel.fold(model)
    quantized = by_fx(model, x)
    assert not [*quantized.parameters()]
    assert_near(quantized(x), want)


def test_torchs_dynamic_quantization():
    """It goes by the type of a layer, as with torch's weight norm; nothing is changed."""
    model, x = Net().eval(), ramp(2, 4, 9)
    before, want = state(model), model(x)
    engine()
    with pytest.raises(AssertionError, match="ParametrizedLinear"):
        torch.ao.quantization.quantize_dynamic(model)
    assert_unchanged(model, before)
    wnkernel.fold(model)
    assert_near(torch.ao.quantization.quantize_dynamic(model)(x), want)

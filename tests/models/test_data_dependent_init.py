"""``wnkernel.data_dependent_init_``: section 3 of Salimans & Kingma 2016."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm

import wnkernel

from .. import small_models
from ..layers import APPLY, legacy_weight_norm, originals
from ..versions import since

norm = wnkernel.weight_norm


def preactivations(model: nn.Module, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
    """What the layers of a model give, channels first, in their first call in a forward."""
    outputs: dict[str, Tensor] = {}

    def keep(path: str, module: nn.Module) -> Callable[..., None]:
        ndim = originals(module)[1].ndim

        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            outputs.setdefault(path, output.detach().movedim(1 - ndim, 0).flatten(1).double())

        return hook

    handles = [
        m.register_forward_hook(keep(f"{path}.weight" if path else "weight", m), prepend=True)
        for path, m in model.named_modules()
        if parametrize.is_parametrized(m, "weight")
    ]
    with torch.no_grad():
        model(*args, **kwargs)
    for handle in handles:
        handle.remove()
    return outputs


def assert_normalised(t: Tensor, atol: float = 1e-5, mean: bool = True) -> None:
    zeros, ones = torch.zeros(len(t), dtype=t.dtype), torch.ones(len(t), dtype=t.dtype)
    torch.testing.assert_close(t.var(1, correction=0), ones, rtol=0, atol=atol)
    if mean:
        torch.testing.assert_close(t.mean(1), zeros, rtol=0, atol=atol)


def values(model: nn.Module) -> dict[str, Tensor]:
    return {k: t.clone() for k, t in model.state_dict().items()}


# id -> (layer, input shape)
ONE_G_PER_CHANNEL: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "Linear": (lambda: norm(nn.Linear(5, 4)), (9, 5)),
    "Linear over a sequence": (lambda: norm(nn.Linear(5, 4)), (2, 7, 5)),
    "Conv1d": (lambda: norm(nn.Conv1d(4, 6, 3)), (2, 4, 8)),
    "Conv1d without a batch": (lambda: norm(nn.Conv1d(4, 6, 3)), (4, 20)),
    "Conv1d padded, dilated": (lambda: norm(nn.Conv1d(4, 6, 3, padding=2, dilation=2)), (2, 4, 8)),
    "Conv1d grouped": (lambda: norm(nn.Conv1d(4, 6, 3, groups=2)), (2, 4, 8)),
    "Conv2d reflecting": (
        lambda: norm(nn.Conv2d(3, 5, 3, padding=1, padding_mode="reflect")),
        (2, 3, 5, 6),
    ),
    "Conv2d, dim from the end": (lambda: norm(nn.Conv2d(3, 5, 3), dim=-4), (2, 3, 5, 6)),
    "Conv3d": (lambda: norm(nn.Conv3d(2, 3, 2)), (2, 2, 4, 4, 4)),
    "ConvTranspose1d": (lambda: norm(nn.ConvTranspose1d(4, 6, 3), dim=1), (2, 4, 8)),
    "ConvTranspose2d": (lambda: norm(nn.ConvTranspose2d(4, 6, 3, 2), dim=1), (2, 4, 5, 5)),
    "ConvTranspose3d": (lambda: norm(nn.ConvTranspose3d(2, 3, 2), dim=-4), (2, 2, 3, 3, 3)),
    "eps": (lambda: norm(nn.Linear(5, 4), eps=1e-3), (9, 5)),
    "converted": (lambda: converted(legacy_weight_norm(nn.Linear(5, 4))), (9, 5)),
}


def converted(module: nn.Module) -> nn.Module:
    wnkernel.convert(module)
    return module


@pytest.mark.parametrize("layer", ONE_G_PER_CHANNEL)
def test_a_layer_as_the_paper_defines_it(route, layer):
    build, shape = ONE_G_PER_CHANNEL[layer]
    module, x = build(), 3 * torch.randn(shape) + 1
    g, v = originals(module)
    with torch.no_grad():
        g.uniform_(-2, 2)  # whatever was there
    direction = v.clone()
    # t: the layer without g and bias
    twin = copy.deepcopy(module)
    with torch.no_grad():
        originals(twin)[0].fill_(1)
        twin.bias.zero_()
    (t,) = preactivations(twin, x).values()
    mean, std = t.mean(1), t.std(1, correction=0)
    assert wnkernel.data_dependent_init_(module, x) == ["weight"]
    torch.testing.assert_close(g.flatten(), (1 / std).float(), rtol=1e-4, atol=0)
    torch.testing.assert_close(module.bias, (-mean / std).float(), rtol=1e-4, atol=1e-5)
    assert torch.equal(v, direction)
    assert_normalised(preactivations(module, x)["weight"])
    assert originals(module) == (g, v)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_dtypes(dtype):
    module = norm(nn.Linear(16, 4).to(dtype))
    x = torch.randn(64, 16, dtype=dtype)
    wnkernel.data_dependent_init_(module, x)
    assert module.bias.dtype == originals(module)[0].dtype == dtype
    (t,) = preactivations(module, x).values()
    assert_normalised(t, atol=8 * torch.finfo(dtype).eps)


# Whole models


class Net(nn.Module):
    """Layers in another order than they are registered in; the last is left out on request."""

    def __init__(self) -> None:
        super().__init__()
        self.last = norm(nn.Linear(4, 3))
        self.shared = norm(nn.Linear(4, 4))
        self.first = norm(nn.Conv1d(2, 4, 3))
        self.unused = norm(nn.Linear(4, 4))
        self.dropout = nn.Dropout(0.5)
        self.batch_norm = nn.BatchNorm1d(4)

    def forward(self, x: Tensor, *, head: bool = True) -> Tensor:
        x = self.batch_norm(torch.tanh(self.first(x))).mean(-1)
        for _ in range(2):
            x = self.dropout(torch.relu(self.shared(x))) - x
        return self.last(x) if head else x


X = torch.linspace(-3, 5, 16 * 2 * 9).view(16, 2, 9).sin()
CALLS: dict[str, tuple[Any, list[str]]] = {
    "tensor": (X, ["first.weight", "shared.weight", "last.weight"]),
    "arguments": ((X,), ["first.weight", "shared.weight", "last.weight"]),
    "keywords": ({"x": X, "head": False}, ["first.weight", "shared.weight"]),
}


@pytest.mark.parametrize("call", CALLS)
def test_later_layers_see_the_earlier_ones_initialised(call):
    batch, names = CALLS[call]
    model = Net().eval()
    before = values(model)
    assert wnkernel.data_dependent_init_(model, batch) == names
    keywords = batch if isinstance(batch, dict) else {"x": X}
    outputs = preactivations(model, **keywords)
    assert list(outputs) == names
    for t in outputs.values():  # the first call of the shared layer
        assert_normalised(t)
    after = values(model)
    changed = {k.split(".")[0] for k in before if not torch.equal(before[k], after[k])}
    assert changed == {name.split(".")[0] for name in names}
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())


def test_the_mode_is_the_models():
    model = Net()
    twin = copy.deepcopy(model).eval()
    wnkernel.data_dependent_init_(model, X), wnkernel.data_dependent_init_(twin, X)
    assert model.training
    assert not twin.training
    assert model.batch_norm.num_batches_tracked == 1  # one forward
    assert twin.batch_norm.num_batches_tracked == 0
    assert not torch.equal(originals(model.last)[0], originals(twin.last)[0])


def test_without_a_bias_only_g():
    module = norm(nn.Linear(5, 4, bias=False))
    x = torch.randn(20, 5) + 1
    wnkernel.data_dependent_init_(module, x)
    (t,) = preactivations(module, x).values()
    assert_normalised(t, mean=False)
    assert t.mean(1).abs().min() > 1e-3


class Exp(nn.Module):
    def forward(self, s: Tensor) -> Tensor:
        return s.exp()


def with_a_computed_g() -> nn.Module:
    """As in the paper's form with an exponential; there is no g to write to."""
    layer = norm(nn.Linear(6, 6))
    parametrize.register_parametrization(layer.parametrizations.weight, "original0", Exp())
    return layer


def test_what_is_left_alone():
    model = nn.Sequential(
        norm(nn.Linear(6, 6)),
        with_a_computed_g(),
        norm(nn.Linear(6, 6), dim=1),
        norm(nn.Linear(6, 6), dim=None),
        spectral_norm(norm(nn.Linear(6, 6))),
        APPLY["torch"](nn.Linear(6, 6)),
        legacy_weight_norm(nn.Linear(6, 6)),
        nn.Linear(6, 6),
        parametrize.register_parametrization(norm(nn.Linear(6, 6)), "bias", nn.Identity()),
        nn.Unflatten(1, (6, 1)),
        norm(nn.ConvTranspose1d(6, 6, 3)),
        norm(nn.ConvTranspose1d(6, 6, 3, groups=2), dim=1),
        norm(nn.Conv1d(6, 6, 2), dim=2),
    ).eval()
    before = values(model[1:])
    assert wnkernel.data_dependent_init_(model, torch.randn(9, 6)) == ["0.weight"]
    after = values(model[1:])
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_a_third_party_model():
    model = small_models.build("EncodecModel")
    names = wnkernel.convert(model)
    with torch.no_grad():
        x = torch.randn(1, 1, 120)
    done = wnkernel.data_dependent_init_(model.encoder, x)
    assert {f"encoder.{name}" for name in done} < set(names)
    assert len(done) == 10
    outputs = preactivations(model.encoder, x)
    for name in done:
        assert_normalised(outputs[name], atol=1e-4)


# Within whatever else a forward may be


@pytest.mark.parametrize("reuse", ["forward", "version"])
def test_a_fused_model(reuse):
    model, x = Net().eval(), X
    twin = copy.deepcopy(model)
    group = wnkernel.fuse(model, reuse=reuse)
    model(x)
    with group.scope():
        wnkernel.data_dependent_init_(model, x)
    wnkernel.data_dependent_init_(twin, x)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


class Cached(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(norm(nn.Linear(5, 4)), nn.Tanh(), norm(nn.Linear(4, 3)))

    def forward(self, x: Tensor) -> Tensor:
        with parametrize.cached():
            self.net(x)
            return self.net(x)


compiled = pytest.param(
    "compiled",
    marks=since("2.6", "torch.compile of torch 2.5 stops at clear_autocast_cache"),
)


@pytest.mark.parametrize("context", ["cached", "autocast", compiled])
def test_values_that_are_remembered_within_a_forward(context):
    model, x = Cached(), torch.randn(64, 5)
    if context == "autocast":
        with torch.autocast(x.device.type, torch.bfloat16):
            wnkernel.data_dependent_init_(model.net, x)
            outputs = preactivations(model.net, x)
        atol = 8 * torch.finfo(torch.bfloat16).eps
    elif context == "compiled":
        torch.compiler.reset()
        compiled = torch.compile(model.net, backend="aot_eager", fullgraph=True)
        compiled(x)
        wnkernel.data_dependent_init_(compiled, x)
        torch.testing.assert_close(compiled(x), model.net(x))
        outputs, atol = preactivations(model.net, x), 1e-5
    else:
        wnkernel.data_dependent_init_(model, x)
        outputs, atol = preactivations(model, x), 1e-5
    assert len(outputs) == 2
    for t in outputs.values():
        assert_normalised(t, atol)


def test_hooks_of_others_see_the_initialised_layer():
    module, x, seen = norm(nn.Linear(5, 4)), torch.randn(20, 5), []
    module.register_forward_pre_hook(lambda _, args: (2 * args[0],))
    module.register_forward_hook(lambda m, args, y: seen.append(y))
    wnkernel.data_dependent_init_(module, x)
    assert_normalised(seen[0].T.double())
    assert len(module._forward_hooks) == 1


# Refused, and nothing has changed


def constant(model: nn.Module) -> Any:
    return X[:1].expand(16, 2, 9)[:, :, :1].expand(16, 2, 9)


def rounded(model: nn.Module) -> Any:
    """All that varies is the last bit."""
    return torch.nextafter(torch.full_like(X, 1e3), X * 1e6)


def one_example(model: nn.Module) -> Any:
    model.first = norm(nn.Conv1d(2, 4, 9))
    return X[:1]


def zero_row(model: nn.Module) -> Any:
    with torch.no_grad():
        originals(model.last)[1][1] = 0
    return X


def infinite(model: nn.Module) -> Any:
    return X / 0


def failing(model: nn.Module) -> Any:
    model.last.register_forward_pre_hook(lambda *_: 1 / 0)
    return X


REFUSED: list[tuple[Callable[[nn.Module], Any], type[Exception], str]] = [
    (constant, ValueError, r"^batch: expected .*every channel.*'first.weight', channel 0, 1, 2, 3"),
    (rounded, ValueError, r"^batch: expected .*every channel.*'first.weight', channel"),
    (one_example, ValueError, r"^batch: expected .*'first.weight'"),
    (zero_row, ValueError, r"^batch: expected .*'last.weight', channel 1$"),
    (infinite, ValueError, r"^batch: expected .*'first.weight'"),
    (failing, ZeroDivisionError, "division by zero"),
]


@pytest.mark.parametrize(("spoil", "error", "pattern"), REFUSED)
def test_a_failure_leaves_the_parameters_as_they_were(spoil, error, pattern):
    model = Net().eval()
    batch = spoil(model)
    before = values(model)
    with pytest.raises(error, match=pattern):
        wnkernel.data_dependent_init_(model, batch)
    after = values(model)
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert not any(m._forward_hooks for m in model.modules())


def test_models_that_cannot_be_initialised():
    with pytest.raises(TypeError, match=r"^model: expected a torch.nn.Module, got int"):
        wnkernel.data_dependent_init_(3, X)
    for model in (nn.Linear(3, 3), APPLY["torch"](nn.Linear(3, 3)), norm(nn.Linear(3, 3), dim=1)):
        with pytest.raises(ValueError, match=r"^model: expected .*one g per output channel"):
            wnkernel.data_dependent_init_(model, torch.randn(5, 3))
    with pytest.raises(ValueError, match=r"^model: expected .*not wrapped.*got DataParallel"):
        wnkernel.data_dependent_init_(nn.Sequential(nn.DataParallel(Net())), X)
    with pytest.raises(ValueError, match=r"^model: expected .*'last.weight' on the meta device"):
        wnkernel.data_dependent_init_(Net().to("meta"), X.to("meta"))

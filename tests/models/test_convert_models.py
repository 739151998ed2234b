"""``wnkernel.convert`` in the middle of a training: of third-party models, HiFi-GAN and RNNs. From
and to checkpoints: tests/checkpoint/test_models.py."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import wnkernel
from benchmarks.hifigan import Discriminators, Generator, weight_normed
from wnkernel.census import OURS, TORCH

from .. import reference, small_models
from ..layers import APPLY, assert_same_state, originals, weight_norm_kinds
from ..small_models import MODELS, all_models

torchs_kinds = pytest.mark.parametrize("kind", ["torch", "legacy"])


def pair(name: str, kind: str) -> tuple[nn.Module, nn.Module]:
    """A model twice."""
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(small_models.build(name, kind))
    return models[0], models[1]


def all_kinds_of(model: nn.Module) -> set[str]:
    return {kind for m in model.modules() for kind in weight_norm_kinds(m).values()}


def assert_same_parameters(got: nn.Module, want: nn.Module) -> None:
    """By their order, since names differ; values and gradients."""
    for a, b in zip(got.parameters(), want.parameters(), strict=True):
        assert torch.equal(a, b)
        assert (a.grad is None) == (b.grad is None)
        assert a.grad is None or torch.equal(a.grad, b.grad)


def assert_right_weights(model: nn.Module) -> None:
    """Every w of ours is what the oracle says."""
    for module in model.modules():
        for name in weight_norm_kinds(module):
            g, v = originals(module, name)
            dim = module.parametrizations[name][0].dim
            reference.assert_close("w", getattr(module, name), reference.forward(v, g, dim))


def _have_same_gradients(*models: nn.Module) -> bool:
    """As equal models should that nothing of ours was done to."""
    grads = zip(*([p.grad for p in m.parameters()] for m in models), strict=True)
    return all(torch.equal(a, b) for a, b in grads if a is not None)


@pytest.mark.skipif(
    torch.empty(0).device.type != "cpu",
    reason="on a GPU, reflection padding and attention add gradients up in any order",
)
@torchs_kinds
@all_models
def test_training_goes_on_with_the_same_bits(kind, name):
    model, twin = pair(name, kind)
    optimizers = [torch.optim.Adam(m.parameters(), lr=1e-2) for m in (model, twin)]
    parameters = list(model.parameters())
    with wnkernel.use_backend("eager"):
        for step in range(4):
            losses = []
            for m, optimizer in zip((model, twin), optimizers, strict=True):
                optimizer.zero_grad()
                losses.append(small_models.run(m, name).square().mean())
                losses[-1].backward()
                optimizer.step()
            if step < 2 and not _have_same_gradients(model, twin):
                pytest.skip("this model has not the same gradients twice with this torch")
            assert torch.equal(*losses)
            assert_same_parameters(model, twin)
            if step == 1:
                assert len(wnkernel.convert(model)) == MODELS[name].layers
    assert all_kinds_of(model) == {OURS}
    assert [id(p) for p in model.parameters()] == [id(p) for p in parameters]


@torchs_kinds
def test_hifigan(kind):
    """On the meta device: the layers are those of the paper, and large."""
    with torch.device("meta"):
        models = nn.ModuleList([Generator(), Discriminators()])
        for layer in weight_normed(models):
            APPLY[kind](layer)
        names = wnkernel.convert(models)
    assert len(names) == len(set(names)) == 78 + 30 + 16
    assert "0.blocks.0.0.dilated.0.weight" in names
    assert all_kinds_of(models) == {OURS}
    spectral = [m for m in models.modules() if isinstance(m, _SpectralNorm)]
    assert len(spectral) == 8  # the first scale discriminator has that and no weight norm
    assert all(p.is_meta for p in models.parameters())


# Optimizers and averages by name or position


@torchs_kinds
def test_an_optimizers_state_dict_still_fits(kind):
    """Parameters are in the order that they had, so positions mean what they meant."""
    model, twin = pair("SpeechT5HifiGan", kind)
    optimizer = torch.optim.Adam(twin.parameters(), lr=1e-2)
    small_models.run(twin, "SpeechT5HifiGan").square().mean().backward()
    optimizer.step()
    wnkernel.convert(model)
    resumed = torch.optim.Adam(model.parameters())
    resumed.load_state_dict(optimizer.state_dict())
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(resumed.state[p]["exp_avg"], optimizer.state[q]["exp_avg"])


@torchs_kinds
def test_averages_go_on(kind):
    """An EMA that was begun before, over the same Parameters, and one begun afterwards."""
    model, twin = pair("Wav2Vec2Model", kind)
    ema = [p.detach().clone() for p in model.parameters()]
    pairs = list(zip(ema, model.parameters(), strict=True))
    wnkernel.convert(model)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    averaged.update_parameters(model)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
        for average, p in pairs:
            average.lerp_(p, 0.5)
    averaged.update_parameters(model)
    for mean, average, p in zip(averaged.module.parameters(), ema, twin.parameters(), strict=True):
        torch.testing.assert_close(average, p + 0.5)
        torch.testing.assert_close(mean, average)
    assert_right_weights(averaged.module)


# RNNs: they keep their weights in a list of their own too


def rnn(cls: type[nn.RNNBase], kind: str) -> tuple[nn.RNNBase, list[str]]:
    """Two layers, two directions, every matrix normed."""
    module = cls(3, 4, num_layers=2, bidirectional=True)
    names = [n for n, _ in module.named_parameters() if n.startswith("weight")]
    for name in names:
        APPLY[kind](module, name)
    with torch.no_grad():
        for key, p in module.named_parameters():
            if key.endswith((".original0", "_g")):
                p.mul_(0.5 + torch.rand(p.shape))
    return module, names


def train_rnn(module: nn.RNNBase) -> list[Tensor]:
    module.zero_grad()
    y = module(torch.linspace(-1, 1, 24).view(4, 2, 3))[0]
    y.square().sum().backward()
    return [y, *(p.grad for p in module.parameters())]


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("cls", [nn.LSTM, nn.GRU, nn.RNN])
@torchs_kinds
def test_rnns(kind, cls, moment):
    torch.manual_seed(0)
    module, names = rnn(cls, kind)
    torch.manual_seed(0)
    twin, _ = rnn(cls, kind)
    if moment == "after":
        train_rnn(module)
    parameters = [id(p) for p in module.parameters()]
    assert wnkernel.convert(module) == names
    assert [id(p) for p in module.parameters()] == parameters
    with wnkernel.use_backend("eager"):
        got, want = train_rnn(module), train_rnn(twin)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        copied = copy.deepcopy(module)  # holds weights with a history by now
        assert_same_state(copied.state_dict(), module.state_dict())
        for a, b in zip(copied._flat_weights, module._flat_weights, strict=True):
            assert a.data_ptr() != b.data_ptr()
        for m in (copied, module.to(torch.float64)):
            x = torch.linspace(-1, 1, 24, dtype=m.bias_hh_l0.dtype).view(4, 2, 3)
            torch.testing.assert_close(m(x)[0], want[0].to(x.dtype))
    assert copied.weight_ih_l0.dtype == torch.float32
    assert all(p.grad is None for p in copied.parameters())


def test_an_rnns_list_of_weights_is_right_at_once():
    """And free of the graph of the last forward, which legacy weight norm leaves in it."""
    module, names = rnn(nn.LSTM, "legacy")
    train_rnn(module)
    with torch.no_grad():
        module.weight_ih_l0_g.mul_(2)
    wnkernel.convert(module)
    for name in names:
        w = module._flat_weights[module._flat_weights_names.index(name)]
        assert torch.equal(w, getattr(module, name))
        assert w.is_leaf


def test_one_of_an_rnns_weights():
    module = APPLY["torch"](nn.LSTM(3, 4), "weight_hh_l0")
    wnkernel.weight_norm(module, "weight_ih_l0")
    assert wnkernel.convert(module) == ["weight_hh_l0"]
    module(torch.randn(2, 1, 3))[0].sum().backward()
    wnkernel.remove_weight_norm(module, "weight_hh_l0")
    assert weight_norm_kinds(module) == {"weight_ih_l0": OURS}
    assert TORCH not in weight_norm_kinds(module).values()
    module(torch.randn(2, 1, 3))[0].sum().backward()
    assert all(p.grad is not None for p in module.parameters())


class Projecting(nn.LSTM):
    """An RNN with a parameter of its own, which is not among those that its kernel gets."""

    def __init__(self) -> None:
        super().__init__(3, 4)
        self.proj = nn.Parameter(torch.randn(2, 4))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[0] @ self.proj.T


@pytest.mark.parametrize("kind", ["ours", "legacy", "torch"])
def test_a_parameter_that_a_subclass_of_an_rnn_adds(kind):
    module = APPLY[kind](Projecting(), "proj")
    x = torch.randn(5, 2, 3)
    y = module(x)
    assert wnkernel.convert(module) == ([] if kind == "ours" else ["proj"])
    torch.testing.assert_close(module(x), y)
    assert wnkernel.fold(module) == ["proj"]
    torch.testing.assert_close(module(x), y)


def test_conversion_of_an_rnn_takes_nothing_from_the_watch_on_it():
    module = APPLY["legacy"](nn.LSTM(3, 4), "weight_hh_l0")
    wnkernel.convert(module)
    assert module.parametrizations.weight_hh_l0.owner._reads == 0

"""``init_weight_``: the weight of a layer that is initialised as a plain one would be."""

from __future__ import annotations

import inspect
import textwrap

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import wnkernel


def layer() -> nn.Module:
    return wnkernel.weight_norm(nn.Conv1d(2, 3, 5))


KINDS = {
    "ours": wnkernel.weight_norm,
    "torch": nn.utils.parametrizations.weight_norm,
    "legacy": nn.utils.weight_norm,
}


@pytest.mark.parametrize("dim", [0, 1, None])
@pytest.mark.parametrize("kind", KINDS)
def test_init_weight_does_what_init_does_to_a_plain_layer(kind, dim):
    module, plain = KINDS[kind](nn.Conv1d(2, 3, 5), dim=dim), nn.Conv1d(2, 3, 5)
    parameters = dict(module.named_parameters())
    for target in (module, plain):
        torch.manual_seed(1)
        if target is module:
            assert wnkernel.init_weight_(module, nn.init.kaiming_normal_) is module
        else:
            nn.init.kaiming_normal_(plain.weight)
    assert all(p is parameters[key] for key, p in module.named_parameters())
    plain.bias = module.bias
    x = torch.randn(1, 2, 7)
    if kind == "ours":
        assert torch.equal(module(x), plain(x))
    else:
        torch.testing.assert_close(module(x), plain(x))
    module(x).sum().backward()
    assert all(p.grad is not None for p in module.parameters())


def zero_first(w: torch.Tensor) -> None:
    nn.init.normal_(w)
    w[0] = 0


ZEROS = {"all": nn.init.zeros_, "some": zero_first}


@pytest.mark.parametrize("dim", [0, 1, None])
@pytest.mark.parametrize("zeros", ZEROS)
@pytest.mark.parametrize("kind", [*KINDS, "by hand"])
def test_init_weight_with_zeros(kind, zeros, dim):
    """Rows of zeros come out as zeros, and can be trained."""
    if kind == "by hand":
        module = nn.Conv1d(2, 3, 5)
        parametrize.register_parametrization(module, "weight", wnkernel.WeightNorm(dim))
    else:
        module = KINDS[kind](nn.Conv1d(2, 3, 5), dim=dim)
    written = []
    wnkernel.init_weight_(module, lambda w: written.append((ZEROS[zeros](w), w.clone())))
    w = written[0][1]
    torch.testing.assert_close(module.weight.detach(), w)  # at once
    module(torch.ones(1, 2, 7))
    torch.testing.assert_close(module.weight.detach(), w)
    module(torch.randn(1, 2, 7)).sum().backward()
    assert all(p.grad.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_an_rnn_knows_what_init_weight_wrote(kind):
    module = KINDS[kind](nn.GRU(4, 3), "weight_hh_l0")
    wnkernel.init_weight_(module, nn.init.zeros_, "weight_hh_l0")
    index = module._flat_weights_names.index("weight_hh_l0")
    assert torch.equal(module._flat_weights[index], torch.zeros(9, 3))


def test_init_weight_of_a_model_as_its_docstring_shows_it():
    model = nn.Sequential(
        *(norm(nn.Conv1d(2, 2, 5)) for norm in KINDS.values()), nn.ReLU(), nn.Conv1d(2, 2, 5)
    )
    before = model[-1].weight.clone()
    example = inspect.getdoc(wnkernel.init_weight_).split("::")[1].split("\n``nn.init")[0]
    code = textwrap.dedent(example)
    exec(code, {"wnkernel": wnkernel, "torch": torch, "nn": nn, "layer": layer(), "model": model})
    assert all(m.weight.abs().max() < 0.1 for m in model[:3])
    assert torch.equal(model[-1].weight, before)


def test_init_weight_gets_the_weight_as_it_is():
    module = layer()
    w = module.weight.detach().clone()
    wnkernel.init_weight_(module, lambda t: t.mul_(0.5))
    assert torch.equal(module.weight, 0.5 * w)


def test_init_weight_of_what_has_none():
    with pytest.raises(ValueError, match=r"^name: expected a weight-normed parameter, got 'bias'"):
        wnkernel.init_weight_(layer(), nn.init.zeros_, "bias")
    with pytest.raises(TypeError, match=r"^module: expected a torch\.nn\.Module, got str"):
        wnkernel.init_weight_("layer", nn.init.zeros_)


def test_a_function_that_fails_leaves_the_layer_as_it_was():
    module = layer()
    before = {key: t.clone() for key, t in module.state_dict().items()}

    def half(w):
        w[0].fill_(1)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        wnkernel.init_weight_(module, half)
    assert all(torch.equal(t, before[key]) for key, t in module.state_dict().items())

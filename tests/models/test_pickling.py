"""Weight-normed layers in pickles: they come back with class, names, hooks and parameters."""

from __future__ import annotations

import copy
import pickle
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm

import wnkernel

from ..groups import ramp
from ..layers import APPLY, assert_same_state, weight_norm_kinds
from ..pickles import all_ways, by_cloudpickle, by_protocol, by_torch_save
from ..processes import python

norm = wnkernel.weight_norm


def scaled(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    """A hook of the user."""
    return 3 * output


class Sign(nn.Module):
    """A parametrization of the user."""

    def forward(self, x: Tensor) -> Tensor:
        return x.abs()


class Kept(nn.Linear):
    """Leaves things out of its pickles and makes them anew."""

    def __init__(self) -> None:
        super().__init__(5, 4)
        self.cache = lambda: None  # cannot be pickled
        self.register_buffer("scale", torch.full((4,), 2.0))
        self.register_buffer("passing", torch.ones(4), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale + self.passing

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "cache"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.cache = "made anew"


class Copied(nn.Linear):
    """Has a way of its own to be copied."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Copied:
        new = memo[id(self)] = type(self).__new__(type(self))
        vars(new).update(copy.deepcopy(vars(self), memo))
        return new


class Delegating(nn.Module):
    """Answers for the module that it holds, once it holds one."""

    def __init__(self) -> None:
        super().__init__()
        self.held = nn.Linear(5, 4)
        self.own = nn.Parameter(torch.ones(3, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.held(x) * self.own.sum()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.held, name)


def legacy_names() -> nn.Module:
    with wnkernel.patch_torch():
        return nn.utils.weight_norm(nn.Linear(5, 4))


def converted(kind: str) -> nn.Module:
    layer = APPLY[kind](nn.Linear(5, 4))
    wnkernel.convert(layer)
    return layer


def lstm_after_training() -> nn.Module:
    lstm = norm(norm(nn.LSTM(5, 4), "weight_ih_l0"), "weight_hh_l0", None)
    lstm(ramp(3, 2, 5))[0].sum().backward()
    return lstm


def with_hooks() -> nn.Module:
    layer = nn.Linear(5, 4)
    layer.register_forward_hook(scaled)
    norm(layer).parametrizations.weight.register_forward_hook(scaled)
    return layer


def frozen() -> nn.Module:
    layer = norm(nn.Linear(5, 4))
    layer.parametrizations.weight.original0.requires_grad = False
    return layer.eval()


def with_parametrized_bias() -> nn.Module:
    layer = parametrize.register_parametrization(nn.Linear(5, 4), "bias", Sign())
    return norm(layer)


def without_grad() -> nn.Module:
    layer = nn.Linear(5, 4)
    layer.weight.requires_grad = False
    return norm(layer)


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "Linear": lambda: norm(nn.Linear(5, 4)),
    "options": lambda: norm(nn.Linear(5, 4, dtype=torch.bfloat16), dim=None, eps=1e-6),
    "legacy names": legacy_names,
    "converted": lambda: converted("torch"),
    "converted legacy": lambda: converted("legacy"),
    "spectral norm on top": lambda: spectral_norm(norm(nn.Linear(5, 4))).eval(),
    "LSTM": lstm_after_training,
    "hooks": with_hooks,
    "frozen g, eval": frozen,
    "without grad": without_grad,
    "parametrized bias": with_parametrized_bias,
    "its own state": lambda: norm(Kept()),
    "its own copies": lambda: norm(Copied(5, 4)),
    "delegating": lambda: norm(Delegating(), "own"),
    "twice normed class": lambda: norm(type(norm(nn.Linear(5, 4)))(5, 4)),
}


def output(layer: nn.Module) -> Tensor:
    dtype = next(layer.parameters()).dtype
    y = layer(ramp(3, 2, 5, dtype=dtype))
    return y[0] if isinstance(y, tuple) else y


def importable(cls: type) -> type:
    """The class that was there before parametrizations."""
    return next(c for c in cls.__mro__ if hasattr(sys.modules[c.__module__], c.__name__))


def assert_alike(got: nn.Module, want: nn.Module) -> None:
    assert importable(type(got)) is importable(type(want))
    assert repr(got) == repr(want).replace("ParametrizedParametrized", "Parametrized")
    assert weight_norm_kinds(got) == weight_norm_kinds(want)
    assert_same_state(got.state_dict(), want.state_dict())
    for (key, p), (other, q) in zip(got.named_parameters(), want.named_parameters(), strict=True):
        assert key == other
        assert type(p) is nn.Parameter
        assert p is not q
        assert p.requires_grad == q.requires_grad
    assert [m.training for m in got.modules()] == [m.training for m in want.modules()]
    assert len(got._forward_pre_hooks) == len(want._forward_pre_hooks)
    assert bool(got._forward_pre_hooks) == bool(want._forward_pre_hooks)
    assert len(got._load_state_dict_pre_hooks) == len(want._load_state_dict_pre_hooks)
    assert hasattr(got, "weight_g") == hasattr(want, "weight_g")
    assert torch.equal(output(got), output(want))


@all_ways
@pytest.mark.parametrize("case", LAYERS)
def test_there_and_back(case: str, way: Callable) -> None:
    layer = LAYERS[case]()
    got = way(layer)
    assert_alike(got, layer)
    assert_alike(copy.deepcopy(got), layer)
    assert_alike(way(got), layer)


@pytest.mark.parametrize("case", LAYERS)
def test_what_comes_back_is_a_layer_as_any(case: str) -> None:
    layer = LAYERS[case]()
    got = by_torch_save()(layer)
    output(got).sum().backward()
    for (_, p), (_, q) in zip(got.named_parameters(), layer.named_parameters(), strict=True):
        assert p.grad is not q.grad or p.grad is None
        assert not p.requires_grad or p.grad is not None
    before = output(layer).detach()
    with torch.no_grad():
        for p in got.parameters():
            p.mul_(2)
    assert torch.equal(output(layer), before)
    got.load_state_dict(layer.state_dict())
    assert torch.equal(output(got), before)
    if hasattr(got, "weight_g"):
        got.weight_g = nn.Parameter(torch.ones(4, 1))
        assert got.parametrizations.weight.original0 is got.weight_g
    for name in weight_norm_kinds(got):
        parametrize.remove_parametrizations(got, name)
    assert len(got._load_state_dict_pre_hooks) == len(got._forward_pre_hooks) == 0
    assert torch.equal(output(layer), before)


def test_what_a_class_does_with_its_own_state() -> None:
    got = by_torch_save()(norm(Kept()))
    assert got.cache == "made anew"
    assert "passing" not in got.state_dict()
    wnkernel.remove_weight_norm(got)
    assert type(got) is Kept


def test_tied_layers_stay_tied() -> None:
    layer = norm(nn.Linear(5, 5))
    other = norm(nn.Linear(5, 5))
    other.parametrizations.weight.original1 = layer.parametrizations.weight.original1
    got = by_torch_save()(nn.Sequential(layer, layer, other))
    assert got[0] is got[1]
    v = got[0].parametrizations.weight.original1
    assert got[2].parametrizations.weight.original1 is v


def test_pickling_leaves_the_layer_as_it_was() -> None:
    lstm = lstm_after_training()
    before = [(key, value) for key, value in vars(lstm).items() if key[:5] != "_flat"]
    pickle.dumps(lstm)
    assert all(vars(lstm)[key] is value for key, value in before)
    assert [w.grad_fn is None for w in lstm._flat_weights] == [False, False, True, True]
    lstm.zero_grad()
    lstm(ramp(3, 2, 5))[0].sum().backward()
    assert all(p.grad is not None for p in lstm.parameters())


def test_a_shallow_copy_shares_everything() -> None:
    layer = legacy_names()
    other = copy.copy(layer)
    assert other is not layer
    assert other.weight_v is layer.weight_v
    assert torch.equal(output(other), output(layer))
    assert vars(other).keys() == vars(layer).keys()
    assert all(vars(other)[key] is value for key, value in vars(layer).items())


def test_optimizers_go_on_with_the_layer_of_one_file() -> None:
    """As checkpoints that hold everything in one object."""
    layer = norm(nn.Linear(5, 4))
    optimizer = torch.optim.Adam(layer.parameters())
    output(layer).sum().backward(), optimizer.step()
    got, other = by_torch_save()((layer, optimizer))
    for module, o in ((layer, optimizer), (got, other)):
        o.zero_grad(), output(module).sum().backward(), o.step()
    assert torch.equal(output(got), output(layer))


# Other processes


def doubled(layer: nn.Module) -> tuple[nn.Module, Tensor]:
    with torch.no_grad():
        layer.weight_g.mul_(2)
    return layer, layer.weight.detach()


def test_as_argument_and_result_of_another_process() -> None:
    layer = converted("legacy")
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        got, weight = pool.submit(doubled, copy.deepcopy(layer)).result()
        got, weight = copy.deepcopy(got), weight.clone()  # memory of the other process
    assert torch.equal(weight, 2 * layer.weight)
    assert torch.equal(got.weight, weight)
    assert wnkernel.remove_weight_norm(got).weight.requires_grad


IN_ANOTHER = """
import sys, torch
layer, fused = torch.load(sys.argv[1], weights_only=False)
assert "wnkernel" in sys.modules
torch.save([layer.weight, fused(torch.ones(1, 5))], sys.argv[2])
torch.nn.utils.remove_weight_norm(layer)
assert type(layer) is torch.nn.Linear, layer
import wnkernel
assert wnkernel.WeightNormGroup.of(fused).layers == ["0.weight", "1.weight"]
"""


def test_a_process_that_knows_torch_only(tmp_path: Path) -> None:
    layer, model = legacy_names(), nn.Sequential(norm(nn.Linear(5, 5)), norm(nn.Linear(5, 4)))
    wnkernel.fuse(model)
    torch.save([layer, model], tmp_path / "in.pt")
    done = python("-c", IN_ANOTHER, str(tmp_path / "in.pt"), str(tmp_path / "out.pt"))
    assert done.returncode == 0, done.stderr
    weight, y = torch.load(tmp_path / "out.pt", weights_only=False)
    assert torch.equal(weight, layer.weight)
    assert torch.equal(y, model(torch.ones(1, 5)))


# What cannot be pickled


def test_a_class_that_nobody_can_import() -> None:
    class Local(nn.Linear):
        pass

    layer = norm(Local(5, 4))
    with pytest.raises((AttributeError, pickle.PicklingError), match=r"local object.*Local"):
        pickle.dumps(layer)
    got = by_cloudpickle(layer)  # takes the class along
    assert torch.equal(output(got), output(layer))


def test_a_class_that_others_made_of_ours() -> None:
    """fully_shard does: what came back would not be sharded."""
    layer = norm(nn.Linear(5, 4))
    layer.__class__ = type("Sharded", (type(layer),), {})
    with pytest.raises(RuntimeError, match="only supported through state_dict"):
        pickle.dumps(layer)


def test_torchs_own_layers_are_refused_as_before() -> None:
    model = nn.Sequential(norm(nn.Linear(5, 5)), APPLY["torch"](nn.Linear(5, 4)))
    with pytest.raises(RuntimeError, match="only supported through state_dict"):
        by_protocol(4)(model)
    wnkernel.convert(model)
    assert torch.equal(output(by_protocol(4)(model)), output(model))

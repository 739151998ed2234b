"""torch's removers of weight norms, on layers of this package."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.nn.utils import parametrize

import wnkernel

from ..groups import ramp
from ..layers import APPLY, legacy_weight_norm, weight_norm_kinds


def patched(apply: Callable[[], Callable]) -> Callable[..., nn.Module]:
    def norm(module: nn.Module, *args: object) -> nn.Module:
        with wnkernel.patch_torch():
            return apply()(module, *args)

    return norm


def converted(kind: str) -> Callable[..., nn.Module]:
    def norm(module: nn.Module, *args: object) -> nn.Module:
        wnkernel.convert(APPLY[kind](module, *args))
        return module

    return norm


MAKERS: dict[str, Callable[..., nn.Module]] = {
    "ours": wnkernel.weight_norm,
    "patched legacy": patched(lambda: nn.utils.weight_norm),
    "patched": patched(lambda: nn.utils.parametrizations.weight_norm),
    "converted legacy": converted("legacy"),
    "converted": converted("torch"),
}
all_makers = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def by_scan(module: nn.Module, name: str = "weight") -> None:
    """As RVC and so-vits-svc do, where a local ``weight_norm`` hides the module of the class."""
    for hook in module._forward_pre_hooks.values():
        if (
            hook.__module__ == "torch.nn.utils.weight_norm"
            and hook.__class__.__name__ == "WeightNorm"
            and hook.name == name
        ):
            nn.utils.remove_weight_norm(module, name)
            return


def remove_parametrizations(module: nn.Module, name: str = "weight") -> None:
    parametrize.remove_parametrizations(module, name)


REMOVERS: dict[str, Callable[..., object]] = {
    "torch.nn.utils": nn.utils.remove_weight_norm,
    "parametrize": remove_parametrizations,
    "scan of hooks": by_scan,
    "ours": wnkernel.remove_weight_norm,
}
all_removers = pytest.mark.parametrize("remove", REMOVERS.values(), ids=REMOVERS)


def assert_plain(module: nn.Module, twin: nn.Module) -> None:
    """As if it had never been normed."""
    assert type(module) is type(twin)
    assert [*module._forward_pre_hooks] == []
    assert len(module._load_state_dict_pre_hooks) == 0
    assert list(module._modules) == list(twin._modules)
    assert {*module.state_dict()} == {*twin.state_dict()}
    assert vars(module).keys() == vars(twin).keys()
    module.load_state_dict(twin.state_dict())


@all_removers
@pytest.mark.parametrize(
    ("make", "reuse"), [*((name, None) for name in MAKERS), ("ours", "version")]
)
def test_removed(make: str, remove: Callable, reuse: str | None) -> None:
    make = MAKERS[make]
    x, twin = ramp(2, 4, 8), nn.Conv1d(4, 6, 3)
    layer = make(nn.Conv1d(4, 6, 3))
    model = nn.Sequential(layer, make(nn.Conv1d(6, 4, 3)))
    if reuse:
        wnkernel.fuse(model, reuse=reuse)
    want, w = model(x), layer.weight.detach().clone()
    remove(layer)
    assert isinstance(layer.weight, nn.Parameter)
    assert layer.weight.requires_grad
    assert torch.equal(layer.weight, w)
    assert torch.equal(model(x), want)
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert not hasattr(layer, "weight_g")
    with pytest.raises(ValueError, match=r"weight_norm of 'weight' not found in Conv1d"):
        nn.utils.remove_weight_norm(layer)
    with pytest.raises(ValueError, match="does not have a parametrization"):
        parametrize.remove_parametrizations(layer, "weight")
    assert_plain(layer, twin)
    for apply in (legacy_weight_norm, make):  # again
        apply(layer)
        assert torch.allclose(layer.weight, twin.weight)
        nn.utils.remove_weight_norm(layer)
    assert_plain(layer, twin)


@all_removers
@all_makers
def test_copies_are_independent(make: Callable, remove: Callable) -> None:
    for which in (0, 1):
        layer = make(nn.Linear(5, 4))
        pair = layer, copy.deepcopy(layer)
        want = layer.weight.detach().clone()
        remove(pair[which])
        assert type(pair[which]) is nn.Linear
        other = pair[1 - which]
        with torch.no_grad():
            other.parametrizations.weight.original0.mul_(2)
        assert torch.equal(other.weight, 2 * want)
        assert torch.equal(pair[which].weight, want)
        other.load_state_dict(make(nn.Linear(5, 4)).state_dict())
        remove(other)
        assert type(other) is nn.Linear


@all_removers
@all_makers
def test_one_of_several_weights(make: Callable, remove: Callable) -> None:
    names = ["weight_ih_l0", "weight_hh_l0", "weight_hh_l1"]
    lstm, twin, x = nn.LSTM(4, 5, num_layers=2), nn.LSTM(4, 5, num_layers=2), ramp(3, 2, 4)
    for name in names:
        make(lstm, name)
    want = lstm(x)[0].detach()
    for k, name in enumerate(names):
        remove(lstm, name)
        assert {*weight_norm_kinds(lstm)} == {*names[k + 1 :]}
        assert len([*lstm._forward_pre_hooks]) == len(lstm._load_state_dict_pre_hooks) == 2 - k
        assert not hasattr(lstm, f"{name}_g")
        torch.testing.assert_close(lstm(x)[0], want)
        setattr(lstm, f"{name}_g", "free again")
        assert getattr(lstm, f"{name}_g") == "free again"
        delattr(lstm, f"{name}_g")
    assert_plain(lstm, twin)


@all_removers
def test_other_hooks_stay(remove: Callable) -> None:
    calls = []
    layer = nn.Linear(5, 4)
    before = layer.register_forward_pre_hook(lambda *_: calls.append("before"))
    wnkernel.weight_norm(layer)
    after = layer.register_forward_pre_hook(lambda *_: calls.append("after"), prepend=True)
    layer(ramp(1, 5))
    remove(layer)
    layer(ramp(1, 5))
    assert calls == 2 * ["after", "before"]
    before.remove(), layer(ramp(1, 5))
    assert calls[4:] == ["after"]
    wnkernel.weight_norm(layer)
    after.remove(), layer(ramp(1, 5))
    assert calls[5:] == []
    assert len([*layer._forward_pre_hooks]) == 1
    last = layer.register_forward_pre_hook(lambda *_: calls.append("last"))
    layer(ramp(1, 5)), remove(layer), layer(ramp(1, 5)), last.remove(), layer(ramp(1, 5))
    assert calls[5:] == ["last", "last"]


@pytest.mark.parametrize("remove", [nn.utils.remove_weight_norm, by_scan])
@all_makers
def test_what_is_stacked_on_top_is_an_error(make: Callable, remove: Callable) -> None:
    layer = nn.utils.parametrizations.spectral_norm(make(nn.Linear(5, 4))).eval()
    want, hooks, state = layer.weight, [*layer._forward_pre_hooks.items()], layer.state_dict()
    with pytest.raises(RuntimeError, match=r"expected weight norm alone on 'weight'"):
        remove(layer)
    assert [*layer._forward_pre_hooks.items()] == hooks
    assert torch.equal(layer.weight, want)
    layer.load_state_dict(state)
    parametrize.remove_parametrizations(layer, "weight")  # torch folds both
    assert torch.equal(layer.weight, want)
    assert_plain(layer, nn.Linear(5, 4))


def test_a_frozen_weight_is_frozen_when_removed() -> None:
    layer = wnkernel.weight_norm(nn.Linear(5, 4))
    layer.parametrizations.requires_grad_(False)
    assert not nn.utils.remove_weight_norm(layer).weight.requires_grad


def test_torch_refuses_a_legacy_weight_norm_on_top() -> None:
    with pytest.raises(RuntimeError, match="register two weight_norm hooks"):
        legacy_weight_norm(wnkernel.weight_norm(nn.Linear(5, 4)))


@pytest.mark.parametrize("nested", [False, True])
def test_remove_parametrizations_without_a_name(nested: bool) -> None:
    """Packages have a method ``remove_parametrizations()``; some call torch's function like it."""
    layer = wnkernel.weight_norm(nn.Linear(5, 4))
    if nested:
        nn.utils.parametrizations.spectral_norm(layer)
    with wnkernel.patch_torch():
        assert parametrize.remove_parametrizations(layer) is layer
    assert_plain(layer, nn.Linear(5, 4))


# What the hook costs


@all_makers
def test_a_forward_does_not_notice_the_hook(
    make: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = make(nn.Linear(5, 4))
    assert len(layer._forward_pre_hooks) == 0
    assert not layer._forward_pre_hooks
    assert not copy.deepcopy(layer)._forward_pre_hooks
    [hook] = layer._forward_pre_hooks.values()
    monkeypatch.setattr(type(hook), "__call__", lambda *_: pytest.fail("it was called"))
    layer(ramp(1, 5))


def test_a_transformer_goes_on_taking_its_fast_path(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    wnkernel.weight_norm(encoder.linear1)
    calls, fast = [], torch._transformer_encoder_layer_fwd
    monkeypatch.setattr(
        torch, "_transformer_encoder_layer_fwd", lambda *args: calls.append(1) or fast(*args)
    )
    with torch.no_grad():
        got = encoder(ramp(1, 3, 8))
    assert calls
    torch.testing.assert_close(got, encoder(ramp(1, 3, 8)))


def test_the_hook_answers_as_torchs() -> None:
    layer = wnkernel.weight_norm(nn.Linear(5, 4))
    [hook] = layer._forward_pre_hooks.values()
    assert torch.equal(hook.compute_weight(layer), layer.weight)
    hook.remove(layer)
    with pytest.raises(ValueError, match=r"weight_norm of 'weight' not found in Linear\("):
        hook.remove(layer)


@pytest.mark.parametrize("take", ["popitem", "clear"])
def test_a_hook_that_was_taken_out_still_removes(take: str) -> None:
    layer = wnkernel.weight_norm(nn.Linear(5, 4))
    [hook] = layer._forward_pre_hooks.values()
    getattr(layer._forward_pre_hooks, take)()
    hook.remove(layer)
    assert_plain(layer, nn.Linear(5, 4))


def test_hooks_are_seen_however_they_come_and_go() -> None:
    hooks = wnkernel.weight_norm(nn.Linear(5, 4))._forward_pre_hooks
    [(ours, hook)] = hooks.items()
    other = {ours + 1: print}
    for add, take in (
        (lambda: hooks.__setitem__(ours + 1, print), lambda: hooks.__delitem__(ours + 1)),
        (lambda: hooks.setdefault(ours + 1, print), lambda: hooks.pop(ours + 1)),
        (lambda: hooks.update(other), lambda: hooks.pop(ours + 1, None)),
        (lambda: hooks.update(other), hooks.popitem),
        (lambda: hooks.__ior__(other), lambda: (hooks.clear(), hooks.update({ours: hook}))),
    ):
        assert not hooks
        add()
        assert hooks
        hooks.move_to_end(ours + 1, last=False)
        hooks.move_to_end(ours + 1)
        for copied in (copy.copy(hooks), copy.deepcopy(hooks), pickle.loads(pickle.dumps(hooks))):
            assert len(copied) == 1
            del copied[ours + 1]
            assert not copied
            assert [*copied] == [ours]
        take()
    assert not hooks
    assert hooks.pop(ours) is hook
    assert [*hooks] == []
    hooks.update(other)  # whoever cleared them adds others
    assert hooks


@pytest.mark.parametrize("hooked", [False, True])
@all_makers
def test_it_costs_no_graph_break_and_no_recompilation(make: Callable, hooked: bool) -> None:
    torch.compiler.reset()
    model = nn.Sequential(make(nn.Linear(5, 4)), make(nn.Linear(4, 5)))
    if hooked:
        model[0].register_forward_pre_hook(lambda layer, args: (2 * args[0],))
    graphs = CompileCounter()
    compiled = torch.compile(model, backend=graphs, fullgraph=True)
    for _ in range(3):
        torch.testing.assert_close(compiled(ramp(2, 5)), model(ramp(2, 5)))
    assert graphs.frame_count == 1

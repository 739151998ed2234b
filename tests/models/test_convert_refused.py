"""What ``wnkernel.convert`` refuses or leaves alone, and torch's load hooks that it clears away."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils.weight_norm import WeightNorm as LegacyHook

import wnkernel
from wnkernel import model as surgery
from wnkernel.census import TORCH, TORCH_HOOK

from ..layers import APPLY, assert_same_state, legacy_weight_norm, originals, run, weight_norm_kinds
from ..versions import needs

torchs_kinds = pytest.mark.parametrize("kind", ["torch", "legacy"])


def state(model: nn.Module) -> list[object]:
    """All that a conversion changes."""
    return [
        (
            path,
            type(module),
            list(vars(module)),
            {k: id(p) for k, p in [*module._parameters.items(), *module._buffers.items()]},
            list(module._modules),
            list(module._forward_pre_hooks),
            list(module._load_state_dict_pre_hooks.values()),
            [id(w) for w in getattr(module, "_flat_weights", [])],
        )
        for path, module in model.named_modules()
    ]


def model(kind: str) -> nn.Sequential:
    """Layers of every kind, so that a failure has something to spoil before it."""
    rnn = nn.LSTM(3, 3)
    for name in ("weight_ih_l0", "weight_hh_l0"):
        APPLY[kind](rnn, name)
    return nn.Sequential(
        legacy_weight_norm(nn.Linear(3, 3)), APPLY["torch"](nn.Linear(3, 3)), rnn, nn.Linear(3, 3)
    )


# Refused, and nothing has changed


def wrong_shape(layer: nn.Module) -> None:
    legacy_weight_norm(layer).weight_g = nn.Parameter(torch.ones(2, 1))


def wrong_shape_parametrized(layer: nn.Module) -> None:
    APPLY["torch"](layer).parametrizations.weight.original0 = nn.Parameter(torch.ones(2, 1))


def wrong_dtype(layer: nn.Module) -> None:
    legacy_weight_norm(layer).weight_v.data = torch.ones(3, 3, dtype=torch.complex64)


def pruned(layer: nn.Module) -> None:
    prune.l1_unstructured(legacy_weight_norm(layer), "weight_v", 1)


def spectral_norm_of_v(layer: nn.Module) -> None:
    nn.utils.spectral_norm(legacy_weight_norm(layer), "weight_v")


def on_top(layer: nn.Module) -> None:
    """torch lets it be registered, and fails in the forward."""
    APPLY["torch"](parametrizations.orthogonal(layer))


REFUSED: list[tuple[Callable[[nn.Module], None], str]] = [
    (wrong_shape, r"g: expected shape \[3, 1\].*got \[2, 1\]"),
    (wrong_shape_parametrized, r"g: expected shape \[3, 1\].*got \[2, 1\]"),
    (wrong_dtype, r"v: expected dtype .*complex64"),
    (pruned, "without a parameter 'weight_v'; undo .* prune.remove"),
    (spectral_norm_of_v, "without a parameter 'weight_v'; undo .* nn.utils.remove_spectral_norm"),
    (on_top, "on top of another parametrization"),
]


@pytest.mark.parametrize("surgeon", [wnkernel.convert, wnkernel.fold])
@pytest.mark.parametrize(("spoil", "pattern"), REFUSED)
@torchs_kinds
def test_a_layer_that_cannot_be_computed(kind, spoil, pattern, surgeon):
    spoiled = model(kind)
    spoil(spoiled[3])
    before = state(spoiled)
    with pytest.raises(ValueError, match=rf"^model: expected .*got '3.weight' .*{pattern}"):
        surgeon(spoiled)
    assert state(spoiled) == before


@torchs_kinds
def test_a_failure_in_the_middle_is_undone(monkeypatch, kind):
    """Whatever it may be: here, of the last layer, after all checks."""
    spoiled = model(kind)
    APPLY[kind](spoiled[3])
    handle = spoiled[0].register_forward_pre_hook(lambda *_: None)
    x = torch.randn(2, 3)
    y = spoiled[3](spoiled[1](spoiled[0](x)))
    for p in spoiled[2].parameters():
        p.grad = torch.ones_like(p)
    before = state(spoiled)
    register = surgery.make_ours if kind == "torch" else surgery.answer_to_legacy_names

    def fail(module: nn.Module, name: str) -> None:
        register(module, name)
        if module is spoiled[3]:
            raise MemoryError

    monkeypatch.setattr(surgery, register.__name__, fail)
    with pytest.raises(MemoryError):
        wnkernel.convert(spoiled)
    monkeypatch.undo()
    assert state(spoiled) == before
    assert torch.equal(spoiled[3](spoiled[1](spoiled[0](x))), y)
    handle.remove()  # finds the dict of hooks that it was made for
    assert len(spoiled[0]._forward_pre_hooks) == 1
    assert len(wnkernel.convert(spoiled)) == 5
    spoiled[2](x)


@pytest.fixture
def one_process() -> Iterator[None]:
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
@needs("fully_shard")
@pytest.mark.parametrize("surgeon", [wnkernel.convert, wnkernel.fold])
@torchs_kinds
def test_sharded_modules(one_process, kind, surgeon):
    from torch.distributed.fsdp import fully_shard

    with torch.device("cpu"):
        sharded = nn.Sequential(APPLY[kind](nn.Linear(3, 3)), nn.Linear(3, 3))
        fully_shard(sharded[0], mesh=torch.distributed.init_device_mesh("cpu", (1,)))
    with pytest.raises(ValueError, match=r"^model: expected .*got '0.weight' .*sharded"):
        surgeon(sharded)
    assert surgeon(sharded[1]) == []


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_a_model_in_distributed_data_parallel_is_not_folded(one_process):
    """Its reducer would wait for g and v, and say so in the second forward after."""
    with torch.device("cpu"):
        wrapped = nn.parallel.DistributedDataParallel(wnkernel.weight_norm(nn.Linear(3, 3)))
    outer = nn.Sequential(wnkernel.weight_norm(nn.Linear(3, 3)), wrapped)
    before = state(outer)
    with pytest.raises(ValueError, match=r"^model: expected .*'1.module.weight'.*fold its .module"):
        wnkernel.fold(outer)
    assert state(outer) == before
    assert wnkernel.fold(wrapped.module) == ["weight"]
    assert wnkernel.fold(wrapped) == []


def test_legacy_names_of_a_converted_layer_say_what_is_wrong():
    layer = legacy_weight_norm(nn.Linear(5, 4))
    wnkernel.convert(layer)
    with pytest.raises(TypeError, match="as parameter 'weight_g'"):
        layer.weight_g = torch.ones(4, 1)
    with pytest.raises(AttributeError, match=r"^weight: expected both .*remove_weight_norm"):
        del layer.weight_g
    assert layer.weight_g is originals(layer)[0]
    wnkernel.remove_weight_norm(layer)
    with pytest.raises(AttributeError, match="weight_g"):  # all that Python 3.10 says
        del layer.weight_g


def test_spectral_norm_of_the_v_of_a_converted_layer_is_refused_by_torch():
    layer = legacy_weight_norm(nn.Linear(5, 4))
    wnkernel.convert(layer)
    before = state(layer)
    with pytest.raises(KeyError, match="weight_v"):
        nn.utils.spectral_norm(layer, "weight_v")
    assert state(layer) == before


# Left alone


class Doubled(parametrizations._WeightNorm):
    def forward(self, weight_g: Tensor, weight_v: Tensor) -> Tensor:
        return 2 * super().forward(weight_g, weight_v)


class DoubledHook(LegacyHook):
    def compute_weight(self, module: nn.Module) -> Tensor:
        return 2 * super().compute_weight(module)


def test_subclasses_compute_something_else():
    first, second = APPLY["torch"](nn.Linear(5, 4)), legacy_weight_norm(nn.Linear(5, 4))
    first.parametrizations.weight[0].__class__ = Doubled
    next(iter(second._forward_pre_hooks.values())).__class__ = DoubledHook
    both = nn.Sequential(first, second)
    outputs = [run(m, "Linear") for m in both]
    assert wnkernel.convert(both) == []
    assert [weight_norm_kinds(m)["weight"] for m in both] == [TORCH, TORCH_HOOK]
    assert wnkernel.fold(both) == ["0.weight", "1.weight"]
    for m, y in zip(both, outputs, strict=True):
        assert torch.equal(run(m, "Linear"), y)


# Load hooks that torch's removal leaves behind


def removed_by_torch() -> nn.Module:
    layer = parametrize.remove_parametrizations(APPLY["torch"](nn.Linear(5, 4)), "weight")
    assert layer._load_state_dict_pre_hooks
    return layer


@pytest.mark.parametrize("surgeon", [wnkernel.convert, wnkernel.fold])
def test_stale_load_hooks_are_gone(surgeon):
    """torch's rename the keys that a plain or legacy layer wants as they are."""
    legacy = legacy_weight_norm(removed_by_torch())
    both = nn.Sequential(removed_by_torch(), nn.Sequential(removed_by_torch(), legacy))
    surgeon(both[0]), surgeon(both)
    for layer in (both[0], both[1][0]):
        assert not layer._load_state_dict_pre_hooks
    source = legacy_weight_norm(nn.Linear(5, 4)).state_dict()
    if surgeon is wnkernel.convert:
        legacy.load_state_dict(source, strict=True)
        assert torch.equal(originals(legacy)[1], source["weight_v"])
    else:
        assert not legacy._load_state_dict_pre_hooks


def test_stale_load_hooks_on_a_legacy_layer_that_stays_legacy():
    layer = legacy_weight_norm(removed_by_torch())
    next(iter(layer._forward_pre_hooks.values())).__class__ = DoubledHook
    assert wnkernel.convert(layer) == []
    source = legacy_weight_norm(nn.Linear(5, 4)).state_dict()
    layer.load_state_dict(source, strict=True)
    assert torch.equal(layer.weight_v, source["weight_v"])


def test_live_load_hooks_of_torch_stay():
    """On what is not converted: a subclass."""
    layer = APPLY["torch"](nn.Linear(5, 4))
    layer.parametrizations.weight[0].__class__ = Doubled
    wnkernel.convert(layer)
    source = legacy_weight_norm(nn.Linear(5, 4)).state_dict()
    layer.load_state_dict(source, strict=True)
    assert torch.equal(originals(layer)[1], source["weight_v"])


@torchs_kinds
def test_converted_layers_load_all_layouts(kind):
    layer = APPLY[kind](nn.Linear(5, 4))
    wnkernel.convert(layer)
    assert len(layer._load_state_dict_pre_hooks) == 1
    for apply in APPLY.values():
        source = apply(nn.Linear(5, 4))
        layer.load_state_dict(source.state_dict(), strict=True)
        torch.testing.assert_close(run(layer, "Linear"), run(source, "Linear"))
    assert_same_state(layer.state_dict(), copy.deepcopy(layer).state_dict())

"""Layers with a forced weight norm: keys, copies, errors, and who else looks at the parameter."""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations, parametrize
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

import wnkernel
from wnkernel import ForcedWeightNorm, WeightNorm, forced_weight_norm
from wnkernel.forced_layers import ForcedWeightNormList

from ..compiled import assert_same, by_inductor, step
from ..distributed_worker import ALL, Net, assert_no_failures, each
from ..distributed_worker import check as check_processes
from ..messages import message, quantised
from ..processes import PATIENCE_S
from ..versions import layers_in_graphs
from . import edm2
from .edm2 import forced, original, pair

F64 = torch.float64
OWN_KEY = "parametrizations.weight.original"


class Plain(nn.Module):
    """Layers of EDM2's formulas within modules, and one with a bias, whose weight is not forced."""

    make: type[edm2.MPConv] = edm2.MPConv

    def __init__(self) -> None:
        super().__init__()
        make = self.make
        self.blocks = nn.ModuleList(nn.Sequential(make(6, 6), nn.SiLU()) for _ in range(2))
        self.out = nn.ModuleDict({"last": make(4, 6), "head": nn.Linear(4, 2)})
        self.out_gain = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.out["head"](self.out["last"](x)) * self.out_gain


class Ours(Plain):
    make = edm2.Layer


def models() -> tuple[Plain, Ours]:
    """Equal ones, in float64."""
    plain, ours = Plain().double(), Ours().double()
    ours.load_state_dict(plain.state_dict())
    return plain, ours


def inputs() -> Tensor:
    return torch.randn(5, 6, dtype=F64)


def close(got: object, want: object) -> None:
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def linear(**options: Any) -> nn.Linear:
    return forced_weight_norm(nn.Linear(4, 3), **options)


# Keys


def test_keys_are_those_of_plain_layers() -> None:
    plain, ours = models()
    assert sorted(ours.state_dict()) == sorted(plain.state_dict())
    assert set(linear().state_dict()) == {"weight", "bias"}
    assert set(nn.Sequential(linear()).state_dict()) == {"0.weight", "0.bias"}
    assert set(linear().state_dict(prefix="a.b.")) == {"a.b.weight", "a.b.bias"}


def test_names_of_parameters() -> None:
    layer = linear()
    assert set(dict(layer.named_parameters())) == {"bias", OWN_KEY}
    assert parametrize.is_parametrized(layer, "weight")
    assert type(layer.parametrizations.weight) is ForcedWeightNormList
    assert type(layer.parametrizations.weight[0]) is ForcedWeightNorm


@pytest.mark.parametrize("assign", [False, True])
def test_state_dicts_go_both_ways(assign: bool) -> None:
    plain, ours = Plain().double(), Ours().double()
    x = inputs()
    for source, target in ((plain, ours), (ours, plain)):
        state = copy.deepcopy(source.state_dict())
        keys = list(state)
        assert not any(target.load_state_dict(state, strict=True, assign=assign))
        assert list(state) == keys  # it belongs to the caller
        close(target(x), source(x))
        for p in plain.parameters():
            with torch.no_grad():
                p.mul_(1.5)


def test_state_dicts_are_v_not_w() -> None:
    layer = linear()
    v = original(layer)
    state = layer.state_dict()
    assert torch.equal(state["weight"], v)
    assert state["weight"].data_ptr() == v.data_ptr()
    assert layer.state_dict(keep_vars=True)["weight"] is v


def test_half_snapshots() -> None:
    """EDM2 saves its averages in float16."""
    plain, ours = models()
    state = {name: t.half() for name, t in plain.state_dict().items()}
    for m in (plain, ours):
        m.load_state_dict(state)
    x = inputs()
    close(ours.eval()(x), plain.eval()(x))


def test_files(tmp_path: Path) -> None:
    plain, ours = models()
    torch.save(ours.state_dict(), tmp_path / "ours.pt")
    torch.save(plain.state_dict(), tmp_path / "plain.pt")
    x = inputs()
    want = plain(x)
    for file in ("ours.pt", "plain.pt"):
        for model in (Ours().double(), Plain().double()):
            model.load_state_dict(torch.load(tmp_path / file, weights_only=True))
            close(model(x), want)


def test_the_names_of_parametrizations_load_as_well() -> None:
    plain, ours = models()
    state = {
        name.replace("weight", OWN_KEY) if "head" not in name else name: t
        for name, t in plain.state_dict().items()
    }
    other = Ours().double()
    other.load_state_dict(state)
    x = inputs()
    close(other(x), ours(x))


def test_another_name() -> None:
    m = nn.Module()
    m.kernel = nn.Parameter(torch.randn(3, 4))
    m.weight = nn.Parameter(torch.randn(3, 4))
    forced_weight_norm(m, "kernel", 1)
    forced_weight_norm(m, gain=2.0)
    assert set(m.state_dict()) == {"kernel", "weight"}
    state = {"kernel": torch.randn(3, 4), "weight": torch.randn(3, 4)}
    m.load_state_dict(state)
    m.eval()
    torch.testing.assert_close(m.kernel, edm2.weight(state["kernel"], 1))
    torch.testing.assert_close(m.weight, edm2.weight(state["weight"], gain=2.0))


def test_strict_loading_still_finds_faults() -> None:
    layer = linear()
    state = layer.state_dict()
    with pytest.raises(RuntimeError, match="Unexpected key"):
        layer.load_state_dict(state | {"weight_g": torch.ones(3, 1)})
    with pytest.raises(RuntimeError, match="Missing key"):
        layer.load_state_dict({"bias": state["bias"]})
    with pytest.raises(RuntimeError, match="size mismatch"):
        layer.load_state_dict(state | {"weight": torch.ones(3, 5)})


# The parameter


def test_the_parameter_is_the_same_object() -> None:
    layer = nn.Linear(4, 3)
    v, before = layer.weight, layer.weight.detach().clone()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    assert forced_weight_norm(layer) is layer
    assert original(layer) is v
    assert isinstance(layer, nn.Linear)
    assert torch.equal(v, before)  # the first forward writes, not this
    layer(torch.randn(2, 4)).pow(2).sum().backward()
    now = v.detach().clone()
    optimizer.step()
    assert not torch.equal(v, now)


def test_assigned_weights_become_v(backend: str) -> None:
    layer = linear().eval()
    v = original(layer)
    w = torch.randn(3, 4)
    for new in (w, w * 3):
        layer.weight = new
        assert original(layer) is v
        assert torch.equal(v, new)
        torch.testing.assert_close(layer.weight, edm2.weight(new))


def test_train_and_eval(backend: str) -> None:
    layer = linear()
    v = original(layer)
    for training, writes in ((True, 1), (False, 0), (True, 1), (False, 0)):
        layer.train(training)
        assert layer.parametrizations.weight[0].training == training
        version = v._version
        layer(torch.randn(2, 4))
        assert v._version == version + writes
    assert forced_weight_norm(nn.Linear(4, 3).eval()).parametrizations.weight[0].training is False


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("training", [True, False])
def test_without_gradients(backend: str, mode: Callable[[], Any], training: bool) -> None:
    """A training forward writes there as well, as EDM2's does."""
    plain, ours = pair(3, 4)
    plain.train(training), ours.train(training)
    x = torch.randn(2, 4, dtype=F64)
    version = original(ours)._version
    with mode():
        got = ours(x)
        want = plain(x)
    assert not got.requires_grad
    close(got.clone(), want.clone())
    close(original(ours), plain.weight)
    assert original(ours)._version == version + training


def test_frozen_parameters(backend: str) -> None:
    plain, ours = pair(3, 4)
    original(ours).requires_grad_(False)
    plain.requires_grad_(False)
    x = torch.randn(2, 4, dtype=F64)
    y = ours(x)
    assert not y.requires_grad
    close(y, plain(x))
    close(original(ours), plain.weight)
    original(ours).requires_grad_(True)
    ours(x).sum().backward()
    assert original(ours).grad is not None


def test_a_layer_twice_in_a_graph_raises(backend: str) -> None:
    """As EDM2's own code does: the second call has written to what the first needs."""
    for layer in pair(4, 4):
        x = torch.randn(2, 4, dtype=F64)
        y = layer(layer(x))
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()
        layer.eval()
        layer(layer(x)).sum().backward()


def test_a_layer_in_two_graphs_one_after_the_other(backend: str) -> None:
    plain, ours = pair(4, 4)
    x = torch.randn(2, 4, dtype=F64)
    for layer in (plain, ours):
        for k in (1, 2):
            layer(x * k).pow(3).sum().backward()
    close(original(ours).grad, plain.weight.grad)


# Removal and copies


def test_removal_leaves_the_weight(backend: str) -> None:
    _, ours = models()
    ours.eval()
    x = inputs()
    y = ours(x)
    keys = set(ours.state_dict())
    for layer in [m for m in ours.modules() if parametrize.is_parametrized(m)]:
        w = layer.weight.detach()
        parametrize.remove_parametrizations(layer, "weight")
        assert torch.equal(layer.weight, w)
        assert isinstance(layer.weight, nn.Parameter)
    assert set(ours.state_dict()) == keys
    assert torch.equal(ours(x), y)
    other = models()[1]
    ours.load_state_dict(other.state_dict())
    assert torch.equal(ours.blocks[0][0].weight, original(other.blocks[0][0]))


def test_fold(backend: str) -> None:
    plain, ours = models()
    x = inputs()
    y = ours.eval()(x)
    wnkernel.fold(ours)
    assert not any(map(parametrize.is_parametrized, ours.modules()))
    assert torch.equal(ours(x), y)
    assert set(ours.state_dict()) == set(plain.state_dict())
    _, other = pair(3, 4)  # in training mode, as in evaluation
    before = original(other).detach().clone()
    wnkernel.fold(other)
    close(other.weight, edm2.weight(before))


def test_copies(backend: str) -> None:
    layer = linear()
    layer.bias.requires_grad_(False)
    copied = copy.deepcopy(layer)
    assert original(copied) is not original(layer)
    assert torch.equal(original(copied), original(layer))
    x = torch.randn(2, 4)
    assert torch.equal(copied(x), layer(x))
    before = original(layer).detach().clone()
    with torch.no_grad():
        original(copied).mul_(7)
    copied(x)
    assert torch.equal(original(layer), before)
    assert set(copied.state_dict()) == {"weight", "bias"}
    copied.load_state_dict({"weight": torch.ones(3, 4), "bias": torch.ones(3)})
    assert torch.equal(original(layer), before)


def test_averages(backend: str) -> None:
    """EDM2 averages v, which then is no longer forced, and w is computed from the average."""
    plain, ours = models()
    averages = [
        AveragedModel(m, multi_avg_fn=get_ema_multi_avg_fn(0.8)).eval() for m in (plain, ours)
    ]
    optimizers = [torch.optim.Adam(m.parameters(), lr=0.01) for m in (plain, ours)]
    for _ in range(4):
        x = inputs()
        for m, average, optimizer in zip((plain, ours), averages, optimizers, strict=True):
            optimizer.zero_grad()
            m(x).pow(2).sum().backward()
            optimizer.step()
            average.update_parameters(m)
    x = inputs()
    states = [average.state_dict() for average in averages]
    assert states[0].keys() == states[1].keys()
    for name in states[0]:
        torch.testing.assert_close(states[1][name], states[0][name], rtol=1e-9, atol=1e-12)
    close(averages[1](x), averages[0](x))


def test_removal_from_a_copy_leaves_the_layer() -> None:
    """As where an average is folded and saved while the model is trained on."""
    layer = linear().eval()
    parametrize.remove_parametrizations(copy.deepcopy(layer), "weight")
    assert layer.weight.shape == (3, 4)


def test_forwards_do_not_write_to_what_was_assigned() -> None:
    layer, t = linear(), torch.randn(3, 4)
    before = t.clone()
    layer.weight = t
    layer(torch.randn(2, 4))
    assert torch.equal(t, before)


# Errors


def module_with(weight: Tensor) -> nn.Module:
    m = nn.Module()
    m.weight = nn.Parameter(weight, requires_grad=weight.is_floating_point())
    return m


LAYERS: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "no module": (lambda: forced_weight_norm(3), TypeError, "module: .*torch.nn.Module, got int"),
    "no such parameter": (
        lambda: forced_weight_norm(nn.Linear(3, 3), "kernel"),
        ValueError,
        r"name: expected a parameter of Linear \(it has: weight, bias\), got 'kernel'",
    ),
    "no parameters": (
        lambda: forced_weight_norm(nn.Tanh()),
        ValueError,
        r"name: .* Tanh \(it has: none\), got 'weight'",
    ),
    "no bias": (
        lambda: forced_weight_norm(nn.Linear(3, 3, bias=False), "bias"),
        ValueError,
        "name: expected a parameter.*got 'bias'",
    ),
    "a buffer": (
        lambda: forced_weight_norm(nn.BatchNorm1d(3), "running_mean"),
        ValueError,
        "name: expected a parameter.*got 'running_mean'",
    ),
    "uninitialised": (
        lambda: forced_weight_norm(nn.LazyLinear(3)),
        ValueError,
        "name: expected an initialised parameter, got 'weight'; run it once",
    ),
    "forced already": (
        lambda: forced_weight_norm(linear()),
        RuntimeError,
        "name: expected a plain parameter, got 'weight', which has a parametrization",
    ),
    "normed already": (
        lambda: forced_weight_norm(wnkernel.weight_norm(nn.Linear(3, 3))),
        RuntimeError,
        "name: expected a plain parameter, got 'weight'",
    ),
    "normed by torch": (
        lambda: forced_weight_norm(parametrizations.weight_norm(nn.Linear(3, 3))),
        RuntimeError,
        "name: expected a plain parameter, got 'weight'",
    ),
    "another parametrization": (
        lambda: forced_weight_norm(parametrizations.spectral_norm(nn.Linear(3, 3))),
        RuntimeError,
        "name: expected a plain parameter, got 'weight'",
    ),
    "integers": (
        lambda: forced_weight_norm(module_with(torch.ones(3, 3, dtype=torch.int32))),
        TypeError,
        message("v", "dtype float16, bfloat16, float32 or float64", "torch.int32"),
    ),
    "complex": (
        lambda: forced_weight_norm(module_with(torch.ones(3, 3, dtype=torch.complex64))),
        TypeError,
        message("v", "dtype", "torch.complex64"),
    ),
    "sparse": (
        lambda: forced_weight_norm(module_with(torch.eye(3).to_sparse())),
        TypeError,
        message("v", "dense", "torch.sparse_coo"),
    ),
    "a number": (
        lambda: forced_weight_norm(module_with(torch.tensor(1.0))),
        ValueError,
        message("v", "at least 1 dimension", "a 0-dimensional"),
    ),
    "dim out of range": (
        lambda: forced_weight_norm(nn.Linear(3, 3), dim=2),
        ValueError,
        message("dim", "-2 <= dim < 2 or None", "2"),
    ),
}


@pytest.mark.parametrize("case", LAYERS)
def test_wrong_layers(case: str) -> None:
    call, error, words = LAYERS[case]
    with pytest.raises(error, match=words):
        call()


OPTIONS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "dim is a float": ({"dim": 1.5}, TypeError, message("dim", "an int or None", "float")),
    "dim is a bool": ({"dim": True}, TypeError, message("dim", "an int or None", "bool")),
    "gain is a text": ({"gain": "1"}, TypeError, message("gain", "a number", "str")),
    "gain is a bool": ({"gain": True}, TypeError, message("gain", "a number", "bool")),
    "gain is a tensor": (
        {"gain": torch.tensor(1.0)},
        TypeError,
        message("gain", "a number", "Tensor"),
    ),
    "gain is NaN": ({"gain": math.nan}, ValueError, message("gain", "a finite number", "nan")),
    "gain is infinite": ({"gain": -math.inf}, ValueError, message("gain", "a finite", "-inf")),
    "eps is a text": ({"eps": "1"}, TypeError, message("eps", "a number", "str")),
    "eps is negative": ({"eps": -1e-4}, ValueError, message("eps", "a finite number >= 0", "-")),
    "eps is infinite": ({"eps": math.inf}, ValueError, message("eps", "a finite number", "inf")),
    "eps is NaN": ({"eps": math.nan}, ValueError, message("eps", "a finite number", "nan")),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_wrong_options(case: str) -> None:
    """They leave the layer as it was."""
    options, error, words = OPTIONS[case]
    with pytest.raises(error, match=words):
        ForcedWeightNorm(**options)
    layer = nn.Linear(3, 3)
    with pytest.raises(error, match=words):
        forced_weight_norm(layer, **options)
    assert type(layer) is nn.Linear
    assert set(dict(layer.named_parameters())) == {"weight", "bias"}
    assert not layer._state_dict_hooks
    assert not layer._load_state_dict_pre_hooks


@pytest.mark.parametrize("training", [True, False])
def test_wrong_tensors(backend: str, training: bool) -> None:
    norm = ForcedWeightNorm(2).train(training)
    with pytest.raises(TypeError, match=message("v", "dtype", "torch.int64")):
        norm(torch.ones(3, 3, 3, dtype=torch.int64))
    with pytest.raises(TypeError, match=message("v", "", "")):
        norm(quantised(torch.ones(3, 3, 3)))
    with pytest.raises(TypeError, match=message("v", "a torch.Tensor", "list")):
        norm([1.0])
    with pytest.raises(ValueError, match=message("v", "at least 1 dimension", "")):
        norm(torch.tensor(1.0))
    with pytest.raises(ValueError, match=message("dim", "-2 <= dim < 2 or None", "2")):
        norm(torch.ones(3, 3))


def test_inference_tensors_are_written_in_inference_mode_only(backend: str) -> None:
    norm = ForcedWeightNorm()
    with torch.inference_mode():
        v = torch.randn(3, 4)
        before = v.clone()
        w = norm(v)
    torch.testing.assert_close(w.clone(), edm2.weight(edm2.normalized(before)))
    with pytest.raises(
        RuntimeError, match=r"^v: expected a tensor that was not made in inference mode"
    ):
        norm(v)


# Others


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing(backend: str, use_reentrant: bool) -> None:
    """The recomputation writes nothing, so gradients are those without checkpointing. (EDM2's own
    layers write v once more there, which changes it by up to eps.)"""
    x = inputs().requires_grad_()
    m = models()[1]
    twin = copy.deepcopy(m)
    for y in (checkpoint(m, x, use_reentrant=use_reentrant), twin(x)):
        y.pow(2).sum().backward()
    for a, b in zip(m.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-13)


def test_checkpointing_in_evaluation(backend: str) -> None:
    _, m = models()
    m.eval()
    x = inputs().requires_grad_()
    (want,) = torch.autograd.grad(m(x).pow(2).sum(), x)
    y = checkpoint(m, x, use_reentrant=False)
    (got,) = torch.autograd.grad(y.pow(2).sum(), x)
    assert torch.equal(got, want)


def test_another_parametrization_on_top(backend: str) -> None:
    class Twice(nn.Module):
        def forward(self, w: Tensor) -> Tensor:
            return 2 * w

    layer = linear()
    parametrize.register_parametrization(layer, "weight", Twice(), unsafe=True)
    v = original(layer).detach().clone()
    want = edm2.expected(v, 0)
    torch.testing.assert_close(layer.weight.double(), 2 * want.w.value, rtol=1e-5, atol=1e-6)
    assert original(layer)._version > 0


def test_parametrize_cached_writes_once(backend: str) -> None:
    """Which is the way to use a layer twice in one graph."""
    layer = forced_weight_norm(nn.Linear(4, 4, bias=False))
    version = original(layer)._version
    with parametrize.cached():
        y = layer(layer(torch.randn(2, 4)))
    y.sum().backward()
    assert original(layer)._version == version + 1


def test_hooks_of_the_norm_run(backend: str) -> None:
    layer, seen = linear(), []
    layer.parametrizations.weight[0].register_forward_hook(lambda *args: seen.append(len(args)))
    layer(torch.randn(2, 4))
    assert seen == [3]


def test_other_threads(backend: str) -> None:
    layers = [linear() for _ in range(3)]
    twins = copy.deepcopy(layers)
    x = torch.randn(2, 4)

    def run(layer: nn.Module) -> None:
        with wnkernel.use_backend(backend):
            layer(x).sum().backward()

    threads = [threading.Thread(target=run, args=(layer,)) for layer in layers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    for layer, twin in zip(layers, twins, strict=True):
        run(twin)
        assert torch.equal(original(layer), original(twin))
        assert torch.equal(original(layer).grad, original(twin).grad)


def test_beside_a_usual_weight_norm(backend: str) -> None:
    """Of another parameter of the same module."""
    m = nn.Module()
    m.a, m.b = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(3, 4))
    wnkernel.weight_norm(m, "a")
    forced_weight_norm(m, "b")
    assert isinstance(m.parametrizations.a[0], WeightNorm)
    assert {"b"} == {name for name in m.state_dict() if not name.startswith("parametrizations.a")}
    other = copy.deepcopy(m)
    assert torch.equal(m.a, other.a)
    assert torch.equal(m.b, other.b)


# torch.compile


@layers_in_graphs
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_compiled_steps(compiler: str) -> None:
    _, m = pair(4, 6)
    twin = copy.deepcopy(m)
    run = torch.compile(m, backend=compiler, fullgraph=True)
    optimizers = [torch.optim.SGD(n.parameters(), lr=0.01) for n in (m, twin)]
    for training in (True, True, False, True):
        x, before = inputs(), original(m).detach().clone()
        m.train(training), twin.train(training)
        close(step(run, m, x), step(twin, twin, x))
        close(forced(m), forced(twin))
        assert torch.equal(original(m), before) == (not training)
        for optimizer in optimizers:
            optimizer.step()


@layers_in_graphs
@pytest.mark.usefixtures("fresh_compiler")
def test_inductor() -> None:
    """Once with a v that was forced before, and once with one that is far from that: Inductor's
    backward must not compute from a v that has changed."""
    m = linear(gain=2.0)
    twin = copy.deepcopy(m)
    run, x = by_inductor(m), torch.randn(2, 4)
    for scale in (1.0, 1e-4):
        for layer in (m, twin):
            layer.weight = torch.linspace(-2, 3, 12).view(3, 4)
            for _ in range(3):
                layer(x)
            with torch.no_grad():
                original(layer).mul_(scale)
        (y, *grads), (want, *wanted) = step(run, m, x), step(twin, twin, x)
        torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(original(m), original(twin), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(grads, wanted, rtol=1e-4, atol=1e-5)


def test_state_dicts_are_loaded_the_same_way_twice() -> None:
    m, twin = linear(), linear()
    for _ in range(2):
        m.load_state_dict(twin.state_dict())
        twin.load_state_dict(m.state_dict())
    assert_same([original(m)], [original(twin)])


# DistributedDataParallel


class ForcedNet(Net):
    """The model of the workers, all of whose weights are forced."""

    def __init__(self) -> None:
        super().__init__(None)
        for module in list(self.modules()):
            if isinstance(module, nn.Linear):
                parametrize.remove_parametrizations(module, "weight")
                forced_weight_norm(module)


def forced_net() -> ForcedNet:
    torch.manual_seed(0)
    return ForcedNet()


@each(("fuse first",))
def forced_ddp(order: str) -> None:
    """Processes write the same to v, as they have the same gradients."""
    assert check_processes(DistributedDataParallel, order, build=forced_net) == 3 * [ALL]


def test_two_processes(tmp_path: Path) -> None:
    assert_no_failures(__name__, "forced_ddp", tmp_path)

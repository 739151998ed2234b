"""``wnkernel convert`` where the order of parameters changes, by which optimizers and averages go:
it is followed, or the file is refused."""

from __future__ import annotations

import tracemalloc

import pytest
import torch
from torch import nn

from ..command_line import convert, fails, on_the_cpu
from ..layers import APPLY, assert_same_state

pytest.importorskip("typer", reason="the command line needs typer")

from wnkernel.cli.parameter_order import Order

__all__ = ["on_the_cpu"]

KIND = {"legacy": "legacy", "parametrized": "torch"}


class Late(nn.Linear):
    """A layer that gets parameters after its weight norm, of shapes that others have too, and a
    buffer."""

    def __init__(self, kind):
        super().__init__(3, 3)
        bias = self.bias
        del self.bias
        APPLY[kind](self)
        self.gain = nn.Parameter(torch.ones(3, 1))
        self.bias = bias
        self.mix = nn.Parameter(torch.eye(3))
        self.register_buffer("scale", torch.full((3,), 0.5))


class Plain(nn.Linear):
    """A layer as most are."""

    def __init__(self, kind):
        super().__init__(3, 3)
        APPLY[kind](self)


class Buffered(nn.Linear):
    """A layer with a buffer, whose parameters stay where they are."""

    def __init__(self, kind):
        super().__init__(3, 3)
        self.register_buffer("scale", torch.ones(3))
        APPLY[kind](self)


class Outer(nn.Linear):
    """A layer with another module inside, which has its g and v behind it or before it."""

    def __init__(self, kind):
        super().__init__(3, 3)
        self.inner = nn.Linear(3, 3)
        APPLY[kind](self)


class Alone(nn.Linear):
    """The same without parameters of its own but g and v."""

    def __init__(self, kind):
        super().__init__(3, 3, bias=False)
        self.inner = nn.Sequential(nn.Linear(3, 3), Buffered(kind))
        APPLY[kind](self)


class Gained(nn.Linear):
    """A layer with a parameter of an unusual name, before its weight norm."""

    def __init__(self, kind):
        super().__init__(3, 3)
        self.gain = nn.Parameter(torch.ones(3, 1))
        APPLY[kind](self)


def model(layer, layout, *, tied=False):
    """Layers of a class, and others."""
    kind = KIND[layout]
    layers = [layer(kind), nn.BatchNorm1d(3), layer(kind), APPLY[kind](nn.Linear(3, 3))]
    if tied:
        layers[2].gain = layers[0].gain
    return nn.Sequential(*layers)


def adam(net):
    return torch.optim.Adam(net.parameters(), amsgrad=True)


def momentum(net):
    return torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)


def named(net):
    try:
        return torch.optim.Adam(net.named_parameters())
    except (TypeError, ValueError, AttributeError):
        pytest.skip("this torch has no optimizers that know names")


def common(name):
    """The same in both layouts."""
    name = name.replace("parametrizations.weight.original0", "weight_g")
    return name.replace("parametrizations.weight.original1", "weight_v")


def trained(net, optimizer):
    """Its state says which parameter it belongs to: gradients are drawn by names."""
    for name, p in net.named_parameters():
        name = common(name)
        random = torch.Generator().manual_seed(sum(name.encode()) + 31 * len(name))
        p.grad = torch.randn(p.shape, generator=random)
    optimizer.step()
    return net, optimizer


FOLLOWED = [
    (Late, "legacy", "parametrized", True),
    (Late, "legacy", "parametrized", False),
    (Buffered, "legacy", "parametrized", False),
    (Buffered, "parametrized", "legacy", False),
    (Outer, "parametrized", "legacy", False),
    (Alone, "parametrized", "legacy", False),
]


@pytest.mark.parametrize("make", [adam, momentum, named])
@pytest.mark.parametrize(("layer", "source", "target", "tied"), FOLLOWED)
def test_training_goes_on_in_the_other_layout(tmp_path, layer, source, target, make, tied):
    net = model(layer, source, tied=tied)
    _, optimizer = trained(net, make(net))
    ema = [p.detach() + 1 for p in net.parameters()]
    content = {
        "model": net.state_dict(),
        "averaged": {key: t.clone() for key, t in net.state_dict().items()},
        "opt": [optimizer.state_dict()],
        "ema": {"shadow_params": ema, "decay": 0.9},
    }
    if tied:
        del content["averaged"]  # its tensors are not tied
    torch.save(content, tmp_path / "in.pt")
    assert convert(tmp_path / "in.pt", tmp_path / "out.pt", target)["warnings"] == []

    got = torch.load(tmp_path / "out.pt", weights_only=True)
    other = model(layer, target, tied=tied)
    other.load_state_dict(got["model"])
    for p, averaged in zip(other.parameters(), got["ema"]["shadow_params"], strict=True):
        assert torch.equal(averaged, p + 1)
    (group,) = got["opt"][0]["param_groups"]
    if make is named:  # as they were called before
        both = [common(name) for name, _ in other.named_parameters()]
        assert [common(name) for name in group["param_names"]] == both
    other_optimizer = make(other)
    other_optimizer.load_state_dict(got["opt"][0])
    trained(net, optimizer)
    trained(other, other_optimizer)
    torch.save(other.state_dict(), tmp_path / "other.pt")
    convert(tmp_path / "other.pt", tmp_path / "back.pt", source)
    back = torch.load(tmp_path / "back.pt", weights_only=True)
    assert_same_state({k: back[k] for k in net.state_dict()}, net.state_dict())


def test_each_of_two_models_has_its_optimizer(tmp_path):
    """Of which one stays as it is."""
    nets = {"g": model(Late, "legacy"), "d": nn.Sequential(APPLY["legacy"](nn.Linear(3, 3)))}
    optimizers = {key: trained(net, adam(net))[1].state_dict() for key, net in nets.items()}
    states = {key: net.state_dict() for key, net in nets.items()}
    torch.save(states | {f"optim_{key}": o for key, o in optimizers.items()}, tmp_path / "in.pt")
    convert(tmp_path / "in.pt", tmp_path / "out.pt", "parametrized")
    got = torch.load(tmp_path / "out.pt", weights_only=True)
    names = [name for name, _ in model(Late, "parametrized").named_parameters()]
    assert names != [name for name, _ in nets["g"].named_parameters()]
    for key, order in (("g", names), ("d", list(got["d"]))):
        for number, name in enumerate(order):
            assert got[f"optim_{key}"]["state"][number]["exp_avg"].shape == got[key][name].shape
    before, after = optimizers["d"]["state"], got["optim_d"]["state"]
    assert all(torch.equal(before[n]["exp_avg"], after[n]["exp_avg"]) for n in before)


def in_groups(net):
    first, *rest = net.parameters()
    return torch.optim.Adam([{"params": [first]}, {"params": rest, "lr": 0.1}])


def frozen(net):
    return torch.optim.Adam(list(net.parameters())[1:])


def reversed_(net):
    return torch.optim.Adam(list(net.parameters())[::-1])


@pytest.mark.parametrize(
    ("layer", "source", "target", "make", "said"),
    [
        (Outer, "legacy", "parametrized", adam, '"0" has modules inside'),
        (Gained, "parametrized", "legacy", adam, '"0.gain" may come before the weight norm'),
        (Late, "legacy", "parametrized", in_groups, "it has them in 2 groups"),
        (Late, "legacy", "parametrized", frozen, "no model with such parameters and no others"),
        (Late, "legacy", "parametrized", reversed_, "no model with such parameters"),
    ],
)
def test_what_is_not_certain_is_refused(tmp_path, layer, source, target, make, said):
    net = model(layer, source)
    _, optimizer = trained(net, make(net))
    torch.save({"model": net.state_dict(), "opt": optimizer.state_dict()}, tmp_path / "in.pt")
    line = fails(3, "convert", tmp_path / "in.pt", tmp_path / "out.pt", "--to", target)
    assert "opt: refused: it goes by the order of parameters, which the conversion changes" in line
    assert said in line
    assert not (tmp_path / "out.pt").exists()
    without = {"model": net.state_dict(), "opt": make(model(layer, source)).state_dict()}
    torch.save(without, tmp_path / "in.pt")
    if make is in_groups:  # which parameters are in which
        fails(3, "convert", tmp_path / "in.pt", tmp_path / "out.pt", "--to", target)
    else:
        convert(tmp_path / "in.pt", tmp_path / "out.pt", target)


@pytest.mark.parametrize("source", ["legacy", "parametrized"])
def test_g_and_v_are_no_buffers(tmp_path, source):
    """A list of as many tensors as there are other parameters is none of this model's."""
    target = "parametrized" if source == "legacy" else "legacy"
    net = nn.Sequential(*(APPLY[KIND[source]](nn.Linear(1, 1, bias=False)) for _ in range(2)))
    for layer in net:
        layer.extra_weight = nn.Parameter(torch.ones(1, 1))
    tensors = [torch.full((1, 1), float(k)) for k in range(4)]
    torch.save({"model": net.state_dict(), "ema": tensors}, tmp_path / "in.pt")
    convert(tmp_path / "in.pt", tmp_path / "out.pt", target)
    assert torch.load(tmp_path / "out.pt", weights_only=True)["ema"] == tensors


def test_lists_of_other_lengths_cost_no_search(monkeypatch):
    """However many there are."""
    state = {f"b.{k}.{name}": torch.ones(1) for k in range(20) for name in "uvwxyz"}
    late = {"a.weight_g": torch.ones(3, 1), "a.weight_v": torch.ones(3, 3)}
    order = Order(late | {"a.extra_weight": torch.ones(3)} | state, ["a.weight"], "legacy")
    assert order.moves([[torch.Size([1])]]) == []
    monkeypatch.setattr(Order, "_parameters", None)
    for length in range(2, 1000):
        assert order.moves(length * [[torch.Size([7])]]) == []


@pytest.mark.parametrize("weights", [[], ["a.weight"]])
def test_a_key_of_dots_takes_little_memory(weights):
    state = {"a.weight_g": torch.ones(3, 1), "a.weight_v": torch.ones(3, 3)}
    tracemalloc.start()
    try:
        order = Order(state | {"." * 30_000: torch.ones(1)}, weights, "legacy")
        assert order.is_kept() == (not weights)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_a_parameter_that_may_be_one_of_two_is_refused(tmp_path):
    """The other is a buffer, and all shapes are the same."""
    net = nn.Sequential(*(APPLY["legacy"](nn.Linear(1, 1, bias=False)) for _ in range(2)))
    net[0].gain = nn.Parameter(torch.ones(1, 1))
    net[1].register_buffer("mix", torch.ones(1, 1))
    _, optimizer = trained(net, adam(net))
    torch.save({"model": net.state_dict(), "opt": optimizer.state_dict()}, tmp_path / "in.pt")
    line = fails(3, "convert", tmp_path / "in.pt", tmp_path / "o.pt", "--to", "parametrized")
    assert "they may be of several models, or buffers" in line


@pytest.mark.parametrize("source", ["legacy", "parametrized"])
def test_where_nothing_moves_optimizers_of_any_kind_are_kept(tmp_path, source):
    target = "parametrized" if source == "legacy" else "legacy"
    net = model(Plain, source)
    optimizers = [trained(net, make(net))[1].state_dict() for make in (in_groups, frozen)]
    odd = {"state": {"x": 1}, "param_groups": [{"params": 7}, 8, {"params": [[], "name"]}]}
    torch.save({"model": net.state_dict(), "opt": [*optimizers, odd]}, tmp_path / "in.pt")
    convert(tmp_path / "in.pt", tmp_path / "out.pt", target)
    got = torch.load(tmp_path / "out.pt", weights_only=True)["opt"]
    assert got[2] == odd
    for one, other in zip(optimizers, got, strict=False):
        assert one["param_groups"] == other["param_groups"]
        for number, state in one["state"].items():
            assert torch.equal(state["exp_avg"], other["state"][number]["exp_avg"])

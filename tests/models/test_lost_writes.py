"""Writes to ``layer.weight`` of a new layer, which change a temporary, and the line that works."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import wnkernel
from wnkernel import lost_writes
from wnkernel.parametrization import WeightNormList

LOST = "wnkernel.init_weight_"


def layer() -> nn.Module:
    return wnkernel.weight_norm(nn.Conv1d(2, 3, 5))


def forward(module: nn.Module) -> None:
    module(torch.randn(1, 2, 7))


def fill(module: nn.Module) -> None:
    with torch.no_grad():
        module.weight.fill_(0.1)


WRITES = {
    "init": lambda m: nn.init.normal_(m.weight),
    "data": lambda m: m.weight.data.normal_(0, 0.01),
    "no_grad": fill,
    "reset": lambda m: m.reset_parameters(),
    "numpy": lambda m: m.weight.detach().numpy().fill(2.0),
}


def written_to_and_run(write, module: nn.Module) -> None:
    write(module)
    forward(module)


NEXT = {
    "forward": forward,
    "read": lambda m: m.weight,
    "fold": wnkernel.fold,
    "fuse": wnkernel.fuse,
    "remove": wnkernel.remove_weight_norm,
}


@pytest.mark.parametrize("write", WRITES)
def test_a_write_is_noticed_when_the_layer_runs(write):
    module = layer()
    before = module.parametrizations.weight.original1.clone()
    with pytest.warns(UserWarning, match=LOST):
        written_to_and_run(WRITES[write], module)
    assert torch.equal(module.parametrizations.weight.original1, before)


@pytest.mark.parametrize("then", NEXT)
def test_a_write_is_noticed_by_whatever_reads_the_weight_next(then):
    module = layer()
    nn.init.ones_(module.weight)
    with pytest.warns(UserWarning, match=LOST):
        NEXT[then](module)


@pytest.mark.parametrize("change", [wnkernel.fold, wnkernel.fuse])
def test_warnings_that_are_errors_leave_a_model_as_it_was(change):
    model = nn.Sequential(layer(), wnkernel.weight_norm(nn.Linear(4, 4)), nn.GRU(4, 3), layer())
    wnkernel.weight_norm(model[2], "weight_ih_l0")
    for module in (model[1], model[3]):
        nn.init.ones_(module.weight)
    keys, owners = list(model.state_dict()), _owners(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match=LOST):
            change(model)
        assert list(model.state_dict()) == keys
        assert _owners(model) == owners  # every layer is watched on
        change(model)  # both writes have been told
    assert not set(_owners(model)) & set(owners)


def _owners(model: nn.Module) -> list[object]:
    return [m.owner for m in model.modules() if isinstance(m, WeightNormList)]


def test_in_a_whole_model_and_after_conversion():
    model = nn.Sequential(nn.utils.weight_norm(nn.Conv1d(2, 2, 3)), layer())
    wnkernel.convert(model)
    model.apply(lambda m: isinstance(m, nn.Conv1d) and nn.init.normal_(m.weight))
    with pytest.warns(UserWarning, match=LOST) as seen:
        forward(model)
    assert len(seen) == 2


def looked_at(module: nn.Module) -> None:
    module.weight.sum()


def trained(module: nn.Module) -> None:
    module.weight  # noqa: B018
    with torch.no_grad():
        module.parametrizations.weight.original0.mul_(2)
        module.parametrizations.weight.original1.data.mul_(-1)


def loaded(module: nn.Module) -> None:
    module.weight  # noqa: B018
    module.load_state_dict(layer().state_dict())


def assigned(module: nn.Module) -> None:
    module.weight = module.weight * 2


def scaled(module: nn.Module) -> None:
    with torch.no_grad():
        module.weight *= 2  # written to, and assigned


def written_and_assigned(module: nn.Module) -> None:
    w = module.weight.detach()
    nn.init.normal_(w)
    module.weight = w


def freed(module: nn.Module) -> None:
    module.weight.untyped_storage().resize_(0)


def computed(module: nn.Module) -> None:
    module.weight.mul(2).fill_(3)


USES = [
    looked_at,
    trained,
    loaded,
    assigned,
    scaled,
    written_and_assigned,
    freed,
    computed,
    forward,
]


@pytest.mark.parametrize("use", USES)
def test_what_is_no_write_to_the_weight_is_not_warned_of(use):
    module = layer()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            use(module)
            forward(module)


def test_a_layer_that_has_run_is_not_watched():
    module = layer()
    weights = module.parametrizations.weight
    assert weights.owner is not None
    forward(module)
    assert weights.owner is None


def test_reads_without_a_forward_are_watched_a_few_times_only():
    module = layer()
    reads = 0
    while module.parametrizations.weight.owner is not None and reads < 100:
        module.weight  # noqa: B018
        reads += 1
    assert 2 <= reads < 10


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_grad(context):
    module = layer()
    with context(), pytest.warns(UserWarning, match=LOST):
        written_to_and_run(WRITES["init"], module)


def test_a_copy_is_new_too_and_copies_no_weight():
    module = layer()
    nn.init.normal_(module.weight)
    copied = copy.deepcopy(module)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        forward(copy.deepcopy(module))
        _ = copied.weight
    with pytest.warns(UserWarning, match=LOST):
        forward(module)
    with pytest.warns(UserWarning, match=LOST):
        written_to_and_run(WRITES["init"], copied)


def test_what_comes_back_from_a_pickle_is_not_new():
    module = pickle.loads(pickle.dumps(layer()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        written_to_and_run(WRITES["init"], module)


# Where nothing may be kept or compared


class Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[object] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("read_before", [False, True])
def test_modes_see_no_operator_of_the_watch(read_before):
    module, unwatched = layer(), layer()
    forward(unwatched)
    if read_before:
        nn.init.ones_(module.weight)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with Seen() as mode:
            _ = module.weight
        with Seen() as alone:
            _ = unwatched.weight
    assert mode.seen == alone.seen != []


def test_what_a_transform_computes_is_not_kept():
    module = layer()
    parameters = module.parametrizations.weight._parameters
    v, g = parameters["original1"], parameters["original0"]

    def read(v, g):
        parameters.update(original1=v, original0=g)
        return module.weight

    torch.vmap(read)(v.detach().expand(3, *v.shape), g.detach().expand(3, *g.shape))
    parameters.update(original1=v, original0=g)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(module.weight, module.weight)


def test_weights_without_values_are_read_as_often_as_one_likes():
    module = layer().to("meta")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module.weight.fill_(1)
        assert module.weight.is_meta
        module.to_empty(device="cpu")
        forward(module)


def test_nothing_is_compared_while_a_stream_is_captured(monkeypatch):
    """The answer would have to be waited for, which ends a capture."""
    module, other = layer(), layer()
    nn.init.ones_(module.weight)
    monkeypatch.setattr(lost_writes, "is_capturing", lambda device: True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _ = module.weight
        nn.init.ones_(other.weight)
        monkeypatch.undo()
        forward(other)

"""Hooks that are registered on unpickled modules leave those alone that came with them."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from torch import nn
from torch.utils.hooks import RemovableHandle

import wnkernel
from wnkernel.grouping import scopes

from ..checkpoints import assert_loaded, saved
from ..versions import load_pre_hook


@pytest.fixture
def in_a_new_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Pickles and unpickles in processes in which no hook has been registered yet."""
    highest = RemovableHandle.next_id

    def there_and_back(make: Callable[[], nn.Module]) -> Any:
        monkeypatch.setattr(RemovableHandle, "next_id", 0)
        pickled = pickle.dumps(make())
        monkeypatch.setattr(RemovableHandle, "next_id", 0)
        return pickle.loads(pickled)

    yield there_and_back
    monkeypatch.undo()
    assert RemovableHandle.next_id == highest


def model() -> nn.Module:
    return nn.Sequential(*(wnkernel.weight_norm(nn.Linear(5, 4)) for _ in range(3)))


def nothing(*args: object) -> None:
    pass


def test_loading(in_a_new_process):
    got = in_a_new_process(model)
    for layer in got:
        for _ in range(50):
            load_pre_hook(layer, nothing)
        checkpoint = saved(nn.Linear(5, 4), "legacy")
        layer.load_state_dict(checkpoint)
        assert_loaded(layer, checkpoint, "legacy")


def test_torchs_remover(in_a_new_process):
    """A profiler comes and goes before."""
    got = in_a_new_process(model)
    handles = [m.register_forward_pre_hook(nothing) for m in got for _ in range(50)]
    for handle in handles:
        handle.remove()
    for layer in got:
        nn.utils.remove_weight_norm(layer)


def test_scopes_of_groups(in_a_new_process):
    def fused() -> nn.Module:
        wnkernel.fuse(made := model())
        return made

    got = in_a_new_process(fused)
    for _ in range(50):
        got.register_forward_hook(nothing)
    assert scopes._enter in got._forward_pre_hooks.values()
    assert scopes._leave in got._forward_hooks.values()


def test_attributes_of_the_user_are_no_hooks(in_a_new_process):
    def with_hooks() -> nn.Module:
        layer = wnkernel.weight_norm(nn.Linear(5, 4))
        layer.user_hooks = {"before": nothing, 10**9: nothing}
        return layer

    assert in_a_new_process(with_hooks).user_hooks["before"] is nothing
    assert RemovableHandle.next_id < 10**9


def test_a_higher_number_stays(monkeypatch):
    pickled = pickle.dumps(model())
    monkeypatch.setattr(RemovableHandle, "next_id", high := RemovableHandle.next_id + 10**6)
    pickle.loads(pickled)
    assert RemovableHandle.next_id == high

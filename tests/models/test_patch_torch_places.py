"""Where ``wnkernel.patch_torch`` replaces torch's functions, and when it restores them."""

from __future__ import annotations

import functools
import sys
import threading
import types
from collections.abc import Iterator

import pytest
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils import weight_norm as imported_earlier

import wnkernel
from wnkernel import patching
from wnkernel.census import OURS, TORCH

from ..processes import PATIENCE_S
from .test_patch_torch import OF_TORCH, PATHS, kind_of

LEGACY = OF_TORCH["torch.nn.utils.weight_norm"]


def is_patched() -> bool:
    """Whether all of torch's functions are ours; all or none are."""
    ours = {get() is not OF_TORCH[path] for path, get in PATHS.items()}
    assert len(ours) == 1
    return ours.pop()


@pytest.fixture(autouse=True)
def _torch_is_restored() -> Iterator[None]:
    yield
    assert not is_patched()
    assert imported_earlier is LEGACY


# Which references are found


def module(name: str, source: str) -> types.ModuleType:
    """A module that somebody imports."""
    new = types.ModuleType(name)
    sys.modules[name] = new
    exec(source, vars(new))
    return new


@pytest.fixture
def imported():
    """A module that names torch's functions in all ways that are found, and in some others."""
    yield module(
        "some_vocoder",
        "import functools, torch\n"
        "from torch.nn.utils import weight_norm, remove_weight_norm as forget\n"
        "from torch.nn.utils.parametrizations import weight_norm as norm\n"
        "from torch.nn.utils.parametrize import remove_parametrizations\n"
        "class Layer:\n"
        "    norm = staticmethod(weight_norm)\n"
        "TABLE = {'weight_norm': norm}\n"
        "by_rows = functools.partial(norm, dim=0)\n"
        "def build(layer, apply=norm):\n"
        "    return apply(layer)\n",
    )
    del sys.modules["some_vocoder"]


def test_globals_of_modules_are_found(imported):
    before = dict(vars(imported))
    with wnkernel.patch_torch():
        assert imported.weight_norm is nn.utils.weight_norm is imported_earlier
        assert imported.norm is parametrizations.weight_norm
        assert imported.forget is nn.utils.remove_weight_norm
        assert imported.remove_parametrizations is parametrize.remove_parametrizations
        assert kind_of(imported.weight_norm(nn.Linear(2, 2))) == OURS
    assert vars(imported) == before


def test_other_references_are_not_found(imported):
    """As documented; ``convert`` is for what they build."""
    with wnkernel.patch_torch():
        for apply in (imported.TABLE["weight_norm"], imported.by_rows, imported.build):
            assert kind_of(apply(nn.Linear(2, 2))) == TORCH
        assert imported.Layer.norm is OF_TORCH["torch.nn.utils.weight_norm"]
        assert kind_of(functools.partial(imported.norm)(nn.Linear(2, 2))) == OURS


def test_imports_in_the_block_are_ours_until_its_end():
    try:
        with wnkernel.patch_torch():
            late = module("late_vocoder", "from torch.nn.utils import weight_norm as norm")
            assert kind_of(late.norm(nn.Linear(2, 2))) == OURS
    finally:
        del sys.modules["late_vocoder"]
    assert late.norm is OF_TORCH["torch.nn.utils.weight_norm"]


def test_modules_that_leave_in_the_block_are_restored(imported):
    with wnkernel.patch_torch():
        del sys.modules["some_vocoder"]
    sys.modules["some_vocoder"] = imported
    assert imported.weight_norm is OF_TORCH["torch.nn.utils.weight_norm"]


def test_what_others_write_meanwhile_stays(imported):
    with wnkernel.patch_torch():
        imported.weight_norm = print
    assert imported.weight_norm is print


def test_odd_modules_are_passed_over():
    """Some put None or other objects there, or raise on any look at them."""

    class Odd(types.ModuleType):
        def __getattr__(self, name: str) -> object:
            raise RuntimeError(name)

    odd = {"none": None, "object": object(), "raises": Odd("raises")}
    sys.modules.update({f"odd_{k}": m for k, m in odd.items()})
    try:
        with wnkernel.patch_torch():
            pass
    finally:
        for k in odd:
            del sys.modules[f"odd_{k}"]


# When


def fail_in_a_block() -> None:
    with wnkernel.patch_torch():
        assert is_patched()
        raise KeyError


def test_the_block_ends_by_an_exception():
    with pytest.raises(KeyError):
        fail_in_a_block()
    assert not is_patched()


def test_blocks_nest():
    with wnkernel.patch_torch():
        ours = nn.utils.weight_norm
        with pytest.raises(KeyError):
            fail_in_a_block()
        assert nn.utils.weight_norm is ours
        with wnkernel.patch_torch():
            assert nn.utils.weight_norm is ours
        assert is_patched()


def test_as_a_decorator():
    @wnkernel.patch_torch()
    def build() -> nn.Module:
        return nn.utils.weight_norm(nn.Linear(2, 2))

    assert not is_patched()
    for _ in range(2):
        assert kind_of(build()) == OURS
        assert not is_patched()


def test_a_block_that_cannot_begin_leaves_nothing(monkeypatch):
    namespaces = patching._namespaces

    def fail() -> Iterator[dict[str, object]]:
        yield vars(nn.utils)
        raise MemoryError

    monkeypatch.setattr(patching, "_namespaces", fail)
    with pytest.raises(MemoryError), wnkernel.patch_torch():
        pass
    monkeypatch.setattr(patching, "_namespaces", namespaces)
    assert not is_patched()
    with wnkernel.patch_torch():
        assert is_patched()


def test_other_threads_see_it():
    """The patch is the process's; the last block that ends restores."""
    entered, leave = threading.Event(), threading.Event()

    def block() -> None:
        with wnkernel.patch_torch():
            entered.set()
            leave.wait(PATIENCE_S)

    thread = threading.Thread(target=block)
    with wnkernel.patch_torch():
        thread.start()
        assert entered.wait(PATIENCE_S)
    assert is_patched()
    assert kind_of(nn.utils.weight_norm(nn.Linear(2, 2))) == OURS
    leave.set()
    thread.join()
    assert not is_patched()


def test_many_threads_at_once():
    failures = []
    start = threading.Barrier(8, timeout=PATIENCE_S)

    def work() -> None:
        start.wait()
        for _ in range(3):
            with wnkernel.patch_torch():
                if not is_patched() or kind_of(nn.utils.weight_norm(nn.Linear(2, 2))) != OURS:
                    failures.append(None)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert not is_patched()

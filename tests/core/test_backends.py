"""The choice of a backend, what is said about it, and life without the compiled module."""

from __future__ import annotations

import json
import os
import threading

import pytest
import torch

import wnkernel
from wnkernel import functional as F
from wnkernel import native
from wnkernel.backends import BACKENDS, choice, choose

from ..conftest import only
from ..processes import python


class Incapable:
    """A backend with two reasons not to run, in place of one that this machine lacks."""

    name = "incapable"

    def __init__(self, missing: list[str], reasons: list[str]) -> None:
        self._missing, self._reasons = missing, reasons

    def missing(self) -> list[str]:
        return self._missing

    def takes(self, v: torch.Tensor) -> bool:
        return not self.reasons(v)

    def reasons(self, v: torch.Tensor) -> list[str]:
        return self._missing + self._reasons


@pytest.fixture
def incapable(monkeypatch):
    def register(missing: list[str], reasons: list[str]) -> None:
        monkeypatch.setitem(BACKENDS, "incapable", Incapable(missing, reasons))

    return register


def test_nesting():
    before = choice.forced
    with wnkernel.use_backend("eager"):
        assert choice.forced == "eager"
        with wnkernel.use_backend("auto"):
            assert choice.forced is None
            with wnkernel.use_backend("eager"):
                assert choice.forced == "eager"
            assert choice.forced is None
        assert choice.forced == "eager"
    assert choice.forced == before


def test_exceptions_restore():
    before = choice.forced
    with pytest.raises(ZeroDivisionError), wnkernel.use_backend("eager"):
        raise ZeroDivisionError
    assert choice.forced == before


def test_usable_as_a_decorator():
    @wnkernel.use_backend("eager")
    def forced():
        return choice.forced

    assert forced() == forced() == "eager"


@pytest.mark.parametrize("name", ["cudnn", "", "EAGER", None])
def test_unknown_name(name):
    before = choice.forced
    with (
        pytest.raises(ValueError, match=r"^backend: expected one of auto, .*eager, got"),
        wnkernel.use_backend(name),
    ):
        pass
    assert choice.forced == before


def test_threads_choose_for_themselves():
    seen = []
    with wnkernel.use_backend("eager"):
        thread = threading.Thread(target=lambda: seen.append(choice.forced))
        thread.start()
        thread.join()
        assert choice.forced == "eager"
    asked = os.environ.get("WNKERNEL_BACKEND", "auto")
    assert seen == [None if asked == "auto" else asked]


def test_forced_backend_is_the_one_that_runs(backend):
    v, g = torch.randn(3, 4), torch.randn(3, 1)
    assert choose(v) is BACKENDS[backend]
    F.weight_norm(v, g)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_backend_takes_what_there_are_no_reasons_against(device):
    v = torch.empty(3, 4, device=device)
    for backend in BACKENDS.values():
        assert backend.takes(v) is not bool(backend.reasons(v))


def test_automatic_choice_is_the_first_that_can():
    v = torch.randn(3, 4)
    able = [b for b in BACKENDS.values() if b.is_automatic(v) and not b.reasons(v)]
    with wnkernel.use_backend("auto"):
        assert choose(v) is able[0]


def test_automatic_choice_takes_any_device():
    v = torch.randn(3, 4, device="meta")
    with wnkernel.use_backend("auto"):
        assert choose(v).name == "eager"


def test_explicit_choice_that_cannot_run(incapable):
    incapable(["no compiler", "no device"], [])
    with (
        pytest.raises(RuntimeError, match=r"'incapable'.*no compiler.*no device"),
        wnkernel.use_backend("incapable"),
    ):
        pass


def test_explicit_choice_that_cannot_take_the_problem(incapable):
    incapable([], ["v is too long", "v is too old"])
    with (
        wnkernel.use_backend("incapable"),
        pytest.raises(RuntimeError, match=r"'incapable'.*v is too long.*v is too old"),
    ):
        F.weight_norm(torch.randn(3, 4), torch.randn(3, 1))


def test_compiled_backend_refuses_other_devices(compiled_backend):
    v, g = torch.randn(3, 4, device="meta"), torch.randn(3, 1, device="meta")
    with pytest.raises(RuntimeError, match=f"'{compiled_backend}'.*v is on meta"):
        F.weight_norm(v, g)


def test_missing_backends_say_why():
    for name, backend in BACKENDS.items():
        why = backend.missing()
        assert all(isinstance(reason, str) and reason for reason in why)
        if why:
            with pytest.raises(RuntimeError, match=name), wnkernel.use_backend(name):
                pass


@pytest.mark.parametrize(("value", "forced"), [("eager", "eager"), ("auto", "None")])
def test_environment_variable_reaches_every_thread(value, forced):
    code = """
import threading
from wnkernel.backends import choice
print(choice.forced)
t = threading.Thread(target=lambda: print(choice.forced)); t.start(); t.join()
"""
    assert python("-c", code, WNKERNEL_BACKEND=value).stdout.split() == [forced, forced]


def test_unknown_name_in_the_environment():
    result = python("-c", "import wnkernel", WNKERNEL_BACKEND="cudnn")
    assert result.returncode != 0
    assert "ValueError: WNKERNEL_BACKEND: expected one of auto, " in result.stderr
    assert "got 'cudnn'" in result.stderr


WITHOUT_MODULE = "import sys; sys.modules['wnkernel._C'] = None\n"
QUIETLY = "-W", "ignore::UserWarning:wnkernel"
"""Without the line of tests/project/test_installation.py."""


def test_environment_variable_that_cannot_run():
    code = """
import torch, wnkernel
wnkernel.functional.weight_norm(torch.ones(3, 4), torch.ones(3, 1))
"""
    result = python("-c", WITHOUT_MODULE + code, WNKERNEL_BACKEND="cpu")
    assert result.returncode != 0
    assert "RuntimeError: backend 'cpu' was asked for and cannot run: wnkernel._C" in result.stderr


def test_import_without_the_compiled_module():
    code = """
import json, torch, wnkernel
from wnkernel import native
layer = wnkernel.weight_norm(torch.nn.Linear(3, 4))
layer(torch.ones(2, 3)).sum().backward()
assert all(p.grad is not None for p in layer.parameters())
print(json.dumps([native.loaded(), native.load_error(), wnkernel.info()]))
"""
    result = python(*QUIETLY, "-c", WITHOUT_MODULE + code)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    loaded, error, info = json.loads(result.stdout)
    assert not loaded
    assert error.startswith("wnkernel._C ")
    assert info["load_error"] == error
    assert info["compiled"] is None
    assert info["cpu"] is None
    assert info["backends"]["cpu"] == [error]
    assert info["backends"]["eager"] == []


def test_import_is_quiet_and_leaves_cuda_alone():
    result = python("-c", "import wnkernel, torch; assert not torch.cuda.is_initialized()")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_load_error_agrees_with_loaded():
    assert bool(native.load_error()) != native.loaded()


def test_info_is_plain_json():
    info = wnkernel.info()
    assert json.loads(json.dumps(info)) == info
    assert info["wnkernel"] == wnkernel.__version__
    assert info["torch"] == torch.__version__
    assert list(info["backends"]) == list(BACKENDS)
    assert info["backends"]["eager"] == []
    assert (info["compiled"] is None) == (not native.loaded())


def test_info_names_the_forced_backend():
    with wnkernel.use_backend("eager"):
        assert wnkernel.info()["forced_backend"] == "eager"
    with wnkernel.use_backend("auto"):
        assert wnkernel.info()["forced_backend"] is None


def test_info_on_the_command_line():
    result = python("-m", "wnkernel")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["wnkernel"] == wnkernel.__version__
    assert result.stderr == ""


def test_tests_leave_out_backends_for_other_devices():
    """Those that can run here, but not on the device that the tests are run on."""
    with torch.device("meta"):
        skipped = {}
        for name in BACKENDS:
            try:
                assert next(only(name)) == name
            except pytest.skip.Exception as why:
                skipped[name] = str(why)
    assert {*skipped} == {*BACKENDS} - {"eager"}
    for name, why in skipped.items():
        assert why == f"{name}: {'; '.join(BACKENDS[name].reasons(torch.empty(0, device='meta')))}"

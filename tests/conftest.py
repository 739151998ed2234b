"""Fixtures: which backend runs, on which device, and a seed for every test."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import pytest
import torch

import wnkernel
from wnkernel import native
from wnkernel.backends import AUTO, BACKENDS
from wnkernel.backends.compiled import CompiledBackend

from .compiled import fresh_compiler, launched
from .groups import computed, python_slots
from .shared_state import left_behind, shared_state
from .vocoders import fresh_accelerate

__all__ = ["computed", "fresh_accelerate", "fresh_compiler", "launched", "python_slots"]

COMPILED = [
    name
    for name, backend in BACKENDS.items()
    if isinstance(backend, CompiledBackend) and (name != "cuda" or torch.cuda.is_available())
]
ON_GPUS = [name for name in BACKENDS if name not in ("cpu", "eager")]


os.environ.setdefault("HF_HUB_OFFLINE", "1")  # it is read once, when transformers is imported

try:
    from hypothesis import HealthCheck, settings
except ImportError:  # then the tests that need it are left out, as on machines with a GPU
    pass
else:
    # How long an example takes says how busy the machine is, no more.
    patient = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
    settings.register_profile("patient", **patient)
    settings.load_profile("patient")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="where tests create their tensors")
    parser.addoption("--seed", default=0, type=int, help="of the random numbers of every test")


def pytest_configure(config: pytest.Config) -> None:
    if (device := config.getoption("--device")) == "cpu":
        return
    torch.set_default_device(device)
    # Models are compared by their bits, and some with torch's deterministic algorithms on.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.allow_tf32 = False  # and with float64


@pytest.fixture(autouse=True)
def _left_as_found() -> Iterator[None]:
    before = shared_state()
    yield
    changed = left_behind(before, shared_state())
    assert not changed, f"the test leaves something behind for the others: {changed}"


@pytest.fixture(autouse=True)
def _seeded(request: pytest.FixtureRequest) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(request.config.getoption("--seed"))
        yield


INTERPRETED = ("test_autocast", "test_autograd", "test_compiled_autograd")
"""What of groups and lists runs on interpreted kernels. The others ask the same of every backend
that is called from Python, and the interpreter takes 15 ms for a launch; on a GPU all run."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    names = [name for name in BACKENDS if name != "cuda" or torch.cuda.is_available()]
    folder, _, file = metafunc.module.__name__.rpartition(".")
    of_lists = folder.endswith((".forced", ".grouping", ".normalize"))
    is_left_out = of_lists and file not in INTERPRETED
    if is_left_out and not torch.cuda.is_available():
        names.remove("triton")
    for fixture, choices in (("backend", names), ("route", [*names, AUTO])):
        if fixture in metafunc.fixturenames:
            metafunc.parametrize(fixture, choices, indirect=True)


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every backend that can run on the device of the tests, asked for by name."""
    yield from only(request.param)


@pytest.fixture
def route(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every backend, and the automatic choice, which has a shorter way into the compiled module."""
    if request.param == AUTO and not native.loaded():
        pytest.skip("without wnkernel._C the automatic choice is the eager backend")
    yield from only(request.param)


@pytest.fixture(params=COMPILED)
def compiled_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every backend of the compiled module."""
    yield from only(request.param)


@pytest.fixture
def recycling(compiled_backend: str) -> Iterator[None]:
    """An empty pool of recycled memory, to which nothing comes back that other tests have left in
    reference cycles: that goes before, and the collector does not choose its moments."""
    if compiled_backend != "cpu":
        pytest.skip("buffers are for results on the CPU")
    gc.collect()
    wnkernel.release_cpu_buffers()
    gc.disable()
    yield
    gc.enable()
    wnkernel.release_cpu_buffers()


@pytest.fixture(params=ON_GPUS)
def gpu_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every backend with kernels of ours for GPUs, where the tests run on one."""
    if (device := torch.empty(0).device).type != "cuda":
        pytest.skip(f"needs a GPU (--device cuda), the tests run on {device}")
    yield from only(request.param)


@pytest.fixture
def ops() -> object:
    """``torch.ops.wnkernel``."""
    if not native.loaded():
        pytest.skip(native.load_error())
    return torch.ops.wnkernel


def only(name: str) -> Iterator[str]:
    """Asks for a backend; skips where it does not run."""
    if name != AUTO and (why := BACKENDS[name].reasons(torch.empty(0))):
        pytest.skip(f"{name}: {'; '.join(why)}")
    with wnkernel.use_backend(name):
        yield name

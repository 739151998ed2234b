"""Where the Triton backend can run, why not, and that nobody hears of it who did not ask."""

from __future__ import annotations

import importlib
import json
import subprocess
from types import SimpleNamespace

import pytest
import torch

import wnkernel
from wnkernel import functional as F
from wnkernel.backends import choose
from wnkernel.backends.triton import availability

from ..processes import ROOT, python
from .cases import OLDEST_TRITON, TRITON, fresh, needs_triton, rows_case, run


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    fresh(monkeypatch)


@pytest.fixture
def looked_up_again():
    """What is found out once per process is found out again, and forgotten."""
    availability.missing.cache_clear()
    yield
    availability.missing.cache_clear()


def with_import(monkeypatch, outcome):
    """Importing triton raises or gives ``outcome``."""

    def import_module(name, *args):
        if name != "triton":
            return original(name, *args)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    original = importlib.import_module
    monkeypatch.setattr(importlib, "import_module", import_module)


class Driver:
    """What compiled kernels are launched with: built when it is first used."""

    def __init__(self, error: Exception | None = None) -> None:
        self._error = error

    @property
    def utils(self) -> object:
        if self._error is not None:
            raise self._error
        return object()


def a_triton(version: str, error: Exception | None = None) -> SimpleNamespace:
    """As much of a Triton as is looked at."""
    driver = SimpleNamespace(active=Driver(error))
    return SimpleNamespace(__version__=version, runtime=SimpleNamespace(driver=driver))


GPU = SimpleNamespace(device=torch.device("cuda", 0))
"""As much of a tensor on a GPU as the choice of a backend looks at."""


@pytest.mark.parametrize(
    "error",
    [
        ImportError("No module named 'triton'"),
        OSError("libtriton.so: cannot open shared object file"),
        AttributeError("module 'triton' has no attribute 'language'"),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.usefixtures("looked_up_again")
def test_triton_that_cannot_be_imported(monkeypatch, error):
    """Missing, or broken in one of the ways of a mixed installation."""
    with_import(monkeypatch, error)
    (why,) = TRITON.missing()
    assert "triton cannot be imported" in why
    assert str(error) in why
    assert TRITON.reasons(GPU) == [why]
    assert choose(GPU).name == "eager"
    with pytest.raises(RuntimeError, match="'triton' cannot run"), wnkernel.use_backend("triton"):
        pass


@pytest.mark.parametrize(
    ("version", "too_old"),
    [
        ("2.3.1", True), ("3.2.0+git35c6c7c6", True), ("3.3.1", True), ("", True),
        ("3.4.0", False), ("3.5.1+gitc8757738", False), ("3.10.0", False), ("4.0.0", False),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("looked_up_again")
@needs_triton
def test_the_oldest_triton(monkeypatch, version, too_old):
    with_import(monkeypatch, a_triton(version))
    if not too_old:
        assert TRITON.missing() == []
        return
    (why,) = TRITON.missing()
    assert f"triton {version} is too old, 3.4 or later is needed" in why
    with pytest.raises(RuntimeError, match=r"too old, 3\.4"), wnkernel.use_backend("triton"):
        pass


@pytest.mark.usefixtures("looked_up_again")
@needs_triton
def test_no_gpu(monkeypatch):
    with_import(monkeypatch, a_triton("3.4.0"))
    monkeypatch.setattr(availability, "is_interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(availability, "_has_xpu", lambda: False)
    assert TRITON.missing() == TRITON.reasons(GPU) == ["there is no GPU that torch can use"]
    monkeypatch.setattr(availability, "_has_xpu", lambda: True)
    availability.missing.cache_clear()
    assert TRITON.missing() == []


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Failed to find C compiler. Please specify via CC environment variable"),
        subprocess.CalledProcessError(1, ["gcc", "cuda_utils.c"]),  # there is no Python.h
        AssertionError("libcuda.so cannot found!"),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.usefixtures("looked_up_again")
@needs_triton
def test_a_driver_that_cannot_be_built(monkeypatch, error):
    """Triton compiles C when it first sees a GPU."""
    with_import(monkeypatch, a_triton("3.4.0", error))
    monkeypatch.setattr(availability, "is_interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    (why,) = TRITON.missing()
    assert "a C compiler and Python's headers" in why
    assert str(error) in why
    assert TRITON.reasons(GPU) == [why]
    # Kernels that were built for CUDA would ask the driver, and there may be none.
    monkeypatch.setattr("wnkernel.native.cuda_reason", lambda device: "no driver")
    assert choose(GPU).name == "eager"
    with pytest.raises(RuntimeError, match="C compiler"), wnkernel.use_backend("triton"):
        pass


def test_the_oldest_triton_is_the_one_that_is_asked_for():
    assert f'"triton>={OLDEST_TRITON}; ' in (ROOT / "pyproject.toml").read_text()
    assert f"Triton {OLDEST_TRITON} or later" in (ROOT / "docs" / "gpu.md").read_text()


@pytest.fixture
def on_gpus(monkeypatch):
    """As where kernels are compiled; ``on_gpus(capability)`` says for which GPU."""

    def set_capability(*capability):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)

    monkeypatch.setattr(availability, "missing", lambda: "")
    monkeypatch.setattr(availability, "is_interpreted", lambda: False)
    monkeypatch.setattr(torch.version, "hip", None)
    set_capability(9, 0)
    return set_capability


@pytest.mark.parametrize(
    ("capability", "taken"), [((7, 0), False), ((7, 5), False), ((8, 0), True), ((10, 0), True)]
)
def test_compute_capability(monkeypatch, on_gpus, capability, taken):
    on_gpus(*capability)
    assert choose(GPU).name == ("triton" if taken else "eager")
    if not taken:
        (why,) = TRITON.reasons(GPU)
        assert "compute capability {}.{}".format(*capability) in why
        assert "8.0" in why
        with (
            wnkernel.use_backend("triton"),
            pytest.raises(RuntimeError, match=r"'triton' was asked for.*compute capability 7"),
        ):
            choose(GPU)
    monkeypatch.setattr(torch.version, "hip", "6.3")  # AMD numbers its GPUs otherwise
    assert TRITON.reasons(GPU) == []


def test_devices(on_gpus):
    on_gpus(9, 0)
    for device in ("cuda:1", "xpu:0"):
        assert TRITON.reasons(SimpleNamespace(device=torch.device(device))) == []
    for device in ("cpu", "meta", "mps:0"):
        v = SimpleNamespace(device=torch.device(device))
        assert TRITON.reasons(v) == [f"v is on {device}, its kernels run on GPUs"]
        assert choose(v).name != "triton"


@needs_triton
def test_a_tensor_on_another_device(monkeypatch):
    monkeypatch.setattr(availability, "is_interpreted", lambda: True)
    v, g = torch.ones(3, 4, device="meta"), torch.ones(3, 1, device="meta")
    with (
        wnkernel.use_backend("triton"),
        pytest.raises(RuntimeError, match=r"v is on meta, and TRITON_INTERPRET runs .* on the CPU"),
    ):
        F.weight_norm(v, g)
    with wnkernel.use_backend("auto"):
        assert F.weight_norm(v, g).device.type == "meta"


PURE_PYTHON = """
import sys
sys.modules["wnkernel._C"] = None

class Importers:
    "Who imports triton. torch does by itself, at times."
    found = []
    def find_spec(self, name, path=None, target=None):
        if name == "triton":
            frame = sys._getframe(1)
            while "importlib" in frame.f_code.co_filename:
                frame = frame.f_back
            self.found.append(frame.f_code.co_filename)

sys.meta_path.insert(0, Importers())
import json, torch, wnkernel
from wnkernel.backends import choose
from wnkernel.backends.triton import availability
layer = wnkernel.weight_norm(torch.nn.Linear(3, 4))
wnkernel.fuse(layer)
layer(torch.ones(2, 3)).sum().backward()
early = [name for name in Importers.found if "wnkernel" in name]
early += ["launch"] if "wnkernel.backends.triton.launch" in sys.modules else []
names = [choose(torch.ones(3, device=device)).name for device in ("cpu", "meta")]
imports = availability.missing.cache_info().misses
raised = []
try:
    with wnkernel.use_backend("triton"):
        wnkernel.functional.weight_norm(torch.ones(3, 4), torch.ones(3, 1))
except RuntimeError as error:
    raised.append(str(error))
print(json.dumps([early, imports, names, raised, wnkernel.info()]))
"""


@pytest.mark.parametrize(
    ("setup", "interpret", "why"),
    [
        ("import sys; sys.modules['triton'] = None", "1", "triton cannot be imported"),
        pytest.param("", "0", "there is no GPU that torch can use", marks=needs_triton),
        pytest.param("", "1", "", marks=needs_triton),
    ],
    ids=["missing", "no_gpu", "interpreted"],
)
def test_an_installation_without_compiled_kernels(setup, interpret, why):
    """Triton is not imported before somebody needs it, the interpreter runs only what asks for it,
    and who does not ask for Triton hears nothing of it."""
    code = f"{setup}\n{PURE_PYTHON}"
    quietly = "-W", "ignore::UserWarning:wnkernel"  # of the module that is not there
    result = python(*quietly, "-c", code, TRITON_INTERPRET=interpret, CUDA_VISIBLE_DEVICES="")
    assert result.returncode == 0, result.stderr
    if why:  # else the interpreter ran, in which numpy warns of divisions by zero
        assert result.stderr == ""
    early, imports, names, raised, info = json.loads(result.stdout)
    assert early == []
    assert imports == int(interpret)  # whether a GPU is there need not be known for other devices
    assert names == ["eager", "eager"]
    assert len(info["backends"]["triton"]) == len(raised) == bool(why)
    assert why in "".join(info["backends"]["triton"])
    assert why in "".join(raised)
    assert (info["triton"] is None) == bool(why)


@needs_triton
def test_info_counts_variants():
    before = wnkernel.info()["triton"]
    assert json.loads(json.dumps(before)) == before
    run([rows_case(1, 3, 60)])
    run([rows_case(1, 4, 61)])  # another tile
    run([rows_case(1, 70, 56)])  # the tile of the first
    launched = wnkernel.info()["triton"]["launched"] - before["launched"]
    assert launched == 4
    assert launched <= before["at_most_per_dtypes"] < 100

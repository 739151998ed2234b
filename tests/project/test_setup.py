"""setup.py: what an sdist holds, and when and for which GPUs CUDA kernels are built. With scripts
for nvcc and other answers of torch, nothing is compiled."""

from __future__ import annotations

import importlib.util
import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import pytest
import torch

from buildtools import wheels
from wnkernel import installation

from ..processes import PATIENCE_S, ROOT

pytest.importorskip("torch.utils.cpp_extension", reason="building needs setuptools")
needs_scripts = pytest.mark.skipif(os.name == "nt", reason="nvcc is a shell script here")

OF_TORCH = "sm_75 sm_80 sm_86 sm_90 sm_100 sm_120 compute_120"
OF_NVCC = "sm_75 sm_80 sm_86 sm_87 sm_89 sm_90 sm_100 sm_110 sm_103 sm_120 sm_121"

NVCC = """#!/bin/sh
case "$1" in
  --version) echo "Cuda compilation tools, release {version}, V{version}.88" ;;
  --list-gpu-code) echo "{gpus}" ;;
  *) exit 1 ;;
esac
"""
BROKEN_NVCC = "#!/bin/sh\nexit 1\n"


FOLDERS = (
    *("benchmarks", "buildtools", "csrc", "docs", "examples", "tests", "wnkernel"),
    *(".ci", ".github"),
)
FILES = (
    *("setup.py", "pyproject.toml", "MANIFEST.in", "Makefile", "noxfile.py", "LICENSE"),
    *("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", ".clang-format", ".gitignore"),
)
"""Everything that is in the repository."""


@pytest.fixture
def script() -> ModuleType:
    """setup.py, of which setup() is not called."""
    spec = importlib.util.spec_from_file_location("wnkernel_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_an_sdist_has_what_a_build_needs(tmp_path):
    """And what tests need, whatever was built before, and without torch: WNKERNEL_BUILD=none does
    not look for it."""
    checkout = tmp_path / "checkout"
    built = shutil.ignore_patterns("_C*.so", "_build_info.py", "__pycache__", "out")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, checkout / folder, ignore=built)
    for file in FILES:
        shutil.copy(ROOT / file, checkout)
    sources = {
        str(path.relative_to(checkout)) for path in checkout.rglob("*") if path.is_file()
    } - {"setup.cfg"}
    for file in ("_build_info.py", "_C.cpython-311-x86_64-linux-gnu.so"):
        (checkout / "wnkernel" / file).touch()
    (checkout / "benchmarks" / "out").mkdir()
    (checkout / "benchmarks" / "out" / "cpu.csv").touch()
    subprocess.run(
        [sys.executable, "setup.py", "-q", "sdist"],
        cwd=checkout, env=os.environ | {"WNKERNEL_BUILD": "none"}, check=True, timeout=PATIENCE_S,
    )  # fmt: skip
    (archive,) = (checkout / "dist").iterdir()
    with tarfile.open(archive) as opened:
        found = {
            name.partition("/")[2] for name in opened.getnames() if opened.getmember(name).isfile()
        }
    assert {"csrc/cuda/dispatch.cpp", "csrc/cuda/types_f32.cu", "csrc/cuda/plan.h"} <= sources
    metadata = {name for name in found if "egg-info" in name} | {"PKG-INFO", "setup.cfg"}
    assert found - metadata == sources


def test_the_script_builds_when_it_is_run(monkeypatch):
    """As installers do, who execute its text."""
    calls = []
    monkeypatch.setattr("setuptools.setup", lambda **arguments: calls.append(arguments))
    monkeypatch.setenv("WNKERNEL_BUILD", "none")
    monkeypatch.setattr(sys, "argv", ["setup.py", "egg_info"])
    runpy.run_path(str(ROOT / "setup.py"), run_name="__main__")
    (arguments,) = calls
    assert "ext_modules" not in arguments


class Machine:
    """A CUDA build of torch, GPUs and toolkits, as setup.py sees them."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._folder, self._patch = folder, monkeypatch
        for name in ("CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST"):
            monkeypatch.setenv(name, "")  # so that what setup.py sets is undone
            monkeypatch.delenv(name)
        monkeypatch.setenv("PATH", os.pathsep.join(["/usr/bin", "/bin"]))
        self.torch("13.0")
        self.cards([])

    def torch(self, cuda: str | None, built_for: str | None = OF_TORCH) -> None:
        self._patch.setattr(torch.version, "cuda", cuda)
        self._patch.setattr(torch._C, "_cuda_getArchFlags", lambda: built_for, raising=False)

    def cards(self, capabilities: Sequence[tuple[int, int]] | Exception) -> None:
        def capability(k: int) -> tuple[int, int]:
            if isinstance(capabilities, Exception):
                raise capabilities
            return capabilities[k]

        count = 1 if isinstance(capabilities, Exception) else len(capabilities)
        self._patch.setattr(torch.cuda, "device_count", lambda: count)
        self._patch.setattr(torch.cuda, "get_device_capability", capability)

    def toolkit(
        self, version: str = "13.0", gpus: str = OF_NVCC, name: str = "cuda", headers: bool = True
    ) -> Path:
        """A toolkit and its folder; an nvcc of no version fails."""
        home = self._folder / name
        (home / "bin").mkdir(parents=True)
        nvcc = home / "bin" / "nvcc"
        nvcc.write_text(NVCC.format(version=version, gpus=gpus) if version else BROKEN_NVCC)
        nvcc.chmod(0o755)
        if headers:
            (home / "include").mkdir()
            (home / "include" / "cuda_runtime.h").touch()
        return home


@pytest.fixture
def machine(tmp_path, monkeypatch) -> Machine:
    return Machine(tmp_path, monkeypatch)


@needs_scripts
def test_a_toolkit_has_both_nvcc_and_headers(script, machine, monkeypatch, tmp_path):
    whole, without_headers = machine.toolkit(), machine.toolkit(name="bare", headers=False)
    without_nvcc = machine.toolkit(name="headers")
    (without_nvcc / "bin" / "nvcc").unlink()
    monkeypatch.setenv("CUDA_PATH", str(whole))
    for home in (without_headers, without_nvcc):
        monkeypatch.setenv("CUDA_HOME", str(home))
        assert script.cuda_home() == str(whole)
    monkeypatch.delenv("CUDA_PATH")
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / "nvcc").symlink_to(whole / "bin" / "nvcc")
    monkeypatch.setenv("PATH", str(linked))
    assert script.cuda_home() == str(whole)


@needs_scripts
@pytest.mark.parametrize(
    ("cards", "nvcc", "of_torch", "built_for"),
    [
        pytest.param([], OF_NVCC, OF_TORCH, "8.0;9.0;10.0+PTX", id="no GPU"),
        pytest.param([], "sm_50 sm_80 sm_90", OF_TORCH, "8.0;9.0+PTX", id="nvcc without Blackwell"),
        pytest.param([], OF_NVCC, "sm_50 sm_90", "8.0;9.0+PTX", id="torch without Blackwell"),
        pytest.param([], OF_NVCC, "sm_75", "7.5+PTX", id="torch of one old GPU"),
        pytest.param([], OF_NVCC, None, "8.0;9.0;10.0+PTX", id="torch that does not say"),
        pytest.param([(9, 0)], OF_NVCC, OF_TORCH, "9.0", id="one card"),
        pytest.param([(12, 0), (9, 0), (9, 0)], OF_NVCC, OF_TORCH, "9.0;12.0", id="three cards"),
        pytest.param([(8, 9)], OF_NVCC, OF_TORCH, "8.9", id="nvcc knows more than torch was for"),
        pytest.param([(12, 0)], "sm_80 sm_90 sm_90a", OF_TORCH, "9.0+PTX", id="newer than nvcc"),
        pytest.param([(12, 0)], OF_NVCC, "sm_80 sm_90", "9.0+PTX", id="newer than torch"),
        pytest.param([(10, 3), (9, 0)], "sm_90 sm_100 sm_120", OF_TORCH, "9.0;10.0+PTX", id="10.3"),
        pytest.param([(9, 0), (12, 0)], "sm_90", OF_TORCH, "9.0+PTX", id="one newer"),
        pytest.param([(6, 1), (9, 0)], "sm_61 " + OF_NVCC, OF_TORCH, "9.0", id="one too old"),
        pytest.param([(6, 1)], "sm_61 " + OF_NVCC, OF_TORCH, "8.0;9.0;10.0+PTX", id="too old"),
        pytest.param([(7, 0)], OF_NVCC, OF_TORCH, "8.0;9.0;10.0+PTX", id="too old for nvcc"),
        pytest.param(RuntimeError("driver"), OF_NVCC, OF_TORCH, "8.0;9.0;10.0+PTX", id="driver"),
    ],
)
@pytest.mark.parametrize("asked", [None, "", "native"])
def test_which_gpus_are_built_for(
    script, machine, monkeypatch, cards, nvcc, of_torch, built_for, asked
):
    machine.torch("13.0", of_torch)
    machine.cards(cards)
    home = machine.toolkit(gpus=nvcc)
    monkeypatch.setenv("CUDA_PATH", str(home))
    if asked is not None:
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked)
    assert script.no_cuda() == ""
    assert os.environ["TORCH_CUDA_ARCH_LIST"] == built_for
    assert os.environ["CUDA_HOME"] == str(home)  # where torch looks


@needs_scripts
def test_gpus_that_are_asked_for_stay(script, machine, monkeypatch):
    machine.cards([(9, 0)])
    monkeypatch.setenv("CUDA_HOME", str(machine.toolkit()))
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.6 9.0a+PTX")
    assert script.no_cuda() == ""
    assert os.environ["TORCH_CUDA_ARCH_LIST"] == "8.6 9.0a+PTX"


REASONS: dict[str, tuple[Callable[[Machine], object], str]] = {
    "no CUDA": (lambda m: m.torch(None), "has no CUDA"),
    "fails": (lambda m: m.toolkit(""), "no CUDA toolkit with nvcc was found: set CUDA_HOME"),
    "old": (lambda m: m.toolkit("12.0"), "nvcc 12.0 is too old, 12.1 is needed"),
    "other": (lambda m: m.toolkit("12.9"), "nvcc 12.9 and torch's CUDA 13.0 differ"),
    "no GPU": (lambda m: m.toolkit(gpus="sm_61"), "nvcc 13.0 and torch have no GPU in common"),
}


@needs_scripts
@pytest.mark.parametrize("why", REASONS)
def test_why_there_can_be_no_kernels(script, machine, monkeypatch, tmp_path, why):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    prepare, reason = REASONS[why]
    prepare(machine)
    assert script.no_cuda().endswith(reason)


@needs_scripts
def test_no_kernels_without_their_sources(script, machine, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(machine.toolkit()))
    monkeypatch.setattr(script, "CUDA_SOURCES", [])
    assert script.no_cuda() == "csrc/cuda is not here"


@needs_scripts
@pytest.mark.parametrize("mode", ["auto", "cuda"])
def test_kernels_that_were_asked_for_are_an_error_without(
    script, machine, monkeypatch, capsys, mode
):
    monkeypatch.setenv("CUDA_HOME", str(machine.toolkit("12.9")))
    monkeypatch.setenv("WNKERNEL_BUILD", mode)
    monkeypatch.setattr(sys, "argv", ["setup.py", "build_ext"])
    if mode == "cuda":
        with pytest.raises(SystemExit, match=r"=cuda: nvcc 12\.9 and torch"):
            script.extension_arguments()
        return
    (extension,) = script.extension_arguments()["ext_modules"]
    assert not [source for source in extension.sources if "cuda/" in source]
    assert "there will be no CUDA kernels: nvcc 12.9" in capsys.readouterr().err


def test_what_was_built_is_python_whatever_was_asked_for(script, machine, monkeypatch):
    asked = "8.0'\"\\;9.0"
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked)
    for cuda in (True, False):
        said: dict[str, str] = {}
        exec(script.build_info(cuda), said)
        assert said["TORCH_VERSION"] == torch.__version__
        assert said["CUDA_VERSION"] == ("13.0" if cuda else "")
        assert said["CUDA_ARCHITECTURES"] == (asked if cuda else "")


@pytest.mark.parametrize("watched", ["address", "thread", "coverage"])
def test_what_watches_is_compiled_and_linked_in(script, monkeypatch, watched):
    plain = script.compile_flags()
    monkeypatch.setenv("WNKERNEL_INSTRUMENT", watched)
    asked = {"address": "-fsanitize=address,undefined", "thread": "-fsanitize=thread"}
    flag = asked.get(watched, "--coverage")
    assert flag in script.compile_flags()
    assert flag in script.link_flags()
    assert flag not in plain


def test_everybody_who_builds_has_the_same_tools():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    tools = re.search(r"^requires = \[(.+)\]$", project, re.MULTILINE)[1]
    assert tools == ", ".join(f'"{tool}"' for tool in installation.BUILD_TOOLS)
    assert wheels.BUILD_TOOLS == installation.BUILD_TOOLS
    for path in ("Makefile", "tests/matrix.py"):
        text = (ROOT / path).read_text(encoding="utf-8")
        assert set(re.findall(r"setuptools[>=<]+\d+", text)) == {installation.BUILD_TOOLS[0]}


def test_nothing_else_can_watch(script, monkeypatch):
    monkeypatch.setenv("WNKERNEL_INSTRUMENT", "asan")
    with pytest.raises(
        SystemExit, match="expected address, thread, coverage or nothing, got 'asan'"
    ):
        script.compile_flags()

"""What is around the CUDA kernels: their operators compile, as far as a CPU build of torch can
tell; cards are told from those that they cannot run on; no product is fused by the compiler."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.cpp_extension import include_paths

from wnkernel import native
from wnkernel.backends.compiled import CompiledBackend

from ..processes import ROOT
from .compiler import FLAGS, SOURCES, find_tool

NVCC, CUOBJDUMP = find_tool("nvcc"), find_tool("cuobjdump")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="nvcc was not found")

# Numbers of CUDA errors, in the words of csrc/cuda/answer.h.
OUT_OF_MEMORY, INSUFFICIENT_DRIVER, INVALID_FUNCTION, NO_IMAGE, SYSTEM = 2, 35, 98, 209, 800
ENOUGH = 12010


def run(*command: object) -> str:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@needs_nvcc
def test_the_operators_compile(tmp_path):
    folders = [Path(folder) for folder in include_paths()]
    if not any((folder / "c10/cuda/CUDAStream.h").exists() for folder in folders):
        pytest.skip("this torch came without the headers of c10/cuda")
    made = tmp_path / "c10" / "cuda" / "impl" / "cuda_cmake_macros.h"  # by a build for CUDA
    made.parent.mkdir(parents=True)
    made.write_text("#pragma once\n")
    of_torch = [part for folder in folders for part in ("-isystem", folder)]
    run(
        NVCC, "-std=c++20", "-Xcompiler", "-fsyntax-only", "-DWNKERNEL_CUDA", *of_torch,
        f"-I{tmp_path}", "-c", "-o", tmp_path / "ops_cuda.o", ROOT / "csrc" / "ops_cuda.cpp",
    )  # fmt: skip


@needs_nvcc
@pytest.mark.parametrize("arch", ["sm_80", "sm_100"])
def test_what_asks_a_card_compiles(tmp_path, arch):
    cubin = tmp_path / "support.cubin"
    run(NVCC, *FLAGS, "-cubin", f"-arch={arch}", "-o", cubin, SOURCES / "support.cu")
    assert b"nothing" in cubin.read_bytes()  # the kernel


@needs_nvcc
@pytest.mark.skipif(CUOBJDUMP is None, reason="cuobjdump was not found")
def test_a_build_fuses_no_products(tmp_path):
    source, cubin = tmp_path / "product.cu", tmp_path / "product.cubin"
    source.write_text("__global__ void f(float* x) { x[0] = x[1] * x[2] + x[3]; }")
    for flags, fused in ((FLAGS, False), (("-O3",), True)):
        run(NVCC, *flags, "-cubin", "-arch=sm_90", "-o", cubin, source)
        assert ("FFMA" in run(CUOBJDUMP, "-sass", cubin)) == fused


CUDA_WITHOUT_CARDS = """
#pragma once
#define __global__
using cudaError_t = int;
enum {
  cudaSuccess = 0,
  cudaErrorInsufficientDriver = 35,
  cudaErrorInvalidDeviceFunction = 98,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorJitCompilerNotFound = 221,
  cudaErrorUnsupportedPtxVersion = 222,
  cudaErrorJitCompilationDisabled = 223,
};
struct cudaFuncAttributes {};
extern "C" int driver, function, last, asked;
inline int cudaDriverGetVersion(int* version) { return *version = driver, 0; }
inline int cudaFuncGetAttributes(cudaFuncAttributes*, void (*)()) {
  ++asked;
  return last = function;
}
inline int cudaGetLastError() { const int error = last; return last = 0, error; }
"""

ASK = """
#include "cuda/answer.h"
#include "weight_norm.h"
extern "C" {
int driver, function, last, asked;
int answer_of(int device) {
  static wnkernel::Answer answers[8];
  return answers[device].get(wnkernel::cuda_supports_device);
}
}
"""


class Cards:
    """What the cards of a machine without any would answer."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        self._unused = iter(range(8))

    def another(self) -> Callable[[], int]:
        """Asks a card that was not asked before."""
        device = next(self._unused)
        return lambda: self._library.answer_of(device)

    def __getattr__(self, name: str) -> int:
        return ctypes.c_int.in_dll(self._library, name).value

    def set(self, **values: int) -> None:
        for name, value in values.items():
            ctypes.c_int.in_dll(self._library, name).value = value


@pytest.fixture(scope="module")
def cards(tmp_path_factory: pytest.TempPathFactory) -> Cards:
    if shutil.which("g++") is None:
        pytest.skip("g++ was not found")
    folder = tmp_path_factory.mktemp("cards")
    (folder / "simt.h").write_text(CUDA_WITHOUT_CARDS)  # in place of CUDA, see csrc/cuda/device.h
    (folder / "ask.cpp").write_text(ASK)
    library = folder / "libcards.so"
    flags = ("-std=c++17", "-shared", "-fPIC", "-DWNKERNEL_SIMT", f"-I{folder}")
    run(
        "g++", *flags, f"-I{ROOT / 'csrc'}", "-x", "c++", folder / "ask.cpp",
        SOURCES / "support.cu", "-o", library,
    )  # fmt: skip
    return Cards(library)


@pytest.mark.parametrize(
    ("driver", "function", "answer"),
    [
        (ENOUGH, 0, 0),
        (ENOUGH - 1, 0, INSUFFICIENT_DRIVER),
        (ENOUGH, NO_IMAGE, NO_IMAGE),
        (13000, INVALID_FUNCTION, INVALID_FUNCTION),
    ],
)
def test_a_card_is_asked_once_whether_there_is_code_for_it(cards, driver, function, answer):
    """And its driver whether it takes the arguments of a list."""
    cards.set(driver=driver, function=function, last=0)
    ask = cards.another()
    assert ask() == answer
    assert cards.last == 0  # it is nobody else's error
    cards.set(driver=ENOUGH, function=SYSTEM, asked=0)
    assert ask() == answer
    assert cards.asked == 0


def test_an_error_that_passes_is_not_kept(cards):
    ask = cards.another()
    cards.set(driver=ENOUGH, last=0)
    for error in (OUT_OF_MEMORY, SYSTEM, 0):
        cards.set(function=error)
        assert ask() == error
        assert cards.last == 0


def test_a_reason_has_the_words_of_cuda_and_what_was_built(monkeypatch):
    monkeypatch.setattr(native, "cuda_reason", lambda device: "out of memory")
    monkeypatch.setitem(native.BUILD_INFO, "cuda_architectures", "9.0")
    monkeypatch.setitem(native.BUILD_INFO, "devices", ["cpu", "cuda"])
    backend, v = CompiledBackend("cuda"), SimpleNamespace(device=torch.device("cuda", 1))
    monkeypatch.setattr(backend, "missing", list)
    (reason,) = backend.reasons(v)
    assert reason == "cuda:1: out of memory (wnkernel._C was built for compute capabilities 9.0)"
    assert not backend.takes(v)
    monkeypatch.setattr(native, "cuda_reason", lambda device: "")
    assert backend.reasons(v) == []
    assert backend.takes(v)
    monkeypatch.setattr(backend, "missing", lambda: ["no GPU"])
    assert backend.reasons(v) == ["no GPU"]
    assert not backend.takes(v)

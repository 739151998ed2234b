"""The CUDA compiler, if there is one, and what it makes of csrc/cuda."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from ..processes import ROOT

SOURCES = ROOT / "csrc" / "cuda"
_OF_SETUP = re.search(r"^NVCC_FLAGS = (.*)$", (ROOT / "setup.py").read_text(), re.MULTILINE)[1]
FLAGS = ("-std=c++17", *ast.literal_eval(_OF_SETUP))
"""Those of a build."""


def find_tool(name: str) -> str | None:
    """A program of the CUDA toolkit, where setup.py looks: in CUDA_HOME, on PATH; else from PyPI
    (nvidia-cuda-nvcc), or from Triton, which brings cuobjdump."""
    homes = [os.environ.get(home) for home in ("CUDA_HOME", "CUDA_PATH")]
    tools = [Path(home, "bin", name) for home in homes if home]
    tools += [Path(found) for found in (shutil.which(name),) if found]
    tools += [Path("/usr/local/cuda/bin", name)]
    for package, *below in (("nvidia", "cu13"), ("triton", "backends", "nvidia")):
        spec = find_spec(package)
        places = spec.submodule_search_locations if spec else ()
        tools += [Path(place, *below, "bin", name) for place in places]
    return next((str(tool) for tool in tools if tool.exists()), None)


THREADS, WARP = 256, 32
"""Of a block; of a warp."""
REGISTERS, UNIT = 65_536, 256
"""Of a processor; given to warps in units."""


class Kernel(NamedTuple):
    """One compiled kernel."""

    direction: str
    lines: int
    """Of its table."""
    of: str
    finish: bool
    registers: int
    stack_bytes: int
    local_bytes: int
    code: tuple[str, ...]
    """Its accesses to memory, and where threads wait for each other, one after the other: "LDG 16"
    is a load of 16 bytes from global memory, "STL 4" a store of 4 bytes to a thread's own memory, a
    spill; "SHFL" and "BAR"."""

    @property
    def accesses(self) -> Counter[str]:
        """How many instructions there are of each."""
        return Counter(self.code)

    @property
    def blocks_of_processor(self) -> int:
        """As many as its registers allow, which are given to warps in units of 256."""
        of_warp = -(-self.registers * WARP // UNIT) * UNIT
        return REGISTERS // of_warp // (THREADS // WARP)

    def __str__(self) -> str:
        many = "single" if self.lines == 1 else f"list of {self.lines}"
        return f"{self.direction}, {many}, {self.of}, launch {self.finish + 1}"


_NAME = r"weight_norm_kernel\w*?(Forward|Backward)LineE\w*?Li(\d+)ELi([123])ELb([01])E"
_OF = {"1": "rows", "2": "tiles", "3": "all"}


def compile_kernels(nvcc: str, cuobjdump: str, source: Path, arch: str, to: Path, *flags: str):
    """The kernels of one source for one architecture ("sm_90").

    Raises:
        subprocess.CalledProcessError: it does not compile.
    """
    cubin = to / f"{source.stem}_{arch}.cubin"
    command = [nvcc, *FLAGS, *flags, "-cubin", f"-arch={arch}", "-o", str(cubin), str(source)]
    subprocess.run(command, check=True, capture_output=True, text=True)

    def dump(option: str) -> str:
        command = [cuobjdump, option, str(cubin)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    code = {}
    for function in dump("-sass").split("Function : ")[1:]:
        found = re.findall(r"\b(?:(LDG|STG|LDL|STL)\b\.?([\w.]*)|(SHFL|BAR)\.)", function)
        code[function.split()[0]] = tuple(
            wait or f"{op} {_width(kind)}" for op, kind, wait in found
        )
    kernels = []
    for name, use in re.findall(r"Function (\w+):\s*\n\s*(.*)", dump("--dump-resource-usage")):
        direction, capacity, of, finish = re.search(_NAME, name).groups()
        registers, stack, local = (
            int(re.search(rf"{what}:(\d+)", use)[1]) for what in ("REG", "STACK", "LOCAL")
        )
        kernels.append(
            Kernel(
                direction.lower(),
                int(capacity),
                _OF[of],
                finish == "1",
                registers,
                stack,
                local,
                code[name],
            )
        )
    return kernels


def _width(kind: str) -> int:
    """Bytes, from what follows the name of an instruction."""
    for bits in (128, 64):
        if re.search(rf"\b{bits}\b", kind):
            return bits // 8
    return 1 if re.search(r"\b[US]8\b", kind) else 2 if re.search(r"\b[US]16\b", kind) else 4

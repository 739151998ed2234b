"""Compiles the Triton kernels for GPUs that are not there: reads requests, a line of JSON each, and
answers each with a line of JSON that says what came of it.

A process of its own, for whether Triton interprets is decided when it is imported. Kernels go
through this package's launcher and Triton's own binding of arguments, up to the point where they
would be loaded. So what is looked at is what runs.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from math import ceil, prod
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from wnkernel.backends.triton import variants
from wnkernel.backends.triton.plan import tiles
from wnkernel.backends.triton.tables import BACKWARD, FORWARD
from wnkernel.backends.triton.variants import Types, Variant

TARGETS = {
    "cuda80": GPUTarget("cuda", 80, 32),
    "cuda90": GPUTarget("cuda", 90, 32),
    "cuda100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DIRECTIONS = {"forward": FORWARD, "backward": BACKWARD}
NUMBERS = (1, 7, 16)
"""Arguments that Triton would tell apart if it were let."""

AMD_BYTES = {"byte": 1, "ubyte": 1, "sbyte": 1, "short": 2, "ushort": 2, "sshort": 2, "dword": 4}

Compiled = triton.compiler.CompiledKernel


class NoGpu:
    """What Triton asks of a driver before it loads a kernel. Each GPU is a device of its own."""

    def __init__(self, name: str) -> None:
        self.device = torch.device("cuda", list(TARGETS).index(name))
        self._target = TARGETS[name]

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return self.device.index

    def get_current_stream(self, device: int) -> int:
        return 0


class NotLaunched:
    """Stands for a kernel: compiles instead of launching, after changes to what was chosen."""

    def __init__(self, kernel: triton.JITFunction, changes: Mapping[str, Any]) -> None:
        self._kernel = kernel
        self._changes = changes
        self.compiled: list[Compiled] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: int, **choices: Any) -> None:
            choices |= self._changes
            self.compiled.append(self._kernel.warmup(*args, grid=grid, **choices))

        return launch


def compiled(
    variant: Variant, changes: Mapping[str, Any], numbers: Sequence[int] = (1,)
) -> list[Compiled]:
    """A variant as it is launched, once with each of ``numbers`` for all of its arguments."""
    launched = copy(variant)
    launched.kernel = NotLaunched(variant.kernel, changes)
    arguments = sum(not p.is_constexpr for p in variant.kernel.params)
    for n in numbers:
        launched.launch(1, [n] * arguments)
    return launched.kernel.compiled


def facts_of(request: Mapping[str, Any], cuobjdump: str) -> dict[str, Any]:
    """Compile and describe one variant: ``dtypes`` of v, g and w; ``direction``; ``tile``, its
    place in the table, for a single weight, None for a list of rows or of ``every`` tile;
    ``finish``, 1 for a second launch; ``changes`` to choices and options; ``disassemble`` it."""
    t = Types(*(getattr(torch, name) for name in request["dtypes"]))
    direction = DIRECTIONS[request["direction"]]
    tile, finish = request["tile"], request["finish"]
    device = triton.runtime.driver.active.device
    if tile is None:
        variant = variants.of_list(direction, t, not request["every"], finish, device)
    else:
        variant = variants.of_one(direction, t, tiles(t.v.itemsize)[tile], finish, device)
    changes = request["changes"]
    if "TILES" in changes:
        changes = changes | {"TILES": tuple(map(tuple, changes["TILES"]))}
    (result,) = compiled(variant, changes)
    if "cubin" in result.asm:
        return _cuda(result.asm, cuobjdump, request["disassemble"])
    return _amd(result.asm)


def _cuda(asm: Mapping[str, Any], cuobjdump: str, disassemble: bool) -> dict[str, Any]:
    """Widths of accesses are PTX's, for the assembler translates them one to one, and disassembling
    takes half a second, as long as compiling a kernel for single weights."""
    encodings = _encodings(asm["ttgir"])
    described = {
        "promises": _promises(asm["ttir"]),
        "loads": _ptx_widths("ld", asm["ptx"]),
        "stores": _ptx_widths("st", asm["ptx"]),
        "fused": _fused(r"\bfma\.[.\w]*f(?:32|64)(x2)?\b", asm["ptx"]),
        "tensor_loads": _accesses("load", asm["ttgir"], encodings),
        "tensor_stores": _accesses("store", asm["ttgir"], encodings),
        "reductions": _reductions(asm["ttgir"], encodings),
    }
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(asm["cubin"])
        usage = _output(cuobjdump, "-res-usage", str(file))
        found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
        assert found, usage
        described["registers"] = int(found[1])
        described["spilled_bytes"] = int(found[2]) + int(found[3])
        if disassemble:
            sass = _output(cuobjdump, "-sass", str(file))
            described["machine_loads"] = len(re.findall(r"\bLDG\.E\.[\w.]*128\b", sass))
            described["machine_stores"] = len(re.findall(r"\bSTG\.E\.[\w.]*128\b", sass))
            described["machine_spills"] = len(re.findall(r"\b(?:LDL|STL)\b", sass))
    return described


def _amd(asm: Mapping[str, Any]) -> dict[str, Any]:
    code = asm["amdgcn"]
    facts = {k: int(n) for k, n in re.findall(r"^\s+\.(\w+):\s+(\d+)$", code, re.MULTILINE)}
    spilled = ("vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size")
    return {
        "promises": _promises(asm["ttir"]),
        "registers": facts["vgpr_count"],
        "spilled_bytes": sum(facts[name] for name in spilled),
        "loads": _amd_widths("load", code),
        "stores": _amd_widths("store", code),
        "fused": _fused(r"\bv_(pk_)?(?:fma|fmac|mad|mac)_f(?:32|64)", code),
        "reductions": _reductions(asm["ttgir"], _encodings(asm["ttgir"])),
    }


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _fused(pattern: str, code: str) -> int:
    """Fused multiplications and additions, two where the group of the pattern is there."""
    return sum(2 if packed else 1 for packed in re.findall(pattern, code))


def _ptx_widths(instruction: str, ptx: str) -> Counter[int]:
    """How many accesses to global memory there are of how many bytes."""
    found = re.findall(rf"\b{instruction}\.global[.\w]*?(?:\.v(\d))?\.[bfus](\d+)\b", ptx)
    return Counter(int(vector or 1) * int(bits) // 8 for vector, bits in found)


def _amd_widths(instruction: str, code: str) -> Counter[int]:
    pattern = rf"\b(?:global|buffer|flat)_{instruction}_([a-z]+)(?:_d16(?:_hi)?)?(?:x(\d))?\b"
    found = re.findall(pattern, code)
    return Counter(AMD_BYTES[word] * int(times or 1) for word, times in found)


def _promises(ttir: str) -> list[tuple[str, int]]:
    """What pointers point to, and of how many bytes their addresses are said to be multiples."""
    pattern = r"tt\.divisibility = dense<(\d+)> .*: !tt\.ptr<(\w+)>"
    return sorted({(of, int(n)) for n, of in re.findall(pattern, ttir)})


def _encodings(ttgir: str) -> dict[str, str]:
    return dict(re.findall(r"^(#\w+) = #(ttg\.\w+<.*>)$", ttgir, re.MULTILINE))


def _written_out(layout: str, encodings: Mapping[str, str]) -> str:
    """A layout without names, which count from one for each kernel."""
    return re.sub(r"#\w+\b(?!\.)", lambda name: encodings[name[0]], layout)


def _reductions(ttgir: str, encodings: Mapping[str, str]) -> Counter[str]:
    """Along which axis of what type in what layout floats are reduced, and how often."""
    pattern = r'"tt\.reduce"\([^)]*\) <\{axis = (\d+).*?^\s*\}\) : \((tensor<.*?)\) -> '
    return Counter(
        f"axis {axis} of {_written_out(of, encodings)}"
        for axis, of in re.findall(pattern, ttgir, re.MULTILINE | re.DOTALL)
        if re.match(r"tensor<[\dx]+xf\d", of)
    )


def _accesses(instruction: str, ttgir: str, encodings: Mapping[str, str]) -> list[dict[str, Any]]:
    """The shapes that are loaded or stored at once, and elements for each thread."""
    accesses = []
    for of in re.findall(rf"tt\.{instruction} .* : (.*) loc\(", ttgir):
        tensor = re.fullmatch(r"tensor<([\dx]+)x!tt\.ptr<\w+>, (.*)>", of)
        shape = [int(n) for n in tensor[1].split("x")] if tensor else []
        layout = _written_out(tensor[2], encodings) if tensor else ""
        accesses.append({"shape": shape, "per_thread": _per_thread(shape, layout)})
    return accesses


def _per_thread(shape: Sequence[int], layout: str) -> int:
    """Elements of a blocked layout, or of a slice of one, that a thread has, repeated or not."""
    if not shape:
        return 1
    extents = list(shape)
    while parent := re.fullmatch(r"#?ttg\.slice<\{dim = (\d), parent = (.*)\}>", layout):
        extents.insert(int(parent[1]), 1)
        layout = parent[2]
    counts = re.findall(r"(?:sizePerThread|threadsPerWarp|warpsPerCTA) = \[([\d, ]+)\]", layout)
    per_thread, threads, warps = ([int(n) for n in count.split(",")] for count in counts)
    dims = zip(extents, per_thread, threads, warps, strict=True)
    return prod(ceil(extent / (n * t * w)) * n for extent, n, t, w in dims)


def specialised(kernels: Sequence[triton.JITFunction]) -> dict[str, list[str]]:
    """Of each kernel, the arguments whose values Triton may compile in; of a small variant of those
    for single weights, also whether it does."""
    tile = min(tiles(4), key=lambda k: k.lines * k.columns)
    device = triton.runtime.driver.active.device
    small = copy(variants.of_one(FORWARD, Types(*[torch.float32] * 3), tile, 0, device))
    found = {}
    for kernel in kernels:
        found[kernel.__name__] = [
            p.name
            for p in kernel.params
            if not (p.is_constexpr or (p.do_not_specialize and p.annotation_type == "i64"))
        ]
        if "TILES" not in kernel.arg_names:
            small.kernel = kernel
            results = compiled(small, {}, NUMBERS)
            if any(result is not results[0] for result in results):
                found[kernel.__name__].append("compiled more than once")
    return found


def answer(request: Mapping[str, Any]) -> Any:
    """``gpu``; ``variants`` to compile, or None to look at arguments; where ``cuobjdump`` is."""
    triton.runtime.driver.set_active(NoGpu(request["gpu"]))
    if request["variants"] is not None:
        return [facts_of(v, request["cuobjdump"]) for v in request["variants"]]
    kernels = [of[d] for d in DIRECTIONS.values() for of in (variants.OF_ONE, variants.OF_LIST)]
    mutants = [triton.jit(kernel.fn) for kernel in kernels[:2]]
    return {"as launched": specialised(kernels), "mutant": specialised(mutants)}


def main() -> None:
    """Answer until there are no more requests."""
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)  # Triton prints what went wrong
        for line in sys.stdin:
            print(json.dumps(answer(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()

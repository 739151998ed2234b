"""Tests of the compiled module while sanitizers watch it: ``make sanitize``.

The module is built in a copy of the working tree, where the tests run. The sanitizer's library has
to be there before Python is, so it is preloaded; Python and torch are not watched themselves.

``address``: AddressSanitizer and UndefinedBehaviorSanitizer, with every instruction set of this
processor, and what a loop leaves behind. ``thread``: ThreadSanitizer. ``--quick``: the
kernels alone, which take no build of the module, with the widest instruction set.
"""

from __future__ import annotations

import argparse
import filecmp
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from .bits import SETS
from .cpu.launches import COMPILER, FLAGS

ROOT = Path(__file__).resolve().parent.parent
REPORT = "report"
"""How names of files begin in which sanitizers report."""


class Sanitizer(NamedTuple):
    """How a sanitizer is run."""

    library: str
    options: dict[str, str]
    """Environment variables."""
    tests: Sequence[str]
    """Files of tests, by their paths below tests/ and without .py."""
    sets: Sequence[str] = ("",)
    """Instruction sets, each in a run of its own."""


CORE = (
    *("values", "lists", "gradients", "bad_input", "buffers", "norms", "norms_of_v"),
    *("determinism", "operators", "problem", "forms", "machine", "single_path"),
    *("single_node", "transforms", "inference_mode", "threads"),
)
GROUPING = ("slots", "launches", "autograd", "memory", "modes")

SANITIZERS = {
    "address": Sanitizer(
        "libasan.so",
        # Python leaves much behind when it ends: leaks are for a process of their own.
        {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"},
        (
            *(f"core/test_{name}" for name in CORE),
            *(f"grouping/test_{name}" for name in GROUPING),
            "models/test_g_of_one_element",
        ),
        SETS[::-1],
    ),
    "thread": Sanitizer(
        "libtsan.so",
        # Threads of torch's OpenMP wait for each other where nobody watches: here is one of them.
        # The threads of a launch are real ones in run_kernels().
        {
            "TSAN_OPTIONS": f"suppressions={ROOT / 'tests' / 'tsan_suppressions.txt'}",
            "OMP_NUM_THREADS": "1",
        },
        (
            *("core/test_threads", "core/test_buffers", "core/test_single_node"),
            *("grouping/test_slots", "grouping/test_scopes", "grouping/test_memory"),
            *("grouping/test_launches", "models/test_serving"),
        ),
    ),
}

LEAKS = """
import ctypes, torch, wnkernel
from torch import nn
from wnkernel import functional as F

def step():
    v, g = torch.randn(128, 64, 8, requires_grad=True), torch.ones(128, 1, 1, requires_grad=True)
    for w in (F.weight_norm(v, g), *F.weight_norms([v, v], [g, g], [0, 0])):
        w.sum().backward()
    (grad,) = torch.autograd.grad(F.weight_norm(v, g).square().sum(), v, create_graph=True)
    grad.sum().backward()
    model = nn.Sequential(*(wnkernel.weight_norm(nn.Linear(200, 200)) for _ in range(2)))
    wnkernel.fuse(model)
    model(torch.randn(2, 200)).sum().backward()
    for wrong in (lambda: F.weight_norm(v, g[1:]), lambda: F.weight_norm(v, g, 7)):
        try:
            wrong()
        except (ValueError, IndexError):
            continue
        raise AssertionError("no error")

for _ in range(20):
    step()
ctypes.CDLL(None).__lsan_do_recoverable_leak_check()
print("looked for leaks")
"""
"""Ways through the module that allocate, and errors on the way."""


WHICH_SET = "import wnkernel; print(wnkernel.info()['compiled']['cpu_instruction_set'])"


def build(name: str) -> Path:
    """A copy of the working tree in which the module is instrumented. Compiles what changed."""
    tree = ROOT / "build" / name / "tree"
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    files = {file for file in listed.split("\0") if (ROOT / file).is_file()}
    for file in files:
        (tree / file).parent.mkdir(parents=True, exist_ok=True)
        if not (tree / file).exists() or not filecmp.cmp(ROOT / file, tree / file):
            shutil.copy(ROOT / file, tree / file)
    for folder in ("csrc", "tests", "wnkernel"):
        for path in (tree / folder).rglob("*.*"):
            made = "__pycache__" in path.parts or path.suffix == ".so" or path.stem == "_build_info"
            if path.is_file() and not made and str(path.relative_to(tree)) not in files:
                path.unlink()
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    environment = os.environ | {"WNKERNEL_BUILD": "cpu", "WNKERNEL_INSTRUMENT": name}
    subprocess.run(command, cwd=tree, env=environment, check=True)
    return tree


def watched(name: str, tree: Path, **more: str) -> dict[str, str]:
    """The environment of processes that a sanitizer watches. They report to files."""
    sanitizer = SANITIZERS[name]
    # libstdc++, which Python lacks: the sanitizers look for what throws exceptions when they start.
    libraries = [library(sanitizer.library), library("libstdc++.so")]
    environment = os.environ | sanitizer.options | more
    for options in ("ASAN_OPTIONS", "TSAN_OPTIONS"):
        environment[options] = f"{environment.get(options, '')}:log_path={tree / REPORT}"
    return environment | {
        "LD_PRELOAD": " ".join(libraries),
        "PYTHONPATH": str(tree),
        "OMP_WAIT_POLICY": "passive",
    }


def library(file: str) -> str:
    """The compiler's own."""
    command = [*COMPILER.split(), f"-print-file-name={file}"]
    path = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    if not os.path.isabs(path):
        raise SystemExit(f"{COMPILER} has no {file}")
    return path


def reports(tree: Path) -> list[str]:
    """What sanitizers have written since the last time."""
    files = sorted(tree.glob(f"{REPORT}.*"))
    found = [file.read_text() for file in files]
    for file in files:
        file.unlink()
    return found


def said(what: str, good: bool, began: float) -> bool:
    """Prints a line of a run; whether it was good."""
    print(f"{what}: {'passed' if good else 'FAILED'}, {time.monotonic() - began:.0f} s", flush=True)
    return good


def run_tests(name: str, tree: Path, arguments: list[str]) -> bool:
    """Whether they pass, and nothing is reported, with every instruction set that is there."""
    sanitizer = SANITIZERS[name]
    command = [sys.executable, "-m", "pytest", "-q", "-n", "2", "-p", "no:cacheprovider"]
    command += ["-k", "not triton and not eager"]  # where nothing of the module runs
    command += [*arguments, *(f"tests/{file}.py" for file in sanitizer.tests)]
    good = True
    for used in sanitizer.sets:
        began = time.monotonic()
        environment = watched(name, tree, **({"WNKERNEL_CPU_ISA": used} if used else {}))
        if used and used != used_set(tree, environment):
            print(f"{name} {used}: not run, this processor has no such instructions")
            continue
        done = subprocess.run(command, cwd=tree, env=environment)
        found = reports(tree)
        print(*found)
        good &= said(f"{name} {used}", done.returncode == 0 and not found, began)
    return good


def used_set(tree: Path, environment: dict[str, str]) -> str:
    """The instruction set that the module uses, which may be narrower than what was asked for."""
    command = [sys.executable, "-c", WHICH_SET]
    done = subprocess.run(
        command, cwd=tree, env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    return done.stdout.strip()


def run_kernels(name: str, quick: bool) -> bool:
    """Whether nothing is reported of the kernels alone, in real threads, without torch."""
    began = time.monotonic()
    program = ROOT / "build" / f"{name}_kernels"
    program.parent.mkdir(exist_ok=True)
    sources = [
        *sorted((ROOT / "csrc" / "cpu").glob("*.cpp")),
        ROOT / "tests" / "cpu" / "values.cpp",
    ]
    flags = [*FLAGS, "-g1", "-pthread"]
    flags += ["-fsanitize=thread" if name == "thread" else "-fsanitize=address,undefined"]
    subprocess.run([*COMPILER.split(), *flags, *map(str, sources), "-o", str(program)], check=True)
    good = True
    for used in SETS[-1:] if quick else SETS:
        done = subprocess.run([program], env=os.environ | {"WNKERNEL_CPU_ISA": used})
        good &= done.returncode == 0
    return said(f"{name}, kernels alone", good, began)


def run_loop(tree: Path) -> bool:
    """Whether nothing that the module has allocated is lost after some steps."""
    began = time.monotonic()
    environment = watched(
        "address",
        tree,
        ASAN_OPTIONS="detect_leaks=1:fast_unwind_on_malloc=0:exitcode=0",
        PYTHONMALLOC="malloc",  # or pointers are in memory where nobody looks for them
    )
    command = [sys.executable, "-c", LEAKS]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    found = re.split(r"\n(?=(?:Direct|Indirect) leak of )", "\n".join(reports(tree)))[1:]
    ours = [report for report in found if "/csrc/" in report]
    good = "looked for leaks" in done.stdout and not ours
    print(*ours if done.stdout else [done.stderr], sep="\n")
    print(f"{len(ours)} leaks of this module, {len(found) - len(ours)} of Python and torch")
    return said("leaks", good, began)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", help=" or ".join(SANITIZERS), metavar="SANITIZER")
    parser.add_argument("--quick", action="store_true", help="the kernels alone")
    chosen, arguments = parser.parse_known_args()
    good = True
    for name in chosen.names or SANITIZERS:
        good &= run_kernels(name, chosen.quick)
        if not chosen.quick:
            tree = build(name)
            reports(tree)
            good &= run_tests(name, tree, arguments)
            good &= name != "address" or run_loop(tree)
    return not good


if __name__ == "__main__":
    sys.exit(main())

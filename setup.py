"""Builds the optional compiled module wnkernel._C; everything else is in pyproject.toml.

WNKERNEL_BUILD=auto  (default) compiled if torch and a C++ compiler are there, else pure Python
WNKERNEL_BUILD=cpu   compiled CPU kernels or an error
WNKERNEL_BUILD=cuda  compiled CPU and CUDA kernels or an error
WNKERNEL_BUILD=none  pure Python
"""

import os
import platform
import subprocess
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
BUILD_INFO = ROOT / "wnkernel" / "_build_info.py"
BUILD_COMMANDS = {"build", "build_ext", "bdist_wheel", "develop", "editable_wheel", "install"}
SOURCES = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*.cpp"))
HEADERS = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*.h"))


def plain_line(text: str) -> None:
    print(f"wnkernel: {text}", file=sys.stderr, flush=True)


def wanted() -> str:
    mode = os.environ.get("WNKERNEL_BUILD", "auto")
    if mode not in ("auto", "cpu", "cuda", "none"):
        raise SystemExit(f"WNKERNEL_BUILD: expected auto, cpu, cuda or none, got {mode!r}")
    if mode == "cuda":
        raise SystemExit(
            "WNKERNEL_BUILD=cuda: this version has no CUDA kernels yet; use auto or cpu"
        )
    return mode


def is_clang() -> bool:
    compiler = os.environ.get("CXX", "c++")
    try:
        found = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False)
    except OSError:
        return False
    return "clang" in found.stdout


def compile_flags() -> list[str]:
    flags = ["-O3", "-g0", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math"]
    flags += ["-Wall", "-Wextra", "-Wno-unused-parameter", "-Wno-psabi"]
    # torch brings the OpenMP runtime, which has gcc's entry points: compiled for, never linked.
    if is_clang():
        return [*flags, "-Wno-bitwise-instead-of-logical", "-Wno-unknown-warning-option"]
    return [*flags, "-fopenmp"]


def link_flags() -> list[str]:
    return [] if platform.system() == "Darwin" else ["-Wl,--strip-all"]


def built_for() -> str:
    """What the compiled module in the tree was built for; empty if there is none."""
    return BUILD_INFO.read_text(encoding="utf-8") if BUILD_INFO.exists() else ""


def extension_arguments() -> dict:
    """Arguments of setup() that build wnkernel._C; empty for a pure-Python package."""
    mode = wanted()
    if mode == "none":
        if BUILD_COMMANDS & set(sys.argv):
            BUILD_INFO.unlink(missing_ok=True)
            plain_line("WNKERNEL_BUILD=none, so this is the pure-Python package")
        return {}
    # torch looks for ninja on PATH only, and a virtual environment need not be active.
    os.environ["PATH"] = os.path.dirname(sys.executable) + os.pathsep + os.environ.get("PATH", "")
    try:
        import torch
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError as error:
        if mode == "cpu":
            raise SystemExit(f"WNKERNEL_BUILD=cpu needs torch at build time: {error}") from error
        plain_line(
            "torch is not installed here, so this is the pure-Python package; for compiled kernels "
            "install torch first and use: pip install --no-build-isolation"
        )
        return {}

    build_info = f'"""Written by setup.py."""\n\nTORCH_VERSION = "{torch.__version__}"\n'

    class Build(BuildExtension):
        def run(self) -> None:
            # A module built against another torch is out of date however new its sources are.
            self.force = self.force or build_info != built_for()
            BUILD_INFO.unlink(missing_ok=True)
            try:
                super().run()
            except (Exception, SystemExit) as error:
                if mode == "cpu":
                    raise
                self.extensions = []
                reason = str(error).strip().splitlines()[-1:] or [type(error).__name__]
                plain_line(
                    f"compiled kernels were not built ({reason[0]}); "
                    "the pure-Python package works without them"
                )
                return
            BUILD_INFO.write_text(build_info, encoding="utf-8")
            if not self.inplace:  # build_py has copied the Python files already
                target = Path(self.build_lib) / "wnkernel" / BUILD_INFO.name
                target.write_text(build_info, encoding="utf-8")

    extension = CppExtension(
        "wnkernel._C",
        SOURCES,
        depends=HEADERS,
        extra_compile_args=compile_flags(),
        extra_link_args=link_flags(),
    )
    return {"ext_modules": [extension], "cmdclass": {"build_ext": Build}}


setup(**extension_arguments())

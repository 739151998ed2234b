"""Builds the optional compiled module wnkernel._C; everything else is in pyproject.toml.

WNKERNEL_BUILD=auto  (default) compiled if torch and a C++ compiler are there, else pure Python;
                     with CUDA kernels if torch has CUDA and there is an nvcc, a GPU or none
WNKERNEL_BUILD=cpu   compiled CPU kernels or an error
WNKERNEL_BUILD=cuda  compiled CPU and CUDA kernels or an error
WNKERNEL_BUILD=none  pure Python, which whoever installs it has asked for
WNKERNEL_BUILD=index pure Python for an index, where nobody has asked for it

WNKERNEL_INSTRUMENT=address   with AddressSanitizer and UndefinedBehaviorSanitizer,
WNKERNEL_INSTRUMENT=thread    with ThreadSanitizer: to be run as tests/instrumented.py does,
WNKERNEL_INSTRUMENT=coverage  with counts of what runs, for gcov; without it, as fast as can be

TORCH_CUDA_ARCH_LIST says for which GPUs; without it, those of this machine, or else COMMON_GPUS.

WNKERNEL_WHEELS=folder or URL    take the compiled module out of a wheel there, if one fits
WNKERNEL_LOCAL_VERSION=text      follows a + in the version; `make wheels` names torch there
"""

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup

ROOT = Path(__file__).resolve().parent
if str(ROOT) not in sys.path:  # where installers run this script, it is not
    sys.path.insert(0, str(ROOT))

from buildtools import description, prebuilt  # noqa: E402
from buildtools.environment import add_installed  # noqa: E402
from buildtools.record import EggInfo, info_path, pure_arguments, record_pure  # noqa: E402

BUILD_COMMANDS = {"build", "build_ext", "bdist_wheel", "develop", "editable_wheel", "install"}


def found(folder: str, *patterns: str) -> list[str]:
    paths = (p for pattern in patterns for p in (ROOT / folder).glob(pattern))
    return sorted(str(p.relative_to(ROOT)) for p in paths)


SOURCES = found("csrc", "*.cpp", "cpu/*.cpp")
CUDA_SOURCES = found("csrc/cuda", "*.cu", "*.cpp")
HEADERS = found("csrc", "**/*.h", "**/*.cuh")

# Arguments of 32 KiB, as the kernels take them.
OLDEST_NVCC = (12, 1)
OLDEST_GPU = (7, 0)

COMMON_GPUS = [(8, 0), (9, 0), (10, 0)]
"""Those of data centres since Ampere, whose code 8.6 and 8.9 run too."""


PURE = {"none": "WNKERNEL_BUILD=none", "index": "from a wheel for every machine"}
"""Modes without the compiled module, and what the package says of why it has none."""


def plain_line(text: str) -> None:
    print(f"wnkernel: {text}", file=sys.stderr, flush=True)


def wanted() -> str:
    mode = os.environ.get("WNKERNEL_BUILD", "auto")
    if mode not in ("auto", "cpu", "cuda", *PURE):
        raise SystemExit(
            f"WNKERNEL_BUILD: expected auto, cpu, cuda, {' or '.join(PURE)}, got {mode!r}"
        )
    return mode


def is_clang() -> bool:
    compiler = os.environ.get("CXX", "c++")
    try:
        found = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False)
    except OSError:
        return False
    return "clang" in found.stdout


# Compiled in little time, with lines and callers to name.
WATCHED = ["-O1", "-g1", "-fno-omit-frame-pointer"]
INSTRUMENTS = {
    "": ["-O3", "-g0"],
    "address": [*WATCHED, "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": [*WATCHED, "-fsanitize=thread"],
    "coverage": [*WATCHED, "--coverage", "-fprofile-update=atomic"],
}
"""Flags, by what watches the compiled code run."""


def instrument() -> str:
    name = os.environ.get("WNKERNEL_INSTRUMENT", "")
    if name not in INSTRUMENTS:
        raise SystemExit(
            f"WNKERNEL_INSTRUMENT: expected address, thread, coverage or nothing, got {name!r}"
        )
    return name


def compile_flags() -> list[str]:
    flags = [*INSTRUMENTS[instrument()], "-fvisibility=hidden"]
    flags += ["-fno-math-errno", "-fno-trapping-math"]
    flags += ["-Wall", "-Wextra", "-Wno-unused-parameter", "-Wno-psabi"]
    # torch brings the OpenMP runtime, which has gcc's entry points: compiled for, never linked.
    if is_clang():
        return [*flags, "-Wno-bitwise-instead-of-logical", "-Wno-unknown-warning-option"]
    return [*flags, "-fopenmp"]


# Kernels say which products are fused, so that all of them give the same bits.
NVCC_FLAGS = ["-O3", "-fmad=false", "-Xcompiler", "-fvisibility=hidden"]


def link_flags() -> list[str]:
    if instrument():
        return INSTRUMENTS[instrument()]
    return [] if platform.system() == "Darwin" else ["-Wl,--strip-all"]


def cuda_home() -> str:
    """The CUDA toolkit; empty if there is none. torch takes the folder above that of nvcc, which
    may be a script somewhere else."""
    nvcc = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    homes += [nvcc and str(Path(nvcc).resolve().parents[1]), "/usr/local/cuda"]
    headers = ("include", "targets/x86_64-linux/include", "targets/sbsa-linux/include")
    for home in filter(None, homes):
        has_headers = any(Path(home, folder, "cuda_runtime.h").exists() for folder in headers)
        if has_headers and Path(home, "bin", "nvcc").exists():
            return home
    return ""


def nvcc_says(home: str, option: str) -> str:
    """Empty if it cannot be run."""
    command = [os.path.join(home, "bin", "nvcc"), option]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""


def gpus_of(names: str) -> list[tuple[int, int]]:
    """(9, 0) for sm_90 and sm_90a."""
    return sorted({(int(x), int(y)) for x, y in re.findall(r"sm_(\d+)(\d)", names)})


def gpus_here() -> set[tuple[int, int]]:
    import torch

    try:
        return {torch.cuda.get_device_capability(k) for k in range(torch.cuda.device_count())}
    except Exception:  # a driver that cannot be used is like none: building needs no GPU
        return set()


def architectures(home: str) -> str:
    """For TORCH_CUDA_ARCH_LIST. What nvcc or torch do not know gets the PTX of what comes before,
    which the driver compiles for it. Empty: there is nothing that both know."""
    import torch

    of_torch = gpus_of(torch._C._cuda_getArchFlags() or "")
    known = [
        gpu
        for gpu in gpus_of(nvcc_says(home, "--list-gpu-code"))
        if gpu >= OLDEST_GPU and (not of_torch or gpu <= of_torch[-1])
    ]
    code, ptx = set(), set()
    for gpu in gpus_here():
        if not_newer := [k for k in known if k <= gpu]:
            (code if gpu == not_newer[-1] else ptx).add(not_newer[-1])
    if not code and not ptx:
        code = {gpu for gpu in COMMON_GPUS if gpu in known} or set(known[-1:])
        ptx = {max(code)} if code else set()
    return ";".join(f"{x}.{y}{'+PTX' * ((x, y) in ptx)}" for x, y in sorted(code | ptx))


def no_cuda() -> str:
    """Why CUDA kernels cannot be built; empty if they can, and torch knows with which toolkit and
    for which GPUs."""
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} has no CUDA"
    if not CUDA_SOURCES:
        return "csrc/cuda is not here"
    home = cuda_home()
    release = re.search(r"release (\d+)\.(\d+)", nvcc_says(home, "--version")) if home else None
    if release is None:
        return "no CUDA toolkit with nvcc was found: set CUDA_HOME"
    os.environ["CUDA_HOME"] = home
    version = (int(release[1]), int(release[2]))
    if version < OLDEST_NVCC:
        return "nvcc {}.{} is too old, {}.{} is needed".format(*version, *OLDEST_NVCC)
    if version[0] != int(torch.version.cuda.split(".")[0]):
        return "nvcc {}.{} and torch's CUDA {} differ".format(*version, torch.version.cuda)
    if os.environ.get("TORCH_CUDA_ARCH_LIST", "") in ("", "native"):
        os.environ["TORCH_CUDA_ARCH_LIST"] = gpus = architectures(home)
        if not gpus:
            return "nvcc {}.{} and torch have no GPU in common".format(*version)
    return ""


def extension_of(cuda: bool) -> Extension:
    from torch.utils.cpp_extension import CppExtension, CUDAExtension

    flags = compile_flags()
    return (CUDAExtension if cuda else CppExtension)(
        "wnkernel._C",
        SOURCES + (CUDA_SOURCES if cuda else []),
        depends=HEADERS,
        define_macros=[("WNKERNEL_CUDA", "1")] if cuda else [],
        extra_compile_args={"cxx": flags, "nvcc": NVCC_FLAGS} if cuda else flags,
        extra_link_args=link_flags(),
    )


NO_TORCH = "the build found no torch"


def import_error() -> Exception | None:
    """Why torch cannot be imported: an OSError, say, if a library of CUDA is missing."""
    try:
        import torch  # noqa: F401
    except Exception as error:
        return error
    return None


def torch_missing() -> str:
    """Why torch cannot be imported; empty if it can."""
    error = import_error()
    if isinstance(error, ModuleNotFoundError):
        add_installed()
        error = import_error()
    if error is None:
        return ""
    if isinstance(error, ModuleNotFoundError) and error.name == "torch":
        return NO_TORCH
    return f"the torch that is installed cannot be imported: {error!r}"


def build_info(cuda: bool) -> str:
    """What wnkernel/_build_info.py says of a module that was built."""
    import torch

    return (
        f'"""Written by setup.py."""\n\nTORCH_VERSION = {str(torch.__version__)!r}\n'
        f"CUDA_VERSION = {torch.version.cuda if cuda else ''!r}\n"
        f"CUDA_ARCHITECTURES = {os.environ['TORCH_CUDA_ARCH_LIST'] if cuda else ''!r}\n"
    )


def extension_arguments() -> dict:
    """Arguments of setup() that build wnkernel._C, or record why it is not built."""
    mode = wanted()
    if mode in PURE:
        if BUILD_COMMANDS & set(sys.argv):
            plain_line(f"WNKERNEL_BUILD={mode}, so this is the pure-Python package")
        return pure_arguments(PURE[mode], asked=mode == "none")
    # torch looks for ninja on PATH only, and a virtual environment need not be active.
    os.environ["PATH"] = os.path.dirname(sys.executable) + os.pathsep + os.environ.get("PATH", "")
    if error := torch_missing():
        if mode != "auto":
            raise SystemExit(f"WNKERNEL_BUILD={mode} needs torch at build time: {error}")
        plain_line(
            f"{error}, so this is the pure-Python package; for compiled kernels install torch "
            "first, and then the package again"
        )
        return pure_arguments(error)
    import torch

    why_no_cuda = no_cuda() if mode != "cpu" else "WNKERNEL_BUILD=cpu"
    from torch.utils.cpp_extension import BuildExtension  # reads CUDA_HOME

    if mode == "cuda" and why_no_cuda:
        raise SystemExit(f"WNKERNEL_BUILD=cuda: {why_no_cuda}")
    if mode == "auto" and why_no_cuda and torch.version.cuda and BUILD_COMMANDS & set(sys.argv):
        plain_line(f"there will be no CUDA kernels: {why_no_cuda}")
    extension = extension_of(cuda=not why_no_cuda)

    class Build(BuildExtension):
        def run(self) -> None:
            if self._found_prebuilt():
                return
            attempts = [False] if why_no_cuda else [True] if mode == "cuda" else [True, False]
            for cuda in attempts:
                if cuda is not attempts[0]:
                    vars(extension).update(vars(extension_of(cuda)) | self._computed())
                try:
                    self._build(cuda)
                    return
                except (Exception, SystemExit) as error:
                    if mode != "auto":
                        raise
                    reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
                    what = "CUDA kernels" if cuda else "compiled kernels"
                    rest = "trying without" if cuda else "the pure-Python package works without"
                    plain_line(f"{what} were not built ({reason}); {rest} them")
            self._do_without(reason)

        def _found_prebuilt(self) -> bool:
            """Whether there was a wheel to take the module out of."""
            base = os.environ.get("WNKERNEL_WHEELS", "")
            if not base or instrument():
                return False
            version = self.distribution.get_version().partition("+")[0]
            kinds = ["cpu"] if mode == "cpu" else prebuilt.kinds(not why_no_cuda)
            kinds = kinds[:1] if mode == "cuda" else kinds
            names = prebuilt.names(version, kinds)
            try:
                found = prebuilt.look_up(base, names, info_path(self).parents[1])
            except Exception as error:  # of the network, of a broken file: compiling needs neither
                plain_line(f"{base} cannot be used ({error})")
                return False
            plain_line(f"taken from {found}" if found else f"{base} has no wheel for this torch")
            return bool(found)

        def _do_without(self, reason: str) -> None:
            """Makes this the pure-Python package, and its wheel one for all machines."""
            if shutil.which(os.environ.get("CXX", "c++").split()[0]) is None:
                reason = "there was no C++ compiler"
            record_pure(self, reason)
            self.extensions = self.distribution.ext_modules = []
            wheel = self.distribution.get_command_obj("bdist_wheel", create=False)
            if wheel is not None:
                wheel.root_is_pure = True

        def _computed(self) -> dict:
            """What setuptools has added to the extension."""
            return {name: x for name, x in vars(extension).items() if name.startswith("_")}

        def _build(self, cuda: bool) -> None:
            # A module built for something else is out of date however new its sources are.
            info = build_info(cuda)
            path = info_path(self)  # build_py may have copied another one there
            there = path.read_text(encoding="utf-8") if path.exists() else ""
            self.force = self.force or info != there
            path.unlink(missing_ok=True)
            super().run()
            path.write_text(info, encoding="utf-8")

    return {"ext_modules": [extension], "cmdclass": {"build_ext": Build}}


def about() -> dict:
    """Arguments of setup() that pyproject.toml cannot hold."""
    address = description.repository((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    return {
        "long_description": description.with_absolute_links(readme, address),
        "long_description_content_type": "text/markdown",
    }


if __name__ == "__main__":
    arguments = about() | extension_arguments()
    arguments["cmdclass"]["egg_info"] = EggInfo
    setup(**arguments)

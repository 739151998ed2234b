"""Names of compiled wheels, and the look-up of one of them in place of a compiler.

The names are those that users of causal-conv1d and flash-attn know, such as
``wnkernel-0.1.0+cputorch2.13cxx11abiTRUE-cp311-cp311-manylinux_2_34_x86_64.whl``.
"""

from __future__ import annotations

import io
import platform
import sys
import sysconfig
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from urllib.parse import quote

WANTED = ("wnkernel/_C.*", "wnkernel/_build_info.py")
OLDEST_GLIBC = 17
"""The 2.17 of the oldest manylinux tag that has a number in its name."""
PATIENCE_S = 30


def local_version(kind: str) -> str:
    """What follows the ``+`` in the version of a wheel: kernels, torch, and its C++ ABI.

    Args:
        kind: ``cpu``, or ``cu13`` where there are kernels for CUDA 13 as well.
    """
    import torch

    release = ".".join(torch.__version__.split(".")[:2])
    return f"{kind}torch{release}cxx11abi{str(torch.compiled_with_cxx11_abi()).upper()}"


def kinds(can_build_cuda: bool) -> list[str]:
    """Which kinds of wheels do, the best first: what could be built here is not given up."""
    import torch

    if torch.version.cuda is None:
        return ["cpu"]
    with_cuda = "cu" + torch.version.cuda.split(".")[0]
    return [with_cuda] if can_build_cuda else [with_cuda, "cpu"]


def python_tag() -> str:
    """``cp311-cp311``."""
    version = f"cp{sys.version_info.major}{sys.version_info.minor}"
    return f"{version}-{version}{getattr(sys, 'abiflags', '')}"


def platforms() -> list[str]:
    """Platforms whose wheels run here, the newest first."""
    here = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    library, version = platform.libc_ver()
    if library != "glibc":
        return [here]
    minors = range(int(version.split(".")[1]), OLDEST_GLIBC - 1, -1)
    return [*(f"manylinux_2_{n}_{platform.machine()}" for n in minors), here]


def names(version: str, kinds: Sequence[str]) -> Iterator[str]:
    """File names of wheels that would do, the best first."""
    for kind in kinds:
        for where in platforms():
            yield f"wnkernel-{version}+{local_version(kind)}-{python_tag()}-{where}.whl"


def _read(base: str, name: str) -> bytes | None:
    """A file of a folder or a URL; None if it is not there."""
    try:
        if "://" not in base:
            return Path(base, name).read_bytes()
        address = f"{base.rstrip('/')}/{quote(name)}"
        with urllib.request.urlopen(address, timeout=PATIENCE_S) as answer:
            return answer.read()
    except FileNotFoundError:
        return None
    except urllib.error.URLError as error:
        if getattr(error, "code", None) in (403, 404) or isinstance(
            error.reason, FileNotFoundError
        ):
            return None
        raise


def look_up(base: str, names: Iterator[str], folder: Path) -> str:
    """Takes the compiled module, and what it was built with, out of the first wheel there is.

    Args:
        base: a folder or a URL that wheels are in.
        names: file names of wheels that would do.
        folder: where the package is that lacks them.

    Returns:
        The name of the wheel; empty if there is none.

    Raises:
        OSError: the folder or the URL cannot be read.
        zipfile.BadZipFile: what is there is no wheel.
    """
    for name in names:
        if (content := _read(base, name)) is None:
            continue
        with zipfile.ZipFile(io.BytesIO(content)) as wheel:
            for member in wheel.namelist():
                if any(fnmatch(member, pattern) for pattern in WANTED):
                    wheel.extract(member, folder)
        return name
    return ""

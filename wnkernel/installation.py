"""What to do about a package without its compiled module: one line, once per process.

It is said at import where the module was built for another torch, and where the eager backend is
first used otherwise. Who asked for pure Python, with ``WNKERNEL_BUILD=none``, hears nothing.
"""

from __future__ import annotations

import json
import shlex
import sys
import warnings
from importlib.metadata import Distribution, PackageNotFoundError, distribution, distributions
from pathlib import Path
from urllib.parse import unquote

try:
    from ._build_info import IS_ON_REQUEST, WHY_PURE
except ImportError:  # the module was built, or nothing was
    IS_ON_REQUEST, WHY_PURE = False, ""

PACKAGE = Path(__file__).resolve().parent
NAME = "wnkernel"
BUILD_TOOLS = ("setuptools>=77", "ninja", "pybind11")

_told = False


def _is_checkout() -> bool:
    """Whether this is a checkout, or an editable installation of one."""
    return (PACKAGE.parent / "setup.py").exists()


def why_hidden() -> str:
    """Says that this is a checkout without the module, which hides the installed package because
    Python was started there; otherwise empty."""
    if not _is_checkout():
        return ""
    for found in distributions(name=NAME):  # a build leaves the metadata of another in the checkout
        there = Path(str(found.locate_file(NAME)))
        if (there / "__init__.py").exists() and there.resolve() != PACKAGE:
            return (
                f"wnkernel._C is not built in {PACKAGE.parent}, which hides the package that is "
                f"installed in {there}: start Python in another folder"
            )
    return ""


def why_not_built() -> str:
    """The reason why ``wnkernel._C`` is not there: a checkout that hides the installed package, or
    what the build recorded."""
    recorded = WHY_PURE and f": {WHY_PURE}"
    return why_hidden() or f"wnkernel._C is not built (a pure-Python install{recorded})"


def command() -> str:
    """The command that builds ``wnkernel._C`` for the torch that is here, and installs it."""
    try:
        found = distribution(NAME)
        by_uv = (found.read_text("INSTALLER") or "").strip() == "uv"
    except PackageNotFoundError:
        found, by_uv = None, False
    if _is_checkout():
        source = ["-e", str(PACKAGE.parent)]
    else:
        source = [_source(found)]
        if source == [NAME]:  # an index may have a pure wheel too
            source = ["--no-binary", NAME, NAME]
    if not by_uv:
        return shlex.join(
            ["pip", "install", "--no-deps", "--force-reinstall", "--no-cache-dir", *source]
        )
    # uv builds in isolation without a look at the torch that is installed.
    tools = shlex.join(["uv", "pip", "install", *BUILD_TOOLS])
    options = ["--no-build-isolation", "--no-deps", "--no-cache", "--reinstall"]
    return f"{tools} && {shlex.join(['uv', 'pip', 'install', *options, *source])}"


def _source(found: Distribution | None) -> str:
    """Where the package was installed from, as installers take it: a folder, a URL or a name."""
    record = json.loads((found and found.read_text("direct_url.json")) or "{}")
    url = record.get("url", "")
    inside = record.get("subdirectory", "")
    if not url or url.endswith(".whl"):
        return NAME
    if "dir_info" in record:
        return unquote(url.removeprefix("file://"))
    if vcs := record.get("vcs_info"):
        url = f"{vcs['vcs']}+{url}@{vcs['commit_id']}"
    return f"{url}#subdirectory={inside}" if inside else url


def tell(reason: str) -> None:
    """Warn that kernels could be had, unless that was said before or they are not wanted."""
    global _told
    if _told or IS_ON_REQUEST:
        return
    _told = True
    text = reason
    if reason != why_hidden():
        text += f"; for compiled kernels: {command()}"
    try:
        # No line of source code is printed below it, as that of a caller would be.
        path = str(PACKAGE / "__init__.py")
        warnings.warn_explicit(text, UserWarning, path, 0, module="wnkernel")
    except UserWarning:  # where warnings are errors, a hint must not stop an import or a first call
        print(f"wnkernel: {text}", file=sys.stderr)


def is_told() -> bool:
    """Whether there is nothing more to tell."""
    return _told or IS_ON_REQUEST

"""The packages of the environment that a build in isolation is for."""

from __future__ import annotations

import importlib
import site
import sys


def add_installed() -> None:
    """Makes packages importable that pip hides from a build in isolation.

    pip runs such a build in the interpreter that it installs for, and only takes away its packages.
    They come last here, so that what the build asked for comes first. Other installers build in
    environments of their own, which do not tell for whom, and there is nothing to add.
    """
    folders = site.getsitepackages([sys.prefix]) if sys.prefix != sys.base_prefix else []
    if sys.base_prefix in site.PREFIXES:  # not so in most virtual environments
        folders += [site.getusersitepackages(), *site.getsitepackages()]
    sys.path += [folder for folder in dict.fromkeys(folders) if folder not in sys.path]
    importlib.invalidate_caches()

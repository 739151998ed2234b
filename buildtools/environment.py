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
    folders = site.getsitepackages()
    if sys.prefix == sys.base_prefix:  # a virtual environment does without those of the user
        folders.insert(0, site.getusersitepackages())
    sys.path += [folder for folder in folders if folder not in sys.path]
    importlib.invalidate_caches()

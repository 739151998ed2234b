"""What a build says of itself: its version, and why it has no compiled module."""

from __future__ import annotations

import os
from pathlib import Path

from setuptools import Command
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.command.egg_info import egg_info

ROOT = Path(__file__).resolve().parent.parent


def info_path(command: Command) -> Path:
    """Where a command that builds puts wnkernel/_build_info.py."""
    in_place = command.editable_mode or getattr(command, "inplace", False)
    return (ROOT if in_place else Path(command.build_lib)) / "wnkernel" / "_build_info.py"


def record_pure(command: Command, why: str, asked: bool = False) -> None:
    """Says in a package why it has no compiled module.

    Args:
        command: what builds the package.
        why: the reason.
        asked: whether nobody has to be told, because no module is wanted.
    """
    path = info_path(command)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = f'"""Written by setup.py."""\n\nWHY_PURE = {why!r}\nIS_ON_REQUEST = {asked}\n'
    path.write_text(text, encoding="utf-8")


def pure_arguments(why: str, asked: bool = False) -> dict:
    """Arguments of setup() for a pure-Python package that says why it is one."""

    def recording(command: type[Command]) -> type[Command]:
        class Recording(command):
            command_name = command.__name__

            def run(self) -> None:
                super().run()
                record_pure(self, why, asked)

        return Recording

    return {"cmdclass": {c.__name__: recording(c) for c in (build_py, build_ext)}}


class EggInfo(egg_info):
    """Appends what ``WNKERNEL_LOCAL_VERSION`` says to the version."""

    command_name = "egg_info"

    def finalize_options(self) -> None:
        if local := os.environ.get("WNKERNEL_LOCAL_VERSION", ""):
            self.tag_build = f"+{local}"  # the setup.cfg in an sdist says that there is none
        super().finalize_options()

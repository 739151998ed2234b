"""A wheel in an environment of its own, away from the checkout: ``python -m tests.wheel FILE``.

torch and what else the package takes come from the environment that this is run in.
"""

from __future__ import annotations

import os
import site
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path

import torch

CHECK = """
import pathlib, sys, torch, wnkernel
from wnkernel import functional as F
assert pathlib.Path(wnkernel.__file__).is_relative_to(sys.prefix), wnkernel.__file__
assert not wnkernel.info()["load_error"], wnkernel.info()["load_error"]
v, g = torch.randn(5, 7), torch.ones(5, 1)
w = F.weight_norm(v, g)
assert torch.allclose(w, v / v.norm(dim=1, keepdim=True), atol=1e-6)
print("wnkernel", wnkernel.__version__, "from a wheel")
"""


def main(wheel: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = Path(folder) / ("Scripts" if os.name == "nt" else "bin") / "python"

        def run(*arguments: str) -> None:
            environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
            subprocess.run([python, *arguments], cwd=folder, env=environment, check=True)

        run("-m", "pip", "--disable-pip-version-check", "install", "-q", "--no-deps", str(wheel))
        # Behind the environment's own packages, so that the wheel comes first.
        own = Path(sysconfig.get_path("purelib", vars={"base": folder, "platbase": folder}))
        packages = [*site.getsitepackages(), str(Path(torch.__file__).parents[1])]
        (own / "others.pth").write_text("\n".join(dict.fromkeys(packages)))
        run("-c", CHECK)
        run("-m", "wnkernel", "info")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())

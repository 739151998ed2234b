"""Files of exporters are loaded and run by processes that know nothing of this package."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import wnkernel

from ..exports import batch, model
from ..processes import python

LOADERS = {
    "program.pt2": "torch.export.load(path).module()",
    "trace.pt": "torch.jit.load(path)",
    "package.pt2": "torch._inductor.aoti_load_package(path)",
}


def assert_runs_elsewhere(names: list[str], folder: Path, x: torch.Tensor, y: torch.Tensor) -> None:
    """The files in a folder give ``y`` for ``x`` in a process of its own."""
    torch.save(x, folder / "x")
    loads = "".join(f"path = '{folder}/{n}'\nys.append({LOADERS[n]}(x))\n" for n in names)
    done = python(
        "-c",
        "import sys, torch, torch._inductor.codecache  # which the loader of torch 2.10 forgets\n"
        "sys.modules['wnkernel'] = None  # whoever imports it gets an ImportError\n"
        f"x, ys = torch.load('{folder}/x'), []\n{loads}torch.save(ys, '{folder}/ys')\n",
    )
    assert done.returncode == 0, done.stderr
    for got in torch.load(folder / "ys"):
        torch.testing.assert_close(got, y)


def test_programs_and_traces(tmp_path):
    m, x = model().requires_grad_(False), batch()
    torch.export.save(torch.export.export(m, (x,)), tmp_path / "program.pt2")
    torch.jit.save(torch.jit.trace(m, (x,)), tmp_path / "trace.pt")
    assert_runs_elsewhere(["program.pt2", "trace.pt"], tmp_path, x, m(x))


QUICK = {
    "aot_inductor.compile_wrapper_opt_level": "O0",
    "aot_inductor.precompile_headers": False,
    "cpp.vec_isa_ok": False,
}
"""Takes two thirds off the time of the C++ compiler."""


@pytest.mark.usefixtures("fresh_compiler")
def test_packages_of_aot_inductor(tmp_path, monkeypatch):
    if not hasattr(torch._inductor, "aoti_compile_and_package"):
        pytest.skip("torch._inductor.aoti_compile_and_package came with torch 2.6")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    known = torch._inductor.config.get_config_copy()
    layer, x = wnkernel.weight_norm(nn.Linear(5, 3)).requires_grad_(False), torch.randn(2, 5)
    torch._inductor.aoti_compile_and_package(
        torch.export.export(layer, (x,)),
        package_path=str(tmp_path / "package.pt2"),
        inductor_configs={key: value for key, value in QUICK.items() if key in known},
    )
    assert_runs_elsewhere(["package.pt2"], tmp_path, x, layer(x))

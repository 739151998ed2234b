"""What an installation without the compiled module says, and when: one line, once, with the command
that gets it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch

import wnkernel
from wnkernel import installation

from ..processes import PATIENCE_S, ROOT, python

RECORDED = """
import sys, types
sys.modules["wnkernel._build_info"] = recorded = types.ModuleType("recorded")
recorded.__dict__.update({facts!r})
"""
USED = """
import torch, wnkernel
print("imported", file=sys.stderr)
for _ in range(2):
    layer = wnkernel.weight_norm(torch.nn.Linear(3, 4))
    layer(torch.ones(2, 3)).sum().backward()
wnkernel.functional.weight_norms([torch.ones(3, 4)], [torch.ones(3, 1)], [0])
"""
COMPILED = """
import torch, wnkernel
layer = torch.compile(wnkernel.weight_norm(torch.nn.Linear(3, 4)), fullgraph=True, backend="eager")
layer(torch.ones(2, 3)).sum().backward()
"""
EXPORTED = """
import torch, wnkernel
with wnkernel.use_backend("eager"):
    layer = wnkernel.weight_norm(torch.nn.Linear(3, 4))
torch.export.export(layer, (torch.ones(2, 3),))
"""
NOT_THERE = {"WHY_PURE": "the build found no torch", "IS_ON_REQUEST": False}
ON_REQUEST = {"WHY_PURE": "WNKERNEL_BUILD=none", "IS_ON_REQUEST": True}
OTHER_TORCH = {"TORCH_VERSION": "2.3.1+cpu", "CUDA_VERSION": "", "CUDA_ARCHITECTURES": ""}


def said(
    facts: dict[str, object], code: str, *options: str, **environment: str
) -> tuple[list[str], list[str]]:
    """Lines on standard error before and after the end of the import, where a build recorded
    ``facts``."""
    program = RECORDED.format(facts=facts) + code
    result = python(*options, "-c", program, **environment)
    assert result.returncode == 0, result.stderr
    early, _, late = result.stderr.rpartition("imported\n")
    return early.splitlines(), late.splitlines()


def test_a_pure_installation_says_so_once_when_it_is_first_used():
    early, late = said(NOT_THERE, USED)
    assert early == []
    (line,) = late
    assert line == (
        f"{ROOT / 'wnkernel' / '__init__.py'}:0: UserWarning: wnkernel._C is not built (a "
        "pure-Python install: the build found no torch); for compiled kernels: "
        f"{installation.command()}"
    )


def test_nothing_recorded_is_pure_python_too():
    early, late = said({}, USED)
    assert early == []
    (line,) = late
    assert "wnkernel._C is not built (a pure-Python install); for compiled kernels: " in line


def test_a_module_for_another_torch_is_told_of_at_import_and_not_again():
    early, late = said(OTHER_TORCH, USED)
    (line,) = early
    assert f"built for torch 2.3.1+cpu, this is torch {torch.__version__}; for compiled" in line
    assert line.endswith(installation.command())
    assert late == []


@pytest.mark.parametrize(
    ("facts", "options", "environment"),
    [
        pytest.param(ON_REQUEST, [], {}, id="asked for"),
        pytest.param(NOT_THERE, ["-W", "ignore::UserWarning:wnkernel"], {}, id="filter"),
        pytest.param(
            OTHER_TORCH, [], {"PYTHONWARNINGS": "ignore::UserWarning:wnkernel"}, id="environment"
        ),
        pytest.param(NOT_THERE, [], {"WNKERNEL_BACKEND": "eager"}, id="backend"),
    ],
)
def test_who_wants_it_so_hears_nothing(facts, options, environment):
    assert said(facts, USED, *options, **environment) == ([], [])


def test_other_devices_hear_nothing():
    code = "import torch, wnkernel\nwith torch.device('meta'):\n    "
    code += "wnkernel.functional.weight_norm(torch.ones(3, 4), torch.ones(3, 1))"
    assert said(NOT_THERE, code) == ([], [])


def test_a_compiler_says_it_once_and_an_exporter_not_at_all():
    _, late = said(NOT_THERE, COMPILED)
    (line,) = late
    assert line.endswith(installation.command())
    assert said(NOT_THERE, EXPORTED) == ([], [])


def test_info_has_the_command(monkeypatch):
    monkeypatch.setattr("wnkernel.native._C", None)
    assert wnkernel.info()["build_command"] == installation.command()
    assert wnkernel.info()["threads"] == torch.get_num_threads()
    monkeypatch.setattr("wnkernel._versions.untried", lambda: "torch: expected another")
    assert wnkernel.info()["build_command"] == ""


def test_no_command_is_needed_with_the_module(ops):
    assert wnkernel.info()["build_command"] == ""


PIP = "pip install --no-deps --force-reinstall --no-cache-dir "
UV = "uv pip install 'setuptools>=77' ninja pybind11 && uv pip install --no-build-isolation "
UV += "--no-deps --no-cache --reinstall "
SOURCES = "--no-binary wnkernel wnkernel"
"""From an index, which may have a pure wheel too."""


@pytest.mark.parametrize(
    ("installer", "record", "expected"),
    [
        ("pip\n", {"url": "file:///home/my%20code", "dir_info": {}}, PIP + "'/home/my code'"),
        ("uv", {"url": "file:///home/wnkernel", "dir_info": {}}, UV + "/home/wnkernel"),
        ("pip", {"url": "https://a.b/w-1.tar.gz", "archive_info": {}}, PIP + "https://a.b/w-1.tar.gz"),
        ("pip", {"url": "file:///w-1-py3-none-any.whl", "archive_info": {}}, PIP + SOURCES),
        (
            "pip",
            {"url": "https://a.b/w.git", "vcs_info": {"vcs": "git", "commit_id": "abc"}},
            PIP + "git+https://a.b/w.git@abc",
        ),
        (
            "pip",
            {
                "url": "https://a.b/w.git",
                "vcs_info": {"vcs": "git", "commit_id": "abc"},
                "subdirectory": "python",
            },
            PIP + "'git+https://a.b/w.git@abc#subdirectory=python'",
        ),
        (
            "pip",
            {"url": "https://a.b/w.zip", "archive_info": {}, "subdirectory": "python"},
            PIP + "'https://a.b/w.zip#subdirectory=python'",
        ),
        ("uv", None, UV + SOURCES),
        (None, None, PIP + SOURCES),
    ],
)  # fmt: skip
def test_the_command_is_that_of_the_installer(monkeypatch, tmp_path, installer, record, expected):
    files = {"INSTALLER": installer, "direct_url.json": record and json.dumps(record)}
    monkeypatch.setattr(installation, "PACKAGE", tmp_path / "site-packages" / "wnkernel")
    found = SimpleNamespace(read_text=files.get)
    monkeypatch.setattr(installation, "distribution", lambda name: found)
    assert installation.command() == expected


def test_the_command_for_a_checkout(monkeypatch):
    def distribution(name: str) -> None:
        raise installation.PackageNotFoundError(name)

    monkeypatch.setattr(installation, "distribution", distribution)
    assert installation.command() == f"{PIP}-e {ROOT}"


def test_where_warnings_are_errors_a_hint_stops_nothing(monkeypatch, capsys):
    monkeypatch.setattr(installation, "_told", False)
    monkeypatch.setattr(installation, "IS_ON_REQUEST", False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        installation.tell("a reason")
    assert capsys.readouterr().err.startswith("wnkernel: a reason; for compiled kernels: pip")
    assert installation.is_told()


def test_a_checkout_that_hides_the_installed_package_says_so(tmp_path, monkeypatch):
    installed = tmp_path / "wnkernel"
    installed.mkdir()
    (installed / "__init__.py").touch()
    checkout = SimpleNamespace(locate_file=ROOT.joinpath)  # what a build leaves there
    found = SimpleNamespace(locate_file=tmp_path.joinpath)
    monkeypatch.setattr(installation, "distributions", lambda name: [checkout, found])
    reason = installation.why_not_built()
    monkeypatch.setattr(installation, "IS_ON_REQUEST", False)
    assert reason == (
        f"wnkernel._C is not built in {ROOT}, which hides the package that is installed in "
        f"{installed}: start Python in another folder"
    )
    monkeypatch.setattr(installation, "_told", False)
    with pytest.warns(UserWarning, match=re.escape(reason) + "$"):
        installation.tell(reason)
    monkeypatch.setattr(installation, "_told", False)
    with pytest.warns(UserWarning, match="another torch; for compiled kernels: pip"):
        installation.tell("built for another torch")
    (installed / "__init__.py").unlink()  # as of an editable installation
    assert installation.why_not_built().startswith("wnkernel._C is not built (a pure-Python")


@pytest.mark.skipif(os.name == "nt", reason="there are no broken pipes")
@pytest.mark.parametrize("arguments", [[], ["info"]])
def test_nobody_reads_what_is_printed(arguments):
    """As in ``python -m wnkernel | head -1``."""
    if arguments:
        pytest.importorskip("typer", reason="the command line needs typer")
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as out:
        result = subprocess.run(
            [sys.executable, "-m", "wnkernel", *arguments],
            cwd=ROOT, stdout=out, stderr=subprocess.PIPE, text=True, timeout=PATIENCE_S,
        )  # fmt: skip
    assert (result.returncode, result.stderr) == (128 + 13, "")

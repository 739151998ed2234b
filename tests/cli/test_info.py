"""The command ``wnkernel``: how it is called, what it says of this machine, where it is missing."""

from __future__ import annotations

import json
import re
import runpy
import sys

import pytest

import wnkernel
from wnkernel import cli

from ..command_line import invoke, on_the_cpu, save, trained
from ..processes import ROOT, python

__all__ = ["on_the_cpu"]


def test_info_in_json_is_what_the_function_returns():
    result = invoke("info", "--json")
    assert result.exit_code == 0
    said, facts = json.loads(result.stdout), json.loads(json.dumps(wnkernel.info()))
    assert said.keys() == facts.keys()
    assert said["backends"] == facts["backends"]
    assert said["compiled"] == facts["compiled"]
    assert said["cpu"] == facts["cpu"]


def test_info_as_a_table_has_every_fact(monkeypatch):
    facts = {
        "torch": "2.13.0",
        "compiled": {"devices": ["cpu", "cuda"], "openmp": True},
        "load_error": "",
        "backends": {"cpu": [], "cuda": ["there is no [red]GPU[/red]", "nor a driver"]},
        "cpu": {
            "l1d": 49152,
            "l2": 2 << 20,
            "l3": 1441792,
            "page": 4096,
            "sources": {"l1d": "sysfs", "l2": "cpuid", "l3": "default", "page": "system"},
        },
        "triton": None,
    }
    monkeypatch.setattr("wnkernel.cli.app.facts", lambda: facts)
    result = invoke("info")
    rows = [line.split("│")[1:3] for line in result.stdout.splitlines() if "│" in line]
    assert [(name.strip(), value.strip()) for name, value in rows] == [
        ("torch", "2.13.0"),
        ("compiled: devices", "cpu, cuda"),
        ("compiled: openmp", "True"),
        ("load_error", "-"),
        ("backend cpu", "runs"),
        ("backend cuda", "there is no [red]GPU[/red]; nor a driver"),
        ("cpu: l1d", "48 KiB (sysfs)"),
        ("cpu: l2", "2 MiB (cpuid)"),
        ("cpu: l3", "1.375 MiB (default)"),
        ("cpu: page", "4 KiB (system)"),
        ("triton", "-"),
    ]


def test_the_module_as_a_program_is_the_command_and_works_from_end_to_end(tmp_path):
    source, target = tmp_path / "in.safetensors", tmp_path / "ключ.safetensors"
    save(trained("legacy").state_dict(), source)
    arguments = ["convert", str(source), str(target), "--to", "folded"]
    done = python("-m", "wnkernel", *arguments, PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "7 weight norms, legacy -> folded",
        f"wrote {tmp_path}/" + r"\u043a\u043b\u044e\u0447.safetensors",
    ]
    assert target.exists()
    assert done.stderr == ""  # no bar where nobody sees it


def test_without_arguments_and_without_the_packages_the_facts_are_printed(monkeypatch, capsys):
    for name in cli.NEEDED:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(wnkernel, "cli", cli)  # which is imported anew
    for name in [n for n in sys.modules if re.match(r"wnkernel\.(cli|__main__)", n)]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "argv", ["wnkernel"])
    runpy.run_module("wnkernel", run_name="__main__")
    assert json.loads(capsys.readouterr().out)["wnkernel"] == wnkernel.__version__


@pytest.mark.parametrize("missing", [["typer"], ["rich", "safetensors"]])
def test_a_missing_package_is_named_in_one_line(monkeypatch, capsys, missing):
    for name in missing:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert exit_.value.code == cli.MISSING_PACKAGE
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == (
        f"wnkernel: the command line needs {', '.join(missing)}: pip install 'wnkernel[cli]'; "
        "python -m wnkernel alone prints the facts without\n"
    )


def test_the_library_does_not_import_the_command_line():
    importing = re.compile(r"^\s*(from|import) .*\bcli\b", re.MULTILINE)
    package = ROOT / "wnkernel"
    importers = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        if importing.search(path.read_text()) and path.parent.name != "cli"
    }
    assert importers == {"__main__.py"}


def test_the_installed_command_is_main():
    project = (ROOT / "pyproject.toml").read_text()
    module, name = re.search(r'\[project\.scripts\]\nwnkernel = "(.+):(.+)"', project).groups()
    assert getattr(sys.modules[module], name) is cli.main


def test_the_extras_have_what_the_command_line_needs():
    project = (ROOT / "pyproject.toml").read_text()
    extras = dict(re.findall(r"^(\w+) = \[(.*?)\]$", project, re.MULTILINE | re.DOTALL))
    bounded = [re.fullmatch(r"(\w+)>=[\d.]+", r) for r in re.findall('"(.*?)"', extras["cli"])]
    assert {requirement[1] for requirement in bounded} == set(cli.NEEDED)
    for extra, within in (("test", "examples"), ("examples", "bench"), ("bench", "cli")):
        assert f'"wnkernel[{within}]"' in extras[extra]


@pytest.mark.parametrize("command", ["convert", "bench", None])
def test_the_help_has_all_exit_codes(command):
    result = invoke(*filter(None, [command]), "--help")
    assert result.exit_code == 0
    text = " ".join(result.stdout.split())
    for code in ("0 done", "1 nothing", "2 wrong usage", "3 an input", "4 an output", "130 for"):
        assert code in text


def test_the_version():
    result = invoke("--version")
    assert (result.exit_code, result.stdout) == (0, f"wnkernel {wnkernel.__version__}\n")

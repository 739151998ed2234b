"""The runner of other people's tests, on a small checkout made up here."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from ..others.__main__ import compare, main, run, table
from ..others.selection import ALL, select

TESTS = """
import unittest
from functools import wraps

import torch
from torch import nn
from torch.nn.utils import weight_norm as normed

MAKER = normed.__module__.partition(".")[0]


def by_ours_and_theirs(test):
    @wraps(test)
    def several(self):
        test(self)

    return several


class TestLegacy(unittest.TestCase):
    @by_ours_and_theirs
    def test_same_output(self):
        plain = nn.Linear(3, 4)
        want = plain(torch.ones(3))
        self.assertTrue(torch.allclose(normed(plain)(torch.ones(3)), want))

    def test_weight_norm_of_torch_alone(self):
        torch.nn.utils.weight_norm(nn.Linear(3, 4))
        self.assertEqual(MAKER, "torch", "the reason\\nand more")

    def test_weight_norm_of_ours_alone(self):
        self.assertEqual(MAKER, "wnkernel")

    def test_weight_norm_of_nobody(self):
        self.fail("of nobody")

    def test_weight_norms_in_parts(self):
        for maker in ("torch", MAKER):
            with self.subTest(maker=maker):
                self.assertEqual(maker, "torch")

    def test_same_random_numbers_weight_norm(self):
        torch.manual_seed(torch.initial_seed())
        self.assertEqual(torch.initial_seed(), 0)

    @unittest.skip("weight_norm is not wanted today")
    def test_skipped(self):
        pass

    def test_something_else(self):
        self.fail("not to be run")
"""

DYING = """
import os

from torch.nn.utils import weight_norm


def test_weight_norm():
    if weight_norm.__module__.startswith("wnkernel"):
        os._exit(3)
"""

SELECTED = """
import torch
from torch.nn.utils import weight_norm
from models import Plain, Vocoder{imported}


def build():
    return weight_norm(torch.nn.Linear(2, 2))


class Net(torch.nn.Module):
    def __init__(self):
        self.layer = build()


async def test_weight_norm_later(): ...


def test_direct():
    torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(2, 2))


def test_by_string():
    getattr(torch.nn.utils, "weight_norm")


def test_helper_of_a_helper():
    assert Net()


def test_weight_normalization_of_scores(): ...


class TestShared:
    def setup_method(self):
        self.layer = build()

    def test_shared(self): ...


class TestOther:
    def test_other(self): ...
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With packages of the names that our tests have, and what they test."""
    folder = tmp_path_factory.mktemp("checkout")
    (folder / "pytest.ini").write_text("[pytest]\n")
    for package in ("tests", "torch"):
        (folder / package).mkdir()
    (folder / "tests" / "__init__.py").touch()
    (folder / "torch" / "__init__.py").write_text("raise ImportError('sources, not built')\n")
    (folder / "tests" / "test_legacy.py").write_text(TESTS)
    (folder / "tests" / "test_import.py").write_text(
        "import missing as weight_norm\ntest_it = weight_norm"
    )
    (folder / "tests" / "test_zz.py").write_text(DYING)
    return folder


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that do not import whatever plugins of pytest are installed here."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")


@pytest.mark.usefixtures("quick")
def test_both_runs(checkout, capfd):
    assert main([str(checkout), "--library=", "--json"]) == 1
    rows = {row["test"].partition("/")[2]: row for row in json.loads(capfd.readouterr().out)}
    assert {test.rpartition("::")[2]: row["kind"] for test, row in rows.items()} == {
        "test_import.py": "failed by both",
        "test_same_output": "passed by both",
        "test_weight_norm_of_nobody": "failed by both",
        "test_weight_norm_of_torch_alone": "failed only with ours",
        "test_weight_norms_in_parts": "failed only with ours",
        "test_weight_norm_of_ours_alone": "failed only with torch's",
        "test_same_random_numbers_weight_norm": "passed by both",
        "test_skipped": "skipped",
        "test_weight_norm": "failed only with ours",
    }
    rows = {test.rpartition("::")[2]: row for test, row in rows.items()}
    assert (
        rows["test_import.py"]["ours"]["error"] == "ModuleNotFoundError: No module named 'missing'"
    )
    assert rows["test_same_output"]["torch"] == {"outcome": "passed", "error": "", "built": 0}
    assert rows["test_same_output"]["ours"] == {"outcome": "passed", "error": "", "built": 1}
    alone = rows["test_weight_norm_of_torch_alone"]["ours"]
    assert alone == {
        "outcome": "failed",
        "error": "AssertionError: 'wnkernel' != 'torch'",
        "built": 1,
    }
    assert rows["test_weight_norms_in_parts"]["ours"]["outcome"] == "failed"
    assert rows["test_weight_norm"]["ours"]["outcome"] == "crashed"


@pytest.mark.usefixtures("quick")
def test_arguments_for_pytest(checkout):
    """Workers of pytest-xdist report once, and are patched too."""
    tests = {str(checkout / "tests" / "test_legacy.py"): ["test_same_output", "test_skipped"]}
    results = run(tests, ["-p", "xdist", "-n", "1"], ours=True)
    assert {test.rpartition("::")[2]: result for test, result in results.items()} == {
        "test_same_output": {"outcome": "passed", "error": "", "built": 1},
        "test_skipped": {"outcome": "skipped", "error": "", "built": 0},
    }


def results(**outcomes: str) -> dict[str, dict[str, Any]]:
    return {
        test: {"outcome": outcome, "error": "why" * (outcome == "failed"), "built": 2}
        for test, outcome in outcomes.items()
    }


def test_table():
    theirs = results(a="passed", b="failed", c="skipped", d="skipped", e="passed", f="failed")
    ours = results(a="passed", b="failed", c="skipped", d="failed", f="passed")
    assert (
        table(compare(theirs, ours))
        == """\
passed by both               1, of which 1 build our layers
failed by both               1, of which 1 build our layers
failed only with torch's     1, of which 1 build our layers
failed only with ours        2, of which 1 build our layers
skipped                      1, of which 1 build our layers

failed by both: b
  why

failed only with torch's: f
  why

failed only with ours: d
  why

failed only with ours: e
  not run"""
    )


@pytest.mark.parametrize("arguments", [["nowhere"], ["empty"], ["one", "--", "-k", "nothing"]])
def test_a_run_without_tests_is_no_success(tmp_path, arguments, capfd, monkeypatch):
    commands = []
    no_tests = pytest.ExitCode.NO_TESTS_COLLECTED

    def call(command, **_):
        commands.append(command)
        return no_tests

    monkeypatch.setattr(subprocess, "call", call)
    for folder in ("empty", "one"):
        (tmp_path / folder).mkdir()
    (tmp_path / "one" / "test_one.py").write_text("def test_weight_norm(): ...\n")
    with pytest.raises(SystemExit) as ended:
        main([str(tmp_path / arguments[0]), "--library=", *arguments[1:]])
    assert ended.value.code == 2
    assert capfd.readouterr().out == ""
    for command in commands:
        assert command[command.index("--") - 2 : command.index("--")] == ["-k", "nothing"]
    assert len(commands) == (arguments[0] == "one")


def test_selection(tmp_path, monkeypatch):
    library = tmp_path / "models"
    library.mkdir()
    (library / "__init__.py").touch()
    (library / "plain.py").write_text("class Plain: ...\n")
    (library / "vocoder.py").write_text(
        "class Vocoder:\n    x = weight_norm(1)\nclass Codec: ...\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    tests = tmp_path / "tests"
    tests.mkdir()
    (tests / "test_own.py").write_text(SELECTED.replace(", Vocoder{imported}", ""))
    (tests / "test_models.py").write_text(SELECTED.replace("{imported}", ", Codec"))
    (tests / "test_other.py").write_text("from models import Plain\ndef test_plain(): ...\n")
    (tests / "test_broken.py").write_text("def test_weight_norm(:\n")
    (tests / "helper.py").write_text("def test_weight_norm(): ...\n")
    assert select(tests, "models") == {
        str(tests / "test_models.py"): [ALL],
        str(tests / "test_own.py"): [
            "test_by_string",
            "test_direct",
            "test_helper_of_a_helper",
            "test_shared",
            "test_weight_norm_later",
        ],
    }
    assert select(tests, "no_such_library")[str(tests / "test_own.py")]
    assert ALL not in select(tests, "")[str(tests / "test_models.py")]

"""A torch that was not tried, what a torch lacks, and the legs of tests/matrix.py."""

from __future__ import annotations

import json
import re
from xml.etree import ElementTree

import pytest

import wnkernel
from wnkernel import _versions

from .. import matrix
from ..processes import ROOT, python

IMPORT = """
import json, torch
torch.__version__ = torch.torch_version.TorchVersion({version!r})
import wnkernel
import wnkernel.functional as F
w = F.weight_norm(torch.ones(2, 3), torch.ones(2, 1))
print(json.dumps([wnkernel.info(), w.sum().item()]))
"""
UNTRIED = ["2.3.1", "2.16.0.dev20270101+cpu", "3.0.0"]


def imported(version: str, **environment: str) -> tuple[dict, str]:
    """wnkernel.info() and what an import prints with a torch of another version. The line on the
    compiled module, which is for the torch that is really there, is left out."""
    quiet = "ignore:wnkernel._C was built for torch:UserWarning"
    result = python("-W", quiet, "-c", IMPORT.format(version=version), **environment)
    assert result.returncode == 0, result.stderr
    info, total = json.loads(result.stdout)
    assert total == pytest.approx(6 / 3**0.5)
    return info, result.stderr


@pytest.mark.parametrize("version", UNTRIED)
def test_an_untried_torch_is_named_in_one_line_and_runs_eagerly(version):
    info, printed = imported(version)
    reason = f"torch: expected 2.4 to 2.15, which were tried, got {version}"
    (line,) = [line for line in printed.splitlines() if "torch" in line]
    assert line == (
        f"<string>:4: UserWarning: wnkernel: {reason}; the eager backend runs, "
        "WNKERNEL_ANY_TORCH=1 asks for the others"
    )
    assert info["compiled"] is None
    assert info["load_error"] == reason
    ways = {name: reason for name in ("cpu", "cuda", "triton")}
    assert info["backends"] == {name: [why] for name, why in ways.items()} | {"eager": []}


@pytest.mark.parametrize("version", UNTRIED)
def test_the_environment_lifts_it(version):
    info, printed = imported(version, WNKERNEL_ANY_TORCH="1")
    assert printed == ""
    assert "which were tried" not in json.dumps(info)


@pytest.mark.parametrize("version", ["2.4.0", "2.15.9+cu132"])
def test_the_oldest_and_the_newest_torch_are_quiet(version):
    info, printed = imported(version, WNKERNEL_ANY_TORCH="0")
    assert printed == ""
    assert "which were tried" not in json.dumps(info)


def test_another_value_of_the_environment_is_an_error():
    result = python("-c", IMPORT.format(version="3.0.0"), WNKERNEL_ANY_TORCH="yes")
    assert "ValueError: WNKERNEL_ANY_TORCH: expected 0 or 1, got 'yes'" in result.stderr


def test_the_facts_say_what_a_torch_lacks(monkeypatch):
    whats = {name: limit.what for name, limit in _versions.LIMITS.items()}
    assert _versions.limits("2.4.1") == [*whats.values()]
    for name in ("layers in graphs", "nodes of Python"):
        del whats[name]
    assert _versions.limits("2.5.1+cu121") == [*whats.values()]
    for name in ("fully_shard", "cpp_wrapper"):
        del whats[name]
    assert _versions.limits("2.6.0") == [*whats.values()]
    sharded = whats["sharded weights"]
    assert _versions.limits("2.11.0") == [sharded]
    assert _versions.limits("2.12.1+cpu") == _versions.limits("2.15.0") == []
    monkeypatch.setattr("torch.__version__", "2.11.0")
    assert wnkernel.info()["limits"] == [sharded]


def test_legs_are_from_the_oldest_torch_to_the_newest():
    legs = [_versions.release(leg.torch) for leg in matrix.LEGS]
    assert legs == sorted(legs)
    assert (legs[0], legs[-1]) == (_versions.OLDEST, _versions.NEWEST)
    major, minor = zip(_versions.OLDEST, _versions.NEWEST, strict=True)
    assert set(legs) == {(major[0], n) for n in range(minor[0], minor[1] + 1)}


def test_the_installation_says_the_same():
    project = (ROOT / "pyproject.toml").read_text()
    oldest = ".".join(map(str, _versions.OLDEST))
    assert f'dependencies = ["torch>={oldest}"]' in project
    classified = re.findall(r"Python :: (3\.\d+)", project)
    assert sorted({leg.python for leg in matrix.LEGS}, key=_versions.release) == classified
    assert f'requires-python = ">={classified[0]}"' in project


def test_every_test_file_is_in_an_area_or_left_out():
    files = set((ROOT / "tests").rglob("test_*.py"))
    of_areas = [path for area in matrix.AREAS for path in matrix.files_of(area)]
    left_out = {path for path in files if matrix.area_of(path) is None}
    assert len(of_areas) == len(set(of_areas))
    assert set(of_areas) == files - left_out
    assert set(matrix.SHOWN) == set(matrix.AREAS)
    assert (
        matrix.area_of(ROOT / "tests/libraries/test_with_distributed_checkpoint.py")
        == "distributed"
    )


def test_outcomes_are_those_of_pytest():
    cases = {
        "<testcase/>": "passed",
        "<testcase><failure/></testcase>": "failed",
        "<testcase><error/></testcase>": "failed",
        '<testcase><skipped message="why"/></testcase>': "skipped",
    }
    got = {text: matrix.outcome(ElementTree.fromstring(text))[1:] for text in cases}
    assert got == {text: (how, "why" * (how == "skipped")) for text, how in cases.items()}


@pytest.mark.parametrize(
    ("test", "at_the_end", "found"),
    [
        ("def test(): pass", "", ["passed"]),
        ("def test(): raise ValueError", "", ["failed"]),
        ("def test(): pass", "os._exit(3)", ["passed", "failed"]),
        ("", "", ["failed"]),
        ("raise ValueError", "", ["failed"]),
    ],
    ids=["passed", "failed", "crash", "no tests", "not collected"],
)
def test_an_area_that_pytest_did_not_finish_has_failed(
    test, at_the_end, found, tmp_path, monkeypatch
):
    folder = tmp_path / "tests"
    folder.mkdir()
    (folder / "test_a.py").write_text(test)
    (folder / "conftest.py").write_text(
        "import os\n"
        f"def pytest_unconfigure(config): hasattr(config, 'workerinput') or {at_the_end or None}"
    )
    monkeypatch.setattr(matrix, "ROOT", tmp_path)
    assert [how for _, how, _ in matrix.outcomes("layers")] == found


def test_the_table_says_what_failed_and_what_was_not_run():
    counts = {"passed": 5, "failed": 0, "skipped": 1}
    areas = dict.fromkeys(matrix.SHOWN, counts) | {"groups": counts | {"failed": 2}}
    result = {"torch": "2.4.1+cu121", "python": "3.10.13", "numpy": "1.26.4", "areas": areas}
    result |= {"date": "2027-01-02", "commit": "abc", "cpu": "Some CPU", "platform": "Linux"}
    lines = matrix.table({"torch-2.4.1-py3.10": result | {"skips": {"why": 6}}}).splitlines()
    assert lines[2].startswith("| 2.4.1+cu121 | 3.10.13 | 1.26.4 | 5 passed, 1 skipped |")
    assert "| 5 passed, **2 failed**, 1 skipped |" in lines[2]
    assert lines[2].endswith(f"| 2027-01-02 | abc | {', '.join(_versions.LIMITS)} |")
    assert lines[3].startswith("| 2.5.1 | 3.11 | 1 | not run |")
    assert "Run on: Some CPU, Linux." in lines
    assert "- why: 6 in every row." in lines


def test_the_table_says_where_a_test_was_skipped():
    result = {"torch": "2.4.1", "python": "3.10", "numpy": "1", "date": "", "commit": ""}
    result |= {
        "cpu": "",
        "platform": "",
        "areas": dict.fromkeys(matrix.SHOWN, dict.fromkeys(("passed", "failed", "skipped"), 0)),
    }
    found = {leg.name: result | {"skips": {"all": k}} for k, leg in enumerate(matrix.LEGS[:3])}
    found[matrix.LEGS[1].name]["skips"] |= {"one": 4}
    lines = matrix.table(found).splitlines()
    assert lines[-2:] == ["- all: 0 to 2 in every row.", f"- one: 4 in {matrix.LEGS[1].name}."]


def test_the_page_has_the_table_of_the_results():
    text = matrix.PAGE.read_text()
    assert matrix.page(text, matrix.results()) == text

"""``make audit`` takes nothing for clean that nobody looked up."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest

from .. import audit

CLEAN = {"name": "a", "version": "1", "vulns": []}
WEAK = {"name": "b", "version": "2", "vulns": [{"id": "PYSEC-1", "fix_versions": ["3"]}]}
UNKNOWN = {
    "name": "editables",
    "skip_reason": "Dependency not found on PyPI and could not be audited: editables (0.5)",
}
OURS = {"name": "wnkernel", "skip_reason": "distribution marked as editable"}


@pytest.mark.parametrize(
    ("packages", "ended", "status", "said"),
    [
        ([CLEAN, OURS], 0, 0, "1 packages were looked up\n"),
        ([CLEAN, UNKNOWN], 0, 0, "not looked up: editables\n1 packages were looked up\n"),
        ([UNKNOWN, OURS], 0, 1, "not looked up: editables\n0 packages were looked up\n"),
        ([CLEAN, WEAK], 1, 1, "b 2: PYSEC-1, mended in 3\n2 packages were looked up\n"),
        (None, 0, 1, ""),
        (None, 2, 2, ""),
    ],
)
def test_what_is_said_of_a_report(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    packages: list[dict[str, Any]] | None,
    ended: int,
    status: int,
    said: str,
) -> None:
    report = "" if packages is None else json.dumps({"dependencies": packages})
    program = f"import sys; sys.stdout.write({report!r}); sys.exit({ended})"
    monkeypatch.setattr(sys, "argv", ["audit"])
    monkeypatch.setattr(audit, "COMMAND", (sys.executable, "-c", program))
    assert audit.main() == status
    assert capsys.readouterr().out == said

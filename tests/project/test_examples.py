"""The examples in their short form: what they print, and the pictures and sounds they write."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from wnkernel import native

from ..processes import ROOT, python

NEEDS = ("matplotlib", "numpy", "pandas", "rich", "soundfile", "transformers", "typer")
MISSING = [name for name in NEEDS if find_spec(name) is None]
pytestmark = pytest.mark.skipif(
    bool(MISSING), reason=f"the examples need {', '.join(MISSING)}: the extra `examples`"
)

EXAMPLES = ROOT / "examples"


def shown(name: str, out: Path, *files: str) -> str:
    """What an example prints in its short form; its files are there and are what they seem."""
    run = python(
        str(EXAMPLES / f"{name}.py"),
        *("--out", str(out), "--short"),
        COLUMNS="200",
        HF_HUB_OFFLINE="1",
        OMP_WAIT_POLICY="passive",
    )
    assert run.returncode == 0, run.stdout + run.stderr
    starts = {".png": b"\x89PNG", ".wav": b"RIFF"}
    for file in files:
        data = (out / file).read_bytes()
        assert len(data) > 100
        assert data.startswith(starts.get(Path(file).suffix, b"")), file
    return run.stdout


def row(printed: str, *cells: str) -> list[str]:
    """The cells of the row of a table that begins with these."""
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in printed.splitlines()]
    (found,) = [row for row in rows if row[: len(cells)] == list(cells)]
    return found[len(cells) :]


def test_every_example_is_tested_and_described() -> None:
    names = {path.stem for path in EXAMPLES.glob("*.py")} - {"common"}
    tested = set(re.findall(r'shown\(\n? *"(\w+)"', Path(__file__).read_text()))
    described = set(re.findall(r"^\| \[(\w+)\.py\]", (EXAMPLES / "README.md").read_text(), re.M))
    assert tested == described == names


def test_train_vocoder(tmp_path: Path) -> None:
    printed = shown("train_vocoder", tmp_path, "losses.csv", "losses.png")
    assert "fused and not fused: the same to the last bit" in printed


def test_long_run(tmp_path: Path) -> None:
    printed = shown("long_run", tmp_path, "long_run.csv")
    assert "killed 1 times, and the same to the last bit" in printed


def test_drift(tmp_path: Path) -> None:
    printed = shown("drift", tmp_path, "drift.png")
    assert "times the first if free, 1.000000 if kept" in printed


def test_tcn(tmp_path: Path) -> None:
    printed = shown("tcn", tmp_path, "tcn.png")
    assert "fused and not fused learn the same, to the last bit" in printed


def test_dino_head(tmp_path: Path) -> None:
    printed = shown("dino_head", tmp_path, "dino_head.png")
    assert "g is still 1 in all 128 rows and is in no optimizer" in printed


def test_finetune_transformers(tmp_path: Path) -> None:
    files = [f"finetune_transformers.{kind}" for kind in ("png", "wav")]
    printed = shown("finetune_transformers", tmp_path, "encodec/model.safetensors", *files)
    assert "28 weight norms of EncodecModel were converted" in printed
    assert "and converted to the last bit" in printed


def test_missing_keys(tmp_path: Path) -> None:
    files = [f"missing_keys.{kind}" for kind in ("png", "wav")]
    printed = shown("missing_keys", tmp_path, "strict_false.wav", "g_folded.pt", *files)
    assert 'Missing key(s) in state_dict: "conv_pre.weight"' in printed
    assert "generator: 29 weight norms, legacy -> folded" in printed
    loaded = "4 by torch alone, 9 by convert_state_dict, 7 by accept_any_layout, 7 by convert"
    assert loaded in printed  # folded into folded is among them, which needs no cure
    assert row(printed, "legacy", "folded")[0] == "29 missing"


def test_serving(tmp_path: Path) -> None:
    printed = shown("serving", tmp_path, "serving.png", "serving.wav")
    ways = {
        name: row(printed, name)
        for name in ("torch", "wnkernel", "fuse", 'fuse(reuse="version")', "fold")
    }
    if not native.loaded():
        pytest.skip(f"torch's operators are not counted: {native.load_error()}")
    assert [int(launches) for launches, *_ in ways.values()] == [29, 29, 1, 0, 0]
    others = [name for name, cells in ways.items() if cells[-1] != "the same bits"]
    assert others in ([], ["torch"])

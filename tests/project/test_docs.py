"""What the pages show: examples that run, every public name, links that lead somewhere."""

from __future__ import annotations

import importlib.util
import inspect
import re
import warnings
from pathlib import Path
from typing import Any

import pytest

import wnkernel

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    page.relative_to(ROOT).as_posix() for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]
)
EXAMPLES = {
    "README.md": 3,
    "docs/checkpoints.md": 5,
    "docs/convert.md": 2,
    "docs/export.md": 2,
    "docs/faq.md": 11,
    "docs/fuse.md": 2,
    "docs/migration.md": 1,
    "docs/plain_weights.md": 1,
    "docs/recipes.md": 7,
    "docs/serving.md": 1,
}
"""How many examples in Python a page has."""

GIVEN = {
    "README.md": """
import torch
old, new = torch.nn.utils.weight_norm, torch.nn.utils.parametrizations.weight_norm
model = torch.nn.Sequential(old(torch.nn.Conv1d(4, 8, 3)), new(torch.nn.Conv1d(8, 1, 3)))
checkpoint = torch.nn.Sequential(new(torch.nn.Linear(4, 2))).state_dict()
vocoder = torch.nn.Sequential(old(torch.nn.Linear(4, 2)))
generator = torch.nn.Sequential(old(torch.nn.Linear(4, 2)), new(torch.nn.Linear(2, 2)))
""",
    "docs/fuse.md": """
import torch, wnkernel
from torch import nn
model = nn.Sequential(*(wnkernel.weight_norm(nn.Linear(4, 4)) for _ in range(2)))
layer = wnkernel.weight_norm(nn.Linear(4, 4), dim=None)
criterion, x, y = nn.MSELoss(), torch.randn(2, 4), torch.randn(2, 4)
""",
    "docs/plain_weights.md": """
import torch, wnkernel
from torch import nn
model = nn.Sequential()
model.add_module("conv_pre", wnkernel.weight_norm(nn.Conv1d(4, 8, 3)))
model.add_module("conv_post", wnkernel.weight_norm(nn.Conv1d(8, 1, 3)))
folder = "adapter"
def train(model):
    optimizer = torch.optim.Adam(p for p in model.parameters() if p.requires_grad)
    model(torch.randn(2, 4, 9)).sum().backward()
    optimizer.step()
""",
    "docs/serving.md": """
import torch, wnkernel
from torch import nn
old = nn.utils.weight_norm
model = nn.Sequential(wnkernel.weight_norm(nn.Conv1d(4, 8, 3)), old(nn.Conv1d(8, 1, 3)))
""",
}
"""What the reader of a page has: names that its examples use and do not define."""

LIBRARIES = ["accelerate", "onnx", "onnxruntime", "peft", "safetensors", "transformers"]
"""What an example may need besides torch."""


def text_of(page: str) -> str:
    return (ROOT / page).read_text()


@pytest.mark.parametrize("page", EXAMPLES)
def test_the_examples_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other, as a reader would type them. Those whose libraries are not there are
    left out, and the test says so when the others have run."""
    monkeypatch.chdir(tmp_path)
    examples = re.findall(r"```python\n(.*?)```", text_of(page), re.DOTALL)
    assert len(examples) == EXAMPLES[page]
    namespace: dict[str, Any] = {}
    exec(GIVEN.get(page, ""), namespace)
    missing = {library for library in LIBRARIES if importlib.util.find_spec(library) is None}
    lacking = set()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's own, of its legacy weight norm
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        for example in examples:
            if lacks := {library for library in missing if library in example}:
                lacking |= lacks
            else:
                exec(example, namespace)
    if lacking:
        pytest.skip(f"examples need {', '.join(sorted(lacking))}; those without have run")


def table_of_the_api() -> str:
    return text_of("docs/api.md").partition("\n## At a glance\n")[2].partition("\n## ")[0]


def test_the_table_of_the_api_has_every_public_name() -> None:
    shown = set(re.findall(r"`wnkernel\.(\w+)", table_of_the_api()))
    assert shown == set(wnkernel.__all__) - {"WeightNormGroup", "__version__"}


def test_the_table_of_the_api_has_the_parameters() -> None:
    for name, parameters in re.findall(r"`wnkernel\.([\w.]+)\(([^`]*)\)`", table_of_the_api()):
        function = wnkernel
        for part in name.split("."):
            function = getattr(function, part)
        shown = [p.partition("=")[0].strip() for p in parameters.split(",") if p.strip(" *")]
        assert shown == list(inspect.signature(function).parameters), name


def test_every_public_name_is_described() -> None:
    """The site makes these parts of the page from the docstrings."""
    described = re.findall(r"^::: wnkernel\.([\w.]+)$", text_of("docs/api.md"), re.MULTILINE)
    functions = ["weight_norm", "weight_norms", "norm_except_dim"]
    expected = set(wnkernel.__all__) - {"__version__", "functional"}
    assert sorted(described) == sorted(expected | {f"functional.{name}" for name in functions})


def pages_in(nav: Any) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    return [
        page for part in (nav.values() if isinstance(nav, dict) else nav) for page in pages_in(part)
    ]


def test_every_page_is_in_the_navigation() -> None:
    yaml = pytest.importorskip("yaml", reason="reading mkdocs.yml needs PyYAML")
    nav = text_of("mkdocs.yml").partition("\nnav:\n")[2]
    shown = pages_in(yaml.safe_load(nav))
    outside = {"index.md", "changelog.md", "contributing.md", "security.md"}
    assert sorted(shown) == sorted({p.name for p in ROOT.glob("docs/*.md")} | outside)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", text_of(page)):
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            anchors = {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings}
            assert anchor in anchors, link


def test_the_table_of_the_readme_is_of_the_files_that_it_names() -> None:
    for package in ("pandas", "rich", "typer"):
        pytest.importorskip(package, reason=f"the benchmark needs {package}")
    from benchmarks import front

    text = text_of("README.md")
    (folder,) = re.findall(r"^python -m benchmarks\.front (\S+)$", text, re.MULTILINE)
    assert f"\n{front.markdown(ROOT / folder)}\n" in text
    assert f"]({folder}/front.png)" in text


def test_the_structure_names_every_file() -> None:
    text = text_of("CONTRIBUTING.md")
    tree = text[text.index("## Structure") : text.index("Two things are written")]
    sources = [p for folder in ("csrc", "wnkernel") for p in (ROOT / folder).rglob("*.*")]
    kinds = {".py", ".cpp", ".h", ".cu", ".cuh"}
    files = [p for p in sources if p.suffix in kinds and not p.name.startswith(("__", "types_"))]
    assert len(files) > 100
    missing = [
        p.relative_to(ROOT).as_posix()
        for p in files
        if p.name != "_build_info.py"
        and not re.search(rf"(?<!\w){re.escape(p.name)}|(?<!\w){p.stem}\.cpp, \{p.suffix}\b", tree)
    ]
    assert not missing

"""Published models and what works on them: the table in docs/models.md.

``python -m tests.model_table`` makes the page anew; tests/libraries/test_model_table.py checks
every cell and the rest of the page. ``python -m tests.model_table VitsModel`` counts the graphs
that ``torch.compile`` makes of that model.
"""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import wnkernel

from . import small_models
from .small_models import MODELS

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
YES, NONE, BROKEN, NEITHER = "yes", "has none", "fails with torch's", "fails folded too"


def same(got: Tensor, want: Tensor) -> None:
    """Up to the rounding of layers that follow each other, relative to the largest output."""
    torch.testing.assert_close(got, want, rtol=0, atol=2e-5 * want.abs().max().item())


def ours(name: str) -> nn.Module:
    """The model with random weights, converted."""
    torch.manual_seed(0)
    model = small_models.build(name, "legacy")
    wnkernel.convert(model)
    return model


def converts(name: str) -> str:
    """``convert`` finds every weight, and the outputs are those with torch's weight norm."""
    torch.manual_seed(0)
    model = small_models.build(name, "legacy")
    want = small_models.run(model, name)
    assert len(wnkernel.convert(model)) == MODELS[name].layers
    same(small_models.run(model, name), want)
    return YES


def loads(name: str) -> str:
    """A converted model loads what torch's model saved, under either set of keys and folded."""
    source = small_models.build(name, "legacy")
    want = small_models.run(source, name)
    for layout in ("parametrized", "legacy", "folded"):
        model = ours(name)
        model.load_state_dict(wnkernel.convert_state_dict(source.state_dict(), to=layout))
        same(small_models.run(model, name), want)
    return YES


def fuses(name: str) -> str:
    """A fused model gives the same bits."""
    model = ours(name)
    want = small_models.run(model, name)
    wnkernel.fuse(model)
    assert torch.equal(small_models.run(model, name), want)
    return YES


def folds(name: str) -> str:
    """A folded model gives the same bits, and has no weight norm."""
    model = ours(name)
    want = small_models.run(model, name)
    assert len(wnkernel.fold(model)) == MODELS[name].layers
    assert torch.equal(small_models.run(model, name), want)
    return YES


def own_remover(name: str) -> str:
    """The model's own ``remove_weight_norm`` removes ours."""

    def remove(model: nn.Module) -> None:
        next(m for m in model.modules() if hasattr(m, "remove_weight_norm")).remove_weight_norm()

    try:
        remove(small_models.build(name, "legacy"))
    except StopIteration:
        return NONE
    except AttributeError:
        return BROKEN
    model = ours(name)
    want = small_models.run(model, name)
    remove(model)
    assert not any("original0" in key for key in model.state_dict())
    assert torch.equal(small_models.run(model, name), want)
    return YES


def compiles(name: str) -> str:
    """``torch.compile`` gives the same outputs, in one graph or in several."""
    graphs(ours(name), name)
    return YES


def graphs(model: nn.Module, name: str) -> int:
    """How many graphs a model is compiled into, after a comparison of its output."""
    made = 0

    def backend(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        nonlocal made
        made += 1
        return graph

    want = small_models.run(model, name)
    torch.compiler.reset()
    compiled = torch.compile(_Runs(model, name), backend=backend)
    same(compiled(small_models.ramp(*MODELS[name].input_shape)), want)
    return made


def exports(name: str) -> str:
    """``torch.export`` takes the model as it is; no operator of ours is in the program."""
    model = ours(name)
    plain = copy.deepcopy(model)
    wnkernel.fold(plain)
    try:
        export(plain, name)
    except Exception:
        return NEITHER
    program = export(model, name)
    assert "wnkernel" not in program.graph_module.code
    return YES


class _Runs(nn.Module):
    """A model with the call that tests make of it, as a forward of one tensor."""

    def __init__(self, model: nn.Module, name: str) -> None:
        super().__init__()
        self.model = model
        self.call = MODELS[name].forward

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.model, x)


def export(model: nn.Module, name: str) -> torch.export.ExportedProgram:
    """The exported program, after a comparison of its output."""
    x = small_models.ramp(*MODELS[name].input_shape)
    runs = _Runs(model, name)
    program = torch.export.export(runs, (x,), strict=False)
    same(program.module()(x), runs(x))
    return program


COLUMNS: dict[str, Callable[[str], str]] = {
    "`convert`": converts,
    "loads all three layouts": loads,
    "`fuse`": fuses,
    "`fold`": folds,
    "its own remover": own_remover,
    "`torch.compile`": compiles,
    "`torch.export`": exports,
}


def rows(text: str) -> dict[str, dict[str, str]]:
    """The cells of the page, by model and column."""
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    header, _, *body = lines
    return {name: dict(zip(header[2:], cells, strict=True)) for name, _, *cells in body}


def page(cells: Callable[[str, str], str]) -> str:
    """docs/models.md, with ``cells(name, column)`` for what a check says of a model."""
    header = ["model", "weights", *COLUMNS]
    lines = [header, ["---"] * len(header)]
    for name, small in MODELS.items():
        lines.append([name, str(small.layers), *(cells(name, column) for column in COLUMNS)])
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"{_BEFORE}\n{table}\n{_AFTER}"


_BEFORE = """# Your model

These published models were tried on a CPU, built with few channels and torch's legacy weight norm.
Every cell is a test (`tests/libraries/test_model_table.py`); `python -m tests.model_table` writes
this page.
"""
_AFTER = f"""
- "its own remover": what the model's `remove_weight_norm()` does after `wnkernel.convert(model)`,
  with nothing patched. "{BROKEN}": that of VITS raises with torch's weight norm too.
- "`torch.compile`": the compiled model has the same outputs. Where a model's own code breaks the
  graph, weight norm adds more pieces: a layer that is called between two breaks is compiled alone,
  once for each class. Layers of a kind share a class, with weight norm or without. VitsModel
  becomes 10 graphs converted and 7 folded (`python -m tests.model_table VitsModel`, torch 2.13.0).
  So fold a model before you compile it to serve.
- "`torch.export`": the model was exported as it is, unfolded. "{NEITHER}": the model's own code
  cannot be exported, not even without weight norm. ONNX, AOTInductor and TorchScript start from the
  same formula ([export.md](export.md)).

The heads of ChatTTS load whichever keys a file has (`tests/checkpoint/test_models.py`). Other
packages call the same two functions of torch: `wnkernel.convert(model)` returns what it found.
"""

if __name__ == "__main__":
    warnings.simplefilter("ignore")
    for model in sys.argv[1:]:
        folded = ours(model)
        wnkernel.fold(folded)
        print(f"{model}: {graphs(ours(model), model)} graphs, folded {graphs(folded, model)}")
    if not sys.argv[1:]:
        PAGE.write_text(page(lambda name, column: COLUMNS[column](name)))

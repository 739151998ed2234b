"""Measures the errors of wnkernel's and torch's results in ulps: ``python -m benchmarks.accuracy``.

Nothing is timed. An ulp is the dtype's eps times the scale of a row. The scale is the largest sum
of the magnitudes of the terms of a result; for long sums it is the root of the sum of their
squares. The oracle is the formula in numpy's longdouble (80 bits on x86), for second derivatives,
too. torch's autograd of its fused operator is one of the contenders, never the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import pandas as pd
import torch
import typer
from torch import Tensor

from wnkernel import functional as F

from .contenders import OURS, TORCH
from .environment import ROOT, Environment, environment, results_folder
from .shapes import dtype_text

RESULTS = Path(__file__).parent / "results"
PAGE = ROOT / "docs" / "reliability.md"
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LENGTHS = (7, 100, 1_000, 10_000, 100_000, 1_000_000, 10_000_000)
# So many rows are measured that they have ELEMENTS elements together, at least two and at most
# MOST_ROWS rows: with few rows the largest error is a matter of chance.
ELEMENTS, MOST_ROWS = 20_000_000, 512
MARKS = "<!-- accuracy -->", "<!-- /accuracy -->"
CONTENDERS = {OURS: F.weight_norm, TORCH: torch._weight_norm}
# The last three are the gradients of <a, grad_v> + <b, grad_g> with respect to grad_w, v and g.
RESULT_NAMES = ("w", "grad_v", "grad_g", "second, grad_w", "second, v", "second, g")
Wide = np.longdouble
IS_WIDE = np.finfo(Wide).eps < np.finfo(np.float64).eps


class Error(NamedTuple):
    """A line of the CSV file."""

    device: str
    torch: str
    commit: str
    backend: str
    dtype: str
    dim: int
    row_length: int
    result: str
    contender: str
    largest_ulps: float
    rms_ulps: float


def main(
    quick: Annotated[bool, typer.Option("--quick", help="Rows up to 10,000.")] = False,
    out: Annotated[Path | None, typer.Option(help="Folder for accuracy.csv.")] = None,
) -> None:
    """Measure, write accuracy.csv, print the table, and put it between the marks of the page."""
    where = environment("cpu", None)
    lengths = [n for n in LENGTHS if not quick or n <= 10_000]
    dtypes = [t for t in DTYPES if IS_WIDE or t != torch.float64]
    errors = [e for case in product(dtypes, (0, 1), lengths) for e in measured(*case, where)]
    folder = out or RESULTS / results_folder(where)
    folder.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(errors).to_csv(folder / "accuracy.csv", index=False, float_format="%.4g")
    text = table(errors)
    print(text)
    print(*worse(errors), sep="\n")
    PAGE.write_text(between_marks(PAGE.read_text(), text))


def measured(dtype: torch.dtype, dim: int, length: int, where: Environment) -> Iterator[Error]:
    """Measure both contenders on rows of one length, which are lines of memory or columns."""
    rows = min(max(2, ELEMENTS // length), MOST_ROWS)
    random = torch.Generator().manual_seed(length)
    sizes = length, 1, length, length, 1
    inputs = [torch.randn(rows, n, generator=random, dtype=torch.float64).to(dtype) for n in sizes]
    got = {who: [t.cpu() for t in results(f, inputs, dim, where)] for who, f in CONTENDERS.items()}
    ulps = {(who, name): [] for who in got for name in RESULT_NAMES}
    for row in range(rows):
        want = exact(*(t[row].double().numpy().astype(Wide) for t in inputs))
        for (who, name), of_rows in ulps.items():
            value, scale = want[name]
            result = got[who][RESULT_NAMES.index(name)][row].double().numpy()
            error = np.abs(result - value) / (scale * torch.finfo(dtype).eps)
            of_rows.append((float(error.max()), float(np.mean(error * error))))
    about = where.device_name, where.torch, where.commit, where.backend, dtype_text(dtype)
    for (who, name), of_rows in ulps.items():
        largest, squares = np.array(of_rows).T
        figures = float(largest.max()), float(np.sqrt(squares.mean()))
        yield Error(*about, dim, length, name, who, *figures)


def results(
    f: Callable[[Tensor, Tensor, int], Tensor], inputs: list[Tensor], dim: int, where: Environment
) -> list[Tensor]:
    """Return the results of a contender, rows first. For dim 1 its rows are columns of memory."""

    def turned(t: Tensor) -> Tensor:
        return t.T.contiguous() if dim else t

    v, g, grad_w, a, b = (turned(t).to(where.device) for t in inputs)
    v, g, grad_w = (t.detach().requires_grad_() for t in (v, g, grad_w))
    w = f(v, g, dim)
    first = torch.autograd.grad(w, (v, g), grad_w, create_graph=True)
    second = torch.autograd.grad(first, (grad_w, v, g), (a, b))
    return [turned(t.detach()) for t in (w, *first, *second)]


def exact(
    v: np.ndarray, g: np.ndarray, grad_w: np.ndarray, a: np.ndarray, b: np.ndarray
) -> dict[str, tuple[np.ndarray, float]]:
    """Return every result of one row with its scale, by the formulas of ``wnkernel.composed``."""
    n = np.sqrt((v * v).sum())
    u, c = v / n, g / n
    s, p = (grad_w * u).sum(), (a * u).sum()
    across_a, across_w = a - u * p, grad_w - u * s
    t = (a * grad_w).sum() - p * s
    second_v = (b * across_w - c * (t * u + s * across_a + p * across_w)) / n
    of_a, of_w = abs(a) + abs(u * p), abs(grad_w) + abs(u * s)
    of_s = np.sqrt(((grad_w * u) ** 2).sum())
    of_t = np.sqrt(((a * grad_w) ** 2).sum()) + abs(p * s)
    of_v = abs(b) * of_w + abs(c) * (abs(u) * of_t + abs(s) * of_a + abs(p) * of_w)
    values = v * c, c * across_w, s[None], c * across_a + b * u, second_v, (t / n)[None]
    terms = v * c, c * of_w, of_s, abs(c) * of_a + abs(b * u), of_v / n, of_t / n
    scales = (float(np.max(abs(x))) for x in terms)
    return dict(zip(RESULT_NAMES, zip(values, scales, strict=True), strict=True))


def worst(errors: list[Error]) -> pd.DataFrame:
    """Return the largest errors of each contender, by dtype, result and length."""
    by = ["dtype", "result", "row_length", "contender"]
    return pd.DataFrame(errors).groupby(by, sort=False).largest_ulps.max().unstack()


def table(errors: list[Error]) -> str:
    """Return the errors as a table in Markdown, with cells "ours / torch's"."""
    found = worst(errors).map(lambda x: f"{x:.2g}" if x < 1000 else f"{x:.0e}")
    cells = (found[OURS] + " / " + found[TORCH]).unstack()
    cells = cells.reindex(found.index.droplevel("row_length").unique())[sorted(cells)]
    lines = [["ulps, ours / torch", *(f"{n:,}" for n in cells)], ["---"] * (1 + cells.shape[1])]
    lines += [[", ".join(key), *row] for key, row in zip(cells.index, cells.values, strict=True)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def worse(errors: list[Error]) -> list[str]:
    """Return the places where our error exceeds torch's by more than the rounding of a result."""
    found = worst(errors)
    return [
        f"{', '.join(map(str, key))}: {of[OURS]:.3g} ulps, torch's are {of[TORCH]:.3g}"
        for key, of in found[found[OURS] > found[TORCH] + 1].iterrows()
    ]


def between_marks(page: str, text: str) -> str:
    """Return the page with this text between its marks; a page without marks stays unchanged."""
    begin, end = MARKS
    before, mark, rest = page.partition(f"{begin}\n")
    return f"{before}{mark}{text}\n{end}{rest.partition(end)[2]}" if mark else page


if __name__ == "__main__":
    typer.run(main)

"""Runs every kind of kernel once, on small weights, and says for each whether it is OK.

``python -m tools.gpu_check.smoke``. The CPU makes the inputs and checks the results, so that almost
only our kernels run on the device. That is what a sanitizer should watch, and it makes Triton
compile before anything is timed. After a failure the other kernels are still tried, as long as the
device works.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Annotated

import torch
import typer

import wnkernel
from benchmarks import verify
from benchmarks.gpu.raw import backends
from benchmarks.gpu.timing import is_usable
from benchmarks.layers import Tensors, tensors
from benchmarks.shapes import LayerCase
from wnkernel.functional import weight_norm, weight_norms

SHAPES = (
    ((33, 40), (0, 1, None)),  # short rows; columns that end within a block
    ((6, 5, 3), (0, 1, 2)),  # sizes that are no multiple of anything
    ((5, 1031), (0, 1)),  # rows that end within a vector
    ((2, 9001), (0, None)),  # rows longer than a block keeps
    ((5, 10_240), (0,)),
    ((64, 3, 256), (1,)),  # rows in runs
    ((384, 8, 128), (2, 1)),  # few columns with many elements: a split reduction
    ((640, 520), (None,)),  # one row with many elements
    ((1, 300, 3), (0, 1, 2)),
    *(((9, n), (0,)) for n in (64, 128, 256, 512, 1024, 2048, 4096, 8192)),  # rows of every length
    ((40_000, 5), (1,)),  # many columns that are no whole vectors
)
"""Every way of cutting a weight into tiles that published models need."""
DTYPES = ("float32", "bfloat16", "float16", "float64")

Weight = tuple[Tensors, int | None]  # The tensors, on the CPU, and the dim.

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    backend: Annotated[list[str] | None, typer.Option(help="Only this; repeatable.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="Only this; repeatable.")] = None,
    device: Annotated[str, typer.Option(help="A torch device.")] = "cuda",
) -> None:
    """Forward and backward of small weights, one by one and as a list, held against float64.

    Exit status: 1 if a result is wrong, 2 if nothing could be tried.
    """
    found = backends(torch.empty(1, device=device))
    chosen = [name for name in (backend or found) if name in found]
    if not chosen:
        asked = f" ({', '.join(backend)} was asked for)" if backend else ""
        print(f"No kernels of ours run on {device}{asked}; those that do: {found or 'none'}")
        raise typer.Exit(2)
    right = wrong = 0
    for title, error in (c for n in chosen for t in dtype or DTYPES for c in cases(n, t, device)):
        right, wrong = right + (not error), wrong + bool(error)
        print(f"FAIL {title}: {error}" if error else f"OK   {title}", flush=True)
        if error and not is_usable(torch.device(device)):
            print("The device reports errors for everything now; the rest is left out.")
            break
    print(f"{right} weight norms on {', '.join(chosen)} are right, {wrong} wrong", flush=True)
    sys.exit(1 if wrong else 0)


def cases(backend: str, dtype: str, device: str) -> Iterator[tuple[str, str]]:
    """Run the cases. Yield, for each weight and for the list of all, its name and what is wrong
    with it."""
    every: list[Weight] = []
    for shape, dims in SHAPES:
        for dim in dims:
            case = LayerCase(shape, dim, "", "")
            every.append((tensors(case, getattr(torch, dtype), torch.device("cpu")), dim))
    with wnkernel.use_backend(backend):
        for t, dim in every:
            yield f"{backend} {dtype} {list(t.v.shape)} dim {dim}", run([(t, dim)], device)
        yield f"{backend} {dtype}, all of them as a list", run(every, device)
        rows = [weight for weight in every if weight[1] == 0]
        yield f"{backend} {dtype}, a list of rows only", run(rows, device)


def run(chosen: Sequence[Weight], device: str) -> str:
    """Return what is wrong with the forward and backward of one weight, or of a list; empty if
    nothing."""
    try:
        _check(chosen, device)
    except Exception as error:  # a kernel, or its compiler, may raise anything
        return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
    return ""


def _check(chosen: Sequence[Weight], device: str) -> None:
    vs, gs = ([getattr(t, x).detach().to(device).requires_grad_() for t, _ in chosen] for x in "vg")
    dims = [dim for _, dim in chosen]
    ws = weight_norms(vs, gs, dims) if len(chosen) > 1 else [weight_norm(vs[0], gs[0], dims[0])]
    grads = torch.autograd.grad(ws, [*vs, *gs], [t.grad_w.to(device) for t, _ in chosen])
    of_v, of_g = grads[: len(chosen)], grads[len(chosen) :]
    for (t, dim), *got in zip(chosen, ws, of_v, of_g, strict=True):
        want = verify.reference(t.v, t.g, dim, t.grad_w)
        # In float64 the sums of the reference are no more exact than ours.
        title, long_sums = f"{list(t.v.shape)} dim {dim}", t.v.dtype == torch.float64
        verify.check(title, [x.detach().cpu() for x in got], want, long_sums=long_sums)


if __name__ == "__main__":
    app()

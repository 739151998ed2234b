"""``wnkernel bench`` measures single weights on this machine, with our backends and with torch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import functional
from ..backends import BACKENDS, choose, use_backend
from ..problem import WHOLE_TENSOR, norm_shape
from .cases import Case
from .errors import WrongResult, WrongUsage, one_line, out_of_memory
from .exact import Exact, bound, exact
from .timing import Contender, Times, measure

TORCH = "torch"
PHASES = ("forward", "forward+backward")

Operator = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Result:
    """The times and the error of one contender in one phase of one case."""

    case: Case
    phase: str
    contender: str
    """The name of the contender: ``torch``, or the name of a backend."""
    automatic: bool
    """Whether the contender is the backend that runs when the user asks for none."""
    times: Times
    error: float
    """The largest relative error of w, grad_v and grad_g against float64."""
    times_torch: float | None
    """torch's median time divided by this median; None if torch does not run or is wrong."""


def run(case: Case, device: torch.device, seconds: float) -> list[Result]:
    """Verify every contender, then time all contenders in turns, one phase after the other.

    Raises:
        WrongResult: if one of our backends gives wrong numbers. Nothing was timed then.
        OutOfMemory: if the case does not fit into memory.
        WrongUsage: if torch cannot make tensors of that size at all.
    """
    inputs = _inputs(case, device)
    on_cpu = (t.cpu() for t in (inputs.v, inputs.g))  # some devices have no float64
    want = exact(*on_cpu, case.dim, inputs.grad_w.cpu())
    contenders = dict(_contenders(inputs.v, case.dim))
    errors = {}
    for name, contender in list(contenders.items()):
        ours = name != TORCH
        try:
            with contender.context():
                got = _both(contender.operator, inputs)
        except RuntimeError:
            if ours:
                raise
            del contenders[name]  # torch has no kernel for some dtypes on some devices
            continue
        errors[name] = _error(got, want)
        allowed = _bound(case, long_sums=name in (TORCH, "eager"))  # eager calls torch's operators
        if not errors[name] <= allowed:  # this form refuses NaN too
            if ours:
                raise WrongResult(
                    f"{case}: backend {name!r} is off by {errors[name]:.2g} against float64, "
                    f"allowed is {allowed:.2g}; nothing was timed"
                )
            del contenders[name]
    automatic = choose(inputs.v).name
    results = []
    for phase in PHASES:
        timed = {
            name: Contender(c.context, _call(c.operator, inputs, phase))
            for name, c in contenders.items()
        }
        times = measure(timed, device, seconds)
        torch_ms = times[TORCH].median_ms if TORCH in times else None
        results += [
            Result(
                case,
                phase,
                name,
                name == automatic,
                t,
                errors[name],
                torch_ms and torch_ms / t.median_ms,
            )
            for name, t in times.items()
        ]
    return results


@dataclass(frozen=True)
class _Inputs:
    """The inputs of a case. g differs from the norm of v, so that w differs from v: an operator
    that just returns v fails."""

    v: Tensor
    g: Tensor
    grad_w: Tensor


@dataclass(frozen=True)
class _Operator:
    context: Callable[[], contextlib.AbstractContextManager[object]]
    operator: Operator


def _inputs(case: Case, device: torch.device) -> _Inputs:
    random = torch.Generator().manual_seed(0)
    try:
        v, grad_w = (
            torch.randn(case.shape, generator=random, device="cpu").to(device, case.dtype)
            for _ in range(2)
        )
    except RuntimeError as error:
        raise (out_of_memory(error, case) or WrongUsage(f"{case}: {one_line(error)}")) from None
    norms = norm_shape(torch.Size(case.shape), case.dim)
    g = torch.rand(norms, generator=random, device="cpu").add_(0.5).to(device, case.dtype)
    return _Inputs(v.requires_grad_(), g.requires_grad_(), grad_w)


def _contenders(v: Tensor, dim: int) -> Iterator[tuple[str, _Operator]]:
    """Yield torch's weight norm, and ours on every backend that takes v.

    The automatic backend runs without :func:`use_backend`, which would make its calls slower.
    """
    yield TORCH, _Operator(contextlib.nullcontext, lambda v, g: torch._weight_norm(v, g, dim))
    automatic = choose(v).name
    for name, backend in BACKENDS.items():
        if not backend.reasons(v):
            yield (
                name,
                _Operator(
                    contextlib.nullcontext
                    if name == automatic
                    else lambda name=name: use_backend(name),
                    lambda v, g: functional.weight_norm(v, g, dim),
                ),
            )


def _call(operator: Operator, t: _Inputs, phase: str) -> Callable[[], object]:
    if phase == "forward":
        return lambda: operator(t.v, t.g)
    return lambda: torch.autograd.grad(operator(t.v, t.g), (t.v, t.g), t.grad_w)


def _both(operator: Operator, t: _Inputs) -> tuple[Tensor, ...]:
    w = operator(t.v, t.g)
    return (w.detach(), *torch.autograd.grad(w, (t.v, t.g), t.grad_w))


def _error(got: tuple[Tensor, ...], want: Exact) -> float:
    """Return the largest relative error of w, grad_v and grad_g; NaN if one error is NaN."""
    w, grad_v, grad_g = (
        have.cpu().double() - should
        for have, should in zip(got, (want.w, want.grad_v, want.grad_g), strict=True)
    )
    tiny = torch.finfo(torch.float64).tiny
    errors = (
        w.norm() / want.w.norm().clamp_min(tiny),
        grad_v.norm() / want.grad_v_terms.norm().clamp_min(tiny),
        (grad_g.abs() / want.grad_w_norm.clamp_min(tiny)).max(),
    )
    return float(torch.stack(errors).max())


def _bound(case: Case, *, long_sums: bool) -> float:
    numel = torch.Size(case.shape).numel()
    length = numel if case.dim == WHOLE_TENSOR else numel // case.shape[case.dim]
    return bound(case.dtype, length, long_sums=long_sums)

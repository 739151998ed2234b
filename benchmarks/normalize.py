"""Case "normalize": after a step of an optimizer, rows of all matrices get their norm in place.

The sets are those of three methods, and torch is the loop over matrices that each one published.
nGPT gives rows the norm 1, EDM2 gives elements a mean square of 1, and Hyperball optimizers keep
the norm that a whole matrix had. All contenders write to the same tensors. After the first call
rows have their norm but for rounding, which changes nothing about the work.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

import wnkernel
from wnkernel.normalizing import KEEP, SQRT_NUMEL

from . import verify
from .compiled import Report, reported
from .contenders import COMPILED, FOREACH, OURS, READ_WRITE, TORCH
from .environment import Environment
from .forced import EDM2_EPS, edm2_normalize
from .models import freed
from .plan import Job, Plan
from .results import IN_PLACE, Result, Subject, rows
from .shapes import NORMALIZED, LayerCase, dtype_text, weight_list
from .timing import Contender, blamed, device_sampler, measure

STEP = 1.25  # The factor by which a step changes weights before a contender is verified.
MATRICES = "64 x 1024^2"


class Weights(NamedTuple):
    """The tensors to write to, and for each the dim and the norm that its rows shall have."""

    tensors: list[Tensor]
    dims: list[int | None]
    norms: list[Tensor]


@dataclass(frozen=True)
class Method:
    """A way to train with rows of a fixed norm."""

    norm: float | str  # The argument of ``normalize_``.
    loop: Callable[[Weights], None]
    foreach: Callable[[Weights], None] | None = None  # The foreach functions know no dim.
    eps: float = 0.0  # The loop adds this share of the norm that a row shall have to its own.


def ngpt_loop(weights: Weights) -> None:
    """Do what ``normalize_matrices`` of NVIDIA/ngpt does."""
    for w, dim in zip(weights.tensors, weights.dims, strict=True):
        x = w.float()
        w.copy_((x / x.norm(p=2, dim=int(dim == 0), keepdim=True)).to(w.dtype))


def edm2_loop(weights: Weights) -> None:
    """Do what every ``MPConv`` of NVlabs/edm2 does in its forward first; forced.py has the rest."""
    for w in weights.tensors:
        w.copy_(edm2_normalize(w.float()))


def hyperball_loop(weights: Weights) -> None:
    """Do what Hyperball optimizers do at the end of a step."""
    for w, norm in zip(weights.tensors, weights.norms, strict=True):
        w.mul_(norm / w.norm())


def hyperball_foreach(weights: Weights) -> None:
    """Do the same with one call for all norms and one for all products."""
    norms = torch._foreach_norm(weights.tensors)
    torch._foreach_mul_(weights.tensors, torch._foreach_div(weights.norms, norms))


NGPT = Method(1.0, ngpt_loop)
EDM2 = Method(SQRT_NUMEL, edm2_loop, eps=EDM2_EPS)
HYPERBALL = Method(KEEP, hyperball_loop, hyperball_foreach)


@dataclass(frozen=True)
class TensorSet:
    """All tensors that one call writes to."""

    label: str
    cases: Sequence[LayerCase]
    method: Method
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        return f"{self.label}, {dtype_text(self.dtype)}, dim {self.dim_text}"

    @property
    def dim_text(self) -> str:
        """The dims of all tensors."""
        return ", ".join(sorted({c.dim_text for c in self.cases}))

    @property
    def subject(self) -> Subject:
        """The subject of a measurement."""
        kinds, numel = {c.kind for c in self.cases}, sum(c.numel for c in self.cases)
        about = dtype_text(self.dtype), f"{len(self.cases)} tensors", self.dim_text
        kind = kinds.pop() if len(kinds) == 1 else ""
        array_bytes = numel * self.dtype.itemsize
        return Subject("normalize", self.label, IN_PLACE, *about, kind, numel, array_bytes)


def sets(names: Sequence[str]) -> list[TensorSet]:
    """Return sets of equal matrices, and these models of :data:`~.shapes.NORMALIZED`. nGPT is
    without its two embeddings. Its weights are bfloat16 in NVIDIA/ngpt."""
    matrices = {dim: [LayerCase((1024, 1024), dim, MATRICES, "")] * 64 for dim in (0, 1, None)}
    ngpt, edm2 = NORMALIZED
    found = [
        TensorSet(MATRICES, of, HYPERBALL if d is None else NGPT) for d, of in matrices.items()
    ]
    found += [TensorSet(ngpt, weight_list(ngpt), NGPT, d) for d in (torch.float32, torch.bfloat16)]
    found += [TensorSet(edm2, weight_list(edm2), EDM2)]
    return [s for s in found if s.label in (MATRICES, *names)]


def jobs(plan: Plan, where: Environment, report: Report) -> list[Job]:
    """Make one job per set."""

    def run_and_free(of: TensorSet) -> list[Result]:
        try:
            return freed(run(of, plan, where, report))
        finally:
            torch._dynamo.reset()

    found = sets(plan.normalize_models)
    return [Job(f"normalize {s}", functools.partial(run_and_free, s)) for s in found]


def run(of: TensorSet, plan: Plan, where: Environment, report: Report) -> list[Result]:
    """Verify, then time, all contenders on one set."""
    random = torch.Generator().manual_seed(0)
    start = [torch.randn(c.shape, generator=random).to(where.device, of.dtype) for c in of.cases]
    norms = [norm_to_reach(of.method, *each) for each in zip(of.cases, start, strict=True)]
    weights = Weights([t.clone() for t in start], [c.dim for c in of.cases], norms)
    if of.method.norm == KEEP:
        wnkernel.norms_of(weights.tensors, weights.dims)
    for t in start:
        t.mul_(STEP)
    contenders: dict[str, Contender] = {
        OURS: functools.partial(
            wnkernel.normalize_, weights.tensors, weights.dims, norm=of.method.norm
        ),
        TORCH: functools.partial(of.method.loop, weights),
    }
    if of.method.foreach is not None:
        contenders[FOREACH] = functools.partial(of.method.foreach, weights)
    if plan.normalize_compiled:
        loop = torch.compile(of.method.loop, fullgraph=True, dynamic=False)
        with reported(report):
            loop(weights)  # this call compiles
            contenders[TORCH + COMPILED] = functools.partial(loop, weights)
    check = functools.partial(verified, of=of, weights=weights, start=start, where=where)
    errors = {who: check(who, contender) for who, contender in contenders.items()}
    start.clear()  # before anything is timed, as it is as large as the set
    contenders[READ_WRITE] = functools.partial(torch._foreach_mul_, weights.tensors, 1.0)
    stats = measure(contenders, device_sampler(where.device), plan.normalize_budget_s)
    return rows(of.subject, where, stats, errors=errors, limit=READ_WRITE)


def norm_to_reach(method: Method, case: LayerCase, t: Tensor) -> Tensor:
    """Return the norm that the rows of a tensor shall have."""
    if method.norm == KEEP:
        norm: Tensor = torch.linalg.vector_norm(t, dtype=torch.float64)
        return norm.float()
    if method.norm == SQRT_NUMEL:
        return torch.tensor(math.sqrt(case.numel // math.prod(case.norm_shape)), device=t.device)
    return torch.tensor(method.norm, device=t.device)


def verified(
    who: str,
    contender: Contender,
    *,
    of: TensorSet,
    weights: Weights,
    start: Sequence[Tensor],
    where: Environment,
) -> float:
    """Run a contender on the start values; return its largest error against float64."""
    for t, s in zip(weights.tensors, start, strict=True):
        t.copy_(s)
    with blamed(who):
        contender()
    eps, long_sums = (0.0, not where.own_kernels) if who == OURS else (of.method.eps, True)
    errors = []
    for k, (t, s) in enumerate(zip(weights.tensors, start, strict=True)):
        want = verify.Scaled(s, float(weights.norms[k]), weights.dims[k], eps)
        about = f"{who}, {of}, tensor {k}"
        errors.append(verify.check_scaled(about, t, want, long_sums=long_sums))
    return max(errors)

"""Case "single": one weight, forward and backward apart, device time inside a CUDA graph.

From 32 MB on, calls take turns on as many copies of the tensors as do not fit into the card's L2
cache. Smaller weights find theirs there, as they do in a training step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch

from wnkernel.backends import BACKENDS
from wnkernel.problem import check

from .. import verify
from ..environment import Environment
from ..layers import Tensors, copy, dtype_text, subject
from ..plan import Job
from ..results import COPY, OURS, TORCH, Result, rows
from ..shapes import LayerCase
from .graphs import calls_for, capture, check_replay, measure_graphs
from .plan import GpuPlan, case_title
from .raw import Maker, Raw, backends, inputs, makers
from .traffic import BACKWARD, FORWARD, arrays

CASE = "single"
DTYPES = (torch.float32, torch.bfloat16)

COLD_BYTES = 32e6
"""A v of this size is measured with cold caches."""

CACHES = 4
"""How many times the L2 cache all copies of v are."""

Report = Callable[[str], None]


def jobs(plan: GpuPlan, where: Environment, report: Report) -> list[Job]:
    """One job per weight and dtype."""
    if not backends(v := torch.empty(1, device=where.device)):
        why = "; ".join(line for b in BACKENDS.values() for line in b.reasons(v))
        report(f"No backend with kernels of ours runs here: {why}")
    return [
        Job(
            f"{dtype_text(dtype)} {case_title(case)}",
            lambda c=case, d=dtype: run(c, d, plan, where, report),
        )
        for case in plan.weights
        for dtype in DTYPES
    ]


def run(
    case: LayerCase,
    dtype: torch.dtype,
    plan: GpuPlan,
    where: Environment,
    report: Report,
    extra: Mapping[str, Maker] | None = None,
    case_name: str = CASE,
) -> list[Result]:
    """Verify, then time, one weight.

    Args:
        case: the weight.
        dtype: of v, g and w.
        plan: how long.
        where: on what.
        report: takes a line on every contender that is left out or wrong, if it is not ours.
        extra: more contenders.
        case_name: what the rows are filed under.

    Raises:
        VerificationError: ours is wrong, eagerly or in a graph.
    """
    sets = [inputs(case, dtype, where.device, k) for k in range(copies(case, dtype, where))]
    own = makers(sets[0].v)
    title = f"{dtype_text(dtype)} {case_title(case)}"
    contenders = {who: [make(t, case.dim) for t in sets] for who, make in own.items()}
    for who, make in (extra or {}).items():
        try:
            contenders[who] = [make(t, case.dim) for t in sets]
            contenders[who][0].backward()
        except Exception as error:  # somebody else's package, whatever it raises
            contenders.pop(who, None)
            report(f"{who} left out, {title}: {_first_line(error)}")
    errors = _verified(
        title, {who: raws[0] for who, raws in contenders.items()}, sets[0], case.dim, report
    )
    out = []
    for phase in (FORWARD, BACKWARD):
        about = subject(case, dtype, case_name, phase)
        traffic = _arrays(phase, sets[0], case.dim)
        calls = calls_for(traffic * about.array_bytes, plan.graph_s)
        graphs = {COPY: capture([copy(t.v) for t in sets], calls, where.device)}
        for who, raws in contenders.items():
            runs = [getattr(raw, phase) for raw in raws]
            try:
                graphs[who] = capture(runs, calls, where.device)
            except RuntimeError as error:
                if is_ours(who) or who == TORCH:
                    raise
                report(f"{who} cannot be captured, {phase}, {title}: {_first_line(error)}")
                continue
            if is_ours(who) and where.device.type == "cuda":
                check_replay(f"{who}, {phase}, {title}", graphs[who], runs[-1]())
        stats = measure_graphs(graphs, where.device, plan.weight_budget_s, plan.sample_s)
        found = rows(about, where, stats, errors=errors, arrays=traffic)
        out += [replace(r, backend=_backend(r)) for r in found]
    return out


def is_ours(who: str) -> bool:
    """Whether a contender is this package."""
    return who.startswith(OURS)


def copies(case: LayerCase, dtype: torch.dtype, where: Environment) -> int:
    """How many sets of tensors the calls of one graph take turns on."""
    size = case.numel * dtype.itemsize
    if where.device.type != "cuda" or size < COLD_BYTES:
        return 1
    properties = torch.cuda.get_device_properties(where.device)
    cache = getattr(properties, "L2_cache_size", 64 * 2**20)
    return max(2, math.ceil(CACHES * cache / size))


def _arrays(phase: str, t: Tensors, dim: int | None) -> int:
    """As the best backend says."""
    first = next(iter(backends(t.v)), "eager")
    return arrays(phase, check(t.v, t.g, dim), BACKENDS[first])


def _verified(
    title: str, contenders: Mapping[str, Raw], t: Tensors, dim: int | None, report: Report
) -> dict[str, float]:
    """Check everyone against float64. Of others than ours, an error is reported; they are timed
    all the same (torch rounds several times where it has no kernel of its own)."""
    want = verify.reference(t.v, t.g, dim, t.grad_w)
    errors = {}
    for who, raw in contenders.items():
        got = (raw.forward()[0], *raw.backward())
        try:
            errors[who] = verify.check(f"{who}, {title}", got, want, long_sums=not is_ours(who))
        except verify.VerificationError as error:
            if is_ours(who):
                raise
            report(str(error).replace("Nothing was timed for this case.", "Timed all the same."))
    return errors


def _backend(r: Result) -> str:
    return r.contender.removeprefix(OURS).strip() if is_ours(r.contender) else r.backend


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)

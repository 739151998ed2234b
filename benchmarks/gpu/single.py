"""Case "single": one weight, forward and backward apart, device time inside a CUDA graph.

From 32 MB on, calls take turns on as many copies of the tensors as do not fit into the card's L2
cache. Smaller weights find theirs there, as they do in a training step.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from wnkernel.backends import BACKENDS
from wnkernel.problem import check

from .. import verify
from ..blame import ContenderError, blamed
from ..environment import Environment
from ..layers import copy, dtype_text, subject
from ..results import COPY, OURS, Result, rows
from ..shapes import LayerCase
from .device import is_usable
from .graphs import Call, Graph, calls_for, capture, check_replay, measure_graphs
from .plan import GpuJob, Report, Setting, case_title
from .raw import Maker, Raw, inputs, is_ours, makers
from .traffic import BACKWARD, FORWARD, arrays

CASE = "single"
DTYPES = (torch.float32, torch.bfloat16)

COLD_BYTES = 32e6
"""A v of this size is measured with cold caches."""

CACHES = 4
"""How many times the L2 cache all copies of v are."""


def jobs(setting: Setting) -> list[GpuJob]:
    """One job per weight and dtype."""
    return [
        GpuJob(
            f"{dtype_text(dtype)} {case_title(case)}",
            lambda without, c=case, d=dtype: run(c, d, setting, without),
        )
        for case in setting.plan.weights[setting.part]
        for dtype in DTYPES
    ]


def run(
    case: LayerCase,
    dtype: torch.dtype,
    setting: Setting,
    without: Collection[str],
    extra: Mapping[str, Maker] | None = None,
    case_name: str = CASE,
) -> Iterator[list[Result]]:
    """Verify, then time, one weight: the rows of its forward, then those of its backward.

    Args:
        case: the weight.
        dtype: of v, g and w.
        setting: what cases have in common.
        without: contenders to leave out.
        extra: more contenders.
        case_name: what the rows are filed under.

    Raises:
        ContenderError: one fails, or ours is wrong, eagerly or in a graph. Of others than ours, an
            error is reported; they are timed all the same (torch rounds several times where it has
            no kernel of its own).
    """
    plan, where = setting.plan, setting.where
    sets = [inputs(case, dtype, where.device, k) for k in range(copies(case, dtype, where))]
    first = sets[0]
    title = f"{dtype_text(dtype)} {case_title(case)}"
    want = verify.reference(first.v, first.g, case.dim, first.grad_w)
    contenders: dict[str, list[Raw]] = {}
    errors: dict[str, float] = {}
    for who, make in (makers(first.v, where.backend) | dict(extra or {})).items():
        if who in without:
            continue
        with blamed(who):
            contenders[who] = [make(t, case.dim) for t in sets]
            got = _results(contenders[who][0])
            errors |= _verified(who, title, got, want, setting.report)
    for phase in (FORWARD, BACKWARD):
        about = subject(case, dtype, case_name, phase)
        traffic = arrays(phase, check(first.v, first.g, case.dim), BACKENDS[where.backend])
        calls = calls_for(traffic * about.array_bytes, plan.graph_s)
        graphs = {COPY: capture([copy(t.v) for t in sets], calls, where.device)}
        for who, raws in contenders.items():
            runs = [getattr(raw, phase) for raw in raws]
            if graph := _captured(who, f"{phase}, {title}", runs, calls, setting):
                graphs[who] = graph
        budget = plan.weight_budget_s[setting.part]
        stats = measure_graphs(graphs, where.device, budget, plan.sample_s)
        found = rows(about, where, stats, errors=errors, arrays=traffic)
        yield [replace(r, backend=_backend(r)) for r in found]


def copies(case: LayerCase, dtype: torch.dtype, where: Environment) -> int:
    """How many sets of tensors the calls of one graph take turns on."""
    size = case.numel * dtype.itemsize
    if where.device.type != "cuda" or size < COLD_BYTES:
        return 1
    properties = torch.cuda.get_device_properties(where.device)
    cache = getattr(properties, "L2_cache_size", 64 * 2**20)
    return max(2, math.ceil(CACHES * cache / size))


def _results(raw: Raw) -> tuple[Tensor, ...]:
    return (raw.forward()[0], *raw.backward())


def _verified(
    who: str, title: str, got: tuple[Tensor, ...], want: verify.Reference, report: Report
) -> dict[str, float]:
    """The error of a contender, by its name."""
    try:
        return {who: verify.check(f"{who}, {title}", got, want, long_sums=not is_ours(who))}
    except verify.VerificationError as error:
        if is_ours(who):
            raise
        report(str(error).replace("Nothing was timed for this case.", "Timed all the same."))
        return {}


def _captured(
    who: str, title: str, runs: Sequence[Call], calls: int, setting: Setting
) -> Graph | None:
    """A graph of a contender's calls; none if it is not ours and cannot be captured.

    Raises:
        ContenderError: ours cannot be captured, or computes something else in a graph.
    """
    device = setting.where.device
    try:
        with blamed(who):
            graph = capture(runs, calls, device)
            if is_ours(who) and device.type == "cuda":
                check_replay(f"{who}, {title}", graph, runs[-1]())
            return graph
    except ContenderError as error:
        if is_ours(who) or not is_usable(device):
            raise
        setting.report(f"{who} cannot be captured, {title}: {error}")
        return None


def _backend(r: Result) -> str:
    return r.contender.removeprefix(OURS).strip() if r.contender.startswith(OURS) else r.backend

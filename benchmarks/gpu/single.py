"""Cases of one weight. "single" measures forward and backward separately, as device time inside a
CUDA graph. "flaggems" does the same with FlagGems, if that imports. "copy" measures what the card
can do. "host" measures what a call costs the calling thread, independent of the device.

From 32 MB on, calls take turns on so many copies of the tensors that they do not fit into the
card's L2 cache. Smaller weights stay in this cache, as in a training step. The host is measured on
weights with fewer than 20,000 elements, for which the device finishes before the host makes the
next call.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace

import torch

from wnkernel.backends import BACKENDS
from wnkernel.problem import check

from .. import verify
from ..contenders import COPY, copy_of, operators
from ..environment import Environment
from ..layers import MAX_NUMEL, forward, forward_backward, run_host, tensors, verified
from ..results import Result, of_list, of_weight, rows
from ..shapes import LayerCase, dtype_text, grid
from ..timing import ContenderError, blamed, host_sampler, measure
from .plan import GpuJob, Part, Setting
from .raw import BACKWARD, FLAGGEMS, FORWARD, Raw, arrays, flaggems, inputs, is_ours, makers, ours
from .timing import Call, Graph, calls_for, capture, check_replay, is_usable, measure_graphs

SINGLE, RIVAL, COPYING, HOST = "single", "flaggems", "copy", "host"
DTYPES = (torch.float32, torch.bfloat16)
COLD_BYTES = 32e6  # From this size of v on, caches are cold.
CACHES = 4  # All copies of v together are this many times the L2 cache.
# The most important shape comes first. FlagGems tunes itself at the first call of every shape, and
# may take FLAGGEMS_S for it: it compiles and times 45 variants of each kernel.
FLAGGEMS_SHAPES = (((4096, 4096), 0), ((768, 48, 128), 2), ((1024, 1024, 5), 0), ((4096, 4096), 1))
FLAGGEMS_S = 60.0
LAUNCH = "launch"  # The phase, and the contender, of an empty kernel.
LAUNCH_CALLS = 200
WARM_UP_BUDGETS = 10  # An idle card needs a moment to reach its clock.
CALL, CALL_BACKWARD = "call, forward", "call, forward+backward"  # Of functions, with autograd.
CALL_SAMPLE_S = 1e-3  # For calls: too short to fill the queue of launches.


def jobs(setting: Setting) -> list[GpuJob]:
    """Make one job per weight and dtype."""
    return [
        GpuJob(f"{dtype_text(t)} {c}", functools.partial(run, c, dtype=t, setting=setting))
        for c in setting.plan.weights[setting.part]
        for t in DTYPES
    ]


def rival_jobs(setting: Setting) -> list[GpuJob]:
    """Make one job per shape, after all other jobs; none if the package does not import."""
    if setting.part is not Part.REST:
        return []
    try:
        flaggems()
    except Exception as error:  # a foreign package may raise anything
        setting.report(f"{FLAGGEMS} left out: {type(error).__name__}: {error}")
        return []
    cases = [LayerCase(shape, dim, RIVAL, "") for shape, dim in FLAGGEMS_SHAPES]
    beside = functools.partial(run, dtype=torch.float32, setting=setting, case_name=RIVAL)
    return [GpuJob(f"{FLAGGEMS} {c}", functools.partial(beside, c), FLAGGEMS_S) for c in cases]


def run(
    case: LayerCase,
    without: Collection[str],
    dtype: torch.dtype,
    setting: Setting,
    case_name: str = SINGLE,
) -> Iterator[list[Result]]:
    """Verify, then time, one weight by all contenders except those in ``without``; FlagGems takes
    part in its own case. Yield the rows of its forward, then those of its backward.

    Raises:
        ContenderError: if a contender raises, or ours is wrong. Errors of others are only reported;
            they are timed anyway (torch rounds several times where it has no kernel of its own).
    """
    plan, where = setting.plan, setting.where
    sets = [inputs(case, dtype, where.device, k) for k in range(copies(case, dtype, where))]
    first = sets[0]
    title = f"{dtype_text(dtype)} {case}"
    want = verify.reference(first.v, first.g, case.dim, first.grad_w)
    contenders: dict[str, list[Raw]] = {}
    errors: dict[str, float] = {}
    rival = {FLAGGEMS: flaggems()} if case_name == RIVAL else {}
    for who, make in (makers(first.v, where.backend) | rival).items():
        if who not in without:
            with blamed(who):
                contenders[who] = raws = [make(t, case.dim) for t in sets]
                got = raws[0].forward()[0], *raws[0].backward()
                other = not is_ours(who)
                try:
                    errors[who] = verify.check(f"{who}, {title}", got, want, long_sums=other)
                except verify.VerificationError as error:
                    if not other:
                        raise
                    said = "Nothing was timed for this case.", "Timed all the same."
                    setting.report(str(error).replace(*said))
    for phase in (FORWARD, BACKWARD):
        about = of_weight(case, dtype, case_name, phase)
        traffic = arrays(phase, check(first.v, first.g, case.dim), BACKENDS[where.backend])
        calls = calls_for(traffic * about.array_bytes, plan.graph_s)
        graphs = {COPY: capture([copy_of([t.v]) for t in sets], calls, where.device)}
        for who, raws in contenders.items():
            runs = [getattr(raw, phase) for raw in raws]
            if graph := captured(who, f"{phase}, {title}", runs, calls, setting):
                graphs[who] = graph
        budget_s = plan.weight_budget_s[setting.part]
        stats = measure_graphs(graphs, where.device, budget_s, plan.sample_s)
        found = rows(about, where, stats, errors=errors, arrays=traffic)
        own = {ours(name): name for name in BACKENDS}
        yield [replace(r, backend=own.get(r.contender, r.backend)) for r in found]


def copies(case: LayerCase, dtype: torch.dtype, where: Environment) -> int:
    """Return how many sets of tensors the calls of one graph take in turns."""
    size = case.numel * dtype.itemsize
    if where.device.type != "cuda" or size < COLD_BYTES:
        return 1
    cache = getattr(torch.cuda.get_device_properties(where.device), "L2_cache_size", 64 * 2**20)
    return max(2, math.ceil(CACHES * cache / size))


def captured(
    who: str, title: str, runs: Sequence[Call], calls: int, setting: Setting
) -> Graph | None:
    """Return a graph of a contender's calls. If it cannot be captured, report that and return
    None.

    Raises:
        ContenderError: if ours gives another result in a graph, or the device fails.
    """
    device = setting.where.device
    try:
        with blamed(who):
            graph = capture(runs, calls, device)
            if is_ours(who) and device.type == "cuda":
                check_replay(f"{who}, {title}", graph, runs[-1]())
            return graph
    except ContenderError as error:
        if isinstance(error.__cause__, verify.VerificationError) or not is_usable(device):
            raise
        tell = setting.fail if is_ours(who) else setting.report
        tell(f"{who} cannot be captured into a CUDA graph, {title}: {error}")
        return None


def copy_jobs(setting: Setting) -> list[GpuJob]:
    """Make a job for the launch first, then one job per size."""
    if setting.part is not Part.KEY:
        return []
    work = [(LAUNCH, LAUNCH, 4)]
    work += [(f"copy of {n / 2**20:.0f} MiB", COPY, n) for n in setting.plan.copy_bytes]
    return [
        GpuJob(title, lambda without, who=who, n=n: [_graph(who, n, setting)])
        for title, who, n in work
    ]


def _graph(who: str, size: int, setting: Setting) -> list[Result]:
    """Time an in-place copy of a float32 tensor of so many bytes, or an addition to one element."""
    plan, device = setting.plan, setting.where.device
    t = torch.ones(size // 4, device=device)
    calls = LAUNCH_CALLS if who == LAUNCH else calls_for(2 * size, plan.graph_s)
    graph = capture([(lambda: t.add_(1.0)) if who == LAUNCH else copy_of([t])], calls, device)
    budget_s = (1 if who == LAUNCH else WARM_UP_BUDGETS) * plan.weight_budget_s[Part.REST]
    stats = measure_graphs({who: graph}, device, budget_s, plan.sample_s)
    about = replace(of_list(COPYING, "", [t.numel()], who), shape=str(t.numel()))
    return rows(about, setting.where, stats, arrays=None if who == LAUNCH else 2)


def host_jobs(setting: Setting) -> list[GpuJob]:
    """Make one job per weight; reads of ``layer.weight`` come first, calls follow."""
    plan, where = setting.plan, setting.where
    small = [c for c in grid() if c.numel < MAX_NUMEL and c.dim == 0][:: plan.host_every]

    def read(case: LayerCase, without: Collection[str]) -> list[list[Result]]:
        return [run_host(case, plan.host_budget_s, where, without)]

    if setting.part is Part.KEY:
        return [GpuJob(f"host, layer.weight, {c}", functools.partial(read, c)) for c in small]
    return [GpuJob(f"host, call, {c}", functools.partial(run_calls, c, setting)) for c in small]


def run_calls(
    case: LayerCase, setting: Setting, without: Collection[str]
) -> Iterator[list[Result]]:
    """Verify, then time, calls. Yield the rows of the forward, then those of both directions."""
    where, budget_s = setting.where, setting.plan.host_budget_s
    t = tensors(case, torch.float32, where.device)
    contenders = {w: operator for w, operator in operators(case.dim).items() if w not in without}
    errors = verified(str(case), contenders, t, case.dim, where)
    for phase, make in ((CALL, forward), (CALL_BACKWARD, forward_backward)):
        timed = {who: make(operator, t) for who, operator in contenders.items()}
        stats = measure(timed, host_sampler(where.device), budget_s, min_sample_s=CALL_SAMPLE_S)
        yield rows(of_weight(case, torch.float32, HOST, phase), where, stats, errors=errors)

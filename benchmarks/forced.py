"""Case "normalize", second part: the weights of EDM2's layers in training mode, which first give v
its norm in place and then compute w of it.

torch is the published code, layer by layer; compiled, it is one function over all layers, of which
only the forward is right: in torch 2.13 the compiled backward computes v / norm again, of the new v
and the old norm (https://github.com/pytorch/pytorch/pull/197039). All contenders write to the same
parameters. The least traffic is one read of v and one write each of v and w, and for the backward
two reads and one write.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

import wnkernel

from . import verify
from .compiled import Report, reported
from .contenders import COMPILED, FUSED, LEAST, OURS, OWN, TORCH, random_grads
from .environment import Environment
from .models import freed
from .plan import Job, Plan
from .results import FORCED, FORCED_BACKWARD, Result, Subject, rows
from .shapes import NORMALIZED, LayerCase, shape_text, weight_list
from .timing import Contender, blamed, device_sampler, measure

EDM2_EPS = 1e-4
STEP = 1.25  # The root mean square of v before a contender is verified.
ONE = LayerCase((768, 768, 3, 3), 0, "one layer of EDM2-S", "Conv2d")

Read = Callable[[], Sequence[Tensor]]  # Writes to all v, and returns all w.


def edm2_normalize(x: Tensor) -> Tensor:
    """Do what ``normalize`` of NVlabs/edm2 does to a weight."""
    others = tuple(range(1, x.ndim))
    norm = torch.linalg.vector_norm(x, dim=others, keepdim=True, dtype=torch.float32)
    return x / (EDM2_EPS + norm * math.sqrt(norm.numel() / x.numel()))


def edm2_weights(vs: Sequence[Tensor]) -> list[Tensor]:
    """Do what every ``MPConv`` of NVlabs/edm2 does about its weight in a training forward."""
    weights = []
    for v in vs:
        w = v.to(torch.float32)
        with torch.no_grad():
            v.copy_(edm2_normalize(w))
        weights.append(edm2_normalize(w) * (1 / math.sqrt(w[0].numel())))
    return weights


def forced_model(vs: Sequence[nn.Parameter], cases: Sequence[LayerCase]) -> nn.ModuleList:
    """Return layers with a forced weight norm that share these parameters."""
    layers = nn.ModuleList()
    for v, c in zip(vs, cases, strict=True):
        outputs, inputs, *kernel = c.shape
        sizes = (inputs, outputs, *[tuple(kernel)] * bool(kernel))
        layer = getattr(nn, c.layer)(*sizes, bias=False, device="meta")
        layer.weight = v
        layers.append(wnkernel.forced_weight_norm(layer))
    return layers.train()


def readers(vs: Sequence[nn.Parameter], cases: Sequence[LayerCase]) -> dict[str, Read]:
    """Return the contenders that need no compiler. One layer needs no group."""
    one_by_one, model = forced_model(vs, cases), forced_model(vs, cases)
    found: dict[str, Read] = {
        OURS: lambda: [layer.weight for layer in one_by_one],
        TORCH: functools.partial(edm2_weights, vs),
    }
    if len(vs) > 1:
        group = wnkernel.fuse(model)

        def fused() -> list[Tensor]:
            with group.scope():
                return [layer.weight for layer in model]

        found[FUSED] = fused
    return found


@torch.no_grad()
def least_traffic(vs: Sequence[Tensor], ws: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
    """Read each v, write w and v; with gradients read v and the gradient too, and write once."""
    for v, w in zip(vs, ws, strict=True):
        w.copy_(v)
        v.fill_(1.0)
    for v, w, grad in zip(vs, ws, grads, strict=False):
        torch.add(v, grad, out=w)


def jobs(plan: Plan, where: Environment, report: Report) -> list[Job]:
    """Make a job for one layer, and one for EDM2-S or a part of it."""
    every, (_, edm2) = plan.forced_every, NORMALIZED
    label = edm2 if every == 1 else f"{edm2}, 1 layer in {every}"
    found = {ONE.label: [ONE], label: weight_list(edm2)[::every]}

    def run_and_free(label: str) -> list[Result]:
        try:
            return freed(run(label, found[label], plan, where, report))
        finally:
            torch._dynamo.reset()

    return [Job(f"forced {label}", functools.partial(run_and_free, label)) for label in found]


def run(
    label: str, cases: Sequence[LayerCase], plan: Plan, where: Environment, report: Report
) -> list[Result]:
    """Verify, then time, all contenders on one list of layers."""
    random = torch.Generator().manual_seed(0)
    start = [STEP * torch.randn(c.shape, generator=random).to(where.device) for c in cases]
    vs = [nn.Parameter(s.clone()) for s in start]
    grads = random_grads(vs)
    reads = readers(vs, cases)

    def step(read: Read) -> list[Tensor]:
        weights = read()
        return [*weights, *torch.autograd.grad(weights, vs, grads)]

    steps = {who: functools.partial(step, read) for who, read in reads.items()}
    if plan.normalize_compiled:
        graph = torch.compile(edm2_weights, fullgraph=True, dynamic=False)
        with reported(report):
            graph(vs)  # this call compiles
            reads[TORCH + COMPILED] = functools.partial(graph, vs)
    check = functools.partial(verified, label=label, vs=vs, start=start, grads=grads, where=where)
    errors = {who: check(who, contender) for who, contender in {**reads, **steps}.items()}
    numel, shape = sum(c.numel for c in cases), f"{len(cases)} layers"
    shape = shape_text(cases[0].shape) if len(cases) == 1 else shape
    out = []
    phases: dict[str, dict[str, Contender]] = {FORCED: {**reads}, FORCED_BACKWARD: {**steps}}
    for phase, contenders in phases.items():
        read = grads if phase == FORCED_BACKWARD else ()
        contenders[LEAST] = functools.partial(least_traffic, vs, start, read)
        stats = measure(contenders, device_sampler(where.device), plan.normalize_budget_s)
        about = Subject("normalize", label, phase, "float32", shape, "0", "first", numel, 4 * numel)
        out += rows(about, where, stats, errors=errors, limit=LEAST)
    return out


def verified(
    who: str,
    contender: Read,
    *,
    label: str,
    vs: Sequence[nn.Parameter],
    start: Sequence[Tensor],
    grads: Sequence[Tensor],
    where: Environment,
) -> float:
    """Run a contender on the start values; return its largest error against float64."""
    for v, s in zip(vs, start, strict=True):
        v.detach().copy_(s)
    with blamed(who):
        out = [t.detach() for t in contender()]  # all w, and all gradients if it takes them
    long_sums = who not in OWN or not where.own_kernels
    errors = []
    for k, (v, s, grad_w) in enumerate(zip(vs, start, grads, strict=True)):
        about = f"{who}, {label}, layer {k}"
        got = v.detach(), *out[k :: len(vs)]
        errors.append(verify.check_forced(about, got, s, grad_w, EDM2_EPS, long_sums=long_sums))
    return max(errors)

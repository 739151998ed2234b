"""Training with normalize_after_step, and the same in plain torch beside it."""

from __future__ import annotations

import copy

import torch
from torch.optim import SGD, AdamW

from wnkernel import normalize_, normalize_after_step

from ..groups import assert_same_models, twins
from .training import loss, matrices, model, step

F64 = torch.float64


def test_ngpt() -> None:
    """Loshchilov et al. 2024: matrices begin on the sphere and go back to it after each step, some
    along their rows, some along their columns."""
    m = model(F64)
    twin = copy.deepcopy(m)
    first, second = matrices(m)
    optimizer, plain = AdamW(m.parameters(), lr=0.05), AdamW(twin.parameters(), lr=0.05)

    def normalize_matrices() -> None:
        with torch.no_grad():
            a, b = matrices(twin)
            a.copy_(a / a.norm(p=2, dim=1, keepdim=True))
            b.copy_(b / b.norm(p=2, dim=(0, 1), keepdim=True))

    with torch.no_grad():
        normalize_([first, second], [0, 2])
    normalize_matrices()
    with normalize_after_step([first, second], [0, 2]):
        for k in range(20):
            step(optimizer, m, k)
            step(plain, twin, k)
            normalize_matrices()
    for p, q in zip(m.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


def test_hyperball() -> None:
    """Wen et al. 2025: W = R Norm(W - lr R Norm(u)), where R is the norm that W began with."""
    m, lr = model(F64), 0.05
    twin = copy.deepcopy(m)
    optimizer = SGD(m.parameters(), lr=lr)
    normalize_after_step(optimizer, None, norm="keep")
    began = {p: p.detach().norm() for p in matrices(twin)}
    for k in range(20):
        optimizer.zero_grad()
        loss(m, k).backward()
        grads = [p.grad for p in matrices(m)]
        normalize_(grads, None, norm=[r.clone() for r in began.values()])
        optimizer.step()
        twin.zero_grad()
        loss(twin, k).backward()
        with torch.no_grad():
            for p in twin.parameters():
                if p not in began:
                    p.sub_(lr * p.grad)
                    continue
                w = p - lr * began[p] * p.grad / p.grad.norm()
                p.copy_(began[p] * w / w.norm())
    for p, q in zip(m.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


def test_a_fused_group_sees_it(backend: str) -> None:
    m, twin, _ = twins("version")
    for n in (m, twin):
        optimizer = SGD((p for p in n.parameters() if p.ndim > 1), lr=0.1)
        normalize_after_step(optimizer, norm=2.0)
        for _ in range(2):
            optimizer.zero_grad()
            n().square().sum().backward()
            optimizer.step()
    assert_same_models(m, twin)

"""The projection heads of DINO, iBOT and DINOv2: a last layer whose g is set to 1 and frozen, whose
gradients are cancelled in the first epochs, and whose teacher is an average of it."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import wnkernel

from ..groups import REUSE, Computed
from ..layers import APPLY

LAYER = "last_layer"
G, V = f"{LAYER}.parametrizations.weight.original0", f"{LAYER}.parametrizations.weight.original1"
LEGACY = {G: f"{LAYER}.weight_g", V: f"{LAYER}.weight_v"}

Norm = Callable[[nn.Module], nn.Module]


class Head(nn.Module):
    """As in DINO: an MLP, a normalised bottleneck, prototypes."""

    def __init__(self, norm: Norm, freeze: Callable[[nn.Module], None]) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(12, 16), nn.GELU(), nn.Linear(16, 8))
        self.last_layer = norm(nn.Linear(8, 20, bias=False))
        freeze(self.last_layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.last_layer(F.normalize(self.mlp(x), dim=-1))


def legacy_names(layer: nn.Module) -> None:
    layer.weight_g.data.fill_(1)
    layer.weight_g.requires_grad = False


def new_names(layer: nn.Module) -> None:
    layer.parametrizations.weight.original0.data.fill_(1)
    layer.parametrizations.weight.original0.requires_grad = False


def patched() -> nn.Module:
    with wnkernel.patch_torch():
        return Head(nn.utils.weight_norm, legacy_names)


def converted(norm: str, freeze: Callable[[nn.Module], None]) -> nn.Module:
    head = Head(APPLY[norm], freeze)
    assert wnkernel.convert(head) == [f"{LAYER}.weight"]
    return head


HEADS: dict[str, Callable[[], nn.Module]] = {
    "ours": lambda: Head(wnkernel.weight_norm, new_names),
    "legacy, converted": lambda: converted("legacy", legacy_names),
    "torch's, converted": lambda: converted("torch", new_names),
    "patch_torch": patched,
}

all_heads = pytest.mark.parametrize("head", HEADS)


def built(head: str, reuse: str | None = None) -> nn.Module:
    """A head; the same in every call."""
    torch.manual_seed(0)
    module = HEADS[head]()
    if reuse is not None:
        wnkernel.fuse(module, reuse=reuse)
    return module


def of_torch(kind: str = "legacy") -> nn.Module:
    torch.manual_seed(0)
    return Head(APPLY[kind], legacy_names if kind == "legacy" else new_names)


def g_and_v(head: nn.Module) -> tuple[Tensor, Tensor]:
    parameters = dict(head.named_parameters())
    return tuple(parameters[key if key in parameters else LEGACY[key]] for key in (G, V))


@all_heads
def test_rows_are_of_length_one(head: str) -> None:
    module = built(head)
    g, v = g_and_v(module)
    assert not g.requires_grad
    assert v.requires_grad
    torch.testing.assert_close(module.last_layer.weight.norm(dim=1), torch.ones(20))
    x = augmented(0)[0]
    torch.testing.assert_close(module(x), of_torch()(x))


@pytest.mark.parametrize("name", ["weight_g", "weight_v"])
@pytest.mark.parametrize("head", ["legacy, converted", "patch_torch"])
def test_legacy_names_after_the_conversion(head: str, name: str) -> None:
    """Code that freezes, or sets g to 1, later than the constructor."""
    module = built(head)
    p = getattr(module.last_layer, name)
    assert p is g_and_v(module)[name == "weight_v"]
    getattr(module.last_layer, name).data.fill_(1)
    getattr(module.last_layer, name).requires_grad = True
    assert p.requires_grad
    assert torch.equal(p, torch.ones_like(p))


# Training


def augmented(step: int) -> list[Tensor]:
    """Two views of a batch."""
    x = torch.linspace(-40, 40, 6 * 12).sin().view(6, 12) + 0.1 * step
    return [x, x.flip(0).roll(1, 1)]


def train(student: nn.Module, teacher: nn.Module, steps: int, frozen: int) -> list[Tensor]:
    """DINO's loop. Until step ``frozen`` the last layer stays."""
    teacher.load_state_dict(student.state_dict())
    for p in teacher.parameters():
        p.requires_grad = False
    optimizer = torch.optim.AdamW(
        [p for p in student.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.04
    )
    losses = []
    for step in range(steps):
        views = augmented(step)
        aims = [F.softmax(teacher(x) / 0.5, dim=-1).detach() for x in views]
        scores = [F.log_softmax(student(x), dim=-1) for x in views]
        loss = -(aims[0] * scores[1] + aims[1] * scores[0]).sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        if step < frozen:
            for name, p in student.named_parameters():
                if LAYER in name:
                    p.grad = None
        optimizer.step()
        with torch.no_grad():
            for p, average in zip(student.parameters(), teacher.parameters(), strict=True):
                average.data.mul_(0.9).add_((1 - 0.9) * p.detach().data)
        losses.append(loss.detach())
    return losses


@pytest.mark.parametrize("reuse", [None, *REUSE])
@all_heads
def test_training(head: str, reuse: str | None) -> None:
    student, teacher = built(head, reuse), built(head, reuse)
    before = [p.clone() for p in g_and_v(student)]
    losses = train(student, teacher, 2, frozen=2)
    assert all(map(torch.equal, g_and_v(student), before))
    losses += train(student, teacher, 2, frozen=0)
    g, v = g_and_v(student)
    assert g.grad is None
    assert torch.equal(g, before[0])
    assert not torch.equal(v, before[1])
    assert not torch.equal(g_and_v(teacher)[1], v)

    theirs = of_torch(), of_torch()
    want = train(*theirs, 2, frozen=2) + train(*theirs, 2, frozen=0)
    torch.testing.assert_close(losses, want)
    for a, b in zip(student.parameters(), theirs[0].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reuse", [None, *REUSE])
@all_heads
def test_a_teacher_may_be_a_copy(head: str, reuse: str | None) -> None:
    """Which a layer with torch's legacy weight norm refuses after a forward."""
    student = built(head, reuse)
    student(augmented(0)[0])
    teacher = copy.deepcopy(student)
    assert not g_and_v(teacher)[0].requires_grad
    with torch.no_grad():
        g_and_v(student)[1].mul_(torch.linspace(1, 2, 8))
    x = augmented(0)[0]
    assert torch.equal(teacher(x), built(head)(x))
    assert not torch.equal(student(x), teacher(x))


def test_several_views_with_one_weight(computed: Computed) -> None:
    """A frozen teacher in version mode computes once, whatever it is asked."""
    teacher = built("ours", "version").requires_grad_(False)
    for x in augmented(0) * 4:
        teacher(x)
    assert computed.take() == ([1], 0)


# Checkpoints


@pytest.mark.parametrize("kind", ["legacy", "torch"])
@all_heads
def test_checkpoints_of_others(head: str, kind: str) -> None:
    theirs = of_torch(kind)
    with torch.no_grad():
        g_and_v(theirs)[1].mul_(torch.linspace(1, 2, 8))
    module = built(head)
    module.load_state_dict(theirs.state_dict())
    assert all(map(torch.equal, g_and_v(module), g_and_v(theirs)))
    assert not g_and_v(module)[0].requires_grad


@pytest.mark.parametrize("kind", ["legacy", "torch"])
@all_heads
def test_checkpoints_for_others(head: str, kind: str) -> None:
    module, theirs = built(head), of_torch(kind)
    with torch.no_grad():
        g_and_v(module)[1].mul_(torch.linspace(1, 2, 8))
    layout = {"legacy": "legacy", "torch": "parametrized"}[kind]
    theirs.load_state_dict(wnkernel.convert_state_dict(module.state_dict(), to=layout))
    assert all(map(torch.equal, g_and_v(theirs), g_and_v(module)))

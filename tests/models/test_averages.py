"""Averages of weights, as libraries for training keep them: a teacher beside the model, or a shadow
that takes its place while it is evaluated. A fused model gives the bits of one that is not."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from wnkernel import WeightNormGroup

from ..groups import both_modes
from ..vocoders import assert_same_parameters, batch, loss_of, vocoder

MOMENTUM = 0.7


@torch.no_grad()
def k_diffusion(teacher: nn.Module, model: nn.Module) -> None:
    of_model = dict(model.named_parameters())
    for name, average in teacher.named_parameters():
        average.mul_(MOMENTUM).add_(of_model[name], alpha=1 - MOMENTUM)


@torch.no_grad()
def timm_v2(teacher: nn.Module, model: nn.Module) -> None:
    pairs = zip(teacher.state_dict().values(), model.state_dict().values(), strict=True)
    for average, p in pairs:
        average.copy_(MOMENTUM * average + (1 - MOMENTUM) * p)


@torch.no_grad()
def timm_v3(teacher: nn.Module, model: nn.Module) -> None:
    torch._foreach_lerp_(list(teacher.parameters()), list(model.parameters()), weight=1 - MOMENTUM)


def stylegan(teacher: nn.Module, model: nn.Module) -> None:
    with torch.inference_mode():
        for average, p in zip(teacher.parameters(), model.parameters(), strict=True):
            average.copy_(p.detach().lerp(average, MOMENTUM))


def dino(teacher: nn.Module, model: nn.Module) -> None:
    with torch.no_grad():
        for p, average in zip(model.parameters(), teacher.parameters(), strict=True):
            average.data.mul_(MOMENTUM).add_((1 - MOMENTUM) * p.detach().data)


def state_dicts(teacher: nn.Module, model: nn.Module) -> None:
    of_model = model.state_dict()
    mixed = {k: t.lerp(of_model[k], 1 - MOMENTUM) for k, t in teacher.state_dict().items()}
    teacher.load_state_dict(mixed)


UPDATES = [k_diffusion, timm_v2, timm_v3, stylegan, dino, state_dicts]


class Training:
    """A model, its optimizer and an average of it."""

    def __init__(self, form: str) -> None:
        self.model = vocoder(form)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)

    def step(self, step: int) -> Tensor:
        self.optimizer.zero_grad()
        loss = loss_of(self.model(batch(step)))
        loss.backward()
        self.optimizer.step()
        return loss.detach()


def outputs(model: nn.Module) -> Tensor:
    """In evaluation, twice: what a first forward leaves behind must not hide anything."""
    with torch.no_grad():
        return torch.stack([model(batch()), model(batch(1))])


# A teacher beside the model


@pytest.mark.parametrize("update", UPDATES)
@both_modes
def test_teachers(reuse: str, update: Callable[[nn.Module, nn.Module], None]) -> None:
    """All of them are seen here in both modes: an optimizer steps before every update."""
    fused, alone = Training(f"fused, {reuse}"), Training("alone")
    teachers = [copy.deepcopy(t.model).requires_grad_(False) for t in (fused, alone)]
    previous = outputs(teachers[1])
    for step in range(3):
        assert torch.equal(fused.step(step), alone.step(step))
        for teacher, training in zip(teachers, (fused, alone), strict=True):
            update(teacher, training.model)
        got, want = map(outputs, teachers)
        assert torch.equal(got, want)
        assert not torch.equal(want, previous)
        previous = want
    assert_same_parameters(*teachers)


@pytest.mark.parametrize("options", [{}, {"multi_avg_fn": get_ema_multi_avg_fn(MOMENTUM)}])
@both_modes
def test_averaged_models_of_torch(reuse: str, options: dict[str, object]) -> None:
    fused, alone = Training(f"fused, {reuse}"), Training("alone")
    averages = [AveragedModel(t.model, use_buffers=True, **options) for t in (fused, alone)]
    for step in range(3):
        assert torch.equal(fused.step(step), alone.step(step))
        for average, training in zip(averages, (fused, alone), strict=True):
            average.update_parameters(training.model)
        assert torch.equal(*map(outputs, averages))
    assert not torch.equal(outputs(averages[1]), outputs(alone.model))


@both_modes
def test_between_optimizer_steps_updates_through_data_want_a_refresh(reuse: str) -> None:
    """An accumulated step with an update of the teacher in each part of it."""
    fused, alone = vocoder(f"fused, {reuse}"), vocoder()
    model = vocoder()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1)
    for _ in range(2):
        assert torch.equal(outputs(fused), outputs(alone))
        dino(fused, model), dino(alone, model)
        WeightNormGroup.of(fused).refresh()
    assert torch.equal(outputs(fused), outputs(alone))


# A shadow that takes the model's place


def swapped_tensors(model: nn.Module, shadow: list[Tensor]) -> None:
    """``param.data = shadow``, as most recipes have it."""
    for k, p in enumerate(model.parameters()):
        p.data, shadow[k] = shadow[k], p.data


def swapped_values(model: nn.Module, shadow: list[Tensor]) -> None:
    """``param.data.copy_(shadow)``: torch_ema, diffusers, Lightning's WeightAveraging."""
    for k, p in enumerate(model.parameters()):
        backup = p.data.clone()
        p.data.copy_(shadow[k])
        shadow[k] = backup


SWAPS = [swapped_tensors, swapped_values]


class Shadow(Training):
    def __init__(self, form: str, swap: Callable[[nn.Module, list[Tensor]], None]) -> None:
        super().__init__(form)
        self.swap = swap
        self.shadow = [p.detach().clone() for p in self.model.parameters()]
        self.group = None if form == "alone" else WeightNormGroup.of(self.model)

    def update(self) -> None:
        for average, p in zip(self.shadow, self.model.parameters(), strict=True):
            average.mul_(MOMENTUM).add_(p.detach(), alpha=1 - MOMENTUM)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        self._swap()
        yield
        self._swap()

    def _swap(self) -> None:
        self.swap(self.model, self.shadow)
        if self.group is not None and self.swap is swapped_values:
            self.group.refresh()


@pytest.mark.parametrize("swap", SWAPS)
@both_modes
def test_shadows(reuse: str, swap: Callable[[nn.Module, list[Tensor]], None]) -> None:
    trainings = [Shadow(f"fused, {reuse}", swap), Shadow("alone", swap)]
    for step in range(3):
        losses, of_averages, of_models = [], [], []
        for training in trainings:
            losses.append(training.step(step))
            training.update()
            of_models.append(outputs(training.model))
            with training.averaged():
                of_averages.append(outputs(training.model))
            of_models.append(outputs(training.model))
        assert torch.equal(*losses)
        assert torch.equal(*of_averages)
        assert all(torch.equal(y, of_models[0]) for y in of_models)
        assert not torch.equal(of_models[0], of_averages[0])

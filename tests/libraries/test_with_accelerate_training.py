"""Accelerate's ``Accelerator``: prepared models train with the bits of a loop written by hand, and
their checkpoints come back."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import wnkernel

from ..groups import assert_same_tensors, gradients
from ..vocoders import (
    FORMS,
    all_forms,
    assert_same_parameters,
    batch,
    from_both_kinds,
    loss_of,
    of_torch,
    vocoder,
)

accelerate = pytest.importorskip("accelerate", reason="Accelerate is not installed")
safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")


@pytest.fixture
def accelerator(fresh_accelerate: None) -> Callable[..., Any]:
    """Makes an Accelerator."""
    return partial(accelerate.Accelerator, cpu=True)


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def train(accelerator: Any, model: nn.Module, optimizer: Any, steps: range) -> list[Tensor]:
    """Some steps as Accelerate's documentation writes them, and their losses."""
    losses = []
    for step in steps:
        with accelerator.accumulate(model):
            loss = loss_of(model(batch(step)))
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.detach())
    return losses


def train_by_hand(model: nn.Module, steps: range, accumulated: int, bf16: bool) -> list[Tensor]:
    """What they come to."""
    optimizer = optimizer_of(model)
    losses = []
    for step in steps:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            y = model(batch(step))
        loss = loss_of(y.float())
        (loss / accumulated).backward()
        if (step + 1) % accumulated == 0:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.detach())
    return losses


def assert_equal(got: list[Tensor], want: list[Tensor]) -> None:
    assert torch.equal(torch.stack(got), torch.stack(want))


@pytest.mark.parametrize(("precision", "accumulated"), [("no", 1), ("bf16", 2)])
@pytest.mark.parametrize("form", [*FORMS, "fused, autocast"])
def test_training(accelerator: Callable[..., Any], form: str, precision: str, accumulated: int):
    twin = vocoder()
    bf16 = precision == "bf16"
    want = train_by_hand(twin, range(4), accumulated, bf16)

    model = vocoder("alone" if "autocast" in form else form)
    if "autocast" in form:
        wnkernel.fuse(model, autocast=True)
    a = accelerator(mixed_precision=precision, gradient_accumulation_steps=accumulated)
    model, optimizer = a.prepare(model, optimizer_of(model))
    assert_equal(train(a, model, optimizer, range(4)), want)

    plain = a.unwrap_model(model, keep_fp32_wrapper=False)
    assert_same_parameters(plain, twin)
    assert torch.equal(plain(batch()), twin(batch()))
    assert plain(batch()).dtype == torch.float32


@all_forms
def test_resumed_training(tmp_path: Path, accelerator: Callable[..., Any], form: str) -> None:
    a = accelerator(mixed_precision="bf16")
    model = vocoder(form)
    model, optimizer = a.prepare(model, optimizer_of(model))
    train(a, model, optimizer, range(2))
    a.save_state(tmp_path)
    want = train(a, model, optimizer, range(2, 4))
    a.load_state(tmp_path)  # into the same
    assert_equal(train(a, model, optimizer, range(2, 4)), want)

    a = accelerator(mixed_precision="bf16")
    resumed = vocoder(form)
    loss_of(resumed(batch()))  # a group has weights of before
    resumed, optimizer = a.prepare(resumed, optimizer_of(resumed))
    a.load_state(tmp_path)
    assert_equal(train(a, resumed, optimizer, range(2, 4)), want)
    assert_same_parameters(resumed, model)


@from_both_kinds
def test_from_torchs_weight_norm_and_back(
    tmp_path: Path, accelerator: Callable[..., Any], kind: str
) -> None:
    """A training that began with torch's weight norm, either of them, goes on with ours; torch's
    parametrization takes it over again."""

    def begin(model: nn.Module) -> tuple[Any, nn.Module, Any]:
        a = accelerator()
        return a, *a.prepare(model, optimizer_of(model))

    a, theirs, optimizer = begin(of_torch(kind))
    train(a, theirs, optimizer, range(2))
    a.save_state(tmp_path / "theirs")
    saved = [p.detach().clone() for p in theirs.parameters()]
    want = train(a, theirs, optimizer, range(2, 4))

    a, ours, optimizer = begin(vocoder("fused, forward"))
    a.load_state(tmp_path / "theirs")
    assert all(map(torch.equal, ours.parameters(), saved))
    a.save_state(tmp_path / "ours")
    torch.testing.assert_close(train(a, ours, optimizer, range(2, 4)), want)

    a, theirs, optimizer = begin(of_torch())
    a.load_state(tmp_path / "ours")
    torch.testing.assert_close(train(a, theirs, optimizer, range(2, 4)), want)


@all_forms
def test_a_saved_model(tmp_path: Path, accelerator: Callable[..., Any], form: str) -> None:
    """The file has torch's keys and nothing of a group."""
    a = accelerator()
    model = a.prepare(vocoder(form))
    a.save_model(model, tmp_path)
    state = safetensors.load_file(tmp_path / "model.safetensors")
    assert set(state) == set(of_torch().state_dict())
    for new in (of_torch(), vocoder(form)):
        new.load_state_dict(state)
        assert_same_parameters(new, model)


@all_forms
def test_clipped_gradients(accelerator: Callable[..., Any], form: str) -> None:
    """Gradients of a group are there when ``clip_grad_norm_`` looks at them."""
    a = accelerator()
    model, twin = a.prepare(vocoder(form)), vocoder()
    a.backward(loss_of(model(batch())))
    loss_of(twin(batch())).backward()
    norm = a.clip_grad_norm_(model.parameters(), 0.1)
    assert torch.equal(norm, nn.utils.clip_grad_norm_(twin.parameters(), 0.1))
    assert_same_tensors(gradients(model), gradients(twin))

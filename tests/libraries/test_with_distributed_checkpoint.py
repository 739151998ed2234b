"""torch.distributed.checkpoint in a single process: models and optimizers with our weight norm and
with torch's read each other's checkpoints. Sharded models: tests/checkpoint/test_sharded.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)

import wnkernel

from ..layers import assert_same_state
from ..vocoders import (
    all_forms,
    assert_same_parameters,
    batch,
    from_both_kinds,
    loss_of,
    of_torch,
    vocoder,
)

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


class Training:
    """A model and its optimizer."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    def run(self, steps: range) -> Tensor:
        """The losses of some steps."""
        losses = []
        for step in steps:
            self.optimizer.zero_grad()
            losses.append(loss_of(self.model(batch(step))))
            losses[-1].backward()
            self.optimizer.step()
        return torch.stack(losses).detach()

    def state(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer}

    def save(self, folder: Path) -> None:
        dcp.save(self.state(), checkpoint_id=folder)

    def load(self, folder: Path) -> None:
        state = self.state()
        dcp.load(state, checkpoint_id=folder)
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )


@all_forms
def test_training_goes_on(tmp_path: Path, form: str) -> None:
    first = Training(vocoder(form))
    first.run(range(2))
    first.save(tmp_path)
    want = first.run(range(2, 4))
    resumed = Training(vocoder(form))
    resumed.run(range(1))  # a group has weights of before
    resumed.load(tmp_path)
    assert torch.equal(resumed.run(range(2, 4)), want)
    assert_same_parameters(resumed.model, first.model)


@pytest.mark.parametrize("whose", ["ours", "torch's"])
@all_forms
def test_between_ours_and_torchs(tmp_path: Path, form: str, whose: str) -> None:
    """With the state of the optimizer, which goes by the names of parameters."""
    models = [vocoder(form), of_torch()]
    if whose == "torch's":
        models.reverse()
    first, second = map(Training, models)
    first.run(range(2))
    first.save(tmp_path)
    second.load(tmp_path)
    assert_same_parameters(second.model, first.model)
    for p, q in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert_same_state(first.optimizer.state[p], second.optimizer.state[q])
    torch.testing.assert_close(second.run(range(2, 4)), first.run(range(2, 4)))


@from_both_kinds
def test_keys_are_those_of_torchs_parametrization(kind: str) -> None:
    """Those of converted layers, too."""
    got = get_model_state_dict(vocoder("fused, forward", kind))
    assert_same_state(got, get_model_state_dict(of_torch()))


@pytest.mark.parametrize("layout", ["legacy", "folded"])
@all_forms
def test_other_layouts(tmp_path: Path, form: str, layout: str) -> None:
    """``dcp.load`` reads what a dict asks for, so the dict has to have the keys of the files."""
    saved = wnkernel.convert_state_dict(of_torch().state_dict(), to=layout)
    dcp.save({"model": saved}, checkpoint_id=tmp_path)

    model = vocoder(form)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(0.5)
    state = wnkernel.convert_state_dict(get_model_state_dict(model), to=layout)
    dcp.load({"model": state}, checkpoint_id=tmp_path)
    set_model_state_dict(model, state)
    if layout == "legacy":
        assert_same_parameters(model, of_torch())
    torch.testing.assert_close(model(batch()), of_torch()(batch()))

"""Weight norms in CUDA graphs: replays compute from what parameters are by then."""

from __future__ import annotations

import copy
import gc
import itertools

import pytest
import torch
from torch import Tensor, nn

import wnkernel
from wnkernel import functional as F
from wnkernel.backends.triton.tables import KEPT

from ..groups import both_modes
from .on_gpus import SHAPES, Captured, assert_same_bits, change, results, weights


@pytest.mark.parametrize("name", SHAPES)
def test_a_weight(gpu_backend, name):
    chosen = weights(names=[name])
    graph = Captured(lambda: results(chosen, together=False))
    for _ in range(3):
        change(chosen)
        assert_same_bits(graph.replay(), results(chosen, together=False))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_list(gpu_backend, dtype):
    chosen = [*weights(dtype), *weights(torch.float64, names=["rows", "few rows"])]
    graph = Captured(lambda: results(chosen, together=True))
    for _ in range(3):
        change(chosen)
        assert_same_bits(graph.replay(), results(chosen, together=False))


def other_lists() -> list[Tensor]:
    """Enough of them for everything that is kept of a list to be that of these."""
    kept = []
    for _ in range(KEPT + 1):
        vs, gs = [torch.randn(2, 3) for _ in range(2)], [torch.rand(2, 1) for _ in range(2)]
        kept += [*vs, *gs, *F.weight_norms(vs, gs, [0, 0])]
    return kept


@pytest.mark.parametrize("when", ["before the capture", "after it"])
def test_a_list_whose_table_was_evicted(gpu_backend, when):
    chosen = weights()
    early = when == "before the capture"
    between = other_lists if early else (lambda: None)
    graph = Captured(lambda: results(chosen, together=True), between)
    if not early:
        others = other_lists()
        del others
        gc.collect()
        torch.cuda.empty_cache()
        noise = [torch.randn(1 << 16) for _ in range(64)]
        del noise
    for _ in range(2):
        change(chosen)
        assert_same_bits(graph.replay(), results(chosen, together=False))


def test_two_graphs_of_one_list(gpu_backend):
    """Each has a table of its own."""
    chosen = weights()
    graphs = [Captured(lambda: results(chosen, together=True)) for _ in range(2)]
    for graph in (*graphs, *graphs[::-1]):
        change(chosen)
        assert_same_bits(graph.replay(), results(chosen, together=False))


class Model(nn.Module):
    """Layers whose weights are all that counts: no convolution that may choose its algorithm."""

    def __init__(self) -> None:
        super().__init__()
        norm = wnkernel.weight_norm
        self.front = nn.Sequential(norm(nn.Conv1d(64, 96, 7)), norm(nn.Linear(37, 50), dim=1))
        self.back = nn.Sequential(
            norm(nn.ConvTranspose1d(64, 32, 4), dim=1), norm(nn.Linear(500, 301), dim=None)
        )

    def forward(self) -> Tensor:
        layers = itertools.chain(self.front, self.back)
        return torch.stack([(w * w.detach().cos()).sum() for w in (x.weight for x in layers)]).sum()


def train(model: nn.Module) -> list[Tensor]:
    """A step; the loss and the parameters after it."""
    model.zero_grad(set_to_none=True)
    loss = model()
    loss.backward()
    trained = [p for name, p in model.named_parameters() if ".original" in name]
    with torch.no_grad():
        for p in trained:
            p.sub_(0.1 * p.grad)
    return [loss, *(p.detach().clone() for p in trained)]


@both_modes
def test_a_training_step_of_a_fused_model(gpu_backend, reuse):
    model = Model()
    twin = copy.deepcopy(model)
    group = wnkernel.fuse(model, reuse=reuse)
    graph = Captured(lambda: train(model))
    model.load_state_dict(twin.state_dict())
    for _ in range(3):
        assert_same_bits(graph.replay(), train(twin))
    group.refresh()
    assert torch.equal(model(), twin())


@both_modes
def test_weights_from_outside_of_a_capture_are_not_baked_into_it(gpu_backend, reuse):
    model = Model()
    twin = copy.deepcopy(model)
    group = wnkernel.fuse(model, reuse=reuse)
    with torch.no_grad(), group.scope():
        model()
        graph = Captured(lambda: [model()])
        for p in (p for m in (model, twin) for p in m.parameters()):
            p.mul_(1.5)
        assert_same_bits(graph.replay(), [twin()])

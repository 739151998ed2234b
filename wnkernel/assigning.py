"""The effect of ``layer.weight = w`` on a weight-normed layer, and the parameters that it
refuses."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .census import originals, parametrizations_of, stacked_in
from .checkpoint import WeightNormOriginals
from .lost_writes import forget_writes


@torch.inference_mode(False)
def assign(module: nn.Module, name: str, value: Tensor) -> None:
    """Carry out ``module.weight = value``: write the g and v that give this weight. g and v stay
    the same Parameters, so optimizers keep working. A frozen Parameter freezes both; a Parameter
    that requires grad unfreezes them if both were frozen. A value of another shape is accepted, as
    by a plain layer."""
    weights = parametrizations_of(module, name)
    if not isinstance(weights, WeightNormOriginals):  # for example spectral norm alone
        weights.right_inverse(value)
        return
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    g, v = originals(weights)
    expected, got = ((t.dtype, t.device) for t in (v, value))
    if expected != got and len(stacked_in(weights)) == 1:  # stacked ones may change dtype or device
        raise ValueError(
            f"{name}: expected a weight like the one of this {type(module).__name__}, of "
            f"{expected[0]} on {expected[1]}, got {got[0]} on {got[1]}; one of another kind can "
            "take its place after wnkernel.remove_weight_norm(layer)"
        )
    value_is_kept = value.shape != v.shape  # it becomes v, see assign_weight
    w = value.detach()
    if value_is_kept or torch._C._is_alias_of(w, v):  # type: ignore[attr-defined]  # no stub has it
        w = w.clone()
    weights.right_inverse(w)
    forget_writes(weights)
    if isinstance(value, nn.Parameter) and (
        not value.requires_grad or not (g.requires_grad or v.requires_grad)
    ):
        for p in (g, v):
            p.requires_grad_(value.requires_grad)


def refuse(module: nn.Module, name: str, parameter: object) -> None:
    """Raise an error: ``parameter`` is no plain Parameter and would replace a weight, or g or v."""
    kind = type(parameter.data if type(parameter) is nn.Parameter else parameter).__name__
    raise RuntimeError(
        f"{name}: expected a plain torch.nn.Parameter for a {type(module).__name__} with weight "
        f"norm, got one of type {kind}; sharding, quantization and the like need plain weights: "
        "call wnkernel.fold(model) before"
    )

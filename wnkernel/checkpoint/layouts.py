"""The key layouts of weight-normed checkpoints, and what the shapes of g and v say.

======================  =====================================  ==========================
layout                  g                                      v
======================  =====================================  ==========================
parametrized (new)      ``parametrizations.<name>.original0``  ``....<name>.original1``
legacy                  ``<name>_g``                           ``<name>_v``
folded (plain)          none: ``<name>`` holds ``w``
======================  =====================================  ==========================
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.utils import parametrize
from torch.nn.utils.weight_norm import WeightNorm as LegacyHook

from .. import functional
from ..backends.eager import torch_has_kernel
from ..problem import WHOLE_TENSOR, check_v, norm_shape
from ..removal import RemovalHook

PARAMETRIZED, LEGACY, FOLDED = "parametrized", "legacy", "folded"
LAYOUTS = (PARAMETRIZED, LEGACY, FOLDED)


def parametrized_keys(name: str) -> tuple[str, str]:
    """Keys of g and v, below the layer's prefix, in the parametrized layout."""
    return f"parametrizations.{name}.original0", f"parametrizations.{name}.original1"


def legacy_keys(name: str) -> tuple[str, str]:
    """Keys of g and v, below the layer's prefix, in the legacy layout."""
    return f"{name}_g", f"{name}_v"


def weight_keys(key: str, layout: str) -> tuple[str, ...]:
    """The keys in a layout (of g and v, if it has them) of the weight that is ``key`` if folded."""
    if layout == FOLDED:
        return (key,)
    prefix, dot, name = key.rpartition(".")
    names = parametrized_keys(name) if layout == PARAMETRIZED else legacy_keys(name)
    return prefix + dot + names[0], prefix + dot + names[1]


def legacy_hooks(module: nn.Module) -> dict[str, tuple[int, LegacyHook]]:
    """torch's legacy weight norms of a module: the names of the parameters, and for each the hook
    after its key among the hooks."""
    return {
        hook.name: (key, hook)
        for key, hook in module._forward_pre_hooks.items()
        if isinstance(hook, LegacyHook) and type(hook) is not RemovalHook
    }


def own_parametrizations(module: nn.Module) -> dict[str, parametrize.ParametrizationList]:
    """The parametrizations of a module itself, by the names of the parameters. Wrappers (that of
    ``torch.compile``, PEFT's, FSDP's) answer for the module that they hold when they are asked
    for ``parametrizations``, and have none."""
    lists = module._modules.get("parametrizations")
    return dict(lists.items()) if isinstance(lists, nn.ModuleDict) else {}


def stacked_in(weights: parametrize.ParametrizationList) -> list[nn.Module]:
    """The parametrizations of a list, in the order in which they are computed. ``len`` and ``iter``
    count ``weights.parametrizations`` too, which is there where g or v is parametrized itself."""
    return [module for key, module in weights._modules.items() if key.isdigit()]


def infer_dim(g: torch.Size, v: torch.Size) -> int | None:
    """The canonical dim of a weight norm with a g and a v of these shapes; None if no dim fits.

    A g with more than one element fits one dim at most. A g with one element means one norm over
    all of v: where v has dims of size 1 the first of them that fits is taken, and any other (or
    the whole tensor) would give the same w.
    """
    if len(g) == len(v):
        for dim in range(len(v)):
            if tuple(g) == norm_shape(v, dim):
                return dim
    one_element = g.numel() == 1 and len(g) in (0, 1, len(v))  # torch 0.3 saved shape (1,)
    return WHOLE_TENSOR if one_element and len(v) else None


def split_weight(weight: Tensor, dim: int, eps: float = 0.0) -> tuple[Tensor, Tensor]:
    """``(g, v)`` that give ``weight``: g is what our kernels divide by, so that w is v. Of a row
    shorter than ``eps`` that is ``eps``. A row of zeros without ``eps``, which has no direction,
    gets one: v is 1 there, so that w is 0 and not NaN, and can be trained."""
    return _with_directions(functional.norms_for(weight, check_v(weight, dim), eps), weight)


def _with_directions(g: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    if has_values(g) and (zero := g == 0).any():
        v = torch.where(zero, 1.0, v)
    return g, v


def split_for_torch(weight: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """``(g, v)`` from which torch's own weight norm computes ``weight``.

    Its norms are off by up to 1e-3 where rows are long, and on the first and the last dim its
    kernel divides by others than those of ``torch.norm_except_dim``. g is what it divides by, but
    for rows that it cannot compute: there g is right.
    """
    g, v = split_weight(weight, dim)
    if weight.numel() == 0:  # torch cannot: one of its views would have any number of columns
        return g, v
    if torch_has_kernel(weight, dim):
        ones = torch.ones_like(g)
        of_torch = torch._weight_norm_interface(weight.contiguous(), ones, dim)[1].to(g.dtype)
    else:
        of_torch = torch.norm_except_dim(weight, 2, dim)
    return torch.where((of_torch > 0) & of_torch.isfinite(), of_torch, g), v


def has_values(t: Tensor) -> bool:
    """Whether there is anything to compare: not on the meta device, nor in a fake tensor."""
    return not (t.is_meta or isinstance(t, FakeTensor))


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same to the last bit, NaN included.

    Tensors without values have no bits: there the shape and the dtype decide.
    """
    if a is b:
        return True
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not (has_values(a) and has_values(b)):
        return True
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.dtype.itemsize]
    return torch.equal(a.detach().view(bits), b.detach().to(a.device).view(bits))


def same_up_to_rounding(a: Tensor, b: Tensor) -> bool:
    """Whether two weights could be one, computed by two kernels, or rounded to a narrower dtype."""
    if a.shape != b.shape:
        return False
    if not (has_values(a) and has_values(b)):
        return True
    rtol = max(_rounding(a.dtype), _rounding(b.dtype))
    # float8 has no promotion
    wide = torch.float64 if torch.float64 in (a.dtype, b.dtype) else torch.float32
    a, b = a.detach().to(wide), b.detach().to(a.device, wide)
    near = b.isfinite() & ((a - b).abs() <= rtol * b.abs())
    same = (a == b) | near | (a.isnan() & b.isnan())
    return bool(same.all())  # allclose has no rule for DTensors


def _rounding(dtype: torch.dtype) -> float:
    """Kernels sum in float32 at least: the order of a sum does not show in half types."""
    return torch.finfo(dtype).eps * (2 if dtype.itemsize <= 2 else 16)

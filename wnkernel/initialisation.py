"""Initialisation of one weight, and of g and bias from data (Salimans & Kingma 2016)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.weight_norm import WeightNorm as LegacyHook

from .census import OURS, census, normed_in, originals, parametrizations_of
from .checkpoint import WeightNormOriginals
from .checkpoint.loading import assign_weight
from .layers import M, folded_weight, update_flat_weights
from .module_class import forget_cached
from .observers import sharding_modules
from .problem import accumulation_dtype, canonical_dim, check_module
from .splitting import split_for_torch

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
NAME = "weight"


def init_weight_(module: M, fn: Callable[[Tensor], Any], name: str = "weight") -> M:
    """Initialise the weight of a weight-normed layer in place, as ``fn`` would a plain one.

    ::

        wnkernel.init_weight_(layer, nn.init.kaiming_normal_)

        def init(m):
            if hasattr(m, "weight_g") or torch.nn.utils.parametrize.is_parametrized(m, "weight"):
                wnkernel.init_weight_(m, lambda w: w.normal_(0, 0.01))

        model.apply(init)

    ``nn.init.kaiming_normal_(layer.weight)`` would change a temporary. g and v stay the Parameters
    that they are: g becomes the norms of what ``fn`` wrote, v becomes that itself. Where ``fn``
    wrote a row of zeros, g is 0 and v becomes ones, since zeros have no direction: the weight is 0
    and can be trained. (With an ``eps`` v may be 0, and g is ``eps``.)

    Args:
        module: a layer with weight norm on ``name``, of any of the three kinds.
        fn: gets the weight as a plain tensor without gradient and writes to it; what it returns is
            not looked at.
        name: which parameter of the layer.

    Returns:
        ``module``.

    Raises:
        TypeError: ``module`` is no module.
        ValueError: ``name`` has no weight norm.
    """
    check_module("module", module)
    normed = normed_in(module).get(name)
    if normed is None:
        raise ValueError(f"name: expected a weight-normed parameter, got {name!r}, which is not")
    with torch.no_grad():
        weight = folded_weight(module, name).detach()
        fn(weight)
        if isinstance(normed.norm, LegacyHook):
            pair = split_for_torch(weight, normed.norm.dim)
            for own, t in zip(normed.originals(), pair, strict=True):
                own.copy_(t)
        elif isinstance(normed.weights, WeightNormOriginals):
            setattr(module, name, weight)
        else:  # torch's own list would leave rows of zeros without a direction
            assign_weight(normed.weights, weight)
            update_flat_weights(module, name)
    if isinstance(normed.norm, LegacyHook):  # else it is of the last forward until the next one
        setattr(module, name, normed.norm.compute_weight(module))
    return module


def data_dependent_init_(model: nn.Module, batch: Any) -> list[str]:
    r"""Initialise g and bias so that every channel of every weight-normed layer has mean 0 and
    variance 1 on a batch, before its nonlinearity.

    As section 3 of Salimans & Kingma 2016 defines it. With the pre-activations
    :math:`t = v \cdot x / \lVert v \rVert`, one mean and one standard deviation per output channel
    over the batch (and over all positions of a convolution):

    .. math:: g \leftarrow 1 / \sigma[t], \qquad b \leftarrow -\mu[t] / \sigma[t]

    One forward of the model does it, under ``no_grad`` and in the mode (train or eval) that the
    model is in; a layer that is called gets its values before the layers after it are called, and a
    layer that is called twice gets them the first time. v stays as it is.

    Initialised are :class:`~torch.nn.Linear`, convolutions and transposed convolutions of 1 to 3
    dimensions whose weight is normed by :func:`wnkernel.weight_norm` with one g per output channel:
    ``dim=0``, for transposed convolutions ``dim=1`` and one group. Layers without a bias get g
    only, so the variance is 1 and the mean is not 0. All others are left alone: other dims,
    parametrizations on top of the weight norm, torch's two kinds (:func:`convert` them first), and
    layers that the forward does not call.

    Args:
        model: the model, not wrapped in DataParallel, DistributedDataParallel or FSDP yet.
        batch: what the model is called with: a tuple is its arguments, a mapping its keyword
            arguments, anything else its only argument.

    Returns:
        The names of the weights whose layers were initialised, in the order of execution.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: no layer can be initialised, the model is wrapped or on the meta device, or a
            channel is constant or not finite over the batch. All parameters are as they were then.
    """
    check_module("model", model)
    _check_unwrapped(model)
    initialised: list[_Layer] = []
    layers = _layers(model, initialised)
    if not layers:
        raise ValueError(
            "model: expected linear layers or convolutions with wnkernel.weight_norm and one g per "
            f"output channel, got none in {type(model).__name__}"
        )
    for layer in layers:
        if layer.g.is_meta:
            raise ValueError(
                f"model: expected parameters with values, got {layer.path!r} on the meta device"
            )
    handles = [
        layer.module.register_forward_hook(layer.after_forward, prepend=True, with_kwargs=True)
        for layer in layers
    ]
    try:
        with torch.no_grad(), _eager():
            if isinstance(batch, tuple):
                model(*batch)
            elif isinstance(batch, Mapping):
                model(**batch)
            else:
                model(batch)
    except BaseException:
        for layer in initialised:
            layer.restore()
        raise
    finally:
        for handle in handles:
            handle.remove()
    return [layer.path for layer in initialised]


@dataclass
class _Layer:
    """A layer to initialise."""

    path: str
    module: nn.Module
    initialised: list[_Layer]
    """The layers of the model that are, in the order of execution."""
    before: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """Its g and bias, and their values."""

    @property
    def g(self) -> Tensor:
        return originals(parametrizations_of(self.module, NAME))[0]

    def after_forward(self, module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        """The forward hook: initialise, and say what the layer gives now."""
        if any(layer.g is self.g for layer in self.initialised):
            return None
        self.initialised.append(self)
        with torch.no_grad():
            self.before = [(p, p.clone()) for p in (self.g, module.bias) if p is not None]
            self._assign(1.0, 0.0)
            mean, scale = self._statistics(module.forward(*args, **kwargs))
            self._assign(scale, -mean * scale)
        return module.forward(*args, **kwargs)

    def _statistics(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """The mean and one by the standard deviation of every channel."""
        ndim = originals(parametrizations_of(self.module, NAME))[1].ndim
        channels = t.movedim(1 - ndim, 0).flatten(1) if t.ndim > 1 else t.unsqueeze(1)
        channels = channels.to(accumulation_dtype(t.dtype))
        variance, mean = torch.var_mean(channels, dim=1, correction=0)
        scale = variance.rsqrt()
        rounding = 16 * torch.finfo(t.dtype).eps * mean.abs()
        usable = (variance.sqrt() > rounding) & scale.to(self.g.dtype).isfinite()
        if not usable.all():
            which = ", ".join(str(k) for k in (~usable).nonzero().flatten()[:8].tolist())
            raise ValueError(
                "batch: expected one on which every channel varies, got constant or infinite "
                f"outputs of the layer of {self.path!r}, channel {which}"
            )
        return mean, scale

    def _assign(self, g: Tensor | float, bias: Tensor | float) -> None:
        for (parameter, _), value in zip(self.before, (g, bias), strict=False):
            new = torch.as_tensor(value, device=parameter.device, dtype=parameter.dtype)
            parameter.copy_(new.view_as(parameter) if new.ndim else new)
        # What remembers values within a forward does not expect them to change there.
        forget_cached(self.module, NAME)
        torch.clear_autocast_cache()

    def restore(self) -> None:
        """Put its parameters back."""
        with torch.no_grad():
            for parameter, value in self.before:
                parameter.copy_(value)


def _layers(model: nn.Module, initialised: list[_Layer]) -> list[_Layer]:
    """The layers with weight norm that have one g per output channel."""
    found = []
    for normed in census(model):
        module = normed.module
        transposed = isinstance(module, TRANSPOSED)
        if (
            normed.name == NAME
            and normed.kind == OURS
            and normed.is_exact
            and isinstance(module, (nn.Linear, *CONVOLUTIONS, *TRANSPOSED))
            and not parametrize.is_parametrized(module, "bias")
            and canonical_dim(normed.norm.dim, normed.originals()[1].ndim) == int(transposed)
            and not (isinstance(module, TRANSPOSED) and module.groups > 1)
        ):
            found.append(_Layer(normed.path, module, initialised))
    return found


def _check_unwrapped(model: nn.Module) -> None:
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel, *sharding_modules())
    for module in model.modules():
        if isinstance(module, wrappers):
            raise ValueError(
                "model: expected one that is not wrapped yet (every process would initialise its "
                f"own), got {type(module).__name__}"
            )


def _eager() -> AbstractContextManager[object]:
    """Compiled models run as they were written: hooks would be compiled in."""
    set_stance = getattr(torch.compiler, "set_stance", None)  # torch 2.6
    return nullcontext() if set_stance is None else set_stance("force_eager")

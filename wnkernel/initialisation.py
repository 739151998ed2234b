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

from .census import (
    OURS,
    census,
    is_known,
    normed_in,
    originals,
    own_parametrizations,
    parametrizations_of,
    stacked_in,
)
from .checkpoint import WeightNormOriginals
from .checkpoint.loading import assign_weight
from .keys import G
from .layers import M, folded_weight, update_flat_weights
from .module_class import forget_cached
from .observers import sharding_modules
from .problem import accumulation_dtype, canonical_dim, check_module
from .splitting import split_for_torch

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
NAME = "weight"


def init_weight_(module: M, fn: Callable[[Tensor], Any], name: str = "weight") -> M:
    """Initialise the weight of a weight-normed layer in place, with ``fn`` as for a plain layer.

    ::

        wnkernel.init_weight_(layer, nn.init.kaiming_normal_)

        def init(m):
            if hasattr(m, "weight_g") or torch.nn.utils.parametrize.is_parametrized(m, "weight"):
                wnkernel.init_weight_(m, lambda w: w.normal_(0, 0.01))

        model.apply(init)

    ``nn.init.kaiming_normal_(layer.weight)`` would only change a temporary tensor. g and v stay the
    same Parameters: v becomes the weight that ``fn`` wrote, and g becomes its norms. Where ``fn``
    wrote a row of zeros, which has no direction, g becomes 0 and v becomes ones: the weight is 0
    there and can be trained. If the layer has an ``eps``, v stays 0 there and g becomes ``eps``.

    Args:
        module: a layer with weight norm on ``name``, of any of the three kinds.
        fn: a function that gets the weight as a plain tensor without gradient and writes to it. Its
            result is ignored.
        name: the name of the parameter.

    Returns:
        ``module``.

    Raises:
        TypeError: if ``module`` is not a torch.nn.Module.
        ValueError: if ``name`` has no weight norm.
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
    if isinstance(normed.norm, LegacyHook):  # w would be stale until the next forward
        setattr(module, name, normed.norm.compute_weight(module))
    return module


def data_dependent_init_(model: nn.Module, batch: Any) -> list[str]:
    r"""Initialise g and bias so that every channel of every weight-normed layer has mean 0 and
    variance 1 on a batch, before its nonlinearity.

    This is the initialisation of section 3 of Salimans & Kingma 2016. The pre-activations
    :math:`t = v \cdot x / \lVert v \rVert` have one mean and one standard deviation per output
    channel, over the batch and over all positions of a convolution:

    .. math:: g \leftarrow 1 / \sigma[t], \qquad b \leftarrow -\mu[t] / \sigma[t]

    The model runs one forward, under ``no_grad`` and in its current mode (train or eval). Each
    layer is initialised when it is called, so the layers after it see its new outputs. A layer that
    is called twice is initialised the first time. v does not change.

    The initialised layers are :class:`~torch.nn.Linear`, convolutions and transposed convolutions
    of 1 to 3 dimensions whose weight is normed by :func:`wnkernel.weight_norm` with one g per
    output channel: ``dim=0``, or for transposed convolutions ``dim=1`` and one group. A layer
    without a bias gets only g, so its variance is 1 but its mean may not be 0. All other layers
    stay as they are: those with other dims or with parametrizations on top of the weight norm,
    those with torch's two kinds (:func:`convert` them first), and those that the forward does not
    call.

    Args:
        model: the model, which must not be wrapped in DataParallel, DistributedDataParallel or FSDP
            yet.
        batch: the input of the model: a tuple of its arguments, a mapping of its keyword arguments,
            or its only argument.

    Returns:
        The names of the weights whose layers were initialised, in the order of execution.

    Raises:
        TypeError: if ``model`` is not a torch.nn.Module.
        ValueError: if no layer can be initialised, if the model is wrapped or on the meta device,
            or if a channel is constant or not finite over the batch. All parameters keep their
            values then.
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
    """The layers of the model that have been initialised, in the order of execution."""
    before: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """g and bias of the layer, each with its earlier value."""

    @property
    def g(self) -> Tensor:
        return originals(parametrizations_of(self.module, NAME))[0]

    def after_forward(self, module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        """The forward hook: initialise the layer and return its new output."""
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
        """The mean and the reciprocal of the standard deviation of every channel."""
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
        # These caches do not notice a change of g within a forward.
        forget_cached(self.module, NAME)
        torch.clear_autocast_cache()

    def restore(self) -> None:
        """Give g and bias their earlier values back."""
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
            and is_known(normed.norm)
            and len(stacked_in(normed.weights)) == 1
            and G not in own_parametrizations(normed.weights)
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
    """Make compiled models run in eager mode, because torch.compile would compile the hooks."""
    set_stance = getattr(torch.compiler, "set_stance", None)  # since torch 2.6
    return nullcontext() if set_stance is None else set_stance("force_eager")

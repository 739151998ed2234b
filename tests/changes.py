"""Ways of changing the parameters of a :class:`tests.groups.Net`, the same for any two nets with
equal parameters: those that leave a trace which ``reuse="version"`` sees, and those that do not."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer
from torch.optim.swa_utils import get_ema_multi_avg_fn

from .groups import LAYERS, layer, originals, ramp
from .messages import here


def aim(p: Tensor) -> Tensor:
    """Where a parameter is moved to: v turns, g scales and changes its sign here and there."""
    return ramp(*p.shape, dtype=p.dtype).sub(0.3)


def moved(p: Tensor) -> Tensor:
    """What becomes of a parameter, in memory of its own and in the same memory order."""
    return p.detach().clone().lerp_(aim(p), 0.25)


def as_numpy(p: Tensor) -> np.ndarray:
    """The memory of a parameter; numpy has no bfloat16."""
    return (p.view(torch.int16) if p.dtype == torch.bfloat16 else p).detach().numpy()


def through_data(p: Tensor) -> None:
    p.data.lerp_(aim(p), 0.25)


def through_numpy(p: Tensor) -> None:
    as_numpy(p)[...] = as_numpy(moved(p))


def through_pointer(p: Tensor) -> None:
    new = moved(p)
    ctypes.memmove(p.data_ptr(), new.data_ptr(), p.numel() * p.element_size())


def through_alias(p: Tensor) -> None:
    alias = torch.empty(0, dtype=p.dtype)
    alias.set_(p.untyped_storage(), p.storage_offset(), p.shape, p.stride())
    alias.copy_(moved(p))


def with_preserved_version(p: Tensor) -> None:
    with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(p):
        p.copy_(moved(p))


class Custom(Optimizer):
    """An optimizer that writes in a way of its own."""

    def __init__(self, params: Iterator[Tensor], write: Callable[[Tensor], None]) -> None:
        super().__init__(params, {})
        self.write = write

    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                self.write(p)


Change = Callable[[nn.Module], object]


def of_each(write: Callable[[Tensor], object]) -> Change:
    """Write to every g and v."""

    def change(model: nn.Module) -> None:
        for p in originals(model):
            write(p)

    return change


def training_step(optimizer: Callable[..., Optimizer], **options: object) -> Change:
    def change(model: nn.Module) -> None:
        model.zero_grad()
        model().square().mean().backward()
        optimizer(model.parameters(), **options).step()

    return change


def in_place(p: Tensor) -> None:
    with torch.no_grad():
        p.lerp_(aim(p), 0.25)


def in_inference_mode(p: Tensor) -> None:
    with torch.inference_mode():
        p.lerp_(aim(p), 0.25)


def as_output(p: Tensor) -> None:
    with torch.no_grad():
        torch.lerp(p, aim(p), 0.25, out=p)


def swap_data(p: Tensor) -> None:
    p.data = moved(p)


def swap_data_twice(p: Tensor) -> None:
    """The allocator may give the second the address of what the first replaced."""
    swap_data(p)
    swap_data(p)


def swap_storage(p: Tensor) -> None:
    with torch.no_grad():
        p.set_(moved(p))


def foreach(of: Callable[[nn.Module], list[Tensor]]) -> Change:
    def change(model: nn.Module) -> None:
        with torch.no_grad():
            torch._foreach_lerp_(of(model), [aim(p) for p in of(model)], 0.25)

    return change


def ema(model: nn.Module) -> None:
    """As the model of averages of another one."""
    other = [moved(p) for p in originals(model)]
    with torch.no_grad():
        for average, p in zip(originals(model), other, strict=True):
            average.lerp_(p, 0.5)


def ema_of_torch(model: nn.Module) -> None:
    """What torch's AveragedModel does."""
    other = [moved(p) for p in originals(model)]
    with torch.no_grad():
        get_ema_multi_avg_fn(0.5)([p.detach() for p in originals(model)], other, None)


def load(assign: bool) -> Change:
    def change(model: nn.Module) -> None:
        state = {key: moved(p) for key, p in model.state_dict().items()}
        model.load_state_dict(state, assign=assign)

    return change


def vectors(model: nn.Module) -> None:
    for name in LAYERS:
        vector = parameters_to_vector(layer(model, name).parameters())
        vector_to_parameters(moved(vector), layer(model, name).parameters())


def assign_weights(model: nn.Module) -> None:
    for name in LAYERS:
        layer(model, name).weight = moved(layer(model, name).weight)


def new_parameters(model: nn.Module) -> None:
    for name in LAYERS:
        parametrization = layer(model, name).parametrizations.weight
        for key, p in [*parametrization.named_parameters(recurse=False)]:
            setattr(parametrization, key, nn.Parameter(moved(p)))


def restride(model: nn.Module) -> None:
    """Other strides over the same memory: other values."""
    v = model.back.image.parametrizations.weight.original1
    strides = torch.empty(v.shape, memory_format=torch.channels_last).stride()
    v.data = v.data.as_strided(v.shape, strides)


def swap_tensors(p: Tensor) -> None:
    torch.utils.swap_tensors(p, nn.Parameter(moved(p)))


def in_another_thread(change: Change) -> Change:
    def run(model: nn.Module) -> None:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(change, model).result()

    return run


def in_backward(write: Callable[[Tensor], object]) -> Change:
    """By hooks that run when a gradient is there: optimizers that step within a backward."""

    def change(model: nn.Module) -> None:
        for p in originals(model):
            p.requires_grad_()
        hooks = [p.register_post_accumulate_grad_hook(write) for p in originals(model)]
        with torch.enable_grad():
            model().square().mean().backward()
        for hook in hooks:
            hook.remove()
        model.zero_grad()

    return change


def offload(p: Tensor) -> None:
    """Nothing in its place for a while, as with DeepSpeed's ZeRO-3."""
    away = moved(p)
    p.data = p.new_empty(0)
    p.data = away


def refill(p: Tensor) -> None:
    """The memory is given away and taken again, as FSDP does: at the same address, or not."""
    new, storage = moved(p), p.untyped_storage()
    if storage.resizable():
        size = storage.nbytes()
        storage.resize_(0)
        storage.resize_(size)
    p.data.copy_(new)


def larger_eps(model: nn.Module) -> None:
    for name in LAYERS:
        layer(model, name).parametrizations.weight[0].eps += 10.0


@contextmanager
def conversion(setting: str) -> Iterator[None]:
    """How ``Module.to`` replaces parameters."""
    setter = getattr(torch.__future__, f"set_{setting}_module_params_on_conversion")
    setter(True)
    try:
        yield
    finally:
        setter(False)


def converted(setting: str) -> Change:
    def change(model: nn.Module) -> None:
        with conversion(setting):
            model.to(torch.bfloat16)

    return change


def _that_reach(device: torch.device, table: dict[str, Change]) -> dict[str, Change]:
    """numpy and ctypes write to the CPU's memory only."""
    if device.type == "cpu":
        return table
    return {name: table[name] for name in table if "numpy" not in name and "point" not in name}


SEEN: dict[str, Change] = {
    "SGD": training_step(SGD, lr=0.1),
    "SGD foreach": training_step(SGD, lr=0.1, momentum=0.9, foreach=True),
    "SGD fused": training_step(SGD, lr=0.1, fused=True),
    "Adam": training_step(Adam, lr=0.1, foreach=False),
    "Adam foreach": training_step(Adam, lr=0.1, foreach=True),
    "Adam fused": training_step(Adam, lr=0.1, fused=True),
    "AdamW fused": training_step(AdamW, lr=0.1, fused=True),
    "Adagrad fused": training_step(Adagrad, lr=0.1, fused=True),
    "optimizer through .data": training_step(Custom, write=through_data),
    "optimizer through numpy": training_step(Custom, write=through_numpy),
    "optimizer through pointers": training_step(Custom, write=through_pointer),
    "in place under no_grad": of_each(in_place),
    "in place in inference mode": of_each(in_inference_mode),
    "through detach": of_each(lambda p: p.detach().lerp_(aim(p), 0.25)),
    "through a view": of_each(lambda p: in_place(p.detach()[...])),
    "out=": of_each(as_output),
    "init": of_each(lambda p: nn.init.constant_(p, 0.5)),
    ".data =": of_each(swap_data),
    ".data = twice": of_each(swap_data_twice),
    ".data = other strides": restride,
    "offloaded": of_each(offload),
    "hooks of gradients": in_backward(in_place),
    "another thread": in_another_thread(of_each(in_place)),
    "SGD fused in another thread": in_another_thread(training_step(SGD, lr=0.1, fused=True)),
    "set_": of_each(swap_storage),
    "_foreach": foreach(originals),
    "EMA lerp_": ema,
    "EMA of torch": ema_of_torch,
    "load_state_dict": load(assign=False),
    "load_state_dict assign": load(assign=True),
    "vector_to_parameters": vectors,
    "weight =": assign_weights,
    "new parameters": new_parameters,
    "to double": lambda model: model.to(torch.float64),
    "to half and back": lambda model: model.half().float(),
    "to, overwriting": converted("overwrite"),
    "freeze": lambda model: model.requires_grad_(False),
    "freeze g": lambda model: [p.requires_grad_(False) for p in originals(model)[::2]],
}
"""Changes that both modes see."""

SWAPS: dict[str, Change] = {
    "swap_tensors": of_each(swap_tensors),
    "to, swapping": converted("swap"),
}
"""Changes that torch refuses while somebody else, a version-mode group say, holds the tensors."""

UNSEEN: dict[str, Change] = {
    ".data": of_each(through_data),
    ".data.copy_": of_each(lambda p: p.data.copy_(moved(p))),
    ".data in _foreach": foreach(lambda model: [p.data for p in originals(model)]),
    "numpy": of_each(through_numpy),
    "DLPack": of_each(lambda p: torch.from_dlpack(p.detach()).copy_(moved(p))),
    "pointer": of_each(through_pointer),
    "storage": of_each(lambda p: p.untyped_storage().copy_(moved(p).untyped_storage())),
    "storage of another tensor": of_each(through_alias),
    "_unsafe_preserve_version_counter": of_each(with_preserved_version),
    ".data in another thread": in_another_thread(of_each(through_data)),
    ".data in hooks of gradients": in_backward(through_data),
    "eps": larger_eps,
}
"""Changes that leave no trace: only the default sees them. docs/fuse.md lists them."""

BY_CHANCE: dict[str, Change] = {"memory taken again": of_each(refill)}
"""Changes of which only the default promises to see them."""

SEEN, UNSEEN = (_that_reach(here(), table) for table in (SEEN, UNSEEN))
ALL = SEEN | SWAPS | UNSEEN | BY_CHANCE


def each_of(table: dict[str, Change]) -> pytest.MarkDecorator:
    """Parametrises ``change``."""
    return pytest.mark.parametrize("change", table.values(), ids=table)

"""What all tests of a process share. Each has to leave it as it was, or others depend on the order
in which they run."""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Callable

import torch
from torch.nn.modules import module
from torch.optim import optimizer

from wnkernel.backends import choice
from wnkernel.cli.signals import ENDING
from wnkernel.grouping.running import steps

LIBRARIES = (
    *("_TORCH", "TORCH", "CUDA_MODULE_LOADING", "KMP_", "TEARDOWN_CUPTI", "DISABLE_CUPTI_"),
    *("PYTEST_", "LOKY_", "JOBLIB_", "ACCELERATE_", "PL_"),
)
"""How variables begin that libraries set for themselves, some when they are first used."""


def _environment() -> set[tuple[str, str]]:
    return {item for item in os.environ.items() if not item[0].startswith(LIBRARIES)}


def _search_path() -> list[str]:
    """Without folders that installed packages add when they are imported, as setuptools does."""
    return [path for path in sys.path if "site-packages" not in path]


def _module_hooks() -> list[int]:
    """Their numbers, for modules of all kinds."""
    return [
        number
        for hooks in (
            module._global_forward_pre_hooks,
            module._global_forward_hooks,
            module._global_backward_pre_hooks,
            module._global_backward_hooks,
            module._global_module_registration_hooks,
            module._global_parameter_registration_hooks,
        )
        for number in hooks
    ]


def _optimizer_hooks() -> list[int]:
    """Those of all optimizers but ours, which come with the first group and stay."""
    hooks = optimizer._global_optimizer_pre_hooks | optimizer._global_optimizer_post_hooks
    return [n for n, hook in hooks.items() if getattr(hook, "__self__", None) is not steps]


SHARED: dict[str, Callable[[], object]] = {
    "backend": lambda: choice.forced,
    "current folder": os.getcwd,
    "default device": lambda: torch.empty(0).device,
    "default dtype": torch.get_default_dtype,
    "deterministic algorithms": torch.are_deterministic_algorithms_enabled,
    "dispatch modes": torch._C._len_torch_dispatch_stack,
    "environment": _environment,
    "function modes": torch._C._len_torch_function_stack,
    "garbage collection": gc.isenabled,
    "grad mode": torch.is_grad_enabled,
    "handlers of signals": lambda: [signal.getsignal(number) for number in ENDING],
    "hooks of modules": _module_hooks,
    "hooks of optimizers": _optimizer_hooks,
    "inference mode": torch.is_inference_mode_enabled,
    "search path": _search_path,
    "threads": torch.get_num_threads,
}


def shared_state() -> dict[str, object]:
    return {name: get() for name, get in SHARED.items()}


def left_behind(before: dict[str, object], after: dict[str, object]) -> list[str]:
    """What differs; of the environment, names of variables, for values may be secret."""
    changed = [name for name in SHARED if before[name] != after[name]]
    if "environment" in changed:
        changed += sorted({name for name, _ in before["environment"] ^ after["environment"]})
    return changed

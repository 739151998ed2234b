"""Ways through which whole modules go: files, other processes, caches."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

try:
    import cloudpickle
    import joblib  # sets environment variables
except ImportError:
    cloudpickle = joblib = None

Way = Callable[[Any], Any]


def by_protocol(protocol: int) -> Way:
    return lambda module: pickle.loads(pickle.dumps(module, protocol))


def by_torch_save(**options: Any) -> Way:
    def save_and_load(module: Any) -> Any:
        file = io.BytesIO()
        torch.save(module, file, **options)
        file.seek(0)
        return torch.load(file, weights_only=False)

    return save_and_load


def by_cloudpickle(module: Any) -> Any:
    if cloudpickle is None:
        pytest.skip("cloudpickle is not installed")
    return pickle.loads(cloudpickle.dumps(module))


def by_joblib(module: Any) -> Any:
    if joblib is None:
        pytest.skip("joblib is not installed")
    file = io.BytesIO()
    joblib.dump(module, file)
    file.seek(0)
    return joblib.load(file)


WAYS: dict[str, Way] = {
    "torch.save": by_torch_save(),
    "torch.save before 1.6": by_torch_save(_use_new_zipfile_serialization=False),
    **{f"protocol {protocol}": by_protocol(protocol) for protocol in (2, 3, 4, 5)},
    "pickle in Python": lambda module: pickle._loads(pickle._dumps(module)),
    "cloudpickle": by_cloudpickle,
    "joblib": by_joblib,
}
all_ways = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)

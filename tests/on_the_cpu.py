"""A fixture for tests of programs that choose their device themselves."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def on_the_cpu() -> Iterator[None]:
    with torch.device("cpu"):  # whatever device the other tests run on
        yield

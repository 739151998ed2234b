"""The examples in docs/checkpoints.md run, one after the other, as a reader would type them."""

from __future__ import annotations

import os
import re
import warnings
from pathlib import Path
from typing import Any

import pytest

PAGE = Path(__file__).parents[1] / "docs" / "checkpoints.md"


def examples() -> list[str]:
    return re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)


def test_the_examples_run() -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    namespace: dict[str, Any] = {}
    assert len(examples()) == 5
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's own, of its legacy weight norm
        for example in examples():
            if "transformers" in example:
                pytest.importorskip("transformers")
            exec(example, namespace)

"""Every instruction set that this processor has gives right results, not just the widest.

The choice is made once per process, so each set runs in one of its own.
"""

from __future__ import annotations

import pytest

from wnkernel import native

from ..bits import SETS
from ..processes import python

CHECK = """
import torch, wnkernel
from tests import reference
from tests.cases import randn, randn_g
from wnkernel import functional as F

torch.manual_seed(0)
print(wnkernel.info()["compiled"]["cpu_instruction_set"])
# tails of every length around a vector; rows in one chunk, in several; strips, narrow, wide
SHAPES = [(3, n) for n in range(1, 70)]
SHAPES += [(5, 7, 3), (2, 70001), (700, 3), (90, 200, 3), (6, 4, 300)]
for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
    for shape in SHAPES:
        for dim in (*range(len(shape)), None):
            v, g = randn(shape, dtype).requires_grad_(), randn_g(shape, dim, dtype).requires_grad_()
            grad_w = randn(shape, dtype)
            w = F.weight_norm(v, g, dim)
            grads = torch.autograd.grad(w, (v, g), grad_w)
            expected = reference.backward(v, g, grad_w, dim)
            reference.assert_close("w", w, reference.forward(v, g, dim))
            for name, got, right in zip(("grad_v", "grad_g"), grads, expected):
                reference.assert_close(name, got, right)
print("right")
"""


@pytest.mark.parametrize("name", SETS)
def test_results_are_right(name: str) -> None:
    if not native.loaded():
        pytest.skip(native.load_error())
    result = python("-c", CHECK, WNKERNEL_CPU_ISA=name)
    assert result.returncode == 0, result.stderr
    used, verdict = result.stdout.split()
    if used != name:
        pytest.skip(f"this processor has no {name}: {used} ran")
    assert verdict == "right"


HASHES = """
import torch
from tests.bits import hashes
types = [(torch.float32, torch.float32), (torch.bfloat16, torch.float32)]
print(*hashes(shapes=[(7, 5, 3), (40, 70)], pairs=types), sep="\\n")
"""


def test_hashes_of_results() -> None:
    """A line for each weight, types and dim, the same in every process."""
    if not native.loaded():
        pytest.skip(native.load_error())
    first, second = (python("-c", HASHES, WNKERNEL_CPU_ISA=SETS[0]) for _ in range(2))
    assert first.returncode == 0, first.stderr
    lines = first.stdout.splitlines()
    assert lines == second.stdout.splitlines()
    assert {line.split()[0] for line in lines} == {SETS[0]}
    assert len({line.rpartition(" ")[2] for line in lines}) == len(lines) == 2 * (4 + 3)


def test_a_name_that_there_is_not_is_an_error_of_the_import() -> None:
    if not native.loaded():
        pytest.skip(native.load_error())
    result = python("-c", "import wnkernel", WNKERNEL_CPU_ISA="avx1024")
    assert result.returncode == 1
    last = result.stderr.splitlines()[-1]
    assert last.startswith("ValueError: WNKERNEL_CPU_ISA: expected ")
    assert all(name in last for name in SETS)
    assert last.endswith("got avx1024")

"""Results on the CPU live in recycled buffers: never one that somebody still sees."""

from __future__ import annotations

import threading

import pytest
import torch

import wnkernel
from wnkernel import functional as F

from ..processes import python
from ..reference import assert_close, forward

pytestmark = pytest.mark.usefixtures("recycling")

SHAPE = (128, 64, 8)  # 256 KiB in float32: above the size from which buffers are recycled
PAGE, LINE = 4096, 64
"""Bytes: loads and stores are told apart by addresses modulo the one at first; of a cache line."""
OFFSETS = [0, 64, 1024, 1984, 2048, 2112, 3072, 4032, 24]


def weight(shape=SHAPE):
    return torch.randn(shape), torch.rand(shape[0], 1, 1) + 0.5


def placed(offset: int, shape=SHAPE, dtype=torch.float32) -> torch.Tensor:
    """Normal random numbers, dense, from some bytes after a multiple of a page on."""
    size = torch.Size(shape).numel() * dtype.itemsize
    room = torch.empty(size + 2 * PAGE, dtype=torch.uint8)
    start = (offset - room.data_ptr()) % PAGE
    return room[start : start + size].view(dtype).view(shape).copy_(torch.randn(shape))


def apart(a: torch.Tensor, b: torch.Tensor) -> int:
    """How far apart two tensors start, modulo a page."""
    distance = (a.data_ptr() - b.data_ptr()) % PAGE
    return min(distance, PAGE - distance)


def memory() -> int:
    """Bytes in use and idle."""
    return sum(wnkernel.cpu_buffers().values())


def test_a_freed_buffer_serves_the_next_result_of_its_size():
    v, g = weight()
    address = F.weight_norm(v, g).data_ptr()
    assert F.weight_norm(v, g).data_ptr() == address


def test_statistics_follow_the_tensors():
    v, g = weight()
    before = wnkernel.cpu_buffers()
    w = F.weight_norm(v, g)
    size = w.untyped_storage().nbytes()
    assert wnkernel.cpu_buffers()["used_bytes"] == before["used_bytes"] + size
    del w
    assert wnkernel.cpu_buffers() == {"used_bytes": before["used_bytes"], "held_bytes": size}
    wnkernel.release_cpu_buffers()
    assert wnkernel.cpu_buffers()["held_bytes"] == 0


@pytest.mark.parametrize(
    "keep",
    [
        lambda w: w,
        lambda w: w.detach(),
        lambda w: w[3:5, 1],  # a view of a part
        lambda w: w.numpy(),
        lambda w: w.untyped_storage(),
        lambda w: torch.utils.dlpack.to_dlpack(w),
    ],
    ids=["tensor", "detached", "view", "numpy", "storage", "dlpack"],
)
def test_a_buffer_that_is_still_seen_is_left_alone(keep):
    v, g = weight()
    w = F.weight_norm(v, g)
    address, expected = w.data_ptr(), w.clone()
    kept = keep(w)
    del w
    later = [F.weight_norm(torch.randn(SHAPE), g) for _ in range(4)]
    assert all(x.data_ptr() != address for x in later)
    if isinstance(kept, torch.Tensor) and kept.shape == expected.shape:
        assert torch.equal(kept, expected)


def test_gradients_that_are_kept_stay():
    v, g = (t.requires_grad_() for t in weight())
    F.weight_norm(v, g).square().sum().backward()
    kept, expected = v.grad, v.grad.clone()
    for _ in range(3):
        v.grad = None
        F.weight_norm(v, g).sum().backward()
    assert torch.equal(kept, expected)


@pytest.mark.parametrize("several", [False, True])
def test_copies_in_other_types_come_back(several):
    """What kernels are given, and what they return, in the place of types that they do not take."""
    v, g = (t.half().requires_grad_() for t in weight())
    halves, floats, doubles = (v.numel() * size for size in (2, 4, 8))
    before = wnkernel.cpu_buffers()["used_bytes"]

    def buffers() -> tuple[int, int]:
        now = wnkernel.cpu_buffers()
        return now["used_bytes"] - before, now["held_bytes"]

    def weight_norm(v, g, out_dtype):
        if several:
            return F.weight_norms([v], [g], [0], out_dtype=out_dtype)[0]
        return F.weight_norm(v, g, out_dtype=out_dtype)

    w = weight_norm(v, g, torch.float32)
    assert buffers() == (floats, floats)  # v
    (grad_v,) = torch.autograd.grad(w, v, torch.ones_like(w))
    assert buffers() == (floats + halves, 2 * floats)  # v, grad_v
    del w, grad_v
    wnkernel.release_cpu_buffers()
    kept = weight_norm(v.detach().double(), g, torch.float16)
    assert kept.dtype == torch.float16
    assert buffers() == (halves, doubles + floats)  # w, and w on its way to halves


def test_threads_do_not_share_a_buffer():
    weights = [weight() for _ in range(4)]
    failures = []

    def work(v, g):
        expected = forward(v, g, 0)
        for _ in range(50):
            try:
                assert_close("w", F.weight_norm(v, g), expected)
            except AssertionError as error:
                failures.append(error)

    threads = [threading.Thread(target=work, args=pair) for pair in weights]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failures


def test_buffers_that_are_not_asked_for_again_go_back():
    before = memory()
    v, g = weight()
    F.weight_norm(v, g)
    other = torch.randn(64, 64, 8), torch.ones(64, 1, 1)  # half the size
    for _ in range(100):
        F.weight_norm(*other)
    assert memory() <= 2 * (before + other[0].numel() * 4)


def test_the_environment_switches_them_off():
    code = (
        "import torch, wnkernel; from wnkernel import functional as F;"
        "w = F.weight_norm(torch.randn(128, 64, 8), torch.ones(128, 1, 1));"
        "print(wnkernel.cpu_buffers()['used_bytes'])"
    )
    for setting, used in (("0", 0), ("1", 128 * 64 * 8 * 4), ("", 128 * 64 * 8 * 4)):
        result = python("-c", code, WNKERNEL_CPU_BUFFERS=setting)
        assert result.stdout.strip() == str(used), result.stderr


@pytest.mark.parametrize("value", ["off", "2", "false"])
def test_nonsense_in_the_environment_is_an_error_of_the_import(value):
    result = python("-c", "import wnkernel", WNKERNEL_CPU_BUFFERS=value)
    assert result.returncode == 1
    said = f"ValueError: WNKERNEL_CPU_BUFFERS: expected 0 or 1, got {value}"
    assert result.stderr.splitlines()[-1] == said


def test_what_was_used_before_a_release_does_not_count():
    """A large model that is gone is no reason to hold much for a small one."""
    F.weight_norm(torch.randn(1024, 64, 64), torch.ones(1024, 1, 1))
    wnkernel.release_cpu_buffers()
    before = memory()
    for k in range(20):
        F.weight_norm(torch.randn(100 + k, 400), torch.ones(100 + k, 1))
    assert memory() <= 2 * (before + 120 * 400 * 4)


def test_ever_new_sizes_do_not_pile_up():
    before = memory()
    for k in range(300):
        F.weight_norm(torch.randn(100 + k, 400), torch.ones(100 + k, 1))
    assert memory() <= 2 * (before + 400 * 400 * 4)


def test_a_child_forked_amid_other_threads_can_use_them():
    code = """
import os, threading, torch
from wnkernel import functional as F
torch.set_num_threads(1)
v, g = torch.randn(64, 320), torch.ones(64, 1)
F.weight_norm(v, g)  # or a child might find what is made once, by the first call, half made
stop = threading.Event()
def work():
    while not stop.is_set():
        F.weight_norm(v, g)
threads = [threading.Thread(target=work) for _ in range(3)]
for t in threads: t.start()
for _ in range(60):
    child = os.fork()
    if child == 0:
        F.weight_norm(v, g)
        os._exit(0)
    os.waitpid(child, 0)
stop.set()
for t in threads: t.join()
print("alive")
"""
    result = python("-c", code)
    assert result.stdout.strip() == "alive", result.stderr


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("offset", OFFSETS)
def test_w_starts_half_a_page_from_v(offset, dtype):
    """With kernels for their types: others read a copy of v."""
    v, (_, g) = placed(offset, dtype=dtype), weight()
    single = F.weight_norm(v, g)
    several = F.weight_norms([v, v], [g, g], [0, 0])
    half = torch.bfloat16 if dtype == torch.float32 else dtype
    other_type = F.weight_norm(v, g, out_dtype=half)
    for w in (single, *several, other_type):
        assert apart(w, v) > PAGE // 2 - LINE
        assert w.data_ptr() % LINE == 0


@pytest.mark.parametrize("offset_of_grad", OFFSETS[::2])
@pytest.mark.parametrize("offset", OFFSETS[::2])
def test_grad_v_starts_apart_from_both_inputs(offset, offset_of_grad):
    """Halfway along the longer way around the page from one to the other."""
    v, grad_w = placed(offset), placed(offset_of_grad)
    longer = PAGE - apart(v, grad_w)
    g = weight()[1]
    single, several = v.requires_grad_(), v.detach().requires_grad_()
    results = [
        *torch.autograd.grad(F.weight_norm(single, g), single, grad_w),
        *torch.autograd.grad(F.weight_norms([several], [g], [0]), several, grad_w),
    ]
    for grad_v in results:
        assert apart(grad_v, v) > longer // 2 - LINE
        assert apart(grad_v, grad_w) > longer // 2 - LINE
        assert grad_v.data_ptr() % LINE == 0


@pytest.mark.parametrize("offset", OFFSETS)
def test_where_a_result_starts_takes_no_bytes(offset):
    """A buffer is as large as its result, in whole pages, and serves results that start anywhere
    in it."""
    shape = (131, 127)
    size, g = 131 * 127 * 4, torch.ones(131, 1)
    pages = -(-size // PAGE) * PAGE
    before = wnkernel.cpu_buffers()["used_bytes"]
    w = F.weight_norm(placed(0, shape), g)
    first = w.data_ptr()
    assert w.untyped_storage().nbytes() == size
    assert wnkernel.cpu_buffers() == {"used_bytes": before + pages, "held_bytes": 0}
    del w
    w = F.weight_norm(placed(offset, shape), g)
    assert abs(w.data_ptr() - first) < PAGE
    assert w.untyped_storage().nbytes() == size
    assert wnkernel.cpu_buffers() == {"used_bytes": before + pages, "held_bytes": 0}


def test_results_end_within_their_buffers():
    """Or malloc finds its own memory destroyed, and ends the process."""
    code = """
import torch, wnkernel
from tests.core.test_buffers import LINE, PAGE, placed
from wnkernel import functional as F
shape, g = (128, 128), torch.ones(128, 1)
for offset in range(0, PAGE, LINE):
    results = [F.weight_norm(placed(offset, shape), g) for _ in range(4)]
    for w in results:
        w.fill_(1)
    del results, w
    wnkernel.release_cpu_buffers()
print("alive")
"""
    result = python("-c", code)
    assert result.stdout.strip() == "alive", result.stderr

"""Tables on their way to a GPU: captured copies read memory of their own, made beforehand."""

from __future__ import annotations

import gc
import itertools
import threading
from collections import Counter

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from wnkernel.backends.triton import tables


@pytest.fixture
def uploads(monkeypatch):
    """Uploads without a GPU: any memory counts as pinned, and copies go to the meta device."""
    empty, numbered = torch.empty, itertools.count()

    def pinned(*args, pin_memory=False, **kwargs):
        return empty(*args, **kwargs).fill_(-1) if pin_memory else empty(*args, **kwargs)

    monkeypatch.setattr(torch, "empty", pinned)
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)

    class Watched(tables.Uploads):
        """Remembers where captured copies came from, without keeping it."""

        def __init__(self):
            super().__init__()
            self.taken = []

        def _take(self, numbers):
            t = super()._take(numbers)
            self.taken.append((t.data_ptr(), numbers, StorageWeakRef(t.untyped_storage())))
            return t

        def upload(self, numbers, capturing=True):
            monkeypatch.setattr(tables, "is_capturing", lambda _: capturing)
            target = torch.device("meta")
            if not capturing:
                self.refill(target)
            memory = torch.full((numbers,), next(numbered), dtype=torch.int64, device="cpu")
            assert self.copy(memory, target).shape == (numbers,)

        def check(self):
            """No two copies came from the same memory, and all that was copied is there still."""
            gc.collect()
            end = 0
            for start, numbers, storage in sorted(self.taken, key=lambda copy: copy[0]):
                assert start >= end
                end = start + 8 * numbers
                assert not storage.expired()
            contents = torch.cat(self._reserve).tolist()
            found = Counter(x for x in contents if x >= 0)
            assert sorted(found.values()) == sorted(numbers for _, numbers, _ in self.taken)

    return Watched()


def test_captured_copies_come_from_memory_of_their_own(uploads):
    """A graph reads it at every replay, and nobody says when the graph is gone."""
    for numbers in (100, 1, 5000, 100, 60_000, 70_000, 200_000, 3):
        uploads.upload(numbers)
        uploads.upload(10, capturing=False)
    uploads.check()
    assert len(uploads.taken) == 8


def test_the_reserve_is_made_before_a_capture(uploads):
    """Within one, older torch cannot allocate pinned memory."""
    uploads.upload(10, capturing=False)
    made = len(uploads._reserve)
    for _ in range(20):
        uploads.upload(3000)
    assert len(uploads._reserve) == made == 1
    uploads.upload(10, capturing=False)
    uploads.upload(100_000)
    assert len(uploads._reserve) == 2
    uploads.check()


@pytest.mark.parametrize("numbers", [(400, 500), (83_818, 83_818), (349_516, 349_516)])
def test_a_model_may_be_captured_again_and_again(uploads, numbers):
    """Tables of some models are larger than all that is in reserve at first. A launch that finds
    its table comes before each capture; or none, for as many captures as are stated."""
    meta = torch.device("meta")
    for table in numbers:
        uploads.expect(table)
    for captures in [1] * 4 + [tables.CAPTURES] * 2:
        uploads.refill(meta)
        made = len(uploads._reserve)
        for table in captures * numbers:
            uploads.upload(table)
        assert len(uploads._reserve) == made
    uploads.check()


def test_the_reserve_has_a_limit(uploads):
    for _ in range(100):
        uploads.expect(1 << 22)
        uploads.refill(torch.device("meta"))
    assert sum(t.numel() for t in uploads._reserve) <= 2 * tables.MOST
    uploads.expect(1)
    assert len(uploads._expected) < 100


def test_copies_captured_in_two_threads(uploads):
    """The second comes when the first has seen that there is enough for itself."""
    uploads.upload(10, capturing=False)
    lock, entered = uploads._lock, []
    assert uploads._left > 5

    class Late:
        """Lets the other thread go first, once."""

        def __enter__(self):
            if not entered:
                entered.append(True)
                other = threading.Thread(target=uploads.upload, args=(uploads._left - 5,))
                other.start()
                other.join()
            return lock.__enter__()

        def __exit__(self, *error):
            return lock.__exit__(*error)

    uploads._lock = Late()
    uploads.upload(100)
    uploads.check()

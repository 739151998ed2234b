"""Streams and captures of GPUs that need not be there."""

from __future__ import annotations

import dataclasses
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from wnkernel import streams
from wnkernel.grouping import threads
from wnkernel.grouping.slots import current_mode

from ..groups import Computed, twins


class Gpus:
    """Two GPUs of one kind, of which some are being captured."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.current = 0
        self.captured: set[int] = set()

    def replace(self, monkeypatch: pytest.MonkeyPatch) -> None:
        module = getattr(torch, self.kind)

        @contextmanager
        def device(where):
            before, self.current = self.current, torch.device(where).index
            yield
            self.current = before

        for name, function in (
            ("is_initialized", lambda: True),
            ("current_device", lambda: self.current),
            ("device", device),
            ("is_current_stream_capturing", lambda: self.current in self.captured),
            ("current_stream", self.stream),
        ):
            monkeypatch.setattr(module, name, function, raising=False)

    def stream(self, device):
        number = 100 + torch.device(device).index
        return SimpleNamespace(
            **{"cuda": {"cuda_stream": number}, "xpu": {"sycl_queue": number}}[self.kind]
        )

    def tensor(self, index: int) -> SimpleNamespace:
        """As much of one as is looked at."""
        return SimpleNamespace(is_cpu=False, device=torch.device(self.kind, index))


@pytest.fixture(params=["cuda", "xpu"])
def gpus(request, monkeypatch):
    found = Gpus(request.param)
    found.replace(monkeypatch)
    monkeypatch.setitem(streams._WITH_GRAPHS, found.kind, getattr(torch, found.kind))
    return found


def test_the_stream_is_that_of_the_device(gpus):
    for index in (0, 1):
        assert streams.current_stream(torch.device(gpus.kind, index)) == 100 + index


def test_a_capture_is_that_of_the_device_whichever_is_current(gpus):
    for gpus.current in (0, 1):
        for gpus.captured in (set(), {0}, {1}, {0, 1}):
            for index in (0, 1):
                device = torch.device(gpus.kind, index)
                assert streams.is_capturing(device) == (index in gpus.captured)
            here = torch.device(gpus.kind, gpus.current)
            found = streams.captured_device()
            assert found == (here if gpus.current in gpus.captured else None)


def test_groups_tell_streams_and_captures_apart(gpus):
    """So that members are computed together on every kind of GPU."""
    modes = {}
    for index in (0, 1):
        for gpus.captured in (set(), {index}):
            mode = current_mode(gpus.tensor(index), None)
            assert (mode.stream, mode.capturing) == (100 + index, bool(gpus.captured))
            modes[index, mode.capturing] = mode
    assert len({*modes.values()}) == 4
    gpus.captured = {0}
    assert current_mode(gpus.tensor(1), None) is modes[1, False]


def test_other_devices():
    for kind, stream in (("cpu", 0), ("meta", 0), ("mps", 0), ("hpu", None)):
        device = torch.device(kind)
        assert streams.current_stream(device) == stream
        assert not streams.is_capturing(device)
        with streams.guard(device):
            pass


@pytest.mark.parametrize("began", ["here", "meta", None])
def test_a_captured_read_is_served_from_launches_of_its_capture(
    monkeypatch, computed: Computed, began
):
    """Else the graph would have a weight of now in it for ever."""
    here = torch.empty(0).device
    captured = None if began is None else here if began == "here" else torch.device(began)
    mode = dataclasses.replace(current_mode(torch.empty(0), None), capturing=True)
    monkeypatch.setattr(threads, "captured_device", lambda: captured)
    monkeypatch.setattr(threads, "current_mode", lambda *_: mode)
    model, _, _ = twins()
    model()
    assert computed.take() == (([7], 0) if captured == here else ([], 7))

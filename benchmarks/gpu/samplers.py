"""Two more ways to time calls on a GPU, for what is more than a few kernels."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..timing import Contender, Sampler, device_sampler, host_sampler

CYCLES_PER_S = 2e9
"""Of the clock that ``torch.cuda._sleep`` counts: at most this."""

HEADSTART = 1.5
"""The device waits this many times as long as the host should need."""


def wall_sampler(device: torch.device) -> Sampler:
    """Samples the time until the host and the device are done."""
    sample = host_sampler(device)
    if device.type != "cuda":
        return sample

    def until_done(run: Contender, times: int) -> float:
        def finish() -> None:
            for _ in range(times):
                run()
            torch.cuda.synchronize(device)

        return sample(finish, 1)

    return until_done


@dataclass(frozen=True)
class Queued:
    """A contender that the host is known to need so long for."""

    run: Contender
    host_s: float

    def __call__(self) -> None:
        self.run()


def queue_sampler(device: torch.device) -> Sampler:
    """Samples the time that the device needs for :class:`Queued` calls when the host is ahead: the
    device first sleeps until all of them should be queued."""
    sample = device_sampler(device)
    if device.type != "cuda":
        return sample

    def behind_a_sleep(run: Contender, times: int) -> float:
        assert isinstance(run, Queued)
        torch.cuda._sleep(int(CYCLES_PER_S * HEADSTART * run.host_s * times))
        return sample(run, times)

    return behind_a_sleep

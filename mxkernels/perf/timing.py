"""Time a call on a GPU or a CPU: many samples, all kept, with their median and spread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch

MIN_SAMPLES = 5
MAX_SAMPLES = 500
_WARM_UP = 5  # samples that only say how many the budget holds
_HOST_BATCH = 50  # calls between two synchronisations: fewer than a GPU's launch queue holds
# Also long enough (over 100 us on an H200) for the host to queue the next call behind the flush: otherwise the
# events of a small kernel would time the host.
_LEAST_FLUSH_BYTES = 512 << 20


@dataclass(frozen=True)
class Timing:
    """Samples of one call in microseconds, in the order they were taken."""

    samples_us: tuple[float, ...]

    @property
    def median_us(self) -> float:
        return statistics.median(self.samples_us)

    @property
    def p10_us(self) -> float:
        return self._percentile(10)

    @property
    def p90_us(self) -> float:
        return self._percentile(90)

    @cached_property
    def _sorted(self) -> list[float]:
        return sorted(self.samples_us)

    def _percentile(self, percent: int) -> float:
        """Nearest rank."""
        return self._sorted[round(percent / 100 * (len(self._sorted) - 1))]


def time_call(call: Callable[[], object], device: torch.device, seconds: float = 0.3) -> Timing:
    """Time `call` with a cold L2 on a GPU, or as it comes on a CPU.

    Args:
        call: enqueues work on `device`, on the current stream.
        device: a CUDA (or ROCm) device, timed by events, or the CPU, timed by the clock.
        seconds: about how long to go on. At least `MIN_SAMPLES` samples are taken, at most `MAX_SAMPLES`.
    """
    call()  # compiles, and fills the allocator's cache
    if device.type == "cuda":
        return _time_cuda(call, device, seconds)
    samples: list[float] = []
    stop = time.perf_counter() + seconds
    while len(samples) < MIN_SAMPLES or (time.perf_counter() < stop and len(samples) < MAX_SAMPLES):
        samples.append(_clock_us(call))
    return Timing(tuple(samples))


def time_host(call: Callable[[], object], device: torch.device, samples: int = 20) -> Timing:
    """How long the host is busy with one call: batches of calls, the device waited for only in between."""
    batches = []
    call()
    for _ in range(samples):
        _synchronize(device)
        batches.append(_clock_us(lambda: [call() for _ in range(_HOST_BATCH)]) / _HOST_BATCH)
    _synchronize(device)
    return Timing(tuple(batches))


class ColdTimer:
    """Times calls on a CUDA device by events, with a cold L2 cache; on the CPU by the clock, as they come."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._flush: torch.Tensor | None = None
        if device.type == "cuda":
            l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
            self._flush = torch.empty(max(2 * l2_bytes, _LEAST_FLUSH_BYTES), dtype=torch.uint8, device=device)

    def take(self, call: Callable[[], object], samples: int) -> tuple[float, ...]:
        """Microseconds of so many calls, one after the other; `call` enqueues work on the current stream."""
        if self._flush is None:
            return tuple(_clock_us(call) for _ in range(samples))
        with torch.cuda.device(self.device):
            events = [
                (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(samples)
            ]
            for start, end in events:
                self._flush.zero_()
                start.record()
                call()
                end.record()
            torch.cuda.synchronize(self.device)
            return tuple(start.elapsed_time(end) * 1e3 for start, end in events)


def _time_cuda(call: Callable[[], object], device: torch.device, seconds: float) -> Timing:
    timer = ColdTimer(device)
    torch.cuda.synchronize(device)
    each = _clock_us(lambda: timer.take(call, _WARM_UP)) * 1e-6 / _WARM_UP
    return Timing(timer.take(call, min(max(int(seconds / each), MIN_SAMPLES), MAX_SAMPLES)))


def _clock_us(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e6


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

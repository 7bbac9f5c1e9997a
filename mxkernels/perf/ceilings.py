"""The ceilings of a kernel, measured beside it: for one that memory limits a copy that reads and writes as many
bytes; for one that the tensor cores limit the rate of a large product."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from .peers import bf16_product, fp8_product
from .timing import Timing, time_call

_LARGE = {"cuda": 8192, "cpu": 256}  # the sides of a product that nothing but the multiplying limits


@dataclass(frozen=True)
class Ceiling:
    """What nothing with the same traffic can be expected to beat.

    Attributes:
        name: of the limit, `"copy"`.
        traffic_bytes: bytes read plus bytes written.
        timing: of the copy.
    """

    name: str
    traffic_bytes: int
    timing: Timing

    @property
    def gbps(self) -> float:
        """10^9 bytes, read plus written, a second, at the median."""
        return self.traffic_bytes / self.timing.median_us / 1e3


class Ceilings:
    """The ceilings of one device in one run: each pair of bytes read and written is measured once.

    Args:
        device: where.
        seconds: about how long each measurement takes.
    """

    def __init__(self, device: torch.device, seconds: float = 0.3) -> None:
        self.device = device
        self.seconds = seconds
        self._measured: dict[tuple[int, int], Ceiling] = {}
        self._rates: dict[str, float] = {}

    def copy(self, read_bytes: int, written_bytes: int) -> Ceiling:
        """The fastest copy kernel with this traffic (on the CPU torch's own copy, half of it read, half written)."""
        key = (read_bytes, written_bytes)
        if key not in self._measured:
            copies = _copies_cuda if self.device.type == "cuda" else _copies_cpu
            timings = [
                time_call(copy, self.device, self.seconds) for copy in copies(read_bytes, written_bytes, self.device)
            ]
            fastest = min(timings, key=lambda timing: timing.median_us)
            self._measured[key] = Ceiling("copy", read_bytes + written_bytes, fastest)
        return self._measured[key]

    def product_tflops(self, kind: str) -> float:
        """10^12 operations a second of a large square product by torch: `"bf16"`, or `"FP8"` where there is that."""
        if kind not in self._rates:
            side = _LARGE[self.device.type]
            a, b = (torch.randn(side, side, dtype=torch.bfloat16, device=self.device) for _ in range(2))
            call = bf16_product(a, b.T) if kind == "bf16" else fp8_product(a, b.T)
            if call is None:
                raise ValueError(f"{self.device} has no {kind} products; allowed: bf16")
            self._rates[kind] = 2 * side**3 / time_call(call, self.device, self.seconds).median_us / 1e6
        return self._rates[kind]


def _copies_cuda(read_bytes: int, written_bytes: int, device: torch.device) -> list[Callable[[], object]]:
    from .copy_kernel import TILES, copy_launch, words_of

    source = torch.randint(-(2**63), 2**63 - 1, (words_of(read_bytes),), device=device)
    target = torch.empty(words_of(written_bytes), dtype=torch.int64, device=device)
    return [partial(copy_launch(source, target, tiles).run, device) for tiles in TILES]


def _copies_cpu(read_bytes: int, written_bytes: int, device: torch.device) -> list[Callable[[], object]]:
    half = (read_bytes + written_bytes + 1) // 2
    source = torch.randint(256, (half,), dtype=torch.uint8)
    return [partial(torch.empty_like(source).copy_, source)]

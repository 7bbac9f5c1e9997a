"""Workload: a problem made runnable."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from statistics import NormalDist
from typing import Any

import torch

from .. import gpu, reference
from ..ops.launch import Launch
from ..spec import MXSpec
from ..tune import Config, Problem
from ..tune.limits import Limits
from ..tune.model import Work

META = torch.device("meta")
POISON = 0x5A  # of every byte before a launch writes it

Draw = Callable[[Sequence[int], int, torch.Generator], torch.Tensor]


def gaussian(shape: Sequence[int], k: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, device=generator.device, generator=generator)


def signs(shape: Sequence[int], k: int, generator: torch.Generator) -> torch.Tensor:
    """-1, 0 and 1, so many of them 0 that the products of two such numbers, K of them, add up to some 4096 at the most:
    every sum is exact then, whatever its order and however tensor cores truncate."""
    share = min(0.5, (4096 / k) ** 0.5)
    x = gaussian(shape, k, generator)
    return torch.where(x.abs() > NormalDist().inv_cdf(1 - share / 2), x.sign(), 0)


class Workload:
    """A problem's operands and outputs on a device.

    Attributes:
        source: where operands and what is expected of casts are computed.
        draw: makes values `[*shape]` by a generator on a device; a product's with K of so many.
        work: the bytes that it has to move.
    """

    work: Work

    def __init__(
        self, problem: Problem, device: torch.device, limits: Limits, source: torch.device, draw: Draw
    ) -> None:
        self.problem = problem
        self.device = device
        self.limits = limits
        self.source = source
        self.draw = draw
        self.dtype: torch.dtype = getattr(torch, problem.dtype)
        self._drawn = 0

    @staticmethod
    def rule(problem: Problem, limits: Limits) -> Config:
        """What the deterministic rule has for a problem."""
        raise NotImplementedError

    @property
    def capabilities(self) -> gpu.Capabilities | None:
        """Those that launches are made for; None: the device's."""
        return self.limits.capabilities if self.device == META else None

    def launches(self, config: Any) -> list[Launch]:
        """Under a config of the op's type, in the order in which they run; the first is the one that it is for."""
        raise NotImplementedError

    def poison(self) -> None:
        """Make sure that what is found in the outputs was written."""
        raise NotImplementedError

    def difference(self) -> str | None:
        """What is wrong with what the launches wrote; None if nothing is."""
        raise NotImplementedError

    def drawn(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        """Values on `source`, the same each time; other ones at the next call."""
        if self.source == META:
            return torch.empty(shape, dtype=dtype, device=META)
        self._drawn += 1
        generator = torch.Generator(self.source).manual_seed(self._drawn)
        return self.draw(shape, self.problem.shape[-1], generator).to(dtype)

    def quantized(self, spec: MXSpec, rows: int, cols: int) -> list[torch.Tensor]:
        """Codes, scale and, if asymmetric, offset, on `source`; by the reference, for which nothing is compiled."""
        x = self.drawn(rows, cols)
        if self.source == META:
            return list(torch.ops.mxkernels.quantize(x, str(spec), self.seed(spec)))
        parts = reference.quantize(x, spec, 1 if spec.stochastic else None)
        return [part for part in parts if part is not None]

    def seed(self, spec: MXSpec) -> torch.Tensor | None:
        return torch.ones(1, dtype=torch.int64, device=self.source) if spec.stochastic else None

    def moved(self, parts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """From the source to the device."""
        return [part.to(self.device) for part in parts]

    def empty(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)


def total_bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(each.nbytes for each in tensors)


def with_offset(parts: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Codes, scale, and the offset, None if there is none."""
    return parts[0], parts[1], parts[2] if len(parts) > 2 else None

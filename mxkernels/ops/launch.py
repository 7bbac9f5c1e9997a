"""A kernel with all that it is launched with, so that it can be run, or compiled for a GPU that is not here."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from ..tune import CastConfig


@dataclass(frozen=True)
class Launch:
    """`kernel[(programs,)](*tensors.values(), *scalars.values())` with `options` (num_warps …).

    `tensors` and `scalars` (constexprs among them) are by name and in the kernel's order.
    """

    kernel: Any
    programs: int
    tensors: dict[str, torch.Tensor | None]
    scalars: dict[str, Any]
    options: dict[str, Any]

    @property
    def arguments(self) -> dict[str, Any]:
        return {**self.tensors, **self.scalars}

    def run(self, device: torch.device) -> Relaunch:
        """Launch on `device`, whichever is current. No programs, no launch."""
        compiled = None
        if self.programs:
            with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
                # Fusing a multiplication with an addition drops a rounding, so it is off wherever bits matter.
                compiled = self.kernel[(self.programs,)](**self.arguments, **self.options, enable_fp_fusion=False)
        return Relaunch(compiled and compiled[(self.programs, 1, 1)], tuple(self.scalars.values()), device)


@dataclass(frozen=True)
class Relaunch:
    """A launch that has been compiled, with other tensors of the same dtypes, layouts and alignment: it skips
    what Triton's launcher works out in Python, which takes several times as long."""

    runner: Any
    scalars: tuple[Any, ...]
    device: torch.device

    def run(self, *tensors: torch.Tensor | None) -> None:
        if not self.runner:
            return
        if self.device.index == torch.cuda.current_device():
            self.runner(*tensors, *self.scalars)
        else:
            with torch.cuda.device(self.device):
                self.runner(*tensors, *self.scalars)


@dataclass(frozen=True)
class Layout:
    """What a kernel may take for granted about a matrix in memory.

    Attributes:
        alignment: a power of two that divides the bytes of every packed row, and its address, up to the 16 or
            4 bytes that the config moves at a time.
        whole: tiles fill the matrix, so nothing needs a mask.
        row_contiguous: the elements of a row are neighbours in memory.
    """

    alignment: int
    whole: bool
    row_contiguous: bool = True

    @classmethod
    def of(cls, config: CastConfig, rows: int, cols: int, row_bytes: int, row_contiguous: bool = True) -> Layout:
        """`row_bytes` may be any integer that shares its factors of two with all that must be aligned."""
        bits = row_bytes | (16 if config.wide else 4)
        whole = rows % config.tile_rows == 0 and cols % config.tile_cols == 0
        return cls(bits & -bits, whole, row_contiguous)

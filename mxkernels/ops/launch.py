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


class Recording:
    """Launches as they were first run, to run again on other buffers that are like the first ones.

    A launch's tensors must be buffers themselves, or descriptors of them, not views.
    """

    def __init__(self) -> None:
        self._steps: list[tuple[Relaunch, list[Any]]] = []

    def run(self, launch: Launch, device: torch.device, buffers: list[torch.Tensor | None]) -> None:
        """Launch, and remember which of `buffers` went where."""
        self._steps.append((launch.run(device), [_place(value, buffers) for value in launch.tensors.values()]))

    def replay(self, buffers: list[torch.Tensor | None]) -> None:
        for relaunch, places in self._steps:
            relaunch.run(*(_at(place, buffers) for place in places))


def _place(value: Any, buffers: list[torch.Tensor | None]) -> Any:
    """Which buffer a launch's tensor is; of a descriptor, that of its base, and the descriptor."""
    if value is None:
        return None
    if isinstance(value, torch.Tensor):
        return next(index for index, buffer in enumerate(buffers) if buffer is value)
    place = _place(value.base, buffers)
    value.base = None  # or a recording would hold on to memory
    return (place, value)


def _at(place: Any, buffers: list[torch.Tensor | None]) -> Any:
    if place is None:
        return None
    if isinstance(place, int):
        return buffers[place]
    index, descriptor = place
    moved = object.__new__(type(descriptor))  # a copy, in a fifth of `copy`'s time
    moved.__dict__.update(descriptor.__dict__, base=buffers[index])
    return moved


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

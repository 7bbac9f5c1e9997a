"""A kernel with all that it is launched with, so that it can be run, or compiled for a GPU that is not here."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import torch
from triton import knobs
from triton.runtime import driver

from ..tune import CastConfig
from ..tune.kernel_key import settle_key


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
            settle_key(self.kernel)
            with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
                # Fusing a multiplication with an addition drops a rounding, so it is off wherever bits matter.
                compiled = self.kernel[(self.programs,)](**self.arguments, **self.options, enable_fp_fusion=False)
        return Relaunch(compiled, self.programs, tuple(self.scalars.values()), device)


@dataclass(frozen=True)
class Relaunch:
    """A launch that has been compiled, to be made again with other tensors, or their addresses, of the same dtypes,
    layouts and alignment. `compiled` is None where there was nothing to compile."""

    compiled: Any
    programs: int
    scalars: tuple[Any, ...]
    device: torch.device

    def run(self, *tensors: Any) -> None:
        """Launch on the device's current stream, as Triton does it."""
        if self.compiled is not None:
            with torch.cuda.device(self.device):
                self.by_triton(None, tensors)

    def by_triton(self, stream: int | None, tensors: Iterable[Any]) -> None:
        self.compiled[(self.programs, 1, 1)](*tensors, *self.scalars, stream=stream)

    def directly(self) -> Callable[[int, Iterable[Any]], None]:
        """`by_triton` in half its time: without its hooks for launches, which are for profilers."""
        run = self.compiled.run
        names = list(inspect.signature(run).parameters)
        if not (names[:5] == _LAUNCHER[:5] and names[5:-1] in ([], _LAUNCHER[5:]) and names[-1] == "args"):
            return self.by_triton
        function, metadata = self.compiled.function, self.compiled.packed_metadata
        programs, scalars = self.programs, self.scalars

        def launch(stream: int, tensors: Iterable[Any]) -> None:
            run(programs, 1, 1, stream, function, metadata, None, None, None, *tensors, *scalars)

        return launch


# What Triton's launchers take before a kernel's own arguments; some take those from the sixth on with `*args`.
_LAUNCHER = ["gridX", "gridY", "gridZ", "stream", "function"]
_LAUNCHER += ["kernel_metadata", "launch_metadata", "launch_enter_hook", "launch_exit_hook"]


class Relaunches:
    """Compiled launches in a row, whose pointers stand in one list of addresses. It holds no tensors."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._steps: list[tuple[Any, ...]] = []

    def add(self, relaunch: Relaunch, tensors: Iterable[Any], slots: Sequence[int]) -> None:
        """For each of `tensors`, which it was launched with, `slots` has the place of its address in the list: a
        pointer's, or that of what a descriptor describes."""
        descriptors = [
            (place, type(each), {**vars(each), "base": None})
            for place, each in enumerate(tensors)
            if each is not None and not isinstance(each, torch.Tensor)
        ]
        pick = itemgetter(*slots)  # makes a tuple, since a kernel reads one tensor and writes another at least
        self._steps.append((relaunch.directly(), relaunch.by_triton, pick, descriptors))

    def run(self, addresses: Sequence[int | None]) -> None:
        """Launch on the current stream of the device, which must be the current one."""
        stream = driver.active.get_current_stream(self._device.index)
        heard = _heard()
        for directly, by_triton, pick, descriptors in self._steps:
            pointers = pick(addresses)
            if descriptors:
                pointers = list(pointers)
                for place, kind, fields in descriptors:
                    moved = object.__new__(kind)  # a copy, in a fifth of `copy`'s time
                    moved.__dict__ = {**fields, "base": _Address(pointers[place])}
                    pointers[place] = moved
            (by_triton if heard else directly)(stream, pointers)


class _Address(int):
    """What a descriptor needs of a tensor."""

    def data_ptr(self) -> int:
        return self


def _heard() -> bool:
    """Whether anything, such as Triton's profiler, has asked to be called at launches."""
    runtime = knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


@dataclass(frozen=True)
class Layout:
    """What a kernel may take for granted about a matrix in memory.

    Attributes:
        alignment: a power of two that divides the bytes of every packed row, and its address, up to the 16 or
            4 bytes that the config moves at a time.
        whole: tiles fill the matrix, so nothing needs a mask.
        row_contiguous: the elements of a row are neighbours in memory.
        wide_counter: there may be more than 2**32 eights of elements, which random numbers are counted by.
    """

    alignment: int
    whole: bool
    row_contiguous: bool = True
    wide_counter: bool = False

    @classmethod
    def of(
        cls,
        config: CastConfig,
        rows: int,
        cols: int,
        row_bytes: int,
        row_contiguous: bool = True,
        stochastic: bool = False,
    ) -> Layout:
        """`row_bytes` may be any integer that shares its factors of two with all that must be aligned."""
        bits = row_bytes | (16 if config.wide else 4)
        whole = rows % config.tile_rows == 0 and cols % config.tile_cols == 0
        wide_counter = stochastic and max(rows * -(-cols // 8), cols * -(-rows // 8)) > 2**32
        return cls(bits & -bits, whole, row_contiguous, wide_counter)

"""What a GPU has for programs, and what a compiled kernel takes of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from .. import gpu
from .config import Config, HopperConfig


@dataclass(frozen=True)
class Limits:
    """What configs are pruned by. The defaults are an H200's.

    Attributes:
        architecture: `sm_90`, `gfx950` …
        processors: multiprocessors.
        shared_bytes: of a program.
        processor_shared_bytes, registers, warps, programs: of a multiprocessor at a time.
        gbps: 10^9 bytes a second between memory and processors.
        ghz: their clock. Each issues four instructions of a warp in a cycle.
    """

    architecture: str
    processors: int = 132
    shared_bytes: int = 232448
    processor_shared_bytes: int = 233472
    registers: int = 65536
    warps: int = 64
    programs: int = 32
    gbps: float = 4200.0
    ghz: float = 1.7

    @classmethod
    def assumed(cls, architecture: str) -> Limits:
        """Those of a well-known GPU of an architecture, `MODELS`, for one that is not here."""
        return _KNOWN.get(architecture, (cls(architecture), ""))[0]

    @classmethod
    def of(cls, device: torch.device) -> Limits:
        """Those of a CUDA or ROCm device; what PyTorch does not tell of it is assumed. Of the CPU, where kernels run in
        the interpreter, an H200's."""
        assumed = cls.assumed(gpu.architecture(device))
        if device.type != "cuda":
            return assumed
        properties = torch.cuda.get_device_properties(device)
        told: dict[str, Any] = {
            "processors": properties.multi_processor_count,
            "shared_bytes": getattr(properties, "shared_memory_per_block_optin", 0),
            "processor_shared_bytes": getattr(properties, "shared_memory_per_multiprocessor", 0),
            "registers": getattr(properties, "regs_per_multiprocessor", 0),
            "warps": getattr(properties, "max_threads_per_multi_processor", 0) // getattr(properties, "warp_size", 32),
        }
        return replace(assumed, **{name: value for name, value in told.items() if value})

    @property
    def capabilities(self) -> gpu.Capabilities:
        return gpu.capabilities(self.architecture)


def _like(
    model: str, architecture: str, processors: int, shared_kib: int, warps: int, programs: int, gbps: int, ghz: float
) -> tuple[Limits, str]:
    """A model by its data sheet, of whose bandwidth kernels see seven eighths (so it is on an H200). `shared_kib`: of a
    multiprocessor, of which a program cannot have the last one."""
    shared = 1024 * shared_kib
    return Limits(architecture, processors, shared - 1024, shared, 65536, warps, programs, gbps * 7 / 8, ghz), model


# By architecture. What a multiprocessor has is CUDA's table of compute capabilities.
_KNOWN: dict[str, tuple[Limits, str]] = {
    limits.architecture: (limits, model)
    for limits, model in (
        _like("NVIDIA A100 80GB SXM", "sm_80", 108, 164, 64, 32, 2039, 1.4),
        _like("NVIDIA RTX A6000", "sm_86", 84, 100, 48, 16, 768, 1.8),
        _like("NVIDIA L40S", "sm_89", 142, 100, 48, 24, 864, 2.5),
        (Limits("sm_90"), "NVIDIA H200"),
        _like("NVIDIA B200", "sm_100", 148, 228, 64, 32, 8000, 1.9),
        _like("NVIDIA B300", "sm_103", 148, 228, 64, 32, 8000, 1.9),
        _like("NVIDIA GeForce RTX 5090", "sm_120", 170, 100, 48, 24, 1792, 2.4),
        (
            Limits("gfx950", 256, 160 * 1024, 160 * 1024, registers=131072, warps=64, gbps=8000 * 7 / 8, ghz=2.4),
            "AMD Instinct MI355X",
        ),
    )
}
MODELS = {architecture: model for architecture, (_, model) in _KNOWN.items()}  # whose limits are assumed


@dataclass(frozen=True)
class Footprint:
    """What the compiler made of a kernel: bytes spilled and registers a thread, bytes of shared memory a program,
    and machine instructions (0 where they were not counted)."""

    spilled_bytes: int
    registers: int
    shared_bytes: int
    instructions: int = 0

    def exceeds(self, config: Config, limits: Limits) -> str | None:
        """Why a kernel is not worth launching, or cannot be; None if nothing is known against it."""
        if self.spilled_bytes:
            return f"it spills {self.spilled_bytes} bytes a thread"
        if self.shared_bytes > limits.shared_bytes:
            return f"it takes {self.shared_bytes} bytes of shared memory, of {limits.shared_bytes}"
        registers = self.registers * threads(config)
        if registers > limits.registers and not isinstance(config, HopperConfig):  # which shares them out anew
            return f"it takes {registers} registers, of {limits.registers}"
        return None


def threads(config: Config) -> int:
    """Of a program."""
    return 32 * (12 if isinstance(config, HopperConfig) else config.num_warps)


def resident(config: Config, limits: Limits, footprint: Footprint) -> int:
    """How many programs a multiprocessor has at a time."""
    return max(
        min(
            limits.registers // max(footprint.registers * threads(config), 1),
            limits.processor_shared_bytes // (footprint.shared_bytes + 1024),  # which each takes besides
            limits.warps * 32 // threads(config),
            limits.programs,
        ),
        1,
    )

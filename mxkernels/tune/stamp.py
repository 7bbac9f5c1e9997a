"""Stamp: what a measured time depends on besides the problem and the config."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch

from .. import gpu as gpus

_PACKAGE = Path(__file__).parents[1]


@dataclass(frozen=True)
class Stamp:
    """What configs were measured on: they serve where all of it is the same.

    Attributes:
        gpu: its name, as the driver tells it.
        architecture: `sm_90`, `gfx950` …
        sm_count: of its multiprocessors.
        triton: its version.
        kernels: a hash of the kernels' sources.
    """

    gpu: str
    architecture: str
    sm_count: int
    triton: str
    kernels: str

    @classmethod
    def of(cls, device: torch.device) -> Stamp:
        """That of a CUDA or ROCm device, here and now."""
        return _stamp(device)

    def here(self) -> Stamp:
        """That of the same GPU with this Triton and these kernels."""
        return replace(self, triton=triton_version(), kernels=kernels_hash())

    def differences(self, other: Stamp) -> str:
        """`triton 3.6.0, not 3.7.1`: what of this stamp is not as in the other."""
        pairs = ((name, getattr(self, name), getattr(other, name)) for name in self.__dataclass_fields__)
        return "; ".join(f"{name} {mine}, not {its}" for name, mine, its in pairs if mine != its)


@lru_cache
def _stamp(device: torch.device) -> Stamp:
    properties = torch.cuda.get_device_properties(device)
    return Stamp(
        properties.name,
        gpus.architecture(device),
        properties.multi_processor_count,
        triton_version(),
        kernels_hash(),
    )


@lru_cache
def triton_version() -> str:
    """`none` where it is not installed."""
    try:
        import triton
    except ImportError:
        return "none"
    return str(triton.__version__)


@lru_cache
def kernels_hash() -> str:
    """Of the sources that make kernels, whatever their ends of lines."""
    ops = _PACKAGE / "ops"
    found = hashlib.sha256()
    for path in (_PACKAGE / "formats.py", ops / "primitives.py", ops / "tiles.py", *sorted(ops.glob("*_kernel.py"))):
        found.update(path.name.encode() + b"\0" + path.read_bytes().replace(b"\r\n", b"\n") + b"\0")
    return found.hexdigest()[:16]

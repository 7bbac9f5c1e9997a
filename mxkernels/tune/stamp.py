"""Stamp: what a measured time depends on besides the problem and the config."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch

from .. import gpu as gpus

_PACKAGE = Path(__file__).parents[1]

# The modules in `ops` that an op's kernels are made of, beside those that all share.
_SHARED = ("formats.py", "ops/primitives.py", "ops/tiles.py")
_MODULES: dict[str, tuple[str, ...]] = {
    "quantize": ("quantize_kernel", "elements"),
    "quantize_pair": ("quantize_pair_kernel", "quantize_kernel", "elements"),
    "dequantize": ("dequantize_kernel",),
    "fold": ("fold_kernel", "quantize_kernel", "elements"),
    "quantize_fold": ("fold_kernel", "quantize_kernel", "elements"),
    "multiply": ("matmul_kernel", "matmul_hopper_kernel"),
    "stream": ("matmul_small_kernel", "matmul_kernel"),
    "decode_multiply": ("matmul_wide_kernel", "matmul_kernel"),
    "native": ("matmul_native_kernel", "matmul_kernel"),
}


@dataclass(frozen=True)
class Stamp:
    """What an op's configs were measured on: they serve where all of it is the same.

    Attributes:
        gpu: its name, as the driver tells it.
        architecture: `sm_90`, `gfx950` …
        sm_count: of its multiprocessors.
        triton: its version.
        kernels: a hash of the sources of the op's kernels; ops that are made of the same have the same.
    """

    gpu: str
    architecture: str
    sm_count: int
    triton: str
    kernels: str

    @classmethod
    def of(cls, device: torch.device, op: str) -> Stamp:
        """That of an op on a CUDA or ROCm device, here and now."""
        return _stamp(device, op)

    def here(self, op: str) -> Stamp:
        """That of an op on the same GPU, with this Triton and these kernels."""
        return replace(self, triton=triton_version(), kernels=kernels_hash(op))

    def differences(self, other: Stamp) -> str:
        """`triton 3.6.0, not 3.7.1`: what of this stamp is not as in the other."""
        pairs = ((name, getattr(self, name), getattr(other, name)) for name in self.__dataclass_fields__)
        return "; ".join(f"{name} {mine}, not {its}" for name, mine, its in pairs if mine != its)


@lru_cache
def _stamp(device: torch.device, op: str) -> Stamp:
    properties = torch.cuda.get_device_properties(device)
    return Stamp(
        properties.name,
        gpus.architecture(device),
        properties.multi_processor_count,
        triton_version(),
        kernels_hash(op),
    )


@lru_cache
def triton_version() -> str:
    """`none` where it is not installed."""
    try:
        import triton
    except ImportError:
        return "none"
    return str(triton.__version__)


def kernel_sources(op: str) -> tuple[str, ...]:
    """The files of the package that an op's kernels are made of."""
    return (*_SHARED, *(f"ops/{module}.py" for module in _MODULES[op]))


@lru_cache
def kernels_hash(op: str) -> str:
    """Of the sources of an op's kernels, whatever their ends of lines."""
    found = hashlib.sha256()
    for name in kernel_sources(op):
        found.update(name.encode() + b"\0" + (_PACKAGE / name).read_bytes().replace(b"\r\n", b"\n") + b"\0")
    return found.hexdigest()[:16]

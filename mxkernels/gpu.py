"""What a GPU can do, asked by name. Nothing else in the package knows a product or an architecture."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch


@dataclass(frozen=True)
class Capabilities:
    """What an instruction set offers.

    Attributes:
        ptx: inline PTX assembles.
        xorsign: the smaller magnitude of two, with the product of their signs, in one instruction.
        cvt_fp8: conversions between fp32/fp16 and E4M3/E5M2.
        cvt_e2m1: conversions between fp32 and E2M1.
        mma: matrix products of 16-bit operands.
        fp8_mma: matrix products of FP8 operands.
        wgmma: asynchronous matrix products of a warp group.
        tma: copies of tiles between global and shared memory, past the registers.
        dependent_launch: a kernel may be launched before the one that it waits for ends.
        block_scaled_mma: matrix products of MX operands with their scales.
        mixed_block_scaled_mma: the same of E2M1 by FP8.
    """

    ptx: bool = False
    xorsign: bool = False
    cvt_fp8: bool = False
    cvt_e2m1: bool = False
    mma: bool = False
    fp8_mma: bool = False
    wgmma: bool = False
    tma: bool = False
    dependent_launch: bool = False
    block_scaled_mma: bool = False
    mixed_block_scaled_mma: bool = False


NONE = Capabilities()

_PTX = Capabilities(ptx=True, mma=True)
_AMPERE_86 = replace(_PTX, xorsign=True)
_ADA = replace(_AMPERE_86, cvt_fp8=True, fp8_mma=True)
_HOPPER = replace(_ADA, wgmma=True, tma=True, dependent_launch=True)
_BLACKWELL_120 = replace(_ADA, cvt_e2m1=True, tma=True, dependent_launch=True, block_scaled_mma=True)
_BLACKWELL = replace(_BLACKWELL_120, mixed_block_scaled_mma=True)

# A new GPU is a row here (and a run of the tuner).
ARCHITECTURES: dict[str, Capabilities] = {
    "sm_80": _PTX,
    "sm_86": _AMPERE_86,
    "sm_89": _ADA,
    "sm_90": _HOPPER,
    "sm_100": _BLACKWELL,
    "sm_103": _BLACKWELL,
    "sm_120": _BLACKWELL_120,
    "gfx950": Capabilities(mma=True, fp8_mma=True, block_scaled_mma=True, mixed_block_scaled_mma=True),
}


def capabilities(architecture: str) -> Capabilities:
    """The capabilities of `"sm_90"`, `"gfx950"` …; of an unknown one, none beyond what every such GPU has."""
    known = ARCHITECTURES.get(architecture)
    if known is None:
        return _PTX if architecture.startswith("sm_") else NONE
    return known


@lru_cache
def architecture(device: torch.device) -> str:
    """`"sm_90"`, `"gfx950"` … for a CUDA or ROCm device, `"cpu"` for the CPU."""
    if device.type != "cuda":
        return device.type
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return str(properties.gcnArchName).partition(":")[0]
    return f"sm_{properties.major}{properties.minor}"


@lru_cache
def device_capabilities(device: torch.device) -> Capabilities:
    """The capabilities of a device; the CPU (where kernels run in the interpreter) has none."""
    return capabilities(architecture(device))

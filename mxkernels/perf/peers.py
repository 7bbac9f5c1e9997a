"""What else multiplies two matrices: the products that those of MX operands are timed beside.

Each is a call with its operands ready: no conversion is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeGuard

import torch

from .. import gpu
from ..spec import MXSpec
from ..tensor import MXTensor

Call = Callable[[], object]

_MULTIPLE = 16  # of N and K, for torch._scaled_mm


def bf16_product(a: torch.Tensor, b: torch.Tensor) -> Call:
    """`torch.mm` (cuBLAS on NVIDIA) of `[M, K]` and `[K, N]` as they lie, in bfloat16."""
    return partial(torch.mm, a.bfloat16(), b.bfloat16())


def fp8_product(a: torch.Tensor, b: torch.Tensor) -> Call | None:
    """`torch._scaled_mm` of `[M, K]` and `[K, N]` in E4M3, both along K, a scale a tensor, with fast accumulation.

    None where the device has no FP8 products, or this one is of sizes that they do not take.
    """
    if not gpu.device_capabilities(a.device).fp8_mma or a.shape[1] % _MULTIPLE or b.shape[1] % _MULTIPLE:
        return None
    one = torch.ones((), device=a.device)
    left, right = (x.contiguous().to(torch.float8_e4m3fn) for x in (a, b.T))
    return partial(
        torch._scaled_mm, left, right.T, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True
    )


def dot_scaled_product(a: torch.Tensor | MXTensor, b: torch.Tensor | MXTensor) -> Call | None:
    """A plain Triton kernel with `tl.dot_scaled`: `[M, K]` in bfloat16 or e2m1 by `[K, N]` in e2m1, both along K.

    None on the CPU, and for operands that the kernel does not take.
    """
    if a.device.type != "cuda":
        return None
    from .dot_scaled_kernel import BLOCK_K, dot_scaled_launch

    w = b.T
    if not _simple(w) or a.shape[1] % BLOCK_K:
        return None
    out = torch.empty(a.shape[0], w.shape[0], dtype=torch.bfloat16, device=a.device)
    if _simple(a):
        launch = dot_scaled_launch(a.codes, a.scale, w.codes, w.scale, out)
    elif isinstance(a, torch.Tensor) and a.dtype == torch.bfloat16 and a.is_contiguous():
        launch = dot_scaled_launch(a, None, w.codes, w.scale, out)
    else:
        return None
    return partial(launch.run, a.device)


def _simple(x: torch.Tensor | MXTensor) -> TypeGuard[MXTensor]:
    """e2m1 with a scale for each 32 of a row, stored so, whatever rule made the scales and codes."""
    if not isinstance(x, MXTensor) or x.transposed:
        return False
    return x.spec == MXSpec("e2m1", (1, 32), x.spec.rounding, x.spec.scale_rounding)

"""FP8 operands with an fp32 scale a row, the usual baseline: plain PyTorch, which `torch.compile` fuses."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..recipes import RowScaled
from .plain import plain_product

_DTYPES = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


class RowScaledTensor(NamedTuple):
    """A matrix `codes * scale`: FP8 codes `[rows, K]`, contiguous, and fp32 scales `[rows, 1]`."""

    codes: torch.Tensor
    scale: torch.Tensor

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        return (self.codes.float() * self.scale).to(dtype)


def row_scaled(x: torch.Tensor, spec: RowScaled) -> RowScaledTensor:
    """A matrix, each row scaled so that its largest magnitude is the format's: NaN or Inf makes NaN of the row."""
    dtype = _DTYPES[spec.element]
    largest = x.abs().amax(1, keepdim=True) if x.shape[1] else x.new_zeros((x.shape[0], 1))
    # times the reciprocal, which is what a GPU makes of a division by a number
    scale = (largest.float() * (1 / torch.finfo(dtype).max)).clamp(min=torch.finfo(torch.float32).tiny)
    return RowScaledTensor((x / scale).to(dtype).contiguous(), scale)


def row_scaled_product(
    a: RowScaledTensor, b: RowScaledTensor, bias: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """`a @ b.T + bias`, by FP8 tensor cores, with partial sums promoted to fp32, where they take the operands;
    these round to bfloat16, whatever `dtype` is."""
    if a.codes.is_cuda and dtype != torch.float16 and _is_native(a, b):
        bias = None if bias is None else bias.to(torch.bfloat16)
        out = torch._scaled_mm(
            a.codes, b.codes.T, a.scale, b.scale.T, bias, out_dtype=torch.bfloat16, use_fast_accum=False
        )
        return out.to(dtype)
    # FP8 is exact in bf16; a row's scale is the same for all of a sum
    out = plain_product(a.codes.bfloat16(), b.codes.bfloat16(), None, torch.float32) * a.scale * b.scale.T
    return (out if bias is None else out + bias).to(dtype)


def _is_native(a: RowScaledTensor, b: RowScaledTensor) -> bool:
    """Whether FP8 tensor cores take two operands: no empty ones, whole 16 bytes, and one E5M2 at most."""
    from .device_facts import multiplies_fp8

    m, (n, k) = a.codes.shape[0], b.codes.shape
    both_e5m2 = a.codes.dtype == b.codes.dtype == torch.float8_e5m2
    return m > 0 and n * k > 0 and n % 16 == k % 16 == 0 and not both_e5m2 and multiplies_fp8(a.codes.device)

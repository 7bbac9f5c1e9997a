"""Products of operands that stay in 16 bits."""

from __future__ import annotations

import torch

from . import matmul


def half_precision(dtype: torch.dtype) -> torch.dtype:
    """The 16-bit dtype of operands in a layer with outputs of `dtype`."""
    return torch.bfloat16 if dtype == torch.float32 else dtype


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """None where autocast is off, or does not exist, as on the meta device."""
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return None


def plain_product(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """`a @ b.T + bias` of bfloat16 or float16 matrices, accumulated in fp32; by the vendor's library on a GPU."""
    if not a.is_cuda:
        return matmul(a, b.T, bias=bias, out_dtype=dtype)
    if a.dtype == dtype:
        return torch.mm(a, b.T) if bias is None else torch.addmm(bias.to(dtype), a, b.T)
    out = torch.mm(a, b.T, out_dtype=torch.float32)
    return (out if bias is None else out + bias).to(dtype)

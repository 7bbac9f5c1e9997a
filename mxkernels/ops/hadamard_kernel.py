"""The block Hadamard transform: one kernel for every size, dtype and stride."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .. import gpu
from ..tune import CastConfig
from .launch import Launch
from .primitives import ceil_div, from_fp32, to_fp32


@triton.jit
def hadamard_kernel(
    x_ptr, signs_ptr, out_ptr, rows, cols, row_stride, col_stride, out_cols,
    FACTOR: tl.constexpr, SIZE: tl.constexpr, CONFIG: tl.constexpr, GPU: tl.constexpr,
):  # fmt: skip
    """Transform the rows of a matrix of any strides, a tile a program; without signs, `signs_ptr` is None."""
    TILE_ROWS: tl.constexpr = CONFIG.tile_rows
    TILE_COLS: tl.constexpr = CONFIG.tile_cols
    tiles_across = ceil_div(out_cols, TILE_COLS)
    row0 = (tl.program_id(0) // tiles_across).to(tl.int64) * TILE_ROWS
    col0 = (tl.program_id(0) % tiles_across).to(tl.int64) * TILE_COLS
    i = tl.arange(0, TILE_ROWS)[:, None]
    j = tl.arange(0, TILE_COLS)[None, :]
    place = x_ptr + row0 * row_stride + col0 * col_stride + (i.to(tl.int64) * row_stride + j.to(tl.int64) * col_stride)
    x = to_fp32(tl.load(place, mask=(i < rows - row0) & (j < cols - col0), other=0.0))
    if signs_ptr is not None:
        x *= tl.where(tl.load(signs_ptr + j % SIZE) < 0, -1.0, 1.0)
    x = butterflies(x, SIZE) * FACTOR
    out = from_fp32(x, None, out_ptr.dtype.element_ty, GPU)
    inside = (i < rows - row0) & (j < out_cols - col0)
    tl.store(out_ptr + row0 * out_cols + col0 + (i.to(tl.int64) * out_cols + j), out, mask=inside)


@triton.jit
def butterflies(x, SIZE: tl.constexpr):
    """Each SIZE neighbours of the rows of fp32 `x` times Sylvester's matrix: sums of pairs at distance 1, 2, 4 …"""
    if SIZE == 1:
        return x
    else:
        ROWS: tl.constexpr = x.shape[0]
        COLS: tl.constexpr = x.shape[1]
        HALF: tl.constexpr = SIZE // 2
        x = butterflies(x, HALF)
        first, second = tl.split(tl.permute(tl.reshape(x, [ROWS, COLS // SIZE, 2, HALF]), 0, 1, 3, 2))
        pairs = tl.permute(tl.join(first + second, first - second), 0, 1, 3, 2)
        return tl.reshape(pairs, [ROWS, COLS])


def hadamard_launch(
    x: torch.Tensor,
    size: int,
    signs: torch.Tensor | None,
    out: torch.Tensor,
    capabilities: gpu.Capabilities | None = None,
) -> Launch:
    """The launch that transforms the matrix `x` into the contiguous `out`, whose rows are whole blocks."""
    config = hadamard_config(x, size)
    return Launch(
        hadamard_kernel,
        triton.cdiv(out.shape[0], config.tile_rows) * triton.cdiv(out.shape[1], config.tile_cols),
        {"x_ptr": x, "signs_ptr": signs, "out_ptr": out},
        {
            "rows": x.shape[0],
            "cols": x.shape[1],
            "row_stride": x.stride(0),
            "col_stride": x.stride(1),
            "out_cols": out.shape[1],
            "FACTOR": float(torch.tensor(size**-0.5, dtype=torch.float32)),
            "SIZE": size,
            "CONFIG": config,
            "GPU": capabilities or gpu.device_capabilities(x.device),
        },
        {"num_warps": config.num_warps},
    )


def hadamard_config(x: torch.Tensor, size: int) -> CastConfig:
    """Long tiles where rows are contiguous, else square ones, which also read the columns in long pieces."""
    return CastConfig(8, 512, 4) if x.stride(1) == 1 else CastConfig(64, max(size, 64), 4)

"""For comparison only: a product with MX weights as one would first write it in Triton, by `tl.dot_scaled`.

No path of the library runs it. Imports Triton.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..ops.launch import Launch

BLOCK_K = 128  # the reduction is in whole ones
_SCALED = 32  # elements a scale


@triton.jit
def dot_scaled_kernel(
    a_ptr, a_scale_ptr, w_ptr, w_scale_ptr, out_ptr, M, N, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """`out[M, N] = A[M, K] W[N, K]^T`, W and A in e2m1 with a scale for each 32 of a row; A is bf16 if it has no
    scales."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    program = tl.program_id(0)
    row = program % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
    col = program // tiles_m * BLOCK_N + tl.arange(0, BLOCK_N)
    # Rows beyond the edge read others again, and are not stored.
    row_read = (row % M).to(tl.int64)
    col_read = (col % N).to(tl.int64)
    byte = tl.arange(0, BLOCK_K // 2)
    scale = tl.arange(0, BLOCK_K // 32)
    w_ptrs = w_ptr + col_read[None, :] * (K // 2) + byte[:, None]
    w_scale_ptrs = w_scale_ptr + col_read[:, None] * (K // 32) + scale[None, :]
    if a_scale_ptr is None:
        a_ptrs = a_ptr + row_read[:, None] * K + tl.arange(0, BLOCK_K)[None, :]
    else:
        a_ptrs = a_ptr + row_read[:, None] * (K // 2) + byte[None, :]
        a_scale_ptrs = a_scale_ptr + row_read[:, None] * (K // 32) + scale[None, :]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in range(K // BLOCK_K):
        w = tl.load(w_ptrs + step * (BLOCK_K // 2))
        w_scale = tl.load(w_scale_ptrs + step * (BLOCK_K // 32))
        if a_scale_ptr is None:
            a = tl.load(a_ptrs + step * BLOCK_K)
            total = tl.dot_scaled(a, None, "bf16", w, w_scale, "e2m1", total)
        else:
            a = tl.load(a_ptrs + step * (BLOCK_K // 2))
            a_scale = tl.load(a_scale_ptrs + step * (BLOCK_K // 32))
            total = tl.dot_scaled(a, a_scale, "e2m1", w, w_scale, "e2m1", total)
    out_ptrs = out_ptr + row.to(tl.int64)[:, None] * N + col[None, :]
    tl.store(out_ptrs, total.to(out_ptr.dtype.element_ty), mask=(row < M)[:, None] & (col < N)[None, :])


def dot_scaled_launch(
    a: torch.Tensor, a_scale: torch.Tensor | None, w: torch.Tensor, w_scale: torch.Tensor, out: torch.Tensor
) -> Launch:
    """The launch that writes `out` `[M, N]`, bfloat16.

    Args:
        a: bfloat16 `[M, K]`, K a multiple of 128; or uint8 `[M, K/2]` codes of e2m1 with `a_scale` `[M, K/32]`.
        w: uint8 `[N, K/2]` with `w_scale` `[N, K/32]`.
    """
    m, n = out.shape
    block_m = min(max(triton.next_power_of_2(m), 16), 128)
    return Launch(
        dot_scaled_kernel,
        triton.cdiv(m, block_m) * triton.cdiv(n, 128),
        {
            "a_ptr": a,
            "a_scale_ptr": a_scale,
            "w_ptr": w,
            "w_scale_ptr": w_scale,
            "out_ptr": out,
        },
        {
            "M": m,
            "N": n,
            "K": w_scale.shape[1] * _SCALED,
            "BLOCK_M": block_m,
            "BLOCK_N": 128,
            "BLOCK_K": BLOCK_K,
        },
        {"num_warps": 8 if block_m >= 64 else 4, "num_stages": 3},
    )

"""The product of carriers: FP8 rows with a power of two each, bf16 or tf32 rows, both along the reduction."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .. import gpu
from ..tune import MatmulConfig
from .launch import Launch
from .primitives import ceil_div, from_fp32, scale_value, to_fp32
from .tiles import grouped_tile

ADDEND_TILE = tl.constexpr(256)  # a multiple of every config's tile, so that an addend is loaded without a mask


@triton.jit
def matmul_kernel(
    a_desc, b_desc, a_reference_ptr, b_reference_ptr, addend_ptr, bias_ptr, out_ptr, M, N, K,
    A_ROWS: tl.constexpr, B_ROWS: tl.constexpr, A_TURNED: tl.constexpr, B_TURNED: tl.constexpr,
    CONFIG: tl.constexpr, GPU: tl.constexpr,
):  # fmt: skip
    """`out[M, N] = A[M, K] B[N, K]^T`, a tile a program. References, None or a byte for each A_ROWS rows of A
    (B_ROWS of B), are powers of two to multiply them by; `addend_ptr` is None or a sum's other half (`addend_shape`),
    `bias_ptr` None or N values. An operand that is TURNED is stored `[K, rows]`."""
    BLOCK_M: tl.constexpr = CONFIG.block_m
    BLOCK_N: tl.constexpr = CONFIG.block_n
    BLOCK_K: tl.constexpr = CONFIG.block_k
    GROUP_M: tl.constexpr = CONFIG.group_m
    tile_m, tile_n = grouped_tile(tl.program_id(0), ceil_div(M, BLOCK_M), ceil_div(N, BLOCK_N), GROUP_M)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    partial = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in range(ceil_div(K, BLOCK_K)):
        a = load_carrier(a_desc, tile_m * BLOCK_M, step * BLOCK_K, A_TURNED)
        b = load_carrier(b_desc, tile_n * BLOCK_N, step * BLOCK_K, B_TURNED)
        if not GPU.mma and a.dtype == tl.bfloat16:  # the interpreter multiplies them wrongly
            a = to_fp32(a)
            b = to_fp32(b)
        partial = tl.dot(a, b.T, partial)
        if CONFIG.promote:
            if step % (CONFIG.promote // BLOCK_K) == CONFIG.promote // BLOCK_K - 1:
                total += partial
                partial = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    total += partial
    if a_reference_ptr is not None:
        row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
        col = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        a_reference = tl.load(a_reference_ptr + row // A_ROWS, mask=row < M, other=127).to(tl.int32)
        b_reference = tl.load(b_reference_ptr + col // B_ROWS, mask=col < N, other=127).to(tl.int32)
        total = times_power_of_two(total, a_reference[:, None] + b_reference[None, :] - 254)
    if addend_ptr is not None:
        row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
        col = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        width = ceil_div(N, ADDEND_TILE) * ADDEND_TILE
        total += tl.load(addend_ptr + row.to(tl.int64) * width + col)
    store_product(total, tile_m, tile_n, bias_ptr, out_ptr, M, N, None, GPU)


@triton.jit
def load_carrier(desc, row, k, TURNED: tl.constexpr):
    if TURNED:
        return desc.load([k, row]).T
    else:
        return desc.load([row, k])


@triton.jit
def times_power_of_two(x, exponent):
    """`x * 2**exponent`, for exponents from -254 to 254, as the product of two powers that fp32 has."""
    half = exponent >> 1
    return x * scale_value(half + 127) * scale_value(exponent - half + 127)


@triton.jit
def store_product(total, tile_m, tile_n, bias_ptr, out_ptr, M, N, wanted, GPU: tl.constexpr):
    """Add the bias, round once, and store a tile of the row-major output; of it what is `wanted`, if not None."""
    BLOCK_M: tl.constexpr = total.shape[0]
    BLOCK_N: tl.constexpr = total.shape[1]
    row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    col = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    if bias_ptr is not None:
        total += tl.load(bias_ptr + col, mask=col < N, other=0.0).to(tl.float32)
    out = from_fp32(total, None, out_ptr.dtype.element_ty, GPU)
    inside = (row < M) & (col < N)
    if wanted is not None:
        inside &= wanted
    tl.store(out_ptr + row.to(tl.int64) * N + col, out, mask=inside)


def addend_shape(m: int, n: int) -> tuple[int, int]:
    """Of the fp32 matrix that is added to a product `[m, n]`, contiguous: whole tiles, anything beyond the product."""
    tile = ADDEND_TILE.value
    return triton.cdiv(m, tile) * tile, triton.cdiv(n, tile) * tile


def carrier_descriptor(carrier: torch.Tensor, k: int, rows: int, cols: int, turned: bool = False) -> TensorDescriptor:
    """For loads of `rows` x `cols` of a carrier, with `k` columns, or `[k, rows]` if `turned`, whose rows are
    contiguous, each at whole 16 bytes."""
    shape = list(carrier.shape) if turned else [carrier.shape[0], k]
    return TensorDescriptor(carrier, shape, list(carrier.stride()), [cols, rows] if turned else [rows, cols])


def matmul_launch(
    a: torch.Tensor,
    b: torch.Tensor,
    k: int,
    references: tuple[torch.Tensor, torch.Tensor] | None,
    rows_per_reference: tuple[int, int],
    bias: torch.Tensor | None,
    out: torch.Tensor,
    config: MatmulConfig,
    turned: tuple[bool, bool] = (False, False),
    addend: torch.Tensor | None = None,
    capabilities: gpu.Capabilities | None = None,
) -> Launch:
    """The launch that writes `out` `[M, N]` from carriers a `[M, K or more]` and b `[N, K or more]`, or their
    transposes if `turned`. Carriers of fp32 are tf32 numbers, of 11 bits."""
    m, n = out.shape
    a_reference, b_reference = references or (None, None)
    return Launch(
        matmul_kernel,
        triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n),
        {
            "a_desc": carrier_descriptor(a, k, config.block_m, config.block_k, turned[0]),
            "b_desc": carrier_descriptor(b, k, config.block_n, config.block_k, turned[1]),
            "a_reference_ptr": a_reference,
            "b_reference_ptr": b_reference,
            "addend_ptr": addend,
            "bias_ptr": bias,
            "out_ptr": out,
        },
        {
            "M": m,
            "N": n,
            "K": k,
            "A_ROWS": rows_per_reference[0],
            "B_ROWS": rows_per_reference[1],
            "A_TURNED": turned[0],
            "B_TURNED": turned[1],
            "CONFIG": config,
            "GPU": capabilities or gpu.device_capabilities(a.device),
        },
        {"num_warps": config.num_warps, "num_stages": config.num_stages},
    )

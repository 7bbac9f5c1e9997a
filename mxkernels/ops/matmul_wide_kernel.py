"""The 16-bit path: operands of any format, block and orientation, decoded on the way to the tensor cores."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .. import gpu
from ..folded import Outside
from ..spec import Block, MXSpec
from ..tune import MatmulConfig
from .launch import Launch, Layout
from .matmul_kernel import store_product
from .primitives import (
    INFINITY,
    MAGNITUDE,
    NAN_BYTE,
    below_bf16,
    bits_of,
    ceil_div,
    decode_words,
    scale_value,
    spread,
    to_fp32,
    value_of,
)
from .tiles import grouped_tile, load_words

# That look for flagged tiles: some for each multiprocessor, and few to start in vain. A prime, or rows that are flagged
# at equal distances would all be the same programs'.
GUARDED_PROGRAMS = 509


@dataclass(frozen=True)
class OperandLayout:
    """What a kernel knows of an operand `[rows, K]`.

    Attributes:
        spec: that of the matrix as stored; None for a plain one.
        turned: what is stored is `[K, rows]`; of a plain one its strides say so.
        parts: how many bf16 numbers an element may take: 1; 2 for fp16; 3 for what has an offset.
        bytes: what its packed rows' bytes and address share.
        line: how many rows share a flag of `outside`.
    """

    spec: MXSpec | None
    turned: bool
    parts: int
    bytes: Layout
    line: int = 1


@dataclass(frozen=True)
class WideOperand:
    """One side of a product: a plain matrix `[rows, K]` as `codes`, or a packed one with its `spec` and parts;
    what is stored is `[K, rows]` if `turned`. `outside`: which of its rows, `line` by line, are wanted; None: it has
    no say."""

    codes: torch.Tensor
    scale: torch.Tensor | None = None
    offset: torch.Tensor | None = None
    spec: MXSpec | None = None
    turned: bool = False
    outside: Outside | None = None
    line: int = 1

    def layout(self) -> OperandLayout:
        if self.spec is None:
            parts = 2 if self.codes.dtype == torch.float16 else 1
            return OperandLayout(None, False, parts, Layout(1, False), self.line)
        bits = self.codes.stride(0) | self.codes.data_ptr() | 4
        parts = 1 if self.spec.symmetric else 3
        return OperandLayout(self.spec, self.turned, parts, Layout(bits & -bits, False), self.line)

    @property
    def strides(self) -> tuple[int, ...]:
        """Of a plain matrix, from row to row and along a row, however it is stored; of a packed one, as stored."""
        strides = self.codes.stride()
        return strides[::-1] if self.spec is None and self.turned else strides


@triton.jit
def matmul_wide_kernel(
    a_ptr, a_scale_ptr, a_offset_ptr, a_outside_ptr, a_outside_lines_ptr,
    b_ptr, b_scale_ptr, b_offset_ptr, b_outside_ptr, b_outside_lines_ptr,
    bias_ptr, out_ptr, everything_ptr, lost_ptr,
    M, N, K, a_stride, a_step, b_stride, b_step,
    A: tl.constexpr, B: tl.constexpr, EXACT: tl.constexpr, CONFIG: tl.constexpr, GPU: tl.constexpr,
):  # fmt: skip
    """`out[M, N] = A[M, K] B[N, K]^T`, of plain operands or packed ones (`OperandLayout`).

    In bf16; an operand that fits it except near fp32's smallest numbers sets `lost_ptr` to 1 if that was met. Or
    EXACT, in fp32, and only if `lost_ptr` is None or has 1. Outputs are written of rows that are flagged as outside;
    all are where `everything_ptr` has 1, or where it and the flags are None.
    """
    if EXACT and lost_ptr is not None:
        if tl.load(lost_ptr) == 0:
            return
    tiles_m = ceil_div(M, CONFIG.block_m)
    tiles_n = ceil_div(N, CONFIG.block_n)
    if a_outside_ptr is None and b_outside_ptr is None and everything_ptr is None:
        tile_m, tile_n = grouped_tile(tl.program_id(0), tiles_m, tiles_n, CONFIG.group_m)
        total = multiply_tile(
            a_ptr, a_scale_ptr, a_offset_ptr, b_ptr, b_scale_ptr, b_offset_ptr, lost_ptr,
            tile_m, tile_n, M, N, K, a_stride, a_step, b_stride, b_step, A, B, EXACT, CONFIG, GPU,
        )  # fmt: skip
        store_product(total, tile_m, tile_n, bias_ptr, out_ptr, M, N, None, GPU)
    else:
        everything = flag(everything_ptr)
        if (everything | flag(a_outside_ptr) | flag(b_outside_ptr)) == 0:
            return
        for tile in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
            tile_m, tile_n = grouped_tile(tile, tiles_m, tiles_n, CONFIG.group_m)
            down = rows_outside(a_outside_lines_ptr, tile_m, M, CONFIG.block_m, A.line)
            across = rows_outside(b_outside_lines_ptr, tile_n, N, CONFIG.block_n, B.line)
            if (everything | tl.max(down, axis=0) | tl.max(across, axis=0)) != 0:
                total = multiply_tile(
                    a_ptr, a_scale_ptr, a_offset_ptr, b_ptr, b_scale_ptr, b_offset_ptr, lost_ptr,
                    tile_m, tile_n, M, N, K, a_stride, a_step, b_stride, b_step, A, B, EXACT, CONFIG, GPU,
                )  # fmt: skip
                # loaded again, which frees registers meanwhile
                down = rows_outside(a_outside_lines_ptr, tile_m, M, CONFIG.block_m, A.line)
                across = rows_outside(b_outside_lines_ptr, tile_n, N, CONFIG.block_n, B.line)
                wanted = (down[:, None] | across[None, :] | everything) != 0
                store_product(total, tile_m, tile_n, bias_ptr, out_ptr, M, N, wanted, GPU)


@triton.jit
def flag(ptr):
    """What a pointer has; 0 if it is None."""
    if ptr is None:
        return 0
    else:
        return tl.load(ptr)


@triton.jit
def rows_outside(outside_ptr, tile, rows, ROWS: tl.constexpr, LINE: tl.constexpr):
    """The flags of a tile's rows, int32 `[ROWS]`; 0 where there are none."""
    row = tile * ROWS + tl.arange(0, ROWS)
    if outside_ptr is None:
        return tl.zeros_like(row)
    else:
        return tl.load(outside_ptr + row // LINE, mask=row < rows, other=0).to(tl.int32)


@triton.jit
def multiply_tile(
    a_ptr, a_scale_ptr, a_offset_ptr, b_ptr, b_scale_ptr, b_offset_ptr, lost_ptr,
    tile_m, tile_n, M, N, K, a_stride, a_step, b_stride, b_step,
    A: tl.constexpr, B: tl.constexpr, EXACT: tl.constexpr, CONFIG: tl.constexpr, GPU: tl.constexpr,
):  # fmt: skip
    """A tile of the product, fp32."""
    BLOCK_M: tl.constexpr = CONFIG.block_m
    BLOCK_N: tl.constexpr = CONFIG.block_n
    BLOCK_K: tl.constexpr = CONFIG.block_k
    A_PARTS: tl.constexpr = A.parts
    B_PARTS: tl.constexpr = B.parts
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    lost_a = tl.zeros([BLOCK_M, BLOCK_K], tl.int32)
    lost_b = tl.zeros([BLOCK_N, BLOCK_K], tl.int32)
    for step in range(ceil_div(K, BLOCK_K)):
        a = operand_tile(
            a_ptr, a_scale_ptr, a_offset_ptr, tile_m.to(tl.int64), tl.cast(step, tl.int64), M, K, a_stride, a_step,
            A, BLOCK_M, BLOCK_K, GPU,
        )  # fmt: skip
        b = operand_tile(
            b_ptr, b_scale_ptr, b_offset_ptr, tile_n.to(tl.int64), tl.cast(step, tl.int64), N, K, b_stride, b_step,
            B, BLOCK_N, BLOCK_K, GPU,
        )  # fmt: skip
        if EXACT:
            total = tl.dot(a, b.T, total, input_precision="ieee")
        else:
            total = dot_by_parts(a, b, total, A_PARTS, B_PARTS, GPU)
            if lost_ptr is not None:
                lost_a |= lost_bits(a, tile_m * BLOCK_M, M, A_PARTS)
                lost_b |= lost_bits(b, tile_n * BLOCK_N, N, B_PARTS)
    if lost_ptr is not None and not EXACT:
        if tl.max(tl.max(lost_a, axis=1), axis=0) + tl.max(tl.max(lost_b, axis=1), axis=0) != 0:
            tl.store(lost_ptr, 1)
    return total


@triton.jit
def operand_tile(
    ptr, scale_ptr, offset_ptr, tile, tile_k, rows, K, stride, step,
    OPERAND: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, GPU: tl.constexpr,
):  # fmt: skip
    """Rows and columns of an operand, decoded to fp32 `[ROWS, COLS]`; zeros beyond K, anything beyond `rows`.

    `stride` is from row to row, in elements of a plain operand, in bytes of a packed one; `step`, from one
    element of a plain operand's row to the next.
    """
    SPEC: tl.constexpr = OPERAND.spec
    LAYOUT: tl.constexpr = OPERAND.bytes
    k = tile_k * COLS + tl.arange(0, COLS)[None, :]
    if SPEC is None:
        row = tile * ROWS + tl.arange(0, ROWS)[:, None]
        return to_fp32(tl.load(ptr + row * stride + k * step, mask=(row < rows) & (k < K), other=0.0))
    elif OPERAND.turned:
        value = tl.trans(
            decoded_tile(ptr, scale_ptr, offset_ptr, tile_k, tile, K, rows, stride, SPEC, COLS, ROWS, LAYOUT, GPU)
        )
        return tl.where(k < K, value, 0.0)
    else:
        value = decoded_tile(ptr, scale_ptr, offset_ptr, tile, tile_k, rows, K, stride, SPEC, ROWS, COLS, LAYOUT, GPU)
        return tl.where(k < K, value, 0.0)


@triton.constexpr_function
def block_within(block, rows, cols):
    """As much of a block as lies in a tile of `rows` x `cols`."""
    return Block(min(block.rows, rows), min(block.cols, cols))


@triton.jit
def decoded_tile(
    codes_ptr, scale_ptr, offset_ptr, tile_row, tile_col, rows, cols, row_bytes,
    SPEC: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, LAYOUT: tl.constexpr, GPU: tl.constexpr,
):  # fmt: skip
    """A tile of a packed matrix, decoded to fp32; anything outside the matrix. A block may exceed the tile."""
    ELEMENT: tl.constexpr = SPEC.element
    BLOCK: tl.constexpr = SPEC.block
    HERE: tl.constexpr = block_within(BLOCK, ROWS, COLS)
    row = tile_row * ROWS + tl.arange(0, ROWS // HERE.rows)[:, None] * HERE.rows
    col = tile_col * COLS + tl.arange(0, COLS // HERE.cols)[None, :] * HERE.cols
    block = row // BLOCK.rows * ceil_div(cols, BLOCK.cols) + col // BLOCK.cols
    exists = (row < rows) & (col < cols)
    scale = tl.load(scale_ptr + block, mask=exists).to(tl.int32)
    factor = tl.where(scale == NAN_BYTE, float("nan"), scale_value(scale))
    words = load_words(codes_ptr, tile_row, tile_col, rows, row_bytes, ROWS, COLS, ELEMENT.bits, LAYOUT)
    value = decode_words(words, ELEMENT, GPU) * spread(factor, HERE)
    if offset_ptr is not None:
        value += spread(tl.load(offset_ptr + block, mask=exists).to(tl.float32), HERE)
    return value


@triton.jit
def dot_by_parts(a, b, total, A_PARTS: tl.constexpr, B_PARTS: tl.constexpr, GPU: tl.constexpr):
    """`total + a b^T`, each operand as the sum of bf16 numbers, the largest first."""
    for i in tl.static_range(A_PARTS):
        rest = b
        a_part = bf16_part(a, A_PARTS - i)
        for j in tl.static_range(B_PARTS):
            b_part = bf16_part(rest, B_PARTS - j)
            if GPU.mma:
                total = tl.dot(a_part.to(tl.bfloat16), b_part.to(tl.bfloat16).T, total)
            else:
                total = tl.dot(a_part, b_part.T, total, input_precision="ieee")
            rest = remainder(rest, b_part)
        a = remainder(a, a_part)
    return total


@triton.jit
def remainder(x, part):
    """`x - part`; 0 of what is not finite, which its first part says."""
    return tl.where((bits_of(x) & MAGNITUDE) < INFINITY, x - part, 0.0)


@triton.jit
def lost_bits(x, first, rows, PARTS: tl.constexpr):
    """Not 0 where PARTS bf16 numbers do not hold fp32 `x`, whose rows are `first` … of `rows`."""
    for i in tl.static_range(PARTS - 1):
        x = remainder(x, bf16_part(x, PARTS - i))
    row = first + tl.arange(0, x.shape[0])[:, None]
    return tl.where(row < rows, below_bf16(x), 0)


@triton.jit
def bf16_part(x, LEFT: tl.constexpr):
    """The leading 8 bits of fp32 `x`, as fp32, if more parts than one are LEFT; all of it if it fits."""
    if LEFT > 1:
        return value_of(bits_of(x) & -0x10000)
    else:
        return x


def matmul_wide_launch(
    operands: tuple[WideOperand, WideOperand],
    k: int,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    everything: torch.Tensor | None,
    lost: torch.Tensor | None,
    exact: bool,
    config: MatmulConfig,
    capabilities: gpu.Capabilities | None = None,
) -> Launch:
    """The launch that writes `out` `[M, N]` from two operands `[M, K]` and `[N, K]`; the flags are on the device."""
    a, b = operands
    m, n = out.shape
    tiles = triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n)
    guarded = everything is not None or a.outside is not None or b.outside is not None
    return Launch(
        matmul_wide_kernel,
        min(tiles, GUARDED_PROGRAMS) if guarded else tiles,
        {
            "a_ptr": a.codes,
            "a_scale_ptr": a.scale,
            "a_offset_ptr": a.offset,
            "a_outside_ptr": a.outside and a.outside.any,
            "a_outside_lines_ptr": a.outside and a.outside.lines,
            "b_ptr": b.codes,
            "b_scale_ptr": b.scale,
            "b_offset_ptr": b.offset,
            "b_outside_ptr": b.outside and b.outside.any,
            "b_outside_lines_ptr": b.outside and b.outside.lines,
            "bias_ptr": bias,
            "out_ptr": out,
            "everything_ptr": everything,
            "lost_ptr": lost,
        },
        {
            "M": m,
            "N": n,
            "K": k,
            "a_stride": a.strides[0],
            "a_step": a.strides[1],
            "b_stride": b.strides[0],
            "b_step": b.strides[1],
            "A": a.layout(),
            "B": b.layout(),
            "EXACT": exact,
            "CONFIG": config,
            "GPU": capabilities or gpu.device_capabilities(out.device),
        },
        {"num_warps": config.num_warps, "num_stages": config.num_stages},
    )

"""The sides of the small product that offsets add: see `correction`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .. import gpu
from .correction import BITS, Columns
from .launch import Launch
from .matmul_wide_kernel import WideOperand
from .primitives import INFINITY, MAGNITUDE, NAN_BYTE, bits_of, ceil_div, decode_words, scale_value, value_of
from .tiles import load_words

TILE_K, TILE_ROWS, TURNED_ROWS = 256, 16, 32
BELOW_TF32 = tl.constexpr((1 << (24 - BITS)) - 1)  # of fp32's bits, those that tf32 lacks
LEAST_NORMAL = tl.constexpr(0x00800000)  # of fp32, as bits


@triton.jit
def correction_kernel(
    codes_ptr, scale_ptr, offset_ptr, out_ptr, outside_ptr, rows, K, stride, out_stride,
    OPERAND: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, LENGTH: tl.constexpr, GPU: tl.constexpr,
):  # fmt: skip
    """The COLUMNS of an operand, fp32 `[rows, columns]`, ROWS x LENGTH of it a program. A block of NaN, which makes
    NaN of the product of the elements, counts as zeros. `outside_ptr` is set to 1 where a sum is no normal number."""
    codes_ptr = codes_ptr.to(tl.pointer_type(tl.uint8))
    SPEC: tl.constexpr = OPERAND.spec
    BLOCK: tl.constexpr = SPEC.block
    SECTIONS: tl.constexpr = COLUMNS.sections
    WIDTH: tl.constexpr = COLUMNS.width
    GROUPS: tl.constexpr = LENGTH // WIDTH
    tiles_along = ceil_div(K, LENGTH)
    tile = (tl.program_id(0) // tiles_along).to(tl.int64)
    tile_k = (tl.program_id(0) % tiles_along).to(tl.int64)
    row = tile * ROWS + tl.arange(0, ROWS)[:, None]
    group = tile_k * GROUPS + tl.arange(0, GROUPS)[None, :]
    groups = ceil_div(K, WIDTH)
    exists = (row < rows) & (group < groups)
    if OPERAND.turned:
        block = group * WIDTH // BLOCK.rows * ceil_div(rows, BLOCK.cols) + row // BLOCK.cols
    else:
        block = row // BLOCK.rows * ceil_div(K, BLOCK.cols) + group * WIDTH // BLOCK.cols
    scale = tl.load(scale_ptr + block, mask=exists, other=NAN_BYTE).to(tl.int32)
    if holds(SECTIONS, "S"):
        sums = group_sums(codes_ptr, tile, tile_k, rows, K, stride, OPERAND, ROWS, LENGTH, WIDTH, GPU)
        sums = tl.where(scale == NAN_BYTE, 0.0, sums * scale_value(scale))
        left = sums - leading_bits(sums)
        if tl.max(tl.max(abnormal(sums) | abnormal(left), axis=1), axis=0) != 0:
            tl.store(outside_ptr, 1)
    if holds(SECTIONS, "O") or holds(SECTIONS, "N"):
        offset = tl.load(offset_ptr + block, mask=exists, other=0.0).to(tl.float32)
        weighted = offset * tl.minimum(K - group * WIDTH, WIDTH).to(tl.float32)
    place = out_ptr + row * out_stride + group
    for i in tl.static_range(length(SECTIONS)):
        if letter(SECTIONS, i) == "O":
            column = offset
        elif letter(SECTIONS, i) == "S":
            column = leading_bits(sums)
        elif letter(SECTIONS, i) == "s":
            column = left
        elif letter(SECTIONS, i) == "N":
            column = leading_bits(weighted)
        else:
            column = weighted - leading_bits(weighted)
        tl.store(place + i * groups, column, mask=exists)


@triton.constexpr_function
def holds(sections, section):
    return section in sections


@triton.constexpr_function
def length(sections):
    return len(sections)


@triton.constexpr_function
def letter(sections, i):
    return sections[i]


@triton.jit
def group_sums(
    codes_ptr, tile, tile_k, rows, K, stride,
    OPERAND: tl.constexpr, ROWS: tl.constexpr, LENGTH: tl.constexpr, WIDTH: tl.constexpr, GPU: tl.constexpr,
):  # fmt: skip
    """The sums of a tile's elements q over its groups, exactly: `[ROWS, LENGTH / WIDTH]`."""
    ELEMENT: tl.constexpr = OPERAND.spec.element
    LAYOUT: tl.constexpr = OPERAND.bytes
    k = tile_k * LENGTH + tl.arange(0, LENGTH)
    if OPERAND.turned:
        words = load_words(codes_ptr, tile_k, tile, K, stride, LENGTH, ROWS, ELEMENT.bits, LAYOUT)
        value = tl.where(k[:, None] < K, decode_words(words, ELEMENT, GPU), 0.0)
        return tl.trans(tl.sum(tl.reshape(value, [LENGTH // WIDTH, WIDTH, ROWS]), axis=1))
    else:
        words = load_words(codes_ptr, tile, tile_k, rows, stride, ROWS, LENGTH, ELEMENT.bits, LAYOUT)
        value = tl.where(k[None, :] < K, decode_words(words, ELEMENT, GPU), 0.0)
        return tl.sum(tl.reshape(value, [ROWS, LENGTH // WIDTH, WIDTH]), axis=2)


@triton.jit
def leading_bits(x):
    """The tf32 number that fp32 `x` begins with."""
    return value_of(bits_of(x) & ~BELOW_TF32)


@triton.jit
def abnormal(x):
    """1 where `x` is neither 0 nor a normal number: what tensor cores may take for something else."""
    magnitude = bits_of(x) & MAGNITUDE
    return ((magnitude != 0) & ((magnitude < LEAST_NORMAL) | (magnitude >= INFINITY))).to(tl.int32)


def correction_launch(
    operand: WideOperand,
    k: int,
    columns: Columns,
    out: torch.Tensor,
    outside: torch.Tensor,
    capabilities: gpu.Capabilities | None = None,
) -> Launch:
    """The launch that writes a packed operand's columns to `out`, fp32 `[rows, columns.count(k) or more]`."""
    rows = out.shape[0]
    tile_rows = TURNED_ROWS if operand.turned else TILE_ROWS
    return Launch(
        correction_kernel,
        triton.cdiv(rows, tile_rows) * triton.cdiv(k, TILE_K),
        {
            "codes_ptr": operand.codes,
            "scale_ptr": operand.scale,
            "offset_ptr": operand.offset,
            "out_ptr": out,
            "outside_ptr": outside,
        },
        {
            "rows": rows,
            "K": k,
            "stride": operand.strides[0],
            "out_stride": out.stride(0),
            "OPERAND": operand.layout(),
            "COLUMNS": columns,
            "ROWS": tile_rows,
            "LENGTH": TILE_K,
            "GPU": capabilities or gpu.device_capabilities(out.device),
        },
        {"num_warps": 4},
    )

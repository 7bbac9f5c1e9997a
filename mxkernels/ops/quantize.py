"""Quantise: one kernel for every format, rounding, block shape and orientation."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .. import gpu
from ..spec import MXSpec
from ..tune import CastConfig, cast_config
from .launch import Launch
from .primitives import (
    INFINITY,
    INT_MAX,
    INT_MIN,
    MAGNITUDE,
    bits_of,
    block_offset,
    encode,
    ordered,
    random_bits,
    scale_byte,
    scale_value,
    split4,
    to_fp32,
    value_of,
)


@triton.jit
def quantize_kernel(
    x_ptr, seed_ptr,
    codes_ptr, scale_ptr, offset_ptr,
    turned_codes_ptr, turned_scale_ptr, turned_offset_ptr,
    rows, cols, row_stride, col_stride,
    SPEC: tl.constexpr, TILE_ROWS: tl.constexpr, TILE_COLS: tl.constexpr, PAIR: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Quantise a matrix of any strides, a tile a program; PAIR: and its transpose, from the same read."""
    tiles_across = tl.cdiv(cols, TILE_COLS)
    row0 = (tl.program_id(0) // tiles_across).to(tl.int64) * TILE_ROWS
    col0 = (tl.program_id(0) % tiles_across).to(tl.int64) * TILE_COLS
    i = tl.arange(0, TILE_ROWS)[:, None]
    j = tl.arange(0, TILE_COLS)[None, :]
    inside = (i < rows - row0) & (j < cols - col0)
    corner = x_ptr + row0 * row_stride + col0 * col_stride
    x = tl.load(corner + i.to(tl.int64) * row_stride + j.to(tl.int64) * col_stride, mask=inside, other=0.0)
    quantize_tile(x, inside, row0, col0, rows, cols, seed_ptr, codes_ptr, scale_ptr, offset_ptr, SPEC, PTX)
    if PAIR:
        quantize_tile(
            tl.trans(x), tl.trans(inside), col0, row0, cols, rows,
            seed_ptr, turned_codes_ptr, turned_scale_ptr, turned_offset_ptr, SPEC, PTX,
        )  # fmt: skip


@triton.jit
def quantize_tile(
    x, inside, row0, col0, rows, cols, seed_ptr, codes_ptr, scale_ptr, offset_ptr,
    SPEC: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Quantise the tile whose first element is (row0, col0) of a matrix of `rows` x `cols`, and store it."""
    ELEMENT: tl.constexpr = SPEC.element
    BLOCK: tl.constexpr = SPEC.block
    TILE_ROWS: tl.constexpr = x.shape[0]
    TILE_COLS: tl.constexpr = x.shape[1]
    BLOCKS_DOWN: tl.constexpr = TILE_ROWS // BLOCK.rows
    BLOCKS_ACROSS: tl.constexpr = TILE_COLS // BLOCK.cols
    BY_BLOCK: tl.constexpr = (BLOCKS_DOWN, BLOCK.rows, BLOCKS_ACROSS, BLOCK.cols)
    EXACT_BITS: tl.constexpr = 24 if x.dtype == tl.float32 else 11

    # One scale (and offset) a block.
    block_row = row0 // BLOCK.rows + tl.arange(0, BLOCKS_DOWN)[:, None]
    block_col = col0 // BLOCK.cols + tl.arange(0, BLOCKS_ACROSS)[None, :]
    blocks_across = (cols + (BLOCK.cols - 1)) // BLOCK.cols
    block_index = block_row * blocks_across + block_col
    block_inside = (block_row * BLOCK.rows < rows) & (block_col < blocks_across)

    x = tl.reshape(to_fp32(x), BY_BLOCK)
    if SPEC.symmetric:
        amax = tl.max(tl.max(bits_of(x) & MAGNITUDE, axis=3), axis=1)
    else:
        inside = tl.reshape(inside, BY_BLOCK)
        keys = ordered(bits_of(x))
        largest = value_of(ordered(tl.max(tl.max(tl.where(inside, keys, INT_MIN), axis=3), axis=1)))
        least = value_of(ordered(tl.min(tl.min(tl.where(inside, keys, INT_MAX), axis=3), axis=1)))
        finite = ((bits_of(largest) & MAGNITUDE) < INFINITY) & ((bits_of(least) & MAGNITUDE) < INFINITY)
        offset = tl.where(finite, block_offset(largest, least), 0.0)
        tl.store(offset_ptr + block_index, offset.to(tl.float16), mask=block_inside)
        x = tl.where(inside, x - offset[:, None, :, None], 0.0)
        # x - offset rounds monotonically, so the largest magnitude is that of an end of the range
        amax = tl.maximum(bits_of(largest - offset) & MAGNITUDE, bits_of(least - offset) & MAGNITUDE)
        amax = tl.where(finite, amax, INFINITY)
    scale = scale_byte(amax, ELEMENT, SPEC.scale_rounding)
    tl.store(scale_ptr + block_index, scale.to(tl.uint8), mask=block_inside)

    # One code an element.
    random = 0
    if SPEC.stochastic:
        GROUPS: tl.constexpr = TILE_COLS // 8
        row = row0 + tl.arange(0, TILE_ROWS)[:, None]
        group = col0 // 8 + tl.arange(0, GROUPS)[None, :]
        random = random_bits(tl.load(seed_ptr), row, group, ((cols + 7) // 8).to(tl.int64))
        random = tl.reshape(random, BY_BLOCK)
    inverse = scale_value(254 - scale)
    codes = encode(x * inverse[:, None, :, None], random, ELEMENT, SPEC.stochastic, SPEC.can_saturate, EXACT_BITS, PTX)
    codes = tl.where((amax < INFINITY)[:, None, :, None], codes, 0)
    store_packed(tl.reshape(codes, [TILE_ROWS, TILE_COLS]), row0, col0, rows, cols, codes_ptr, ELEMENT)


@triton.jit
def store_packed(codes, row0, col0, rows, cols, codes_ptr, ELEMENT: tl.constexpr):
    """Pack a tile of codes along its rows and store it: the n-th byte of every group in one plane."""
    TILE_GROUPS: tl.constexpr = codes.shape[1] // ELEMENT.group
    groups = (cols + (ELEMENT.group - 1)) // ELEMENT.group
    i = tl.arange(0, codes.shape[0])[:, None]
    j = tl.arange(0, TILE_GROUPS)[None, :]
    group0 = col0 // ELEMENT.group
    inside = (i < rows - row0) & (j < groups - group0)
    row_bytes = groups.to(tl.int64) * ELEMENT.group_bytes
    plane = codes_ptr + row0 * row_bytes + group0 * ELEMENT.group_bytes + (i * row_bytes + j * ELEMENT.group_bytes)
    if ELEMENT.bits == 8:
        tl.store(plane, codes.to(tl.uint8), mask=inside)
    elif ELEMENT.bits == 4:
        low, high = tl.split(tl.reshape(codes, [codes.shape[0], TILE_GROUPS, 2]))
        tl.store(plane, (low | (high << 4)).to(tl.uint8), mask=inside)
    else:
        first, second, third, fourth = split4(codes)
        stream = first | (second << 6) | (third << 12) | (fourth << 18)
        for byte in tl.static_range(3):
            tl.store(plane + byte, (stream >> (8 * byte)).to(tl.uint8), mask=inside)


def quantize_launch(
    x: torch.Tensor,
    spec: MXSpec,
    seed: torch.Tensor | None,
    parts: list[torch.Tensor],
    config: CastConfig | None = None,
    capabilities: gpu.Capabilities | None = None,
) -> Launch:
    """The launch that quantises the matrix `x` into `parts`: codes, scale and, if asymmetric, offset; then
    the same of the transpose, if they are given."""
    rows, cols = x.shape
    per_copy = 2 if spec.symmetric else 3
    pair = len(parts) > per_copy
    config = config or cast_config(spec.block.rows, spec.block.cols, rows, cols, x.stride(1) == 1, pair)
    capabilities = capabilities or gpu.device_capabilities(x.device)
    copies = [(parts[k : k + per_copy] + [None])[:3] for k in range(0, len(parts), per_copy)]
    turned = copies[1] if pair else (None, None, None)
    return Launch(
        quantize_kernel,
        triton.cdiv(rows, config.tile_rows) * triton.cdiv(cols, config.tile_cols),
        {
            "x_ptr": x,
            "seed_ptr": seed,
            "codes_ptr": copies[0][0],
            "scale_ptr": copies[0][1],
            "offset_ptr": copies[0][2],
            "turned_codes_ptr": turned[0],
            "turned_scale_ptr": turned[1],
            "turned_offset_ptr": turned[2],
            "rows": rows,
            "cols": cols,
            "row_stride": x.stride(0),
            "col_stride": x.stride(1),
            "SPEC": spec,
            "TILE_ROWS": config.tile_rows,
            "TILE_COLS": config.tile_cols,
            "PAIR": pair,
            "PTX": capabilities.ptx,
        },
        {"num_warps": config.num_warps},
    )

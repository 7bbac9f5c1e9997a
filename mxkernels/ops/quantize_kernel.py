"""Quantise: one kernel for every format, rounding, block shape and orientation."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .. import gpu
from ..spec import MXSpec
from ..tune import CastConfig, Problem, find_config, quantize_config
from .launch import Launch, Layout
from .primitives import (
    INFINITY,
    NAN_BYTE,
    bits_of,
    block_max,
    block_offset,
    ceil_div,
    encode_words,
    join8,
    random_words,
    scale_byte,
    scale_value,
    spread,
    to_fp32,
)
from .tiles import block_index, block_inside, store_words


@triton.jit
def quantize_kernel(
    x_ptr, seed_ptr,
    codes_ptr, scale_ptr, offset_ptr,
    turned_codes_ptr, turned_scale_ptr, turned_offset_ptr,
    rows, cols, row_stride, col_stride,
    SPEC: tl.constexpr, CONFIG: tl.constexpr, LAYOUT: tl.constexpr, GPU: tl.constexpr,
):  # fmt: skip
    """Quantise a matrix of any strides, a tile a program; and its transpose, from the same read, if that has
    somewhere to go."""
    TILE_ROWS: tl.constexpr = CONFIG.tile_rows
    TILE_COLS: tl.constexpr = CONFIG.tile_cols
    tiles_across = ceil_div(cols, TILE_COLS)
    tile_row = (tl.program_id(0) // tiles_across).to(tl.int64)
    tile_col = (tl.program_id(0) % tiles_across).to(tl.int64)
    row0 = tile_row * TILE_ROWS
    col0 = tile_col * TILE_COLS
    if LAYOUT.whole:
        inside = None
        turned_inside = None
    else:
        i = tl.arange(0, TILE_ROWS)[:, None]
        j = tl.arange(0, TILE_COLS)[None, :]
        inside = (i < rows - row0) & (j < cols - col0)
        turned_inside = tl.trans(inside)
    corner = x_ptr + row0 * row_stride + col0 * col_stride
    if CONFIG.square and LAYOUT.row_contiguous:
        x = tl.trans(
            load_square(corner, cols - col0, rows - row0, col_stride, row_stride, TILE_COLS, TILE_ROWS, LAYOUT)
        )
    elif CONFIG.square:
        x = load_square(corner, rows - row0, cols - col0, row_stride, col_stride, TILE_ROWS, TILE_COLS, LAYOUT)
    else:
        x = load_columns(corner, rows - row0, cols - col0, row_stride, col_stride, TILE_ROWS, TILE_COLS, 0, 1, LAYOUT)
    quantize_tile(
        x, inside, tile_row, tile_col, rows, cols,
        seed_ptr, codes_ptr, scale_ptr, offset_ptr, SPEC, LAYOUT, GPU,
    )  # fmt: skip
    if turned_codes_ptr is not None:
        quantize_tile(
            tl.trans(x), turned_inside, tile_col, tile_row, cols, rows,
            seed_ptr, turned_codes_ptr, turned_scale_ptr, turned_offset_ptr, SPEC, LAYOUT, GPU,
        )  # fmt: skip


@triton.jit
def load_columns(
    corner, rows, cols, row_stride, col_stride,
    ROWS: tl.constexpr, COLS: tl.constexpr, FIRST: tl.constexpr, STEP: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    """Load COLS columns, every STEP-th from the FIRST, of a tile at `corner`; zeros beyond `rows` and `cols`."""
    i = tl.arange(0, ROWS)[:, None]
    j = tl.arange(0, COLS)[None, :] * STEP + FIRST
    place = corner + (i.to(tl.int64) * row_stride + j.to(tl.int64) * col_stride)
    if LAYOUT.whole:
        return tl.load(place)
    else:
        return tl.load(place, mask=(i < rows) & (j < cols), other=0.0)


@triton.jit
def load_square(
    corner, rows, cols, row_stride, col_stride, ROWS: tl.constexpr, COLS: tl.constexpr, LAYOUT: tl.constexpr
):
    """Load a tile whose memory runs down the columns so that a thread holds eight neighbours along both
    dimensions: those down a column from one load, as Triton has it, and those along a row from eight."""
    NARROW: tl.constexpr = COLS // 8
    return join8(
        load_columns(corner, rows, cols, row_stride, col_stride, ROWS, NARROW, 0, 8, LAYOUT),
        load_columns(corner, rows, cols, row_stride, col_stride, ROWS, NARROW, 1, 8, LAYOUT),
        load_columns(corner, rows, cols, row_stride, col_stride, ROWS, NARROW, 2, 8, LAYOUT),
        load_columns(corner, rows, cols, row_stride, col_stride, ROWS, NARROW, 3, 8, LAYOUT),
        load_columns(corner, rows, cols, row_stride, col_stride, ROWS, NARROW, 4, 8, LAYOUT),
        load_columns(corner, rows, cols, row_stride, col_stride, ROWS, NARROW, 5, 8, LAYOUT),
        load_columns(corner, rows, cols, row_stride, col_stride, ROWS, NARROW, 6, 8, LAYOUT),
        load_columns(corner, rows, cols, row_stride, col_stride, ROWS, NARROW, 7, 8, LAYOUT),
    )


@triton.jit
def quantize_tile(
    x, inside, tile_row, tile_col, rows, cols, seed_ptr, codes_ptr, scale_ptr, offset_ptr,
    SPEC: tl.constexpr, LAYOUT: tl.constexpr, GPU: tl.constexpr,
):  # fmt: skip
    """Quantise and store tile (tile_row, tile_col) of a matrix of `rows` x `cols`; `inside` says which of its
    elements exist, or is None where all do."""
    ELEMENT: tl.constexpr = SPEC.element
    BLOCK: tl.constexpr = SPEC.block
    TILE_ROWS: tl.constexpr = x.shape[0]
    TILE_COLS: tl.constexpr = x.shape[1]
    BY_BLOCK: tl.constexpr = (TILE_ROWS // BLOCK.rows, BLOCK.rows, TILE_COLS // BLOCK.cols, BLOCK.cols)
    EXACT_BITS: tl.constexpr = (
        24 if x.dtype == tl.float32 or not SPEC.symmetric else (8 if x.dtype == tl.bfloat16 else 11)
    )

    # One scale (and offset) a block.
    block = block_index(tile_row, tile_col, cols, BLOCK, TILE_ROWS, TILE_COLS)
    if LAYOUT.whole:
        exists = None
    else:
        exists = block_inside(tile_row, tile_col, rows, cols, BLOCK, TILE_ROWS, TILE_COLS)

    x = tl.reshape(to_fp32(x), BY_BLOCK)
    if SPEC.symmetric:
        amax = bits_of(block_max(tl.abs(x), GPU))
    else:
        above = x
        below = -x
        if not LAYOUT.whole:
            inside = tl.reshape(inside, BY_BLOCK)
            above = tl.where(inside, above, float("-inf"))
            below = tl.where(inside, below, float("-inf"))
        largest = block_max(above, GPU)
        least = -block_max(below, GPU)
        finite = (tl.abs(largest) < float("inf")) & (tl.abs(least) < float("inf"))
        offset = tl.where(finite, block_offset(largest, least), 0.0)
        tl.store(offset_ptr + block, offset.to(tl.float16), mask=exists)
        x = x - offset[:, None, :, None]
        if not LAYOUT.whole:
            x = tl.where(inside, x, 0.0)
        # x - offset rounds monotonically, so its largest magnitude is at an end of the range
        amax = bits_of(tl.maximum(tl.abs(largest - offset), tl.abs(least - offset)))
        amax = tl.where(finite, amax, INFINITY)
    scale = scale_byte(amax, SPEC)
    tl.store(scale_ptr + block, scale.to(tl.uint8), mask=exists)

    # One code an element.
    random = 0
    if SPEC.stochastic:
        GROUPS: tl.constexpr = TILE_COLS // 8
        row = tile_row * TILE_ROWS + tl.arange(0, TILE_ROWS)[:, None]
        group = tile_col * GROUPS + tl.arange(0, GROUPS)[None, :]
        random = random_words(tl.load(seed_ptr), row, group, ceil_div(cols, 8))
    x = tl.reshape(x, [TILE_ROWS, TILE_COLS])
    factor = spread(scale_value(254 - scale), BLOCK)
    keep = spread(scale != NAN_BYTE, BLOCK)
    words = encode_words(x, factor, keep, random, SPEC, EXACT_BITS, GPU)
    row_bytes = ceil_div(cols, ELEMENT.group) * ELEMENT.group_bytes
    store_words(words, codes_ptr, tile_row, tile_col, rows, row_bytes, TILE_COLS * ELEMENT.bits // 32, LAYOUT)


TENSORS = (
    "x_ptr", "seed_ptr", "codes_ptr", "scale_ptr", "offset_ptr",
    "turned_codes_ptr", "turned_scale_ptr", "turned_offset_ptr",
)  # fmt: skip


def quantize_tensors(
    x: torch.Tensor, seed: torch.Tensor | None, parts: list[torch.Tensor], spec: MXSpec
) -> tuple[torch.Tensor | None, ...]:
    """The kernel's tensors, None for those that `spec` and the number of `parts` leave out."""
    per_copy = 2 if spec.symmetric else 3
    absent = (None,) * (3 - per_copy)
    straight, turned = parts[:per_copy], parts[per_copy:] or (None,) * per_copy
    return (x, seed, *straight, *absent, *turned, *absent)


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
    pair = len(parts) > 3
    row_contiguous = x.stride(1) == 1 or x.stride(0) != 1
    if config is None:
        op, layout = "quantize_pair" if pair else "quantize", "rows" if row_contiguous else "columns"
        config = find_config(
            Problem.of(op, spec, x.dtype, layout, rows, cols),
            x.device,
            lambda: quantize_config(spec, rows, cols, x.element_size(), row_contiguous, pair),
        ).config
    row_bytes = spec.packed_cols(cols) | (spec.packed_cols(rows) if pair else 0)
    capabilities = capabilities or gpu.device_capabilities(x.device)
    return Launch(
        quantize_kernel,
        triton.cdiv(rows, config.tile_rows) * triton.cdiv(cols, config.tile_cols),
        dict(zip(TENSORS, quantize_tensors(x, seed, parts, spec), strict=True)),
        {
            "rows": rows,
            "cols": cols,
            "row_stride": x.stride(0),
            "col_stride": x.stride(1),
            "SPEC": spec,
            "CONFIG": config,
            "LAYOUT": Layout.of(config, rows, cols, row_bytes, row_contiguous),
            "GPU": capabilities,
        },
        {"num_warps": config.num_warps},
    )

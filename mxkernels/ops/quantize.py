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
    NAN_BYTE,
    bits_of,
    block_max,
    block_offset,
    bytes_of_words,
    encode_words,
    random_bits,
    scale_byte,
    scale_value,
    spread,
    to_fp32,
)


@triton.jit
def quantize_kernel(
    x_ptr, seed_ptr,
    codes_ptr, scale_ptr, offset_ptr,
    turned_codes_ptr, turned_scale_ptr, turned_offset_ptr,
    rows, cols, row_stride, col_stride,
    SPEC: tl.constexpr, CONFIG: tl.constexpr, ALIGNMENT: tl.constexpr, GPU: tl.constexpr,
):  # fmt: skip
    """Quantise a matrix of any strides, a tile a program; and its transpose, from the same read, if that has
    somewhere to go. ALIGNMENT: a power of two that divides the bytes of every packed row."""
    TILE_ROWS: tl.constexpr = CONFIG.tile_rows
    TILE_COLS: tl.constexpr = CONFIG.tile_cols
    tiles_across = tl.cdiv(cols, TILE_COLS)
    tile_row = (tl.program_id(0) // tiles_across).to(tl.int64)
    tile_col = (tl.program_id(0) % tiles_across).to(tl.int64)
    row0 = tile_row * TILE_ROWS
    col0 = tile_col * TILE_COLS
    i = tl.arange(0, TILE_ROWS)[:, None]
    j = tl.arange(0, TILE_COLS)[None, :]
    inside = (i < rows - row0) & (j < cols - col0)
    corner = x_ptr + row0 * row_stride + col0 * col_stride
    x = tl.load(corner + i.to(tl.int64) * row_stride + j.to(tl.int64) * col_stride, mask=inside, other=0.0)
    quantize_tile(
        x, inside, tile_row, tile_col, rows, cols,
        seed_ptr, codes_ptr, scale_ptr, offset_ptr, SPEC, ALIGNMENT, GPU,
    )  # fmt: skip
    if turned_codes_ptr is not None:
        quantize_tile(
            tl.trans(x), tl.trans(inside), tile_col, tile_row, cols, rows,
            seed_ptr, turned_codes_ptr, turned_scale_ptr, turned_offset_ptr, SPEC, ALIGNMENT, GPU,
        )  # fmt: skip


@triton.jit
def quantize_tile(
    x, inside, tile_row, tile_col, rows, cols, seed_ptr, codes_ptr, scale_ptr, offset_ptr,
    SPEC: tl.constexpr, ALIGNMENT: tl.constexpr, GPU: tl.constexpr,
):  # fmt: skip
    """Quantise and store tile (tile_row, tile_col) of a matrix of `rows` x `cols`."""
    ELEMENT: tl.constexpr = SPEC.element
    BLOCK: tl.constexpr = SPEC.block
    TILE_ROWS: tl.constexpr = x.shape[0]
    TILE_COLS: tl.constexpr = x.shape[1]
    BLOCKS_DOWN: tl.constexpr = TILE_ROWS // BLOCK.rows
    BLOCKS_ACROSS: tl.constexpr = TILE_COLS // BLOCK.cols
    BY_BLOCK: tl.constexpr = (BLOCKS_DOWN, BLOCK.rows, BLOCKS_ACROSS, BLOCK.cols)
    EXACT_BITS: tl.constexpr = 24 if x.dtype == tl.float32 or not SPEC.symmetric else (8 if x.dtype == tl.bfloat16 else 11)

    # One scale (and offset) a block.
    block_row = tile_row * BLOCKS_DOWN + tl.arange(0, BLOCKS_DOWN)[:, None]
    block_col = tile_col * BLOCKS_ACROSS + tl.arange(0, BLOCKS_ACROSS)[None, :]
    blocks_across = (cols + (BLOCK.cols - 1)) // BLOCK.cols
    block_index = block_row * blocks_across + block_col
    block_inside = (block_row * BLOCK.rows < rows) & (block_col < blocks_across)

    x = tl.reshape(to_fp32(x), BY_BLOCK)
    if SPEC.symmetric:
        amax = bits_of(block_max(tl.abs(x), GPU))
    else:
        inside = tl.reshape(inside, BY_BLOCK)
        largest = block_max(tl.where(inside, x, float("-inf")), GPU)
        least = -block_max(tl.where(inside, -x, float("-inf")), GPU)
        finite = (tl.abs(largest) < float("inf")) & (tl.abs(least) < float("inf"))
        offset = tl.where(finite, block_offset(largest, least), 0.0)
        tl.store(offset_ptr + block_index, offset.to(tl.float16), mask=block_inside)
        x = tl.where(inside, x - offset[:, None, :, None], 0.0)
        # x - offset rounds monotonically, so its largest magnitude is at an end of the range
        amax = bits_of(tl.maximum(tl.abs(largest - offset), tl.abs(least - offset)))
        amax = tl.where(finite, amax, INFINITY)
    scale = scale_byte(amax, SPEC)
    tl.store(scale_ptr + block_index, scale.to(tl.uint8), mask=block_inside)

    # One code an element.
    random = 0
    if SPEC.stochastic:
        GROUPS: tl.constexpr = TILE_COLS // 8
        row = tile_row * TILE_ROWS + tl.arange(0, TILE_ROWS)[:, None]
        group = tile_col * GROUPS + tl.arange(0, GROUPS)[None, :]
        random = random_bits(tl.load(seed_ptr), row, group, ((cols + 7) // 8).to(tl.int64))
    x = tl.reshape(x, [TILE_ROWS, TILE_COLS])
    factor = spread(scale_value(254 - scale), BLOCK)
    keep = spread(scale != NAN_BYTE, BLOCK)
    words = encode_words(x, factor, keep, random, SPEC, EXACT_BITS, GPU)

    TILE_BYTES: tl.constexpr = TILE_COLS * ELEMENT.bits // 8
    row_bytes = tl.multiple_of((cols + (ELEMENT.group - 1)) // ELEMENT.group * ELEMENT.group_bytes, ALIGNMENT)
    store_words(words, codes_ptr, tile_row * TILE_ROWS, tile_col * TILE_BYTES, rows, row_bytes, TILE_BYTES, ALIGNMENT)


@triton.jit
def store_words(
    words, ptr, row0, byte0, rows, row_bytes, TILE_BYTES: tl.constexpr, ALIGNMENT: tl.constexpr
):
    """Store a tile of packed words at (row0, byte0) of a matrix of `rows` x `row_bytes` bytes: as words where
    its rows are aligned to them, else byte by byte. Of each row of the tile, TILE_BYTES count."""
    i = tl.arange(0, words.shape[0])[:, None]
    if ALIGNMENT >= 4:
        j = tl.arange(0, words.shape[1])[None, :]
        word_ptr = ptr.to(tl.pointer_type(tl.int32)) + (row0 * row_bytes + byte0) // 4
        row_words = tl.multiple_of(row_bytes // 4, ALIGNMENT // 4)
        inside = (i < rows - row0) & (j < tl.minimum(row_words - byte0 // 4, TILE_BYTES // 4))
        tl.store(word_ptr + i.to(tl.int64) * row_words + j, words, mask=inside)
    else:
        j = tl.arange(0, words.shape[1] * 4)[None, :]
        inside = (i < rows - row0) & (j < tl.minimum(row_bytes - byte0, TILE_BYTES))
        bytes = bytes_of_words(words).to(tl.uint8)
        tl.store(ptr + row0 * row_bytes + byte0 + i.to(tl.int64) * row_bytes + j, bytes, mask=inside)


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
    row_bytes = spec.packed_cols(cols) | (spec.packed_cols(rows) if pair else 0) | 16
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
            "CONFIG": config,
            "ALIGNMENT": row_bytes & -row_bytes,
            "GPU": capabilities,
        },
        {"num_warps": config.num_warps},
    )

"""Dequantise: one kernel for every format, block shape and output dtype."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .. import gpu
from ..spec import MXSpec
from ..tune import CastConfig, dequantize_config
from .launch import Launch, Layout
from .primitives import NAN_BYTE, ceil_div, decode_words, from_fp32, scale_value, spread


@triton.jit
def dequantize_kernel(
    codes_ptr, scale_ptr, offset_ptr, out_ptr, rows, cols,
    ELEMENT: tl.constexpr, BLOCK: tl.constexpr, CONFIG: tl.constexpr, LAYOUT: tl.constexpr,
    GPU: tl.constexpr,
):  # fmt: skip
    """Decode a packed matrix, a tile a program; without offsets, `offset_ptr` is None."""
    TILE_ROWS: tl.constexpr = CONFIG.tile_rows
    TILE_COLS: tl.constexpr = CONFIG.tile_cols
    tiles_across = ceil_div(cols, TILE_COLS)
    tile_row = (tl.program_id(0) // tiles_across).to(tl.int64)
    tile_col = (tl.program_id(0) % tiles_across).to(tl.int64)

    BLOCKS_DOWN: tl.constexpr = TILE_ROWS // BLOCK.rows
    BLOCKS_ACROSS: tl.constexpr = TILE_COLS // BLOCK.cols
    block_row = tile_row * BLOCKS_DOWN + tl.arange(0, BLOCKS_DOWN)[:, None]
    block_col = tile_col * BLOCKS_ACROSS + tl.arange(0, BLOCKS_ACROSS)[None, :]
    blocks_across = ceil_div(cols, BLOCK.cols)
    block_index = block_row * blocks_across + block_col
    if LAYOUT.whole:
        block_inside = None
    else:
        block_inside = (block_row * BLOCK.rows < rows) & (block_col < blocks_across)
    scale = tl.load(scale_ptr + block_index, mask=block_inside).to(tl.int32)

    TILE_WORDS: tl.constexpr = TILE_COLS * ELEMENT.bits // 32
    # of 6 bits, a tile's words are three quarters of a power of two
    WORDS: tl.constexpr = TILE_COLS // 8 if ELEMENT.bits == 4 else TILE_COLS // 4
    row_bytes = ceil_div(cols, ELEMENT.group) * ELEMENT.group_bytes
    words = load_words(codes_ptr, tile_row, tile_col, rows, row_bytes, TILE_ROWS, WORDS, TILE_WORDS, LAYOUT)
    factor = scale_value(scale)
    if ELEMENT.special == "none" and offset_ptr is None:
        is_nan = spread(scale == NAN_BYTE, BLOCK)
    else:
        is_nan = None
        factor = tl.where(scale == NAN_BYTE, float("nan"), factor)
    value = decode_words(words, ELEMENT, GPU) * spread(factor, BLOCK)
    if offset_ptr is not None:
        offset = tl.load(offset_ptr + block_index, mask=block_inside).to(tl.float32)
        value = value + spread(offset, BLOCK)
    out = from_fp32(value, is_nan, out_ptr.dtype.element_ty, GPU)

    row0 = tile_row * TILE_ROWS
    col0 = tile_col * TILE_COLS
    i = tl.arange(0, TILE_ROWS)[:, None]
    j = tl.arange(0, TILE_COLS)[None, :]
    if LAYOUT.whole:
        inside = None
    else:
        inside = (i < rows - row0) & (j < cols - col0)
    tl.store(out_ptr + row0 * cols + col0 + (i.to(tl.int64) * cols + j), out, mask=inside)


@triton.jit
def load_words(
    ptr, tile_row, tile_col, rows, row_bytes,
    ROWS: tl.constexpr, WORDS: tl.constexpr, TILE_WORDS: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    """The inverse of `store_words`: int32 `[ROWS, WORDS]`, undefined outside the matrix."""
    row0 = tile_row * ROWS
    word0 = tile_col * TILE_WORDS
    i = tl.arange(0, ROWS)[:, None]
    j = tl.arange(0, WORDS)[None, :]
    if LAYOUT.alignment >= 4:
        row_words = tl.multiple_of(row_bytes // 4, LAYOUT.alignment // 4).to(tl.int64)
        place = ptr.to(tl.pointer_type(tl.int32)) + row0 * row_words + word0 + (i * row_words + j)
        if not LAYOUT.whole:
            return tl.load(place, mask=(i < rows - row0) & (j < tl.minimum(row_words - word0, TILE_WORDS)))
        elif TILE_WORDS < WORDS:
            return tl.load(place, mask=j < TILE_WORDS)
        else:
            return tl.load(place)
    else:
        words = tl.zeros([ROWS, WORDS], tl.int32)
        for byte in tl.static_range(4):
            place = ptr + row0 * row_bytes + word0 * 4 + (i.to(tl.int64) * row_bytes + j * 4 + byte)
            inside = (i < rows - row0) & (j < TILE_WORDS) & (j * 4 + byte < row_bytes - word0 * 4)
            words |= tl.load(place, mask=inside).to(tl.int32) << (8 * byte)
        return words


def dequantize_launch(
    codes: torch.Tensor,
    scale: torch.Tensor,
    offset: torch.Tensor | None,
    spec: MXSpec,
    out: torch.Tensor,
    config: CastConfig | None = None,
    capabilities: gpu.Capabilities | None = None,
) -> Launch:
    """The launch that decodes into the matrix `out`, all contiguous."""
    rows, cols = out.shape
    config = config or dequantize_config(spec, rows, cols)
    return Launch(
        dequantize_kernel,
        triton.cdiv(rows, config.tile_rows) * triton.cdiv(cols, config.tile_cols),
        {
            "codes_ptr": codes,
            "scale_ptr": scale,
            "offset_ptr": offset,
            "out_ptr": out,
        },
        {
            "rows": rows,
            "cols": cols,
            "ELEMENT": spec.element,
            "BLOCK": spec.block,
            "CONFIG": config,
            "LAYOUT": Layout.of(config, rows, cols, spec.packed_cols(cols) | codes.data_ptr()),
            "GPU": capabilities or gpu.device_capabilities(out.device),
        },
        {"num_warps": config.num_warps},
    )

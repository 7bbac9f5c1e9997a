"""Dequantise: one kernel for every format, block shape and output dtype."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .. import gpu
from ..spec import MXSpec
from ..tune import CastConfig, cast_config
from .launch import Launch
from .primitives import NAN_BYTE, decode, from_fp32, scale_value, spread, unpack, words_of_bytes


@triton.jit
def dequantize_kernel(
    codes_ptr, scale_ptr, offset_ptr, out_ptr, rows, cols,
    ELEMENT: tl.constexpr, BLOCK: tl.constexpr, CONFIG: tl.constexpr, ALIGNMENT: tl.constexpr,
    GPU: tl.constexpr,
):  # fmt: skip
    """Decode a packed matrix, a tile a program; without offsets, `offset_ptr` is None. ALIGNMENT: a power of
    two that divides the bytes of every packed row."""
    TILE_ROWS: tl.constexpr = CONFIG.tile_rows
    TILE_COLS: tl.constexpr = CONFIG.tile_cols
    tiles_across = tl.cdiv(cols, TILE_COLS)
    tile_row = (tl.program_id(0) // tiles_across).to(tl.int64)
    tile_col = (tl.program_id(0) % tiles_across).to(tl.int64)

    BLOCKS_DOWN: tl.constexpr = TILE_ROWS // BLOCK.rows
    BLOCKS_ACROSS: tl.constexpr = TILE_COLS // BLOCK.cols
    block_row = tile_row * BLOCKS_DOWN + tl.arange(0, BLOCKS_DOWN)[:, None]
    block_col = tile_col * BLOCKS_ACROSS + tl.arange(0, BLOCKS_ACROSS)[None, :]
    blocks_across = (cols + (BLOCK.cols - 1)) // BLOCK.cols
    block_index = block_row * blocks_across + block_col
    block_inside = (block_row * BLOCK.rows < rows) & (block_col < blocks_across)
    scale = tl.load(scale_ptr + block_index, mask=block_inside, other=0).to(tl.int32)

    TILE_BYTES: tl.constexpr = TILE_COLS * ELEMENT.bits // 8
    TILE_WORDS: tl.constexpr = TILE_COLS // (8 if ELEMENT.bits == 4 else 4)  # of 6 bits, a quarter unused
    row_bytes = tl.multiple_of((cols + (ELEMENT.group - 1)) // ELEMENT.group * ELEMENT.group_bytes, ALIGNMENT)
    words = load_words(
        codes_ptr, tile_row * TILE_ROWS, tile_col * TILE_BYTES, rows, row_bytes,
        TILE_ROWS, TILE_WORDS, TILE_BYTES, ALIGNMENT,
    )  # fmt: skip
    value = decode(unpack(words, ELEMENT.bits), ELEMENT) * spread(scale_value(scale), BLOCK)
    is_nan = spread(scale == NAN_BYTE, BLOCK)
    if offset_ptr is not None:
        offset = tl.load(offset_ptr + block_index, mask=block_inside, other=0.0).to(tl.float32)
        value = value + spread(offset, BLOCK)
    if ELEMENT.special != "none" or offset_ptr is not None:
        is_nan |= value != value
    out = from_fp32(value, is_nan, out_ptr.dtype.element_ty, GPU)

    row0 = tile_row * TILE_ROWS
    col0 = tile_col * TILE_COLS
    i = tl.arange(0, TILE_ROWS)[:, None]
    j = tl.arange(0, TILE_COLS)[None, :]
    inside = (i < rows - row0) & (j < cols - col0)
    tl.store(out_ptr + row0 * cols + col0 + (i.to(tl.int64) * cols + j), out, mask=inside)


@triton.jit
def load_words(
    ptr, row0, byte0, rows, row_bytes,
    TILE_ROWS: tl.constexpr, TILE_WORDS: tl.constexpr, TILE_BYTES: tl.constexpr, ALIGNMENT: tl.constexpr,
):  # fmt: skip
    """The inverse of `store_words`; zeros outside the matrix."""
    i = tl.arange(0, TILE_ROWS)[:, None]
    if ALIGNMENT >= 4:
        j = tl.arange(0, TILE_WORDS)[None, :]
        word_ptr = ptr.to(tl.pointer_type(tl.int32)) + (row0 * row_bytes + byte0) // 4
        row_words = tl.multiple_of(row_bytes // 4, ALIGNMENT // 4)
        inside = (i < rows - row0) & (j < tl.minimum(row_words - byte0 // 4, TILE_BYTES // 4))
        return tl.load(word_ptr + i.to(tl.int64) * row_words + j, mask=inside, other=0)
    else:
        j = tl.arange(0, TILE_WORDS * 4)[None, :]
        inside = (i < rows - row0) & (j < tl.minimum(row_bytes - byte0, TILE_BYTES))
        bytes = tl.load(ptr + row0 * row_bytes + byte0 + i.to(tl.int64) * row_bytes + j, mask=inside, other=0)
        return words_of_bytes(bytes.to(tl.int32))


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
    config = config or cast_config(spec.block.rows, spec.block.cols, rows, cols, True, False)
    row_bytes = spec.packed_cols(cols) | codes.data_ptr() | 16  # a view may start anywhere
    return Launch(
        dequantize_kernel,
        triton.cdiv(rows, config.tile_rows) * triton.cdiv(cols, config.tile_cols),
        {
            "codes_ptr": codes,
            "scale_ptr": scale,
            "offset_ptr": offset,
            "out_ptr": out,
            "rows": rows,
            "cols": cols,
            "ELEMENT": spec.element,
            "BLOCK": spec.block,
            "CONFIG": config,
            "ALIGNMENT": row_bytes & -row_bytes,
            "GPU": capabilities or gpu.device_capabilities(out.device),
        },
        {"num_warps": config.num_warps},
    )

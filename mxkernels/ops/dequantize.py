"""Dequantise: one kernel for every format, block shape and output dtype."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..spec import MXSpec
from ..tune import CastConfig, cast_config
from .launch import Launch
from .primitives import NAN_BYTE, decode, from_fp32, join4, scale_value


@triton.jit
def dequantize_kernel(
    codes_ptr, scale_ptr, offset_ptr, out_ptr, rows, cols,
    ELEMENT: tl.constexpr, BLOCK: tl.constexpr, TILE_ROWS: tl.constexpr, TILE_COLS: tl.constexpr,
):  # fmt: skip
    """Decode a packed matrix, a tile a program; without offsets, `offset_ptr` is None."""
    tiles_across = tl.cdiv(cols, TILE_COLS)
    row0 = (tl.program_id(0) // tiles_across).to(tl.int64) * TILE_ROWS
    col0 = (tl.program_id(0) % tiles_across).to(tl.int64) * TILE_COLS

    BLOCKS_DOWN: tl.constexpr = TILE_ROWS // BLOCK.rows
    BLOCKS_ACROSS: tl.constexpr = TILE_COLS // BLOCK.cols
    block_row = row0 // BLOCK.rows + tl.arange(0, BLOCKS_DOWN)[:, None]
    block_col = col0 // BLOCK.cols + tl.arange(0, BLOCKS_ACROSS)[None, :]
    blocks_across = (cols + (BLOCK.cols - 1)) // BLOCK.cols
    block_index = block_row * blocks_across + block_col
    block_inside = (block_row * BLOCK.rows < rows) & (block_col < blocks_across)
    scale = tl.load(scale_ptr + block_index, mask=block_inside, other=0).to(tl.int32)

    codes = load_packed(codes_ptr, row0, col0, rows, cols, TILE_ROWS, TILE_COLS, ELEMENT)
    codes = tl.reshape(codes, [BLOCKS_DOWN, BLOCK.rows, BLOCKS_ACROSS, BLOCK.cols])
    value = decode(codes, ELEMENT) * scale_value(scale)[:, None, :, None]
    if offset_ptr is not None:
        offset = tl.load(offset_ptr + block_index, mask=block_inside, other=0.0).to(tl.float32)
        value = value + offset[:, None, :, None]
    is_nan = (scale == NAN_BYTE)[:, None, :, None] | (value != value)
    out = tl.reshape(from_fp32(value, is_nan, out_ptr.dtype.element_ty), [TILE_ROWS, TILE_COLS])

    i = tl.arange(0, TILE_ROWS)[:, None]
    j = tl.arange(0, TILE_COLS)[None, :]
    inside = (i < rows - row0) & (j < cols - col0)
    tl.store(out_ptr + row0 * cols + col0 + (i.to(tl.int64) * cols + j), out, mask=inside)


@triton.jit
def load_packed(
    codes_ptr, row0, col0, rows, cols, TILE_ROWS: tl.constexpr, TILE_COLS: tl.constexpr, ELEMENT: tl.constexpr
):
    """Load and unpack a tile of codes, int32; zeros outside the matrix."""
    TILE_GROUPS: tl.constexpr = TILE_COLS // ELEMENT.group
    groups = (cols + (ELEMENT.group - 1)) // ELEMENT.group
    i = tl.arange(0, TILE_ROWS)[:, None]
    j = tl.arange(0, TILE_GROUPS)[None, :]
    group0 = col0 // ELEMENT.group
    inside = (i < rows - row0) & (j < groups - group0)
    row_bytes = groups.to(tl.int64) * ELEMENT.group_bytes
    plane = codes_ptr + row0 * row_bytes + group0 * ELEMENT.group_bytes + (i * row_bytes + j * ELEMENT.group_bytes)
    stream = tl.load(plane, mask=inside, other=0).to(tl.int32)
    if ELEMENT.bits == 8:
        return stream
    elif ELEMENT.bits == 4:
        return tl.reshape(tl.join(stream & 15, stream >> 4), [TILE_ROWS, TILE_COLS])
    else:
        for byte in tl.static_range(1, 3):
            stream |= tl.load(plane + byte, mask=inside, other=0).to(tl.int32) << (8 * byte)
        return join4(stream & 63, (stream >> 6) & 63, (stream >> 12) & 63, stream >> 18)


def dequantize_launch(
    codes: torch.Tensor,
    scale: torch.Tensor,
    offset: torch.Tensor | None,
    spec: MXSpec,
    out: torch.Tensor,
    config: CastConfig | None = None,
) -> Launch:
    """The launch that decodes into the matrix `out`, all contiguous."""
    rows, cols = out.shape
    config = config or cast_config(spec.block.rows, spec.block.cols, rows, cols, True, False)
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
            "TILE_ROWS": config.tile_rows,
            "TILE_COLS": config.tile_cols,
        },
        {"num_warps": config.num_warps},
    )

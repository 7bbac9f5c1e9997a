"""Dequantise: one kernel for every format, block shape and output dtype."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .. import gpu
from ..spec import MXSpec
from ..tune import CastConfig, Problem, dequantize_config, find_config
from .launch import Launch, Layout
from .primitives import NAN_BYTE, below_bf16, ceil_div, decode_words, from_fp32, scale_value, spread
from .tiles import block_index, block_inside, load_words


@triton.jit
def dequantize_kernel(
    codes_ptr, scale_ptr, offset_ptr, out_ptr, lost_ptr, rows, cols,
    ELEMENT: tl.constexpr, BLOCK: tl.constexpr, CONFIG: tl.constexpr, LAYOUT: tl.constexpr,
    GPU: tl.constexpr,
):  # fmt: skip
    """Decode a packed matrix, a tile a program; without offsets, `offset_ptr` is None. `lost_ptr`, if not None,
    is set to 1 where bf16 has not the bits of what was decoded."""
    TILE_ROWS: tl.constexpr = CONFIG.tile_rows
    TILE_COLS: tl.constexpr = CONFIG.tile_cols
    tiles_across = ceil_div(cols, TILE_COLS)
    tile_row = (tl.program_id(0) // tiles_across).to(tl.int64)
    tile_col = (tl.program_id(0) % tiles_across).to(tl.int64)

    block = block_index(tile_row, tile_col, cols, BLOCK, TILE_ROWS, TILE_COLS)
    if LAYOUT.whole:
        inside = None
    else:
        inside = block_inside(tile_row, tile_col, rows, cols, BLOCK, TILE_ROWS, TILE_COLS)
    scale = tl.load(scale_ptr + block, mask=inside).to(tl.int32)

    row_bytes = ceil_div(cols, ELEMENT.group) * ELEMENT.group_bytes
    words = load_words(codes_ptr, tile_row, tile_col, rows, row_bytes, TILE_ROWS, TILE_COLS, ELEMENT.bits, LAYOUT)
    factor = scale_value(scale)
    if ELEMENT.special == "none" and offset_ptr is None:
        is_nan = spread(scale == NAN_BYTE, BLOCK)
    else:
        is_nan = None
        factor = tl.where(scale == NAN_BYTE, float("nan"), factor)
    value = decode_words(words, ELEMENT, GPU) * spread(factor, BLOCK)
    if offset_ptr is not None:
        offset = tl.load(offset_ptr + block, mask=inside).to(tl.float32)
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
    if lost_ptr is not None:
        lost = (i < rows - row0) & (j < cols - col0) & (below_bf16(value) != 0)
        if tl.max(tl.max(lost.to(tl.int32), axis=1), axis=0) != 0:
            tl.store(lost_ptr, 1)
    tl.store(out_ptr + row0 * cols + col0 + (i.to(tl.int64) * cols + j), out, mask=inside)


def dequantize_launch(
    codes: torch.Tensor,
    scale: torch.Tensor,
    offset: torch.Tensor | None,
    spec: MXSpec,
    out: torch.Tensor,
    config: CastConfig | None = None,
    capabilities: gpu.Capabilities | None = None,
    lost: torch.Tensor | None = None,
) -> Launch:
    """The launch that decodes into the matrix `out`, all contiguous; int32 `lost` `[1]` is set to 1 if bf16
    lacks bits that were decoded."""
    rows, cols = out.shape
    if config is None:
        problem = Problem.of("dequantize", spec, out.dtype, "rows", rows, cols)
        config = find_config(problem, out.device, lambda: dequantize_config(spec, rows, cols)).config
    return Launch(
        dequantize_kernel,
        triton.cdiv(rows, config.tile_rows) * triton.cdiv(cols, config.tile_cols),
        {
            "codes_ptr": codes,
            "scale_ptr": scale,
            "offset_ptr": offset,
            "out_ptr": out,
            "lost_ptr": lost,
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

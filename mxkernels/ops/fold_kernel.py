"""Fold: MX codes and scales to FP8 with one power of two a row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .. import gpu
from ..folded import Outside, Window
from ..spec import MXSpec
from ..tune import CastConfig, Problem, find_config, fold_config
from .elements import encode_words, fp8_of_fp4, fp8_table, fp8_words
from .launch import Launch, Layout
from .primitives import (
    NAN_BYTE,
    block_magnitude,
    bytes_of_words,
    ceil_div,
    decode_words,
    random_words,
    scale_byte,
    scale_value,
    spread,
    spread_fours,
    words_of_bytes,
)
from .quantize_kernel import load_columns
from .tiles import block_index, block_inside, load_words, store_words

NAN_CODE = tl.constexpr(0x7F)  # of both FP8 formats; what the hardware gives for NaN


@triton.jit
def reference_kernel(
    scale_ptr, reference_ptr, outside_ptr, outside_lines_ptr, lines, length, line_stride, stride, span,
    TOP: tl.constexpr, CONFIG: tl.constexpr,
):  # fmt: skip
    """The reference byte of each line of scales: of its largest that is no NaN, put at the top of the window.
    A line is worked on in spans; `reference_ptr` has those of all lines for the first span, then the second …
    The flags, if not None, are cleared, for the kernel that folds with the references."""
    LINES: tl.constexpr = CONFIG.tile_rows
    LENGTH: tl.constexpr = CONFIG.tile_cols
    line_tiles = ceil_div(lines, LINES)
    part = (tl.program_id(0) // line_tiles).to(tl.int64)
    line = tl.program_id(0) % line_tiles * LINES + tl.arange(0, LINES)[:, None]
    largest = tl.zeros([LINES, LENGTH], tl.int32)
    for first in range(0, span, LENGTH):
        place = part * span + first + tl.arange(0, LENGTH)[None, :]
        inside = (line < lines) & (place < length)
        byte = tl.load(scale_ptr + line.to(tl.int64) * line_stride + place * stride, mask=inside, other=0)
        largest = tl.maximum(largest, tl.where(byte == NAN_BYTE, 0, byte.to(tl.int32)))
    reference = tl.maximum(tl.max(largest, axis=1, keep_dims=True) - TOP, 0)
    tl.store(reference_ptr + part * lines + line, reference.to(tl.uint8), mask=line < lines)
    if outside_ptr is not None:
        tl.store(outside_lines_ptr + line, tl.zeros_like(line).to(tl.uint8), mask=line < lines)
        if tl.program_id(0) == 0:
            tl.store(outside_ptr, 0)


@triton.jit
def fold_kernel(
    codes_ptr, scale_ptr, reference_ptr, folded_ptr, folded_scale_ptr, outside_ptr, outside_lines_ptr,
    rows, cols, row_bytes, folded_stride,
    ELEMENT: tl.constexpr, WINDOW: tl.constexpr, FOLDED: tl.constexpr, TURNED: tl.constexpr,
    CONFIG: tl.constexpr, LAYOUT: tl.constexpr, GPU: tl.constexpr,
):  # fmt: skip
    """Fold a packed matrix of `rows` x `cols`, a tile a program; its transpose if TURNED. FOLDED is the spec
    of what comes out, WINDOW says how ELEMENT fits in it."""
    folded_ptr = folded_ptr.to(tl.pointer_type(tl.uint8))
    BLOCK: tl.constexpr = FOLDED.block
    TILE_ROWS: tl.constexpr = CONFIG.tile_rows
    TILE_COLS: tl.constexpr = CONFIG.tile_cols
    tiles_across = ceil_div(cols, TILE_COLS)
    tile_row = (tl.program_id(0) // tiles_across).to(tl.int64)
    tile_col = (tl.program_id(0) % tiles_across).to(tl.int64)

    block = block_index(tile_row, tile_col, cols, BLOCK, TILE_ROWS, TILE_COLS)
    if LAYOUT.whole:
        exists = None
        scale = tl.load(scale_ptr + block).to(tl.int32)
    else:
        exists = block_inside(tile_row, tile_col, rows, cols, BLOCK, TILE_ROWS, TILE_COLS)
        scale = tl.load(scale_ptr + block, mask=exists, other=NAN_BYTE).to(tl.int32)
    blocks_across = ceil_div(cols, BLOCK.cols)
    blocks_down = ceil_div(rows, BLOCK.rows)
    block_row = tile_row * (TILE_ROWS // BLOCK.rows) + tl.arange(0, TILE_ROWS // BLOCK.rows)[:, None]
    block_col = tile_col * (TILE_COLS // BLOCK.cols) + tl.arange(0, TILE_COLS // BLOCK.cols)[None, :]
    if TURNED:
        line = block_col
        lines = blocks_across
        folded_block = block_col * blocks_down + block_row
    else:
        line = block_row
        lines = blocks_down
        folded_block = block
    reference = tl.load(reference_ptr + line, mask=line < lines).to(tl.int32)
    words = load_words(codes_ptr, tile_row, tile_col, rows, row_bytes, TILE_ROWS, TILE_COLS, ELEMENT.bits, LAYOUT)
    i = tl.arange(0, TILE_ROWS)[:, None]
    j = tl.arange(0, TILE_COLS)[None, :]
    inside = (i < rows - tile_row * TILE_ROWS) & (j < cols - tile_col * TILE_COLS)
    fits = fits_window(scale, reference, WINDOW)
    if tl.min(tl.min(fits, axis=1), axis=0) == 0:
        outside = lines_outside(words, fits, inside, ELEMENT, BLOCK, TURNED, GPU)
        tl.store(outside_lines_ptr + line, outside.to(tl.uint8), mask=outside != 0)
        if tl.max(tl.max(outside, axis=1), axis=0) != 0:
            tl.store(outside_ptr, 1)
    folded, byte = folded_words(words, scale, reference, fits, ELEMENT, WINDOW, FOLDED, GPU)
    tl.store(folded_scale_ptr + folded_block, byte.to(tl.uint8), mask=exists)
    if TURNED:
        turned = tl.trans(bytes_of_words(folded).to(tl.uint8))
        i = tile_col * TILE_COLS + tl.arange(0, TILE_COLS)[:, None]
        j = tile_row * TILE_ROWS + tl.arange(0, TILE_ROWS)[None, :]
        tl.store(folded_ptr + i * folded_stride + j, turned, mask=tl.trans(inside))
    else:
        store_words(folded, folded_ptr, tile_row, tile_col, rows, folded_stride, TILE_COLS // 4, LAYOUT)


@triton.jit
def fits_window(scale, reference, WINDOW: tl.constexpr):
    """Which blocks are within reach of the reference, or NaN: int32."""
    return ((scale == NAN_BYTE) | (scale - reference >= WINDOW.low)).to(tl.int32)


@triton.jit
def folded_words(
    words, scale, reference, fits,
    ELEMENT: tl.constexpr, WINDOW: tl.constexpr, FOLDED: tl.constexpr, GPU: tl.constexpr,
):  # fmt: skip
    """A tile of packed words and the scales of its blocks as words of FP8 codes and scales."""
    BLOCK: tl.constexpr = FOLDED.block
    CARRIER: tl.constexpr = FOLDED.element
    is_nan = scale == NAN_BYTE
    # one that does not fit gets the scale that it would have on its own
    byte = tl.where(fits != 0, reference, tl.maximum(scale - WINDOW.top, 0))
    factor = scale_value(tl.where(is_nan, 0, scale - byte) + 127)
    byte = tl.where(is_nan, NAN_BYTE, byte)
    if GPU.cvt_fp8:
        factor = tl.where(is_nan, float("nan"), factor)
        if ELEMENT.bits == 4 and not ELEMENT.twos_complement and BLOCK.cols >= 4:
            low, high = fp8_table(factor, ELEMENT, CARRIER)
            signs = tl.where(is_nan, 0, -0x7F7F7F80)
            folded = fp8_of_fp4(words, spread_fours(low, BLOCK), spread_fours(high, BLOCK), spread_fours(signs, BLOCK))
        else:
            value = decode_words(words, ELEMENT, GPU)
            folded = fp8_words(value * spread(factor, BLOCK), CARRIER.mantissa_bits)
    else:
        kept = spread((~is_nan).to(tl.int32), BLOCK) != 0
        value = decode_words(words, ELEMENT, GPU)
        folded = encode_words(value, spread(factor, BLOCK), kept, 0, FOLDED, GPU)
        folded |= words_of_bytes(tl.where(kept, 0, NAN_CODE))
    return folded, byte


@triton.jit
def lines_outside(
    words, fits, inside, ELEMENT: tl.constexpr, BLOCK: tl.constexpr, TURNED: tl.constexpr, GPU: tl.constexpr
):
    """Which rows of blocks of a tile, or columns if TURNED, have an element `inside` the matrix, and not 0, in a block
    that does not fit: int32, a column or a row of them."""
    # blocks of zeros have the least scale, but fit anywhere
    outside = (inside & (decode_words(words, ELEMENT, GPU) != 0) & (spread(fits, BLOCK) == 0)).to(tl.int32)
    ROWS: tl.constexpr = outside.shape[0]
    COLS: tl.constexpr = outside.shape[1]
    if TURNED:
        by_line = tl.reshape(tl.max(outside, axis=0), [COLS // BLOCK.cols, BLOCK.cols])
        return tl.max(by_line, axis=1)[None, :]
    else:
        by_line = tl.reshape(tl.max(outside, axis=1), [ROWS // BLOCK.rows, BLOCK.rows])
        return tl.max(by_line, axis=1)[:, None]


@triton.jit
def quantize_fold_kernel(
    x_ptr, seed_ptr, folded_ptr, folded_scale_ptr, reference_ptr, outside_ptr, outside_lines_ptr,
    rows, cols, row_stride, col_stride, folded_stride,
    SPEC: tl.constexpr, WINDOW: tl.constexpr, FOLDED: tl.constexpr, ONE_TILE: tl.constexpr,
    CONFIG: tl.constexpr, LAYOUT: tl.constexpr, GPU: tl.constexpr,
):  # fmt: skip
    """Quantise a matrix to symmetric SPEC and fold that, rows of tiles a program. It reads them twice, the second time
    from the cache: first for their largest scales; or once, where they are ONE_TILE. `outside_ptr` must hold 0."""
    folded_ptr = folded_ptr.to(tl.pointer_type(tl.uint8))
    BLOCK: tl.constexpr = SPEC.block
    ROWS: tl.constexpr = CONFIG.tile_rows
    COLS: tl.constexpr = CONFIG.tile_cols
    tile_row = tl.program_id(0).to(tl.int64)
    row0 = tile_row * ROWS
    corner = x_ptr + row0 * row_stride
    tiles = ceil_div(cols, COLS)
    largest = tl.zeros([ROWS // BLOCK.rows, 1], tl.int32)
    if ONE_TILE:
        x = load_columns(corner, rows - row0, cols, row_stride, col_stride, ROWS, COLS, 0, 1, LAYOUT)
        largest = largest_scale(tile_scale(x, SPEC, GPU))
    else:
        for tile_col in range(tiles):
            col0 = tl.cast(tile_col, tl.int64) * COLS
            at = corner + col0 * col_stride
            x = load_columns(at, rows - row0, cols - col0, row_stride, col_stride, ROWS, COLS, 0, 1, LAYOUT)
            largest = tl.maximum(largest, largest_scale(tile_scale(x, SPEC, GPU)))
    reference = tl.maximum(largest - WINDOW.top, 0)
    line = tile_row * (ROWS // BLOCK.rows) + tl.arange(0, ROWS // BLOCK.rows)[:, None]
    within = line < ceil_div(rows, BLOCK.rows)
    tl.store(reference_ptr + line, reference.to(tl.uint8), mask=within)

    outside = tl.zeros([ROWS // BLOCK.rows, 1], tl.int32)
    if ONE_TILE:
        outside = quantize_fold_tile(
            x, reference, tile_row, tl.cast(0, tl.int64), rows, cols, folded_stride,
            seed_ptr, folded_ptr, folded_scale_ptr, SPEC, WINDOW, FOLDED, LAYOUT, GPU,
        )  # fmt: skip
    else:
        for tile_col in range(tiles):
            col0 = tl.cast(tile_col, tl.int64) * COLS
            at = corner + col0 * col_stride
            x = load_columns(at, rows - row0, cols - col0, row_stride, col_stride, ROWS, COLS, 0, 1, LAYOUT)
            outside |= quantize_fold_tile(
                x, reference, tile_row, tl.cast(tile_col, tl.int64), rows, cols, folded_stride,
                seed_ptr, folded_ptr, folded_scale_ptr, SPEC, WINDOW, FOLDED, LAYOUT, GPU,
            )  # fmt: skip
    tl.store(outside_lines_ptr + line, outside.to(tl.uint8), mask=within)
    if tl.max(tl.max(outside, axis=1), axis=0) != 0:
        tl.store(outside_ptr, 1)


@triton.jit
def tile_scale(x, SPEC: tl.constexpr, GPU: tl.constexpr):
    """The scale bytes of a tile's blocks; zeros beyond the matrix give the least."""
    BLOCK: tl.constexpr = SPEC.block
    return scale_byte(block_magnitude(x, BLOCK, GPU), SPEC)


@triton.jit
def largest_scale(scale):
    """Of each row of blocks, of those that hold no NaN: int32 `[rows of blocks, 1]`."""
    return tl.max(tl.where(scale == NAN_BYTE, 0, scale), axis=1, keep_dims=True)


@triton.jit
def quantize_fold_tile(
    x, reference, tile_row, tile_col, rows, cols, folded_stride, seed_ptr, folded_ptr, folded_scale_ptr,
    SPEC: tl.constexpr, WINDOW: tl.constexpr, FOLDED: tl.constexpr, LAYOUT: tl.constexpr, GPU: tl.constexpr,
):  # fmt: skip
    """Quantise, fold and store tile (tile_row, tile_col); which of its rows of blocks are outside of the window."""
    ELEMENT: tl.constexpr = SPEC.element
    BLOCK: tl.constexpr = SPEC.block
    ROWS: tl.constexpr = x.shape[0]
    COLS: tl.constexpr = x.shape[1]
    DTYPE: tl.constexpr = x.dtype
    scale = tile_scale(x, SPEC, GPU)
    factor = spread(scale_value(254 - scale), BLOCK, DTYPE)
    keep = spread(scale != NAN_BYTE, BLOCK, DTYPE)
    random = 0
    if SPEC.stochastic:
        row = tile_row * ROWS + tl.arange(0, ROWS)[:, None]
        group = tile_col * (COLS // 8) + tl.arange(0, COLS // 8)[None, :]
        random = random_words(tl.load(seed_ptr), row, group, ceil_div(cols, 8), x, LAYOUT.wide_counter, GPU)
    words = encode_words(x, factor, keep, random, SPEC, GPU)

    block = block_index(tile_row, tile_col, cols, BLOCK, ROWS, COLS)
    exists = block_inside(tile_row, tile_col, rows, cols, BLOCK, ROWS, COLS)
    fits = fits_window(scale, reference, WINDOW)
    outside = tl.zeros([ROWS // BLOCK.rows, 1], tl.int32)
    if tl.min(tl.min(tl.where(exists, fits, 1), axis=1), axis=0) == 0:
        # what lies beyond the matrix are zeros
        outside = lines_outside(words, fits, True, ELEMENT, BLOCK, False, GPU)
    folded, byte = folded_words(words, scale, reference, fits, ELEMENT, WINDOW, FOLDED, GPU)
    tl.store(folded_scale_ptr + block, byte.to(tl.uint8), mask=exists)
    store_words(folded, folded_ptr, tile_row, tile_col, rows, folded_stride, COLS // 4, LAYOUT)
    return outside


def reference_launch(
    scale: torch.Tensor,
    reference: torch.Tensor,
    top: int,
    turned: bool,
    spans: int = 1,
    outside: Outside | None = None,
) -> Launch:
    """The launch that writes the reference `[lines]` of each row of `scale`, or of each column if `turned`; or
    those of `spans` parts of it, `[spans, lines]`, of which another such launch makes one. It clears `outside`."""
    lines, length = scale.shape[::-1] if turned else scale.shape
    line_stride, stride = scale.stride()[::-1] if turned else scale.stride()
    config = CastConfig(64, 16, 4) if turned else CastConfig(4, 128, 4)
    return Launch(
        reference_kernel,
        triton.cdiv(lines, config.tile_rows) * spans,
        {
            "scale_ptr": scale,
            "reference_ptr": reference,
            "outside_ptr": outside and outside.any,
            "outside_lines_ptr": outside and outside.lines,
        },
        {
            "lines": lines,
            "length": length,
            "line_stride": line_stride,
            "stride": stride,
            "span": triton.cdiv(length, spans),
            "TOP": top,
            "CONFIG": config,
        },
        {"num_warps": config.num_warps},
    )


def reference_spans(length: int) -> int:
    """In how many parts a column of scales is worked on, so that few columns occupy a GPU."""
    return triton.cdiv(length, 128)


def quantize_fold_launch(
    x: torch.Tensor,
    spec: MXSpec,
    seed: torch.Tensor | None,
    window: Window,
    reference: torch.Tensor,
    folded: torch.Tensor,
    folded_scale: torch.Tensor,
    outside: Outside,
    config: CastConfig,
    capabilities: gpu.Capabilities | None = None,
) -> Launch:
    """The launch that quantises and folds a matrix of contiguous rows; the outputs are those of `fold_launch` and
    `reference_launch`."""
    rows, cols = x.shape
    return Launch(
        quantize_fold_kernel,
        triton.cdiv(rows, config.tile_rows),
        {
            "x_ptr": x,
            "seed_ptr": seed,
            "folded_ptr": folded,
            "folded_scale_ptr": folded_scale,
            "reference_ptr": reference,
            "outside_ptr": outside.any,
            "outside_lines_ptr": outside.lines,
        },
        {
            "rows": rows,
            "cols": cols,
            "row_stride": x.stride(0),
            "col_stride": x.stride(1),
            "folded_stride": folded.stride(0),
            "SPEC": spec,
            "WINDOW": window,
            "FOLDED": MXSpec(window.carrier, spec.block, "rtne", "rceil"),
            "ONE_TILE": cols <= config.tile_cols,
            "CONFIG": config,
            "LAYOUT": Layout.of(config, rows, cols, 16, stochastic=spec.stochastic),
            "GPU": capabilities or gpu.device_capabilities(x.device),
        },
        {"num_warps": config.num_warps},
    )


def fold_launch(
    codes: torch.Tensor,
    scale: torch.Tensor,
    cols: int,
    spec: MXSpec,
    turned: bool,
    window: Window,
    reference: torch.Tensor,
    folded: torch.Tensor,
    folded_scale: torch.Tensor,
    outside: Outside,
    config: CastConfig | None = None,
    capabilities: gpu.Capabilities | None = None,
) -> Launch:
    """The launch that folds a matrix of `cols` columns, codes `[R, P]`, into `folded`: FP8 codes `[R, C]`, or
    `[C, R]` if `turned`, with rows of whole 16 bytes."""
    rows, row_bytes = codes.shape
    if config is None:
        problem = Problem.of("fold", spec, folded.dtype, "turned" if turned else "straight", rows, cols)
        config = find_config(problem, codes.device, lambda: fold_config(spec, rows, cols, turned)).config
    return Launch(
        fold_kernel,
        triton.cdiv(rows, config.tile_rows) * triton.cdiv(cols, config.tile_cols),
        {
            "codes_ptr": codes,
            "scale_ptr": scale,
            "reference_ptr": reference,
            "folded_ptr": folded,
            "folded_scale_ptr": folded_scale,
            "outside_ptr": outside.any,
            "outside_lines_ptr": outside.lines,
        },
        {
            "rows": rows,
            "cols": cols,
            "row_bytes": row_bytes,
            "folded_stride": folded.stride(0),
            "ELEMENT": spec.element,
            "WINDOW": window,
            "FOLDED": MXSpec(window.carrier, spec.block, "rtne", "rceil"),
            "TURNED": turned,
            "CONFIG": config,
            "LAYOUT": Layout.of(config, rows, cols, row_bytes | codes.data_ptr()),
            "GPU": capabilities or gpu.device_capabilities(codes.device),
        },
        {"num_warps": config.num_warps},
    )

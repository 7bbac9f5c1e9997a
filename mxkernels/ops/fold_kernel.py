"""Fold: MX codes and scales to FP8 with one power of two a row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .. import gpu
from ..folded import Window
from ..spec import MXSpec
from ..tune import CastConfig, Problem, find_config, fold_config
from .launch import Launch, Layout
from .primitives import (
    NAN_BYTE,
    bits_of,
    block_max,
    bytes_of_words,
    ceil_div,
    decode_words,
    encode_words,
    fp8_of_fp4,
    fp8_table,
    fp8_words,
    random_words,
    scale_byte,
    scale_value,
    spread,
    spread_fours,
    to_fp32,
    words_of_bytes,
)
from .quantize_kernel import load_columns
from .tiles import block_index, block_inside, load_words, store_words

NAN_CODE = tl.constexpr(0x7F)  # of both FP8 formats; what the hardware gives for NaN


@triton.jit
def reference_kernel(
    scale_ptr, reference_ptr, outside_ptr, lines, length, line_stride, stride, span,
    TOP: tl.constexpr, CONFIG: tl.constexpr,
):  # fmt: skip
    """The reference byte of each line of scales: of its largest that is no NaN, put at the top of the window.
    A line is worked on in spans; `reference_ptr` has those of all lines for the first span, then the second …
    `outside_ptr`, if not None, is cleared, for the kernel that folds with the references."""
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
        if tl.program_id(0) == 0:
            tl.store(outside_ptr, 0)


@triton.jit
def fold_kernel(
    codes_ptr, scale_ptr, reference_ptr, folded_ptr, folded_scale_ptr, outside_ptr,
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
        reference = tl.load(reference_ptr + block_col, mask=block_col < blocks_across).to(tl.int32)
        folded_block = block_col * blocks_down + block_row
    else:
        reference = tl.load(reference_ptr + block_row, mask=block_row < blocks_down).to(tl.int32)
        folded_block = block
    words = load_words(codes_ptr, tile_row, tile_col, rows, row_bytes, TILE_ROWS, TILE_COLS, ELEMENT.bits, LAYOUT)
    i = tl.arange(0, TILE_ROWS)[:, None]
    j = tl.arange(0, TILE_COLS)[None, :]
    inside = (i < rows - tile_row * TILE_ROWS) & (j < cols - tile_col * TILE_COLS)
    folded, byte = folded_words(words, scale, reference, inside, outside_ptr, ELEMENT, WINDOW, FOLDED, GPU)
    tl.store(folded_scale_ptr + folded_block, byte.to(tl.uint8), mask=exists)
    if TURNED:
        turned = tl.trans(bytes_of_words(folded).to(tl.uint8))
        i = tile_col * TILE_COLS + tl.arange(0, TILE_COLS)[:, None]
        j = tile_row * TILE_ROWS + tl.arange(0, TILE_ROWS)[None, :]
        tl.store(folded_ptr + i * folded_stride + j, turned, mask=tl.trans(inside))
    else:
        store_words(folded, folded_ptr, tile_row, tile_col, rows, folded_stride, TILE_COLS // 4, LAYOUT)


@triton.jit
def folded_words(
    words, scale, reference, inside, outside_ptr,
    ELEMENT: tl.constexpr, WINDOW: tl.constexpr, FOLDED: tl.constexpr, GPU: tl.constexpr,
):  # fmt: skip
    """A tile of packed words and the scales of its blocks as words of FP8 codes and scales; sets `outside_ptr` to 1
    if elements of it are `inside` the matrix, but not within reach of the reference."""
    BLOCK: tl.constexpr = FOLDED.block
    CARRIER: tl.constexpr = FOLDED.element
    is_nan = scale == NAN_BYTE
    fits = is_nan | (scale - reference >= WINDOW.low)
    # one that does not fit gets the scale that it would have on its own
    byte = tl.where(fits, reference, tl.maximum(scale - WINDOW.top, 0))
    factor = scale_value(tl.where(is_nan, 0, scale - byte) + 127)
    byte = tl.where(is_nan, NAN_BYTE, byte)
    if tl.min(tl.min(fits.to(tl.int32), axis=1), axis=0) == 0:
        # blocks of zeros have the least scale, but fit anywhere
        misfit = (decode_words(words, ELEMENT, GPU) != 0) & (spread(fits.to(tl.int32), BLOCK) == 0)
        if tl.max(tl.max((inside & misfit).to(tl.int32), axis=1), axis=0) != 0:
            tl.store(outside_ptr, 1)
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
        folded = encode_words(value, spread(factor, BLOCK), kept, 0, FOLDED, 8, GPU)
        folded |= words_of_bytes(tl.where(kept, 0, NAN_CODE))
    return folded, byte


@triton.jit
def quantize_fold_kernel(
    x_ptr, seed_ptr, folded_ptr, folded_scale_ptr, reference_ptr, outside_ptr,
    rows, cols, row_stride, col_stride, folded_stride,
    SPEC: tl.constexpr, WINDOW: tl.constexpr, FOLDED: tl.constexpr,
    CONFIG: tl.constexpr, LAYOUT: tl.constexpr, GPU: tl.constexpr,
):  # fmt: skip
    """Quantise a matrix to symmetric SPEC and fold that, from one read: a program has whole rows in its tile, and
    so knows their largest scales before it writes."""
    folded_ptr = folded_ptr.to(tl.pointer_type(tl.uint8))
    ELEMENT: tl.constexpr = SPEC.element
    BLOCK: tl.constexpr = SPEC.block
    ROWS: tl.constexpr = CONFIG.tile_rows
    COLS: tl.constexpr = CONFIG.tile_cols
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    EXACT_BITS: tl.constexpr = 24 if DTYPE == tl.float32 else (8 if DTYPE == tl.bfloat16 else 11)
    tile_row = tl.program_id(0).to(tl.int64)
    first = tile_row * ROWS
    x = load_columns(x_ptr + first * row_stride, rows - first, cols, row_stride, col_stride, ROWS, COLS, 0, 1, LAYOUT)
    x = to_fp32(x)
    by_block = tl.reshape(tl.abs(x), [ROWS // BLOCK.rows, BLOCK.rows, COLS // BLOCK.cols, BLOCK.cols])
    scale = scale_byte(bits_of(block_max(by_block, GPU)), SPEC)
    factor = spread(scale_value(254 - scale), BLOCK)
    keep = spread(scale != NAN_BYTE, BLOCK)
    random = 0
    if SPEC.stochastic:
        row = first + tl.arange(0, ROWS)[:, None]
        group = tl.arange(0, COLS // 8)[None, :].to(tl.int64)
        random = random_words(tl.load(seed_ptr), row, group, ceil_div(cols, 8))
    words = encode_words(x, factor, keep, random, SPEC, EXACT_BITS, GPU)

    block = block_index(tile_row, 0, cols, BLOCK, ROWS, COLS)
    exists = block_inside(tile_row, 0, rows, cols, BLOCK, ROWS, COLS)
    scale = tl.where(exists, scale, NAN_BYTE)  # which takes no part in what follows
    largest = tl.max(tl.where(scale == NAN_BYTE, 0, scale), axis=1, keep_dims=True)
    reference = tl.maximum(largest - WINDOW.top, 0)
    block_row = tile_row * (ROWS // BLOCK.rows) + tl.arange(0, ROWS // BLOCK.rows)[:, None]
    tl.store(reference_ptr + block_row, reference.to(tl.uint8), mask=block_row < ceil_div(rows, BLOCK.rows))
    inside = (tl.arange(0, ROWS)[:, None] < rows - first) & (tl.arange(0, COLS)[None, :] < cols)
    folded, byte = folded_words(words, scale, reference, inside, outside_ptr, ELEMENT, WINDOW, FOLDED, GPU)
    tl.store(folded_scale_ptr + block, byte.to(tl.uint8), mask=exists)
    store_words(folded, folded_ptr, tile_row, 0, rows, folded_stride, COLS // 4, LAYOUT)


def reference_launch(
    scale: torch.Tensor,
    reference: torch.Tensor,
    top: int,
    turned: bool,
    spans: int = 1,
    outside: torch.Tensor | None = None,
) -> Launch:
    """The launch that writes the reference `[lines]` of each row of `scale`, or of each column if `turned`; or
    those of `spans` parts of it, `[spans, lines]`, of which another such launch makes one. It clears `outside`."""
    lines, length = scale.shape[::-1] if turned else scale.shape
    line_stride, stride = scale.stride()[::-1] if turned else scale.stride()
    config = CastConfig(64, 16, 4) if turned else CastConfig(4, 128, 4)
    return Launch(
        reference_kernel,
        triton.cdiv(lines, config.tile_rows) * spans,
        {"scale_ptr": scale, "reference_ptr": reference, "outside_ptr": outside},
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
    outside: torch.Tensor,
    config: CastConfig,
    capabilities: gpu.Capabilities | None = None,
) -> Launch:
    """The launch that quantises and folds a matrix of contiguous rows, which fill no more than a tile's; the
    outputs are those of `fold_launch` and `reference_launch`."""
    rows, cols = x.shape
    whole = rows % config.tile_rows == 0 and cols == config.tile_cols
    return Launch(
        quantize_fold_kernel,
        triton.cdiv(rows, config.tile_rows),
        {
            "x_ptr": x,
            "seed_ptr": seed,
            "folded_ptr": folded,
            "folded_scale_ptr": folded_scale,
            "reference_ptr": reference,
            "outside_ptr": outside,
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
            "CONFIG": config,
            "LAYOUT": Layout(16, whole),
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
    outside: torch.Tensor,
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
            "outside_ptr": outside,
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

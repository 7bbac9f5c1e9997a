"""Quantise: one kernel for every format, rounding, block shape and orientation."""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl

from .. import gpu
from ..spec import MXSpec
from ..tune import CastConfig, Problem, find_config, quantize_config
from .elements import encode_words, laid_out
from .launch import Launch, Layout
from .primitives import (
    INFINITY,
    NAN_BYTE,
    bits_of,
    block_magnitude,
    block_offset,
    block_range,
    ceil_div,
    join4,
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
    x = load_tile(
        corner, rows - row0, cols - col0, row_stride, col_stride, TILE_ROWS, TILE_COLS, CONFIG, LAYOUT,
        LAYOUT.row_contiguous,
    )  # fmt: skip
    if turned_codes_ptr is not None:
        if CONFIG.square:
            turned = tl.trans(x)
        else:  # for other threads; the cache has it
            turned = load_tile(
                corner, cols - col0, rows - row0, col_stride, row_stride, TILE_COLS, TILE_ROWS, CONFIG, LAYOUT,
                not LAYOUT.row_contiguous,
            )  # fmt: skip
    quantize_tile(
        x, inside, tile_row, tile_col, rows, cols,
        seed_ptr, codes_ptr, scale_ptr, offset_ptr, SPEC, LAYOUT, GPU,
    )  # fmt: skip
    if turned_codes_ptr is not None:
        quantize_tile(
            turned, turned_inside, tile_col, tile_row, cols, rows,
            seed_ptr, turned_codes_ptr, turned_scale_ptr, turned_offset_ptr, SPEC, LAYOUT, GPU,
        )  # fmt: skip


@triton.jit
def load_tile(
    corner, rows, cols, row_stride, col_stride, ROWS: tl.constexpr, COLS: tl.constexpr,
    CONFIG: tl.constexpr, LAYOUT: tl.constexpr, CONTIGUOUS: tl.constexpr,
):  # fmt: skip
    """Load a tile at `corner`, zeros beyond `rows` and `cols`. CONTIGUOUS: memory runs along the rows, or else down the
    columns. Triton gives a thread what one load makes contiguous; what else it should hold comes in several loads."""
    if CONFIG.square and CONTIGUOUS:
        return tl.trans(load_every_eighth(corner, cols, rows, col_stride, row_stride, COLS, ROWS, 0, 8, LAYOUT))
    elif CONFIG.square:
        return load_every_eighth(corner, rows, cols, row_stride, col_stride, ROWS, COLS, 0, 8, LAYOUT)
    elif CONFIG.run == 1:
        return load_columns(corner, rows, cols, row_stride, col_stride, ROWS, COLS, 0, 1, LAYOUT)
    elif CONTIGUOUS:
        x = join4(
            load_pieces(corner, rows, cols, row_stride, col_stride, ROWS, COLS, 0, LAYOUT),
            load_pieces(corner, rows, cols, row_stride, col_stride, ROWS, COLS, 1, LAYOUT),
            load_pieces(corner, rows, cols, row_stride, col_stride, ROWS, COLS, 2, LAYOUT),
            load_pieces(corner, rows, cols, row_stride, col_stride, ROWS, COLS, 3, LAYOUT),
        )
        # the elements of a piece are next to each other, not every fourth
        PIECE: tl.constexpr = 128 // x.dtype.primitive_bitwidth
        return tl.reshape(tl.permute(tl.reshape(x, [ROWS, COLS // (4 * PIECE), PIECE, 4]), (0, 1, 3, 2)), [ROWS, COLS])
    else:
        return join4(
            load_every_eighth(corner, rows, cols, row_stride, col_stride, ROWS, COLS // 4, 0, 32, LAYOUT),
            load_every_eighth(corner, rows, cols, row_stride, col_stride, ROWS, COLS // 4, 1, 32, LAYOUT),
            load_every_eighth(corner, rows, cols, row_stride, col_stride, ROWS, COLS // 4, 2, 32, LAYOUT),
            load_every_eighth(corner, rows, cols, row_stride, col_stride, ROWS, COLS // 4, 3, 32, LAYOUT),
        )


@triton.jit
def load_columns(
    corner, rows, cols, row_stride, col_stride,
    ROWS: tl.constexpr, COLS: tl.constexpr, FIRST: tl.constexpr, STEP: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    """Load COLS columns, every STEP-th from the FIRST, of a tile at `corner`; zeros beyond `rows` and `cols`."""
    i = tl.arange(0, ROWS)[:, None]
    j = tl.arange(0, COLS)[None, :] * STEP
    # what threads add is the same for every FIRST
    place = corner + tl.cast(FIRST, tl.int64) * col_stride + (i.to(tl.int64) * row_stride + j.to(tl.int64) * col_stride)
    if LAYOUT.whole:
        return tl.load(place)
    else:
        return tl.load(place, mask=(i < rows) & (j < cols - FIRST), other=0.0)


@triton.jit
def load_pieces(
    corner, rows, cols, row_stride, col_stride,
    ROWS: tl.constexpr, COLS: tl.constexpr, FIRST: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    """Load every fourth piece of 16 bytes of the rows of a tile of COLS columns, from the FIRST: COLS / 4 columns."""
    PIECE: tl.constexpr = 128 // corner.dtype.element_ty.primitive_bitwidth
    i = tl.arange(0, ROWS)[:, None, None]
    piece = tl.arange(0, COLS // (4 * PIECE))[None, :, None] * 4 + FIRST
    j = piece * PIECE + tl.arange(0, PIECE)[None, None, :]
    place = corner + (i.to(tl.int64) * row_stride + j.to(tl.int64) * col_stride)
    if LAYOUT.whole:
        x = tl.load(place)
    else:
        x = tl.load(place, mask=(i < rows) & (j < cols), other=0.0)
    return tl.reshape(x, [ROWS, COLS // 4])


@triton.jit
def load_every_eighth(
    corner, rows, cols, row_stride, col_stride,
    ROWS: tl.constexpr, COLS: tl.constexpr, FIRST: tl.constexpr, STEP: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    """Load COLS columns, every STEP/8-th from the FIRST, of a tile whose memory runs down the columns, in eight loads:
    a thread holds eight neighbours of what is loaded, and those below each that one load gives it."""
    NARROW: tl.constexpr = COLS // 8
    EVERY: tl.constexpr = STEP // 8
    return join8(
        load_columns(corner, rows, cols, row_stride, col_stride, ROWS, NARROW, FIRST, STEP, LAYOUT),
        load_columns(corner, rows, cols, row_stride, col_stride, ROWS, NARROW, FIRST + EVERY, STEP, LAYOUT),
        load_columns(corner, rows, cols, row_stride, col_stride, ROWS, NARROW, FIRST + 2 * EVERY, STEP, LAYOUT),
        load_columns(corner, rows, cols, row_stride, col_stride, ROWS, NARROW, FIRST + 3 * EVERY, STEP, LAYOUT),
        load_columns(corner, rows, cols, row_stride, col_stride, ROWS, NARROW, FIRST + 4 * EVERY, STEP, LAYOUT),
        load_columns(corner, rows, cols, row_stride, col_stride, ROWS, NARROW, FIRST + 5 * EVERY, STEP, LAYOUT),
        load_columns(corner, rows, cols, row_stride, col_stride, ROWS, NARROW, FIRST + 6 * EVERY, STEP, LAYOUT),
        load_columns(corner, rows, cols, row_stride, col_stride, ROWS, NARROW, FIRST + 7 * EVERY, STEP, LAYOUT),
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

    block = block_index(tile_row, tile_col, cols, BLOCK, TILE_ROWS, TILE_COLS)
    if LAYOUT.whole:
        exists = None
    else:
        exists = block_inside(tile_row, tile_col, rows, cols, BLOCK, TILE_ROWS, TILE_COLS)
    DTYPE: tl.constexpr = x.dtype
    scale, offset, x = block_scale(x, inside, SPEC, GPU)
    if not SPEC.symmetric:
        tl.store(offset_ptr + block, offset.to(tl.float16), mask=exists)
    # of a sector of 32 bytes, other tiles may have the rest: it had better wait for them in the cache
    KEEP: tl.constexpr = "evict_last" if TILE_COLS // BLOCK.cols < 32 else ""
    tl.store(scale_ptr + block, scale.to(tl.uint8), mask=exists, eviction_policy=KEEP)

    random = 0
    if SPEC.stochastic:
        GROUPS: tl.constexpr = TILE_COLS // 8
        row = tile_row * TILE_ROWS + tl.arange(0, TILE_ROWS)[:, None]
        group = tile_col * GROUPS + tl.arange(0, GROUPS)[None, :]
        random = random_words(tl.load(seed_ptr), row, group, ceil_div(cols, 8), x, LAYOUT.wide_counter, GPU)
    words = scaled_words(x, inside, scale, random, SPEC, DTYPE, GPU)
    row_bytes = ceil_div(cols, ELEMENT.group) * ELEMENT.group_bytes
    store_words(words, codes_ptr, tile_row, tile_col, rows, row_bytes, TILE_COLS * ELEMENT.bits // 32, LAYOUT)


@triton.jit
def block_scale(x, inside, SPEC: tl.constexpr, GPU: tl.constexpr):
    """The scale byte of each block of `x`; its offset; and `x` less that. Offset and difference are fp32; of symmetric
    specs they are 0, and `x` as it was. `inside` says which elements exist, or is None where all do."""
    BLOCK: tl.constexpr = SPEC.block
    if SPEC.symmetric:
        return scale_byte(block_magnitude(x, BLOCK, GPU), SPEC), 0.0, x
    else:
        largest, least = block_range(x, inside, BLOCK, GPU)
        finite = (tl.abs(largest) < float("inf")) & (tl.abs(least) < float("inf"))
        offset = tl.where(finite, block_offset(largest, least), 0.0)
        x = to_fp32(x) - spread_over(offset, x, BLOCK, x.dtype)
        # x - offset rounds monotonically, so its largest magnitude is at an end of the range
        amax = bits_of(tl.maximum(tl.abs(largest - offset), tl.abs(least - offset)))
        amax = tl.where(finite, amax, INFINITY)
        return scale_byte(amax, SPEC), offset, x


@triton.jit
def scaled_words(x, inside, scale, random, SPEC: tl.constexpr, DTYPE: tl.constexpr, GPU: tl.constexpr):
    """`x`, of DTYPE before an offset was subtracted, over the scales of its blocks, rounded and packed
    (`encode_words`)."""
    BLOCK: tl.constexpr = SPEC.block
    factor = spread_over(scale_value(254 - scale), x, BLOCK, DTYPE)
    keep = spread_over(scale != NAN_BYTE, x, BLOCK, DTYPE)
    if not SPEC.symmetric and inside is not None:
        keep &= inside
    return encode_words(x, factor, keep, random, SPEC, GPU)


@triton.jit
def spread_over(per_block, x, BLOCK: tl.constexpr, DTYPE: tl.constexpr):
    """One value a block to one for each element of `x`, which had DTYPE when it was reduced."""
    return laid_out(spread(per_block, BLOCK, DTYPE), x)


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
    """The launch that quantises the matrix `x` into `parts`: codes, scale and, if asymmetric, offset; then the same of
    the transpose, if they are given (`quantize_pair_launch` knows their config)."""
    rows, cols = x.shape
    pair = len(parts) > 3
    row_contiguous = x.stride(1) == 1 or x.stride(0) != 1
    if config is None:
        assert not pair
        layout = "rows" if row_contiguous else "columns"
        config = find_config(
            Problem.of("quantize", spec, x.dtype, layout, rows, cols),
            x.device,
            lambda: quantize_config(spec, rows, cols, x.element_size(), row_contiguous, pair=False),
        ).config
    if config.run > 1 and not (config.fills_runs(x.element_size()) and loads_pieces(x)):
        config = replace(config, run=1, square=pair or not row_contiguous)
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
            "LAYOUT": Layout.of(config, rows, cols, row_bytes, row_contiguous, spec.stochastic),
            "GPU": capabilities,
        },
        {"num_warps": config.num_warps},
    )


def loads_pieces(x: torch.Tensor) -> bool:
    """Whether Triton sees that 16 bytes at a time can be loaded. Where it loads less (as for tiles that do not fill
    runs), neighbours lie with threads that are not, and kernels that Triton 3.6 compiled so gave wrong bytes."""
    along, across = sorted(x.stride())
    return along == 1 and across % 16 == 0 and x.data_ptr() % 16 == 0

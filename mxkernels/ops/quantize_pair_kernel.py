"""Quantise both orientations of a matrix from one read of it, by way of shared memory.

Written in Gluon, which says what a thread holds: memory is best read by whole lines, while a scale costs the least
where one thread has all of a block, along a row in the one orientation and down a column in the other. Shared memory
gives each its own. What becomes of the elements is `quantize_kernel`'s. Imports Triton.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from .. import gpu
from ..spec import MXSpec
from ..tune import CastConfig, PairConfig, Problem, find_config, quantize_config, quantize_pair_config
from .elements import layout_of
from .launch import Launch
from .primitives import random_words, zeros_beside
from .quantize_kernel import (
    TENSORS,
    block_scale,
    loads_pieces,
    quantize_launch,
    quantize_tensors,
    scaled_words,
)
from .tiles import grouped_tile

# Triton 3.9 knows these names, 3.6 and 3.7 only the others.
load_async = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
reinterpret = getattr(gl.shared_memory_descriptor, "reinterpret", None) or gl.shared_memory_descriptor._reinterpret

SIDE = gl.constexpr(PairConfig.SIDE)  # of a cell, of which a program's tile consists


@gluon.jit
def quantize_pair_kernel(
    x_ptr, seed_ptr,
    codes_ptr, scale_ptr, offset_ptr,
    turned_codes_ptr, turned_scale_ptr, turned_offset_ptr,
    rows, cols, row_stride,
    SPEC: gl.constexpr, CONFIG: gl.constexpr, GPU: gl.constexpr,
):  # fmt: skip
    """Quantise a matrix of contiguous rows, which tiles fill, and its transpose. A program works on a tile's cells, one
    after the other, while the next ones are loaded. It keeps scales and offsets to the end, since a few bytes of a row
    take as long to write as 32; programs whose scales fill 32 bytes together follow each other."""
    DOWN: gl.constexpr = CONFIG.tile_rows // SIDE
    ACROSS: gl.constexpr = CONFIG.tile_cols // SIDE
    STAGES: gl.constexpr = CONFIG.stages
    tile_row, tile_col = grouped_tile(
        gl.program_id(0), rows // CONFIG.tile_rows, cols // CONFIG.tile_cols, CONFIG.group_rows
    )
    first_row = tile_row.to(gl.int64) * DOWN
    first_col = tile_col.to(gl.int64) * ACROSS
    cells = gl.allocate_shared_memory(x_ptr.dtype.element_ty, [STAGES, SIDE, SIDE], cell_layout())
    scales = allocate_blocks(gl.uint8, SPEC, CONFIG)
    turned_scales = allocate_blocks(gl.uint8, SPEC, CONFIG)
    offsets = None if SPEC.symmetric else allocate_blocks(gl.float16, SPEC, CONFIG)
    turned_offsets = None if SPEC.symmetric else allocate_blocks(gl.float16, SPEC, CONFIG)
    seed = gl.load(seed_ptr) if SPEC.stochastic else None

    for first in gl.static_range(STAGES - 1):
        load(x_ptr, first_row + first // ACROSS, first_col + first % ACROSS, row_stride, cells.index(first), CONFIG)
    for cell in range(CONFIG.cells):
        ahead = cell + STAGES - 1
        if ahead < CONFIG.cells:
            load(
                x_ptr, first_row + ahead // ACROSS, first_col + ahead % ACROSS, row_stride,
                cells.index(ahead % STAGES), CONFIG,
            )  # fmt: skip
        else:
            async_copy.commit_group()  # of nothing, so that groups count cells
        async_copy.wait_group(STAGES - 1)
        down = cell // ACROSS
        across = cell % ACROSS
        elements = cells.index(cell % STAGES)
        quantize_cell(
            elements, first_row + down, first_col + across, cols, cell, seed, codes_ptr, scales, offsets,
            SPEC, CONFIG, GPU,
        )  # fmt: skip
        quantize_cell(
            elements.permute([1, 0]), first_col + across, first_row + down, rows, across * DOWN + down,
            seed, turned_codes_ptr, turned_scales, turned_offsets, SPEC, CONFIG, GPU,
        )  # fmt: skip

    store_blocks(scales, first_row, first_col, cols, scale_ptr, SPEC, DOWN, ACROSS, CONFIG)
    store_blocks(turned_scales, first_col, first_row, rows, turned_scale_ptr, SPEC, ACROSS, DOWN, CONFIG)
    if not SPEC.symmetric:
        store_blocks(offsets, first_row, first_col, cols, offset_ptr, SPEC, DOWN, ACROSS, CONFIG)
        store_blocks(turned_offsets, first_col, first_row, rows, turned_offset_ptr, SPEC, ACROSS, DOWN, CONFIG)


@gluon.jit
def load(x_ptr, cell_row, cell_col, row_stride, elements, CONFIG: gl.constexpr):
    """Start to load a cell into shared memory, by whole lines."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [CONFIG.num_warps, 1], [1, 0])
    i = gl.arange(0, SIDE, gl.SliceLayout(1, LAYOUT))[:, None]
    j = gl.arange(0, SIDE, gl.SliceLayout(0, LAYOUT))[None, :]
    corner = x_ptr + cell_row * SIDE * row_stride + cell_col * SIDE
    load_async(elements, corner + (i.to(gl.int64) * row_stride + j))
    async_copy.commit_group()


@gluon.jit
def quantize_cell(
    elements, cell_row, cell_col, cols, place, seed, codes_ptr, scales, offsets,
    SPEC: gl.constexpr, CONFIG: gl.constexpr, GPU: gl.constexpr,
):  # fmt: skip
    """Quantise cell (cell_row, cell_col) of a matrix of `cols` columns, whose elements are in shared memory: codes into
    memory, scales and offsets to `place` among those of the program's cells."""
    x = elements.load(thread_layout(CONFIG.num_warps))
    DTYPE: gl.constexpr = x.dtype
    scale, offset, x = block_scale(x, None, SPEC, GPU)
    scales.index(place).store(scale.to(gl.uint8))
    if not SPEC.symmetric:
        offsets.index(place).store(offset.to(gl.float16))
    random = 0
    if SPEC.stochastic:
        GROUPS: gl.constexpr = SIDE // 8
        BESIDE: gl.constexpr = layout_of(zeros_beside(x).type)
        row = cell_row * SIDE + gl.arange(0, SIDE, gl.SliceLayout(1, BESIDE))[:, None]
        group = cell_col * GROUPS + gl.arange(0, GROUPS, gl.SliceLayout(0, BESIDE))[None, :]
        # always counted by 64 bits: what counts by 32 makes zeros, for which Gluon wants a layout
        random = random_words(seed, row, group, cols // 8, x, True, GPU)
    words = scaled_words(x, None, scale, random, SPEC, DTYPE, GPU)

    WORDS: gl.constexpr = words.shape[1]
    LAYOUT: gl.constexpr = words_layout(WORDS, CONFIG.num_warps)
    i = gl.arange(0, SIDE, gl.SliceLayout(1, LAYOUT))[:, None]
    j = gl.arange(0, WORDS, gl.SliceLayout(0, LAYOUT))[None, :]
    row_words = gl.multiple_of(cols // SIDE * WORDS, WORDS)
    corner = codes_ptr.cast(gl.pointer_type(gl.int32), bitcast=True) + cell_row * SIDE * row_words + cell_col * WORDS
    gl.store(corner + (i.to(gl.int64) * row_words + j), gl.convert_layout(words, LAYOUT))


@gluon.jit
def allocate_blocks(dtype: gl.constexpr, SPEC: gl.constexpr, CONFIG: gl.constexpr):
    """Shared memory for one value of each block of a program's tile, cell by cell."""
    DOWN: gl.constexpr = SIDE // SPEC.block.rows
    ACROSS: gl.constexpr = SIDE // SPEC.block.cols
    return gl.allocate_shared_memory(dtype, [CONFIG.cells, DOWN, ACROSS], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))


@gluon.jit
def store_blocks(
    blocks, first_row, first_col, cols, ptr,
    SPEC: gl.constexpr, CELLS_DOWN: gl.constexpr, CELLS_ACROSS: gl.constexpr, CONFIG: gl.constexpr,
):  # fmt: skip
    """Store one value of each block of a program's cells, from cell (first_row, first_col) of a matrix of `cols`
    columns on."""
    ROWS: gl.constexpr = CELLS_DOWN * SIDE // SPEC.block.rows
    COLS: gl.constexpr = CELLS_ACROSS * SIDE // SPEC.block.cols
    TOGETHER: gl.constexpr = min(COLS, 128 // blocks.dtype.primitive_bitwidth)
    LANES: gl.constexpr = min(COLS // TOGETHER, 32)
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, TOGETHER], [32 // LANES, LANES], [CONFIG.num_warps, 1], [1, 0])
    i = gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))[:, None]
    j = gl.arange(0, COLS, gl.SliceLayout(0, LAYOUT))[None, :]
    row_blocks = gl.multiple_of(cols // SPEC.block.cols, COLS)
    corner = ptr + first_row * (SIDE // SPEC.block.rows) * row_blocks + first_col * (SIDE // SPEC.block.cols)
    whole = reinterpret(blocks, blocks.dtype, [ROWS, COLS], blocks_layout(SPEC.block, CELLS_DOWN, CELLS_ACROSS))
    # A few bytes of a row: the L2 cache keeps them until the programs beside this one have filled the sector.
    gl.store(corner + (i.to(gl.int64) * row_blocks + j), whole.load(LAYOUT), eviction_policy="evict_last")


@gluon.constexpr_function
def thread_layout(num_warps):
    """Of a cell: a thread has 32 neighbours along a row, four threads all of it, a warp eight rows, and then others."""
    along = [[0, 1], [0, 2], [0, 4], [0, 8], [0, 16]]
    lanes = [[0, 32], [0, 64], [1, 0], [2, 0], [4, 0]]
    warps, others = rows_of_warps(num_warps)
    return gl.DistributedLinearLayout(along + others, lanes, warps, [], [128, 128])


@gluon.constexpr_function
def words_layout(words, num_warps):
    """Of a cell's codes, `words` a row: a thread has four words at a time, its neighbours those beside them. Warps have
    the same rows as in `thread_layout`, so that they exchange nothing with each other."""
    lanes = [[0, word] for word in (4, 8, 16) if word < words]
    rows = [[1, 0], [2, 0], [4, 0]]
    left = 5 - len(lanes)
    warps, others = rows_of_warps(num_warps)
    return gl.DistributedLinearLayout(
        [[0, 1], [0, 2]] + rows[left:] + others, lanes + rows[:left], warps, [], [128, words]
    )


@gluon.constexpr_function
def rows_of_warps(num_warps):
    """The bits of a cell's row beyond the lowest three: those that number warps, and the others."""
    rows = [[8, 0], [16, 0], [32, 0], [64, 0]]
    warps = num_warps.bit_length() - 1
    return rows[:warps], rows[warps:]


@gluon.constexpr_function
def cell_layout():
    """Of a cell of 16-bit elements in shared memory: by rows, whose pieces of 16 bytes change places, so that eight
    threads that read or write at a time never meet in a bank. They have eight pieces in succession (as it is loaded);
    those at columns 0, 32, 64 and 96 of two rows (`thread_layout`); or, turned, one of two rows in each quarter."""
    columns = [[0, 1], [0, 2], [0, 4], [0, 8], [0, 16], [0, 32], [0, 64 + 16]]
    return gl.SharedLinearLayout([*columns, [1, 8], [2, 0], [4, 0], [8, 0], [16, 0], [32, 16], [64, 32]])


@gluon.constexpr_function
def blocks_layout(block, cells_down, cells_across):
    """What stands cell by cell in shared memory, as a matrix."""
    rows, cols = 128 // block.rows, 128 // block.cols
    bases = [[0, 1 << bit] for bit in range(cols.bit_length() - 1)]
    bases += [[1 << bit, 0] for bit in range(rows.bit_length() - 1)]
    bases += [[0, cols << bit] for bit in range(cells_across.bit_length() - 1)]
    bases += [[rows << bit, 0] for bit in range(cells_down.bit_length() - 1)]
    return gl.SharedLinearLayout(bases)


def quantize_pair_launch(
    x: torch.Tensor,
    spec: MXSpec,
    seed: torch.Tensor | None,
    parts: list[torch.Tensor],
    config: CastConfig | PairConfig | None = None,
    capabilities: gpu.Capabilities | None = None,
) -> Launch:
    """The launch that quantises the matrix `x` and its transpose into `parts`: codes, scale and, if asymmetric, offset
    of the one, then of the other; by this kernel or by `quantize_kernel`'s, as the config is."""
    rows, cols = x.shape
    row_contiguous = x.stride(1) == 1 or x.stride(0) != 1
    capabilities = capabilities or gpu.device_capabilities(x.device)

    if config is None:
        config = find_config(
            Problem.of("quantize_pair", spec, x.dtype, "rows" if row_contiguous else "columns", rows, cols),
            x.device,
            lambda: quantize_pair_config(spec, rows, cols, x.element_size(), row_contiguous, capabilities),
            lambda found: pair_serves(found, rows, cols, capabilities),
        ).config
    if isinstance(config, PairConfig) and not loads_pieces(x):
        config = quantize_config(spec, rows, cols, x.element_size(), row_contiguous, pair=True)
    if isinstance(config, CastConfig):
        return quantize_launch(x, spec, seed, parts, config, capabilities)
    assert pair_serves(config, rows, cols, capabilities), (config, x.shape)
    if not row_contiguous:
        x, half = x.T, len(parts) // 2
        parts = parts[half:] + parts[:half]
        config = replace(config, tile_rows=config.tile_cols, tile_cols=config.tile_rows)
    return Launch(
        quantize_pair_kernel,
        rows * cols // (config.tile_rows * config.tile_cols),
        dict(zip(TENSORS, quantize_tensors(x, seed, parts, spec), strict=True)),
        {
            "rows": x.shape[0],
            "cols": x.shape[1],
            "row_stride": x.stride(0),
            "SPEC": spec,
            "CONFIG": config,
            "GPU": capabilities,
        },
        {"num_warps": config.num_warps},
    )


def pair_serves(config: CastConfig | PairConfig, rows: int, cols: int, capabilities: gpu.Capabilities) -> bool:
    """Whether a config serves a matrix of `rows` x `cols`: tiles of this kernel must fill it."""
    if isinstance(config, CastConfig):
        return True
    return capabilities.ptx and rows % config.tile_rows == 0 and cols % config.tile_cols == 0

"""The product of carriers on Hopper: persistent, warp-specialised, the partial sums of FP8 promoted to fp32.

Written in Gluon: plain Triton has no way to multiply half a tile at a time, and so none to hold the sums of a
128x256 tile in registers beside the tensor cores' accumulators. Imports Triton.
"""

from __future__ import annotations

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..tune import HopperConfig, hopper_config
from .launch import Launch
from .matmul_kernel import ADDEND_TILE
from .primitives import ceil_div
from .tiles import grouped_tile

# Triton 3.9 knows only these names, 3.7 only the others.
load_tile = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
store_tile = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global

BLOCK_BYTES = 128  # of K: the widest swizzle of shared memory
CONSUMERS = gl.constexpr(2)  # warpgroups that multiply, each ROWS of a tile
ROWS = gl.constexpr(64)
REGISTERS = gl.constexpr(240)  # of a consumer's thread; the warp that loads needs few
LOADER_REGISTERS = gl.constexpr(24)
EXPONENT = gl.constexpr(0x7F800000)  # of fp32 bits


@gluon.jit(do_not_specialize=["M", "N", "K"])
def matmul_hopper_kernel(
    a_desc, b_desc, out_desc, a_reference_ptr, b_reference_ptr, addend_ptr, bias_ptr, M, N, K,
    A_ROWS: gl.constexpr, B_ROWS: gl.constexpr, CONFIG: gl.constexpr,
):  # fmt: skip
    """`out[M, N] = A[M, K] B[N, K]^T`: every program works on tile after tile, one warp loading, two warpgroups
    multiplying. References, both None or a byte for each A_ROWS rows of A (B_ROWS of B), are powers of two to
    multiply them by; `addend_ptr` is None or a sum's other half (`addend_shape`), `bias_ptr` None or
    N values."""
    STAGES: gl.constexpr = CONFIG.stages
    PIECES: gl.constexpr = CONFIG.pieces
    TILE_N: gl.constexpr = CONFIG.pieces * CONFIG.cols
    # promotion groups are whole: past the end of K loads give zeros
    GROUP: gl.constexpr = CONFIG.promote if CONFIG.promote else 1
    BLOCK: gl.constexpr = a_desc.block_type.shape[1]
    blocks = ceil_div(K, GROUP * BLOCK) * GROUP
    grid = (M, N, ceil_div(M, CONSUMERS * ROWS), ceil_div(N, TILE_N), blocks)

    a_tiles = gl.allocate_shared_memory(a_desc.dtype, [STAGES * CONSUMERS] + a_desc.block_shape, a_desc.layout)
    b_tiles = gl.allocate_shared_memory(b_desc.dtype, [STAGES * PIECES] + b_desc.block_shape, b_desc.layout)
    out_tiles = gl.allocate_shared_memory(out_desc.dtype, [CONSUMERS] + out_desc.block_shape, out_desc.layout)
    loaded = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    freed = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    turn = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(loaded.index(stage), count=1)
        mbarrier.init(freed.index(stage), count=CONSUMERS)
    for consumer in gl.static_range(CONSUMERS):
        mbarrier.init(turn.index(consumer), count=1)
    fence_async_shared()

    shared = (a_tiles, b_tiles, loaded, freed, turn)
    epilogue = (out_desc, out_tiles, a_reference_ptr, b_reference_ptr, addend_ptr, bias_ptr)
    gl.warp_specialize(
        [
            (consume, (shared, grid, epilogue, 0, A_ROWS, B_ROWS, CONFIG)),
            (consume, (shared, grid, epilogue, 1, A_ROWS, B_ROWS, CONFIG)),
            (produce, (a_desc, b_desc, shared, grid, CONFIG)),
        ],
        [4, 1],
        [REGISTERS, LOADER_REGISTERS],
    )


@gluon.jit
def produce(a_desc, b_desc, shared, grid, CONFIG: gl.constexpr):
    """Load block after block of the tiles into the stages, as they are freed."""
    STAGES: gl.constexpr = CONFIG.stages
    PIECES: gl.constexpr = CONFIG.pieces
    BLOCK: gl.constexpr = a_desc.block_type.shape[1]
    STAGE_BYTES: gl.constexpr = CONSUMERS * a_desc.block_type.nbytes + PIECES * b_desc.block_type.nbytes
    a_tiles, b_tiles, loaded, freed, _ = shared
    _, _, tiles_m, tiles_n, blocks = grid
    done = 0
    for tile in range(gl.program_id(0), tiles_m * tiles_n, gl.num_programs(0)):
        tile_m, tile_n = grouped_tile(tile, tiles_m, tiles_n, CONFIG.group_m)
        for block in range(blocks):
            stage = done % STAGES
            mbarrier.wait(freed.index(stage), (done // STAGES & 1) ^ 1)
            ready = loaded.index(stage)
            mbarrier.expect(ready, STAGE_BYTES)
            for i in gl.static_range(CONSUMERS):
                place = [(tile_m * CONSUMERS + i) * ROWS, block * BLOCK]
                load_tile(a_desc, place, ready, a_tiles.index(stage * CONSUMERS + i))
            for i in gl.static_range(PIECES):
                place = [(tile_n * PIECES + i) * CONFIG.cols, block * BLOCK]
                load_tile(b_desc, place, ready, b_tiles.index(stage * PIECES + i))
            done += 1


@gluon.jit
def consume(
    shared, grid, epilogue,
    CONSUMER: gl.constexpr, A_ROWS: gl.constexpr, B_ROWS: gl.constexpr, CONFIG: gl.constexpr,
):  # fmt: skip
    """Multiply 64 rows of every tile."""
    COLS: gl.constexpr = CONFIG.cols
    PIECES: gl.constexpr = CONFIG.pieces
    a_tiles, _, _, _, _ = shared
    _, _, tiles_m, tiles_n, blocks = grid
    DEPTH: gl.constexpr = 256 // a_tiles.dtype.primitive_bitwidth  # of K in an instruction
    zeros = gl.zeros([ROWS, COLS], gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLS, DEPTH]))
    group = zeros  # its registers serve all groups
    done = 0
    for tile in range(gl.program_id(0), tiles_m * tiles_n, gl.num_programs(0)):
        sums = (zeros,) * PIECES
        if CONFIG.promote:
            for first in range(0, blocks, CONFIG.promote):
                for piece in gl.static_range(PIECES):
                    group = multiply_group(group, shared, done + first, piece, CONSUMER, CONFIG)
                    # Nothing is left to wait for: it keeps compilers from starting the next group before this
                    # one's addition, for which there are no registers.
                    sums = sums[1:] + (warpgroup_mma_wait(0, deps=(sums[0] + group,)),)
        else:
            sums = multiply_tile(sums, shared, done, blocks, CONSUMER, CONFIG)
        done += blocks
        tile_m, tile_n = grouped_tile(tile, tiles_m, tiles_n, CONFIG.group_m)
        row0 = (tile_m * CONSUMERS + CONSUMER) * ROWS
        for piece in gl.static_range(PIECES):
            col0 = (tile_n * PIECES + piece) * COLS
            finish(sums[piece], row0, col0, grid, epilogue, CONSUMER, A_ROWS, B_ROWS)
    tma.store_wait(0)


@gluon.jit
def multiply_group(group, shared, done, PIECE: gl.constexpr, CONSUMER: gl.constexpr, CONFIG: gl.constexpr):
    """A B over a promotion group, from the `done`-th block on, for one piece; the last one frees the stages.

    Consumers issue their groups in turns, so that the promotion of one falls into the products of the other.
    A group thus waits in shared memory for all pieces; these share the tensor cores' accumulators.
    """
    STAGES: gl.constexpr = CONFIG.stages
    PROMOTE: gl.constexpr = CONFIG.promote
    LAST: gl.constexpr = PIECE == CONFIG.pieces - 1
    a_tiles, b_tiles, loaded, freed, turn = shared
    # the first consumer's first turn is free
    mbarrier.wait(turn.index(CONSUMER), (done // PROMOTE * CONFIG.pieces + PIECE & 1) ^ (CONSUMER == 0))
    for block in gl.static_range(PROMOTE):
        stage = (done + block) % STAGES
        if PIECE == 0:
            mbarrier.wait(loaded.index(stage), (done + block) // STAGES & 1)
        a = a_tiles.index(stage * CONSUMERS + CONSUMER)
        b = b_tiles.index(stage * CONFIG.pieces + PIECE).permute((1, 0))
        group = warpgroup_mma(a, b, group, use_acc=block > 0, is_async=True)
        if block == PROMOTE - 1:
            mbarrier.arrive(turn.index((CONSUMER + 1) % CONSUMERS))
        if LAST and block > 0:
            # one block stays in flight, the one before has been read
            group = warpgroup_mma_wait(1, deps=(group,))
            mbarrier.arrive(freed.index((done + block - 1) % STAGES))
    group = warpgroup_mma_wait(0, deps=(group,))
    if LAST:
        mbarrier.arrive(freed.index((done + PROMOTE - 1) % STAGES))
    return group


@gluon.jit
def multiply_tile(sums, shared, done, blocks, CONSUMER: gl.constexpr, CONFIG: gl.constexpr):
    """`sums` of all pieces + A B over a tile's blocks, from the `done`-th block on."""
    STAGES: gl.constexpr = CONFIG.stages
    PIECES: gl.constexpr = CONFIG.pieces
    a_tiles, b_tiles, loaded, freed, _ = shared
    for block in range(blocks):
        stage = (done + block) % STAGES
        mbarrier.wait(loaded.index(stage), (done + block) // STAGES & 1)
        a = a_tiles.index(stage * CONSUMERS + CONSUMER)
        for piece in gl.static_range(PIECES):
            b = b_tiles.index(stage * PIECES + piece).permute((1, 0))
            sums = sums[1:] + (warpgroup_mma(a, b, sums[0], is_async=True),)
        # one block stays in flight, the one before has been read
        sums = wait_for(sums, PIECES)
        mbarrier.arrive(freed.index((done + block - 1) % STAGES), pred=block > 0)
    sums = wait_for(sums, 0)
    mbarrier.arrive(freed.index((done + blocks - 1) % STAGES))
    return sums


@gluon.jit
def wait_for(sums, OUTSTANDING: gl.constexpr):
    """`sums`, when OUTSTANDING products are left in flight."""
    if len(sums) == 1:  # what comes back is no tuple
        return (warpgroup_mma_wait(OUTSTANDING, deps=sums),)
    else:
        return warpgroup_mma_wait(OUTSTANDING, deps=sums)


@gluon.jit
def finish(
    acc, row0, col0, grid, epilogue, CONSUMER: gl.constexpr, A_ROWS: gl.constexpr, B_ROWS: gl.constexpr
):  # fmt: skip
    """Give a piece its powers of two, what is added to it and its dtype, and send it off."""
    MMA: gl.constexpr = acc.type.layout
    ACROSS: gl.constexpr = gl.SliceLayout(0, MMA)
    M, N, _, _, _ = grid
    out_desc, out_tiles, a_reference_ptr, b_reference_ptr, addend_ptr, bias_ptr = epilogue
    row = row0 + gl.arange(0, acc.shape[0], gl.SliceLayout(1, MMA))
    # a column a thread: the accumulators' layout would have every thread load a quarter of the columns
    col = col0 + gl.arange(0, acc.shape[1], gl.BlockedLayout([1], [32], [4], [0]))
    if a_reference_ptr is not None:
        down = gl.load(a_reference_ptr + row // A_ROWS, mask=row < M, other=0).to(gl.int32) << 22
        across = gl.load(b_reference_ptr + col // B_ROWS, mask=col < N, other=0).to(gl.int32) << 22
        # Twice the exponent, in the exponent's place: half of it twice over, the second time rounded up. What is
        # out of a normal factor's range leaves nothing of any sum: 2**-127 may as well be 0.
        twice = down[:, None] + gl.convert_layout(across, ACROSS)[None, :]
        acc *= (twice & EXPONENT).to(gl.float32, bitcast=True)
        acc *= (twice + (1 << 22) & EXPONENT).to(gl.float32, bitcast=True)
    if addend_ptr is not None:
        down = gl.arange(0, acc.shape[0], gl.SliceLayout(1, MMA))
        along = gl.arange(0, acc.shape[1], ACROSS)
        width = ceil_div(N, ADDEND_TILE) * ADDEND_TILE
        start = addend_ptr + (row0.to(gl.int64) * width + col0)
        acc += gl.load(start + (down[:, None] * width + along[None, :]))  # no mask: there are no registers for it
    if bias_ptr is not None:
        bias = gl.load(bias_ptr + col, mask=col < N, other=0.0).to(gl.float32)
        acc += gl.convert_layout(bias, ACROSS)[None, :]
    out_tile = out_tiles.index(CONSUMER)
    tma.store_wait(0)  # the piece before has left
    out_tile.store(acc.to(out_desc.dtype))
    fence_async_shared()
    store_tile(out_desc, [row0, col0], out_tile)


def hopper_serves(m: int, n: int, k: int, out_dtype: torch.dtype) -> bool:
    """Whether the kernel takes a product of these sizes: rows of the output must be whole 16 bytes."""
    return min(m, n, k) > 0 and n * out_dtype.itemsize % 16 == 0


def hopper_matmul_launch(
    a: torch.Tensor,
    b: torch.Tensor,
    k: int,
    references: tuple[torch.Tensor, torch.Tensor] | None,
    rows_per_reference: tuple[int, int],
    bias: torch.Tensor | None,
    out: torch.Tensor,
    config: HopperConfig | None = None,
    processors: int | None = None,
    addend: torch.Tensor | None = None,
) -> Launch:
    """The launch that writes `out` `[M, N]` from carriers a `[M, K or more]` and b `[N, K or more]`, if
    `hopper_serves` it; a program for each of the GPU's `processors`. Carriers of fp32 are tf32 numbers."""
    m, n = out.shape
    processors = processors or torch.cuda.get_device_properties(out.device).multi_processor_count
    config = config or hopper_config(m, n, a.dtype, out.dtype, processors)
    block = BLOCK_BYTES // a.itemsize
    a_reference, b_reference = references or (None, None)
    return Launch(
        matmul_hopper_kernel,
        min(triton.cdiv(m, 128) * triton.cdiv(n, config.cols * config.pieces), processors),
        {
            "a_desc": _descriptor(a, k, ROWS.value, block),
            "b_desc": _descriptor(b, k, config.cols, block),
            "out_desc": _descriptor(out, n, ROWS.value, config.cols),
            "a_reference_ptr": a_reference,
            "b_reference_ptr": b_reference,
            "addend_ptr": addend,
            "bias_ptr": bias,
        },
        {
            "M": m,
            "N": n,
            "K": k,
            "A_ROWS": rows_per_reference[0],
            "B_ROWS": rows_per_reference[1],
            "CONFIG": config,
        },
        {"num_warps": 4},
    )


def _descriptor(matrix: torch.Tensor, width: int, rows: int, cols: int) -> TensorDescriptor:
    """For tiles of `rows` x `cols` of a matrix's first `width` columns."""
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8 * matrix.itemsize, rank=2)
    return TensorDescriptor(matrix, [matrix.shape[0], width], list(matrix.stride()), [rows, cols], layout)

"""The deterministic rule: good configs for any GPU, untuned.

What it says was found on one GPU, but for reasons that hold on others: a thread that has a whole block spends
the least on its scale, and writes its codes as they are; a tile's rows should be long where rows are packed, and
its two sides alike where blocks or memory run down the columns. Where a program has less shared memory, or fewer
registers to spare, products of carriers have fewer stages and smaller tiles: every GPU can launch what it says.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from ..gpu import Capabilities
from ..spec import MXSpec
from .config import CastConfig, HopperConfig, MatmulConfig, PairConfig, SmallMatmulConfig
from .limits import Limits

FEW_ROWS = 256  # of a product: too few for the tiles that large ones take
_MANY_COLUMNS = 6144  # of a product of few rows: enough for wider tiles to occupy a large GPU
_BARRIER_BYTES = 1024  # of shared memory, at most
_SHORTEST_BLOCK_K = 32  # of tensor cores' instructions
_LARGEST_FOLDED_TILE = 32768  # elements that are quantised and folded by one program
_TALL_TILE_BYTES, _TALL_WARP_BYTES = 65536, 8192  # that such a program, and each of its warps, reads of tall blocks
_SMALLEST_SIDE = 16  # whole 32-bit words of packed codes, whole groups of random bits
_SHORTEST_RUN = 32


def quantize_config(
    spec: MXSpec, rows: int, cols: int, bytes_per_element: int, row_contiguous: bool, pair: bool
) -> CastConfig:
    """For a matrix of `rows` x `cols`, whose rows (or else columns) are contiguous; `pair`: both orientations
    are written."""
    block, bits = spec.block, spec.element.bits
    light = spec.symmetric and not spec.stochastic  # else what a thread holds besides elements leaves fewer registers
    few_bits = bits == 4 and not spec.element.twos_complement
    if pair and spec.symmetric and (few_bits or not spec.stochastic):
        config = CastConfig(128, 64, 4, square=True, wide=True)
    elif pair or not (light or row_contiguous):
        config = CastConfig(64, 64, 4, square=True, wide=True)
    elif not row_contiguous:
        along = block.rows == 1 and bits == 4
        config = CastConfig(128, 128, 4, wide=True, run=4) if along else CastConfig(128, 128, 8, square=True, wide=True)
    elif min(block.rows, block.cols) >= 64:
        config = CastConfig(64, 128, 4, square=True, wide=True)
    elif block.rows >= 16:
        tile_cols, num_warps = (256, 4) if block.cols >= 16 else (128, 2)
        config = CastConfig(32, tile_cols, num_warps, square=True, wide=True)
    elif bits == 6:
        config = CastConfig(4, 512, 1, wide=True, run=4)
    elif bits == 8 and spec.element.name != "int8" and bytes_per_element == 2:
        config = CastConfig(4, 1024, 4, wide=True)
    elif block.rows > 1:
        config = CastConfig(4, 1024, 2) if spec.stochastic else CastConfig(8, 1024, 4)
    else:
        config = CastConfig(1, 4096, 2 if spec.stochastic else 4, wide=True, run=4)
    elements = config.tile_rows * config.tile_cols // (32 * config.num_warps)  # a thread
    if bytes_per_element == 4 and elements >= 64 and not light:
        config = replace(config, num_warps=2 * config.num_warps)  # registers hold half as many
    least_rows, least_cols = block.rows, block.cols
    if pair:
        least_rows = least_cols = max(least_rows, least_cols)
    if config.square:
        least_rows = max(least_rows, _SMALLEST_SIDE)
    if config.run > 1:
        least_cols = max(least_cols, _SHORTEST_RUN)
    fitting = _fit(config, least_rows, least_cols, rows, cols)
    return fitting if fitting.fills_runs(bytes_per_element) else replace(fitting, run=1)


def quantize_pair_config(
    spec: MXSpec, rows: int, cols: int, bytes_per_element: int, row_contiguous: bool, capabilities: Capabilities
) -> CastConfig | PairConfig:
    """For both orientations of a matrix of `rows` x `cols`. By way of shared memory where blocks are rows, since there
    a thread has all of one in either orientation; squares cost less in registers."""
    block, bits, side = spec.block, spec.element.bits, PairConfig.SIDE
    is_served = capabilities.ptx and bytes_per_element == 2 and bits != 6 and rows % side == cols % side == 0
    if is_served and block.rows == 1 and block.cols >= 16:
        by_integers = bits == 8 and not (spec.element.twos_complement or capabilities.cvt_fp8)
        many_registers = spec.stochastic or (by_integers and not spec.symmetric)
        return PairConfig(side, side, 8 if many_registers else 4, 1)
    return quantize_config(spec, rows, cols, bytes_per_element, row_contiguous, pair=True)


def dequantize_config(spec: MXSpec, rows: int, cols: int) -> CastConfig:
    """For a matrix of `rows` x `cols`."""
    if min(spec.block.rows, spec.block.cols) >= 64:
        config = CastConfig(64, 128, 4, wide=True)
    elif spec.block.rows >= 16:
        config = CastConfig(32, 256, 4, wide=True) if spec.block.cols >= 16 else CastConfig(32, 128, 1, wide=True)
    elif spec.element.bits == 6:
        config = CastConfig(4, 512, 1, wide=True) if spec.block.rows == 1 else CastConfig(4, 2048, 4, wide=True)
    elif spec.block.rows == 1:
        config = CastConfig(1, 1024, 1, wide=True)
    else:
        config = CastConfig(4, 1024, 4, wide=True)
    return _fit(config, spec.block.rows, spec.block.cols, rows, cols)


def fold_config(spec: MXSpec, rows: int, cols: int, turned: bool) -> CastConfig:
    """For a matrix of `rows` x `cols`, which is written transposed if `turned`."""
    rows_of_block = spec.block.rows
    if turned:
        config = CastConfig(32, 512, 4, wide=True) if rows_of_block == 1 else CastConfig(64, 128, 4)
    elif rows_of_block == 1:
        config = CastConfig(4, 512, 2, wide=True) if spec.element.bits == 6 else CastConfig(4, 1024, 4, wide=True)
    else:
        config = CastConfig(4, 1024, 2, wide=True) if rows_of_block < 16 else CastConfig(16, 512, 2, wide=True)
    return _fit(config, spec.block.rows, spec.block.cols, rows, cols)


def quantize_fold_config(spec: MXSpec, cols: int, bytes_per_element: int) -> CastConfig | None:
    """For contiguous rows of `cols`; None where packing would move elements between threads, as it does of 6 bits.
    A tile has whole rows, where these fill enough of it; else pieces of them, which are read twice, one after the
    other. Pieces are short where blocks are tall, since registers, or shared memory, would not hold more."""
    if spec.element.bits != 4:
        return None
    least = max(spec.block.cols, 64)
    tile_cols = max(power_of_two_above(cols), least)
    one_row = spec.block.rows == 1
    most = cols * 3 // 2 if one_row and tile_cols <= 16384 else cols * 9 // 8
    if tile_cols > most or tile_cols * spec.block.rows > _LARGEST_FOLDED_TILE:
        tile_cols = max(min(tile_cols, 4096 if one_row else 1024), least)
    tile_rows = max(spec.block.rows, 1024 // tile_cols)
    if spec.block.rows >= 16:
        tile_cols = min(tile_cols, _TALL_TILE_BYTES // bytes_per_element // tile_rows)
        num_warps = tile_rows * tile_cols * bytes_per_element // _TALL_WARP_BYTES
        return CastConfig(tile_rows, tile_cols, max(num_warps, 1), wide=True)
    elements = tile_rows * tile_cols
    per_warp = 2048 if tile_rows == 1 and elements > 8192 else 1024
    return CastConfig(tile_rows, tile_cols, min(max(elements // per_warp, 1), 16), wide=True)


def small_matmul_config(m: int, n: int, k: int) -> SmallMatmulConfig:
    """For a product of m <= 64 rows with 4-bit weights: as many programs as a large GPU holds at a time."""
    rows, cols = 128, 128
    programs = 512 if m <= 16 else 256
    splits = max(min(programs // max(ceil_div(n, rows), 1), ceil_div(k, 4 * cols)), 1)
    return SmallMatmulConfig(rows, cols, splits, num_warps=4, num_stages=3)


def folded_matmul_config(m: int, n: int, k: int) -> MatmulConfig:
    """For a product of FP8 operands, m x k and k x n: of few rows, tiles enough to occupy a large GPU, and a deep
    pipeline."""
    if m <= 64 and n < _MANY_COLUMNS:
        return MatmulConfig(64, 32, 256, 4, 8, promote=512)
    if m <= 64:
        return MatmulConfig(64, 64, 256, 4, 6, promote=512)
    return MatmulConfig(128, 128, 128, 8, 6 if m <= FEW_ROWS else 4, promote=512)


# Columns of a piece, pieces of a tile, and the time that a tile takes, relative to half of the largest one's;
# that of the smallest is reckoned, not measured.
_HOPPER_TILES = ((128, 2, 2.0), (128, 1, 1.05), (64, 1, 0.65))
_HOPPER_SHARED_BYTES = 232448 - 2048  # of a program, less what barriers and changes of layout take
_HOPPER_BLOCK_BYTES = 128  # of K, a row


def hopper_config(m: int, n: int, carrier: torch.dtype, out_dtype: torch.dtype, processors: int) -> HopperConfig:
    """For an output `[m, n]` of FP8 or bf16 carriers: the tiles that leave the least of the GPU idle."""

    def time(tile: tuple[int, int, float]) -> float:
        cols, pieces, cost = tile
        return cost * ceil_div(ceil_div(m, 128) * ceil_div(n, cols * pieces), processors)

    cols, pieces, _ = min(_HOPPER_TILES, key=time)
    if pieces == 2 and carrier.itemsize == out_dtype.itemsize == 2:
        cols, pieces = 256, 1  # nothing to promote, and room for the output beside three stages
    return hopper_tile_config(cols, pieces, carrier, out_dtype)


def hopper_tile_config(cols: int, pieces: int, carrier: torch.dtype, out_dtype: torch.dtype) -> HopperConfig:
    """As many stages as fit beside the output. Promotion comes every 512 of K; with two pieces, for which a
    group has to wait in shared memory, every 256."""
    out_bytes = 128 * cols * out_dtype.itemsize
    stages = (_HOPPER_SHARED_BYTES - out_bytes) // ((128 + cols * pieces) * _HOPPER_BLOCK_BYTES)
    return HopperConfig(cols, pieces, stages, promote=4 // pieces if carrier.itemsize == 1 else 0)


def carrier_config(
    m: int, n: int, k: int, carrier: torch.dtype, out_dtype: torch.dtype, on_hopper: bool, limits: Limits
) -> MatmulConfig | HopperConfig:
    """For a product of FP8, bf16 or tf32 carriers; `on_hopper`: the kernel for Hopper serves it."""
    if on_hopper:
        # large tiles leave most of a GPU idle, and the kernel for them loads less far ahead with small ones
        few = m <= FEW_ROWS and ceil_div(m, 128) * ceil_div(n, 128) > 3 * limits.processors // 4
        plain = (m <= 64 and carrier.itemsize <= 2) or (few and carrier.itemsize == 1)
        if not plain:
            return hopper_config(m, n, carrier, out_dtype, limits.processors)
    if _loads_by_registers(limits):
        config = register_matmul_config(m, carrier)
    elif carrier.itemsize == 1:
        config = folded_matmul_config(m, n, k)
    else:
        config = bf16_matmul_config(m, n, k)
        if carrier != torch.bfloat16:
            config = replace(config, block_k=config.block_k // 2)  # as many bytes
    return fitting(config, carrier.itemsize, limits.shared_bytes)


def _loads_by_registers(limits: Limits) -> bool:
    """Whether descriptors are pointers, by which Triton loads tiles into registers first."""
    return limits.capabilities.ptx and not limits.capabilities.tma


def register_matmul_config(m: int, carrier: torch.dtype) -> MatmulConfig:
    """For a product of carriers on GPUs whose registers hold the next tiles, those that are multiplied and the sums:
    short blocks of K, and half as many columns of FP8, which has its sums twice."""
    block_k, promote = 64 // carrier.itemsize, 512 if carrier.itemsize == 1 else 0
    if m <= 64:
        return MatmulConfig(64, 64, 2 * block_k, 4, 4, promote=promote)
    return MatmulConfig(128, 64 if promote else 128, block_k, 8, 4, promote=promote)


def fitting(config: MatmulConfig, element_bytes: int, shared_bytes: int) -> MatmulConfig:
    """The config with as many of its stages as a program's shared memory has room for; with shorter ones where that
    has none for two."""
    room = shared_bytes - _BARRIER_BYTES
    stage = (config.block_m + config.block_n) * config.block_k * element_bytes
    if 2 * stage > room and config.block_k > _SHORTEST_BLOCK_K:
        return fitting(replace(config, block_k=config.block_k // 2), element_bytes, shared_bytes)
    return replace(config, num_stages=min(config.num_stages, max(room // stage, 1)))


def bf16_matmul_config(m: int, n: int, k: int) -> MatmulConfig:
    """For a product of bf16 operands: of few rows as of FP8 ones."""
    if m <= 64:
        return MatmulConfig(64, 32, 128, 4, 8) if n < _MANY_COLUMNS else MatmulConfig(64, 64, 128, 4, 6)
    if m <= 512:
        return MatmulConfig(128, 128, 64, 4, 4)
    return MatmulConfig(256, 128, 64, 8, 3)


def wide_matmul_config(m: int, n: int, k: int, exact: bool) -> MatmulConfig:
    """For a product that decodes its operands on the way to the tensor cores; `exact`: to the fp32 units."""
    if exact:
        return MatmulConfig(32, 64, 32, 4, 1)
    if m <= 64:
        return MatmulConfig(32, 128, 64, 4, 3)
    if m <= FEW_ROWS:
        return MatmulConfig(64, 64, 64, 8, 3)
    return MatmulConfig(128, 128, 64, 8, 3)


def guarded_matmul_config(exact: bool) -> MatmulConfig:
    """For what is redone of a product: a few rows here and there."""
    return MatmulConfig(32, 64, 32, 4, 1) if exact else MatmulConfig(64, 128, 64, 8, 3)


def _fit(config: CastConfig, least_rows: int, least_cols: int, rows: int, cols: int) -> CastConfig:
    """The config with tiles that whole blocks fill and the matrix does not fall far short of; as many elements
    a warp as before."""
    per_warp = config.tile_rows * config.tile_cols // config.num_warps
    tile_cols = max(min(config.tile_cols, power_of_two_above(cols)), least_cols, _SMALLEST_SIDE)
    tile_rows = max(min(config.tile_rows, power_of_two_above(rows)), least_rows)
    num_warps = min(max(tile_rows * tile_cols // per_warp, 1), 8)
    return CastConfig(tile_rows, tile_cols, num_warps, config.square, config.wide, config.run)


def ceil_div(n: int, divisor: int) -> int:
    return (n + divisor - 1) // divisor


def power_of_two_above(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()

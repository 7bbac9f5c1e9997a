"""The deterministic rule: good configs for any GPU, untuned.

What it says was found on one GPU, but for reasons that hold on others: a program of one warp needs no
barriers; the more a thread has of a block, the less it spends on the block's scale; a tile's rows should be
long where rows are packed, and its two sides alike where blocks or memory run down the columns.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..spec import MXSpec

_SMALLEST_SIDE = 16  # whole 32-bit words of packed codes, whole groups of random bits


@dataclass(frozen=True)
class CastConfig:
    """How a quantise or dequantise kernel is launched: a program works on `tile_rows` x `tile_cols`.

    Attributes:
        square: a thread holds eight neighbours along both dimensions (quantise only).
        wide: packed words are moved four at a time, 16 bytes, rather than one.
    """

    tile_rows: int
    tile_cols: int
    num_warps: int
    square: bool = False
    wide: bool = False


def quantize_config(
    spec: MXSpec, rows: int, cols: int, bytes_per_element: int, row_contiguous: bool, pair: bool
) -> CastConfig:
    """For a matrix of `rows` x `cols`, whose rows (or else columns) are contiguous; `pair`: both orientations
    are written."""
    block = spec.block
    light = spec.symmetric and not spec.stochastic  # else what a thread holds besides elements leaves fewer registers
    if pair or not row_contiguous:
        config = CastConfig(64, 128 if light else 64, 4, square=True, wide=True)
    elif block.rows >= 16:
        config = CastConfig(32, 128 if light else 64, 1, square=True, wide=True)
    elif spec.element.bits == 6:
        config = CastConfig(8, 512, 2, wide=True)
    elif spec.element.bits == 8 or bytes_per_element == 4:
        config = CastConfig(4, 1024, 4, wide=True)
    elif block.rows == 1 and block.cols >= 32:
        config = CastConfig(1, 2048, 1)
    else:
        config = CastConfig(8, 1024, 4)
    least_rows, least_cols = block.rows, block.cols
    if pair:
        least_rows = least_cols = max(least_rows, least_cols)
    if config.square:
        least_rows = max(least_rows, _SMALLEST_SIDE)
    return _fit(config, least_rows, least_cols, rows, cols)


def dequantize_config(spec: MXSpec, rows: int, cols: int) -> CastConfig:
    """For a matrix of `rows` x `cols`."""
    if spec.block.rows >= 16:
        config = CastConfig(32, 256, 4, wide=True) if spec.block.cols >= 16 else CastConfig(32, 128, 1, wide=True)
    elif spec.element.bits == 6:
        config = CastConfig(4, 512, 1, wide=True) if spec.block.rows == 1 else CastConfig(4, 2048, 4, wide=True)
    elif spec.block.rows == 1:
        config = CastConfig(1, 1024, 1, wide=True)
    else:
        config = CastConfig(4, 1024, 4, wide=True)
    return _fit(config, spec.block.rows, spec.block.cols, rows, cols)


def _fit(config: CastConfig, least_rows: int, least_cols: int, rows: int, cols: int) -> CastConfig:
    """The config with tiles that whole blocks fill and the matrix does not fall far short of; as many elements
    a warp as before."""
    per_warp = config.tile_rows * config.tile_cols // config.num_warps
    tile_cols = max(min(config.tile_cols, _power_of_two_above(cols)), least_cols, _SMALLEST_SIDE)
    tile_rows = max(min(config.tile_rows, _power_of_two_above(rows)), least_rows)
    num_warps = min(max(tile_rows * tile_cols // per_warp, 1), 8)
    return CastConfig(tile_rows, tile_cols, num_warps, config.square, config.wide)


def _power_of_two_above(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()

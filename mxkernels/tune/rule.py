"""The deterministic rule: good configs for any GPU, untuned."""

from __future__ import annotations

from dataclasses import dataclass

_TILE_ELEMENTS = 4096
_SMALLEST_SIDE = 16  # whole 32-bit words of packed codes, whole groups of random bits


@dataclass(frozen=True)
class CastConfig:
    """How a quantise or dequantise kernel is launched: a program works on `tile_rows` x `tile_cols`."""

    tile_rows: int
    tile_cols: int
    num_warps: int


def cast_config(block_rows: int, block_cols: int, rows: int, cols: int, row_contiguous: bool, pair: bool) -> CastConfig:
    """A tile of about 4096 elements that whole blocks fill, long along the contiguous dimension of the input.

    Args:
        block_rows, block_cols: the block.
        rows, cols: the matrix.
        row_contiguous: elements of a row are neighbours in memory (else those of a column).
        pair: the transposed matrix is written too, so whole transposed blocks must fill the tile as well.
    """
    if pair:
        side = max(block_rows, block_cols, 64)
        return CastConfig(side, side, _warps(side * side))
    least_cols = max(block_cols, _SMALLEST_SIDE)
    if row_contiguous:
        tile_rows = max(block_rows, min(4, _power_of_two_above(rows)))
        tile_cols = max(least_cols, min(_TILE_ELEMENTS // tile_rows, _power_of_two_above(cols)))
        if tile_cols * tile_rows < _TILE_ELEMENTS:  # short rows: take more of them
            tile_rows = max(tile_rows, min(_TILE_ELEMENTS // tile_cols, _power_of_two_above(rows)))
    else:
        tile_cols = max(least_cols, min(64, _power_of_two_above(cols)))
        tile_rows = max(block_rows, min(_TILE_ELEMENTS // tile_cols, _power_of_two_above(rows)))
    return CastConfig(tile_rows, tile_cols, _warps(tile_rows * tile_cols))


def _warps(elements: int) -> int:
    return min(max(elements // 1024, 1), 8)


def _power_of_two_above(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()

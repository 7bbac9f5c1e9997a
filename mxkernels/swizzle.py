"""Scales in the order in which block-scaled tensor cores read them, and back."""

from __future__ import annotations

import torch
import torch.nn.functional as F

TILE_ROWS, TILE_COLS = 128, 4


def swizzle(scale: torch.Tensor) -> torch.Tensor:
    """Scales of `[rows, cols]` in the layout that cuBLAS and torch call 32x4x4.

    Tiles of 128 x 4 scales lie one after the other, row by row. In a tile of 512 bytes, the scale (r, c) is

        tile[r % 32 * 16 + r // 32 * 4 + c]

    Args:
        scale: uint8 `[rows, cols]`, one for each 32 elements of a row, on any device.

    Returns:
        uint8 `[ceil(rows/128), ceil(cols/4), 512]`, contiguous. What pads the last tiles is 0: no NaN (255), which
        would make one of the zeros that it multiplies, and the byte that a block of zeros has anyway.

    As an argument of `torch.nn.functional.scaled_mm`, `swizzle(scale).flatten().view(torch.float8_e8m0fnu)` is
    `scale_a` (or `scale_b`, from the scales `[N, K/32]` of the transposed second operand), with the recipe
    `ScalingType.BlockWise1x32` and `SwizzleType.SWIZZLE_32_4_4`; so it is for `torch._scaled_mm`.
    """
    rows, cols = scale.shape
    padded = F.pad(scale, (0, -cols % TILE_COLS, 0, -rows % TILE_ROWS))
    tiles = padded.view(padded.shape[0] // TILE_ROWS, 4, 32, padded.shape[1] // TILE_COLS, TILE_COLS)
    return tiles.permute(0, 3, 2, 1, 4).reshape(tiles.shape[0], tiles.shape[3], TILE_ROWS * TILE_COLS)


def unswizzle(swizzled: torch.Tensor, rows: int, cols: int) -> torch.Tensor:
    """The inverse of `swizzle`: uint8 `[rows, cols]`. `swizzled` may have any shape of as many elements.

    Raises:
        ValueError: `swizzled` has another number of elements.
    """
    down, across = -(-rows // TILE_ROWS), -(-cols // TILE_COLS)
    if swizzled.numel() != down * across * TILE_ROWS * TILE_COLS:
        raise ValueError(
            f"swizzled has {swizzled.numel()} elements; {rows} x {cols} scales have "
            f"{down * across * TILE_ROWS * TILE_COLS} in tiles of {TILE_ROWS} x {TILE_COLS}"
        )
    tiles = swizzled.reshape(down, across, 32, 4, TILE_COLS).permute(0, 3, 2, 1, 4)
    return tiles.reshape(down * TILE_ROWS, across * TILE_COLS)[:rows, :cols].contiguous()

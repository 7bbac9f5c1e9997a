"""Configs: how kernels are launched. They decide speed and never a byte (of a product: never more than the order
in which its sums are taken)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class CastConfig:
    """How a quantise, dequantise or fold kernel is launched: a program works on `tile_rows` x `tile_cols`.

    Attributes:
        square: a thread holds eight neighbours along both dimensions (quantise only).
        wide: packed words are moved four at a time, 16 bytes, rather than one.
        run: how many pieces of 16 bytes that a thread loads are neighbours along a row, 1 or 4 (quantise only).
    """

    tile_rows: int
    tile_cols: int
    num_warps: int
    square: bool = False
    wide: bool = False
    run: int = 1

    def fills_runs(self, bytes_per_element: int) -> bool:
        """Whether every thread has pieces enough for a run."""
        return self.tile_rows * self.tile_cols * bytes_per_element >= 64 * 32 * self.num_warps

    def __str__(self) -> str:
        square = ", square to a thread" if self.square else ""
        wide = ", 16 bytes at a time" if self.wide else ""
        run = ", runs along a row to a thread" if self.run > 1 else ""
        return f"tiles {self.tile_rows}x{self.tile_cols}, {self.num_warps} warps{square}{run}{wide}"


@dataclass(frozen=True)
class PairConfig:
    """How a kernel is launched that quantises both orientations by way of shared memory: a program works on `tile_rows`
    x `tile_cols`, a cell of `SIDE` x `SIDE` at a time.

    Attributes:
        stages: how many cells are in shared memory, all but one of them being loaded.
    """

    SIDE: ClassVar[int] = 128

    tile_rows: int
    tile_cols: int
    num_warps: int
    stages: int

    @property
    def cells(self) -> int:
        """Of a tile."""
        return self.tile_rows * self.tile_cols // self.SIDE**2

    @property
    def group_rows(self) -> int:
        """How many tiles, one below the other, programs work on before the next column: as many as fill sectors, of 32
        bytes, of the transpose's scales, if blocks have 32 columns."""
        return max(32 * 32 // self.tile_rows, 1)

    def __str__(self) -> str:
        return f"tiles {self.tile_rows}x{self.tile_cols} by shared memory, {self.num_warps} warps, {self.stages} stages"


@dataclass(frozen=True)
class MatmulConfig:
    """How a product is launched: a program works on `block_m` x `block_n` of the output, `block_k` of the
    reduction at a time.

    Attributes:
        group_m: programs that follow each other work on so many rows of tiles before the next column, and so
            share what the L2 cache holds.
        promote: partial sums are added in fp32 every so many of the reduction, a multiple of `block_k`; 0:
            they are fp32 as they come.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    group_m: int = 8
    promote: int = 0

    def __str__(self) -> str:
        promote = f", promoted to fp32 every {self.promote} of K" if self.promote else ""
        tile = f"{self.block_m}x{self.block_n}x{self.block_k}"
        return f"tiles {tile} in groups of {self.group_m}, {self.num_warps} warps, {self.num_stages} stages{promote}"


@dataclass(frozen=True)
class HopperConfig:
    """How programs of the Hopper kernel work on tiles of 128 rows and `cols * pieces` columns.

    Attributes:
        cols: columns of one piece, and of a tensor-core instruction.
        pieces: pieces side by side in a tile.
        stages: blocks of K, of 128 bytes, in shared memory.
        promote: blocks of K between promotions, at most `stages`; 0: sums are fp32 as they come.
        group_m: rows of tiles that go together, column by column, so that what neighbours in time read stays
            in the L2 cache.
    """

    cols: int
    pieces: int
    stages: int
    promote: int = 0
    group_m: int = 16

    def __str__(self) -> str:
        promote = f", promoted to fp32 every {self.promote * 128} of K" if self.promote else ""
        pieces = f" in {self.pieces} pieces" if self.pieces > 1 else ""
        tile = f"128x{self.cols * self.pieces}{pieces}"
        return f"persistent, tiles {tile} in groups of {self.group_m}, {self.stages} stages{promote}"


@dataclass(frozen=True)
class SmallMatmulConfig:
    """How a product of few rows is launched: a program works on `rows` of W (64 for each four warps, or a
    multiple), `cols` columns at a time, and on one of `splits` parts of K."""

    rows: int
    cols: int
    splits: int
    num_warps: int
    num_stages: int

    def __str__(self) -> str:
        tile = f"{self.rows}x{self.cols} of the weights"
        return f"tiles {tile}, K in {self.splits} parts, {self.num_warps} warps, {self.num_stages} stages"


Config = CastConfig | PairConfig | MatmulConfig | HopperConfig | SmallMatmulConfig

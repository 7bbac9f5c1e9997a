"""Tiles: which one a program works on; and those of a packed matrix between memory and registers, its words and one
value a block.

Tile (tile_row, tile_col) of a matrix of `rows` x `cols` has ROWS x COLS elements, whole blocks and whole words.
"""

import triton
import triton.language as tl

from .primitives import ceil_div


@triton.jit
def grouped_tile(program, tiles_down, tiles_across, GROUP: tl.constexpr):
    """The row and column of the tile that a program works on: down a column of GROUP tiles, then the next column."""
    group = program // (GROUP * tiles_across)
    height = tl.minimum(tiles_down - group * GROUP, GROUP)
    within = program % (GROUP * tiles_across)
    return group * GROUP + within % height, within // height


@triton.jit
def block_index(tile_row, tile_col, cols, BLOCK: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Where a tile's blocks stand among the matrix's: int64 `[ROWS / BLOCK.rows, COLS / BLOCK.cols]`."""
    block_row = tile_row * (ROWS // BLOCK.rows) + tl.arange(0, ROWS // BLOCK.rows)[:, None]
    block_col = tile_col * (COLS // BLOCK.cols) + tl.arange(0, COLS // BLOCK.cols)[None, :]
    return block_row * ceil_div(cols, BLOCK.cols) + block_col


@triton.jit
def block_inside(tile_row, tile_col, rows, cols, BLOCK: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Which of a tile's blocks exist."""
    block_row = tile_row * (ROWS // BLOCK.rows) + tl.arange(0, ROWS // BLOCK.rows)[:, None]
    block_col = tile_col * (COLS // BLOCK.cols) + tl.arange(0, COLS // BLOCK.cols)[None, :]
    return (block_row * BLOCK.rows < rows) & (block_col < ceil_div(cols, BLOCK.cols))


@triton.jit
def load_words(
    ptr, tile_row, tile_col, rows, row_bytes,
    ROWS: tl.constexpr, COLS: tl.constexpr, BITS: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    """The inverse of `store_words`: int32 `[ROWS, WORDS]`, undefined outside the matrix."""
    TILE_WORDS: tl.constexpr = COLS * BITS // 32
    # of 6 bits, a tile's words are three quarters of a power of two
    WORDS: tl.constexpr = COLS // 8 if BITS == 4 else COLS // 4
    row0 = tile_row * ROWS
    word0 = tile_col * TILE_WORDS
    i = tl.arange(0, ROWS)[:, None]
    j = tl.arange(0, WORDS)[None, :]
    if LAYOUT.alignment >= 4:
        row_words = tl.multiple_of(row_bytes // 4, LAYOUT.alignment // 4).to(tl.int64)
        place = ptr.to(tl.pointer_type(tl.int32)) + row0 * row_words + word0 + (i * row_words + j)
        if not LAYOUT.whole:
            return tl.load(place, mask=(i < rows - row0) & (j < tl.minimum(row_words - word0, TILE_WORDS)))
        elif TILE_WORDS < WORDS:
            return tl.load(place, mask=j < TILE_WORDS)
        else:
            return tl.load(place)
    else:
        words = tl.zeros([ROWS, WORDS], tl.int32)
        for byte in tl.static_range(4):
            place = ptr + row0 * row_bytes + word0 * 4 + (i.to(tl.int64) * row_bytes + j * 4 + byte)
            inside = (i < rows - row0) & (j < TILE_WORDS) & (j * 4 + byte < row_bytes - word0 * 4)
            words |= tl.load(place, mask=inside).to(tl.int32) << (8 * byte)
        return words


@triton.jit
def store_words(
    words, ptr, tile_row, tile_col, rows, row_bytes, TILE_WORDS: tl.constexpr, LAYOUT: tl.constexpr
):  # fmt: skip
    """Store a tile of packed words, TILE_WORDS of each row, in a matrix of `rows` x `row_bytes` bytes: as words
    where its rows are aligned to them, else byte by byte."""
    row0 = tile_row * words.shape[0]
    word0 = tile_col * TILE_WORDS
    i = tl.arange(0, words.shape[0])[:, None]
    j = tl.arange(0, words.shape[1])[None, :]
    if LAYOUT.alignment >= 4:
        row_words = tl.multiple_of(row_bytes // 4, LAYOUT.alignment // 4).to(tl.int64)
        place = ptr.to(tl.pointer_type(tl.int32)) + row0 * row_words + word0 + (i * row_words + j)
        if not LAYOUT.whole:
            tl.store(place, words, mask=(i < rows - row0) & (j < tl.minimum(row_words - word0, TILE_WORDS)))
        elif TILE_WORDS < words.shape[1]:
            tl.store(place, words, mask=j < TILE_WORDS)
        else:
            tl.store(place, words)
    else:
        for byte in tl.static_range(4):
            place = ptr + row0 * row_bytes + word0 * 4 + (i.to(tl.int64) * row_bytes + j * 4 + byte)
            inside = (i < rows - row0) & (j < TILE_WORDS) & (j * 4 + byte < row_bytes - word0 * 4)
            tl.store(place, (words >> (8 * byte)).to(tl.uint8), mask=inside)

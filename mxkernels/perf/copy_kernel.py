"""A copy with any ratio of bytes read to bytes written and almost no arithmetic. Imports Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..ops.launch import Launch

TILES = (1, 4)  # of the larger side, a program: which is faster depends on what is written for what is read
_TILE = 512  # words of 8 bytes that a program loads or stores at once: 16 bytes a thread
_LINE = 16  # words in 128 bytes: no line is shared between programs


@triton.jit
def copy_kernel(
    source_ptr, target_ptr, source_words, target_words, source_share, target_share,
    LOADS: tl.constexpr, STORES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Each program reads its share of the source, contiguous, tile by tile, and fills its share of the target
    with the exclusive or of those tiles, so that no load can be left out."""
    program = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, TILE)
    words = tl.zeros([TILE], dtype=tl.int64)
    for tile in tl.static_range(LOADS):
        within = tile * TILE + lane
        place = program * source_share + within
        words ^= tl.load(source_ptr + place, mask=(within < source_share) & (place < source_words), other=0)
    for tile in tl.static_range(STORES):
        within = tile * TILE + lane
        place = program * target_share + within
        tl.store(target_ptr + place, words, mask=(within < target_share) & (place < target_words))


def words_of(size: int) -> int:
    """The int64 words that hold `size` bytes, in whole lines, so that every access is a full vector."""
    return triton.cdiv(size, 8 * _LINE) * _LINE


def copy_launch(source: torch.Tensor, target: torch.Tensor, tiles: int) -> Launch:
    """The launch that reads all of `source` and writes all of `target`, int64 vectors, each of whole lines."""
    programs = max(triton.cdiv(max(source.numel(), target.numel()), tiles * _TILE), 1)
    source_share = _share(source.numel(), programs)
    target_share = _share(target.numel(), programs)
    return Launch(
        copy_kernel,
        programs,
        {
            "source_ptr": source,
            "target_ptr": target,
        },
        {
            "source_words": source.numel(),
            "target_words": target.numel(),
            "source_share": source_share,
            "target_share": target_share,
            "LOADS": triton.cdiv(source_share, _TILE),
            "STORES": triton.cdiv(target_share, _TILE),
            "TILE": _TILE,
        },
        {"num_warps": 8},
    )


def _share(words: int, programs: int) -> int:
    return triton.cdiv(triton.cdiv(words, programs), _LINE) * _LINE

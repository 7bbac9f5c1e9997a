"""Prepared weights put back into the contract's order: see `PreparedTensor` for the order that they are held in."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..prepared import BAND
from .launch import Launch
from .primitives import NAN_BYTE

_ROWS = 32  # of a program's tile
_MOST_GROUPS = 4
_GROUP_WORDS = tl.constexpr(16)


@triton.jit
def restore_kernel(
    words_ptr, scale_ptr, out_words_ptr, out_scale_ptr, groups,
    ADDED: tl.constexpr, BLOCKS: tl.constexpr, BAND: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """A tile of ROWS rows and GROUPS groups a program, all within the matrix as it is held; codes as int32 words."""
    tiles_across = groups // GROUPS
    row0 = (tl.program_id(0) // tiles_across).to(tl.int64) * ROWS
    group0 = (tl.program_id(0) % tiles_across).to(tl.int64) * GROUPS
    held = (row0 // BAND * groups + group0) * BAND + row0 % BAND  # a row of a group is a line of the memory held
    i = tl.arange(0, ROWS)[:, None]

    # Word 4 t + u of a line has of byte h and i the codes j: of column 32 u + 16 i + 8 j + 2 t + h. In order, word
    # 4 u + 2 i + j has byte t, and of it the half h.
    u = tl.arange(0, GROUPS * 4)[None, :]
    source = words_ptr + held * _GROUP_WORDS + (i + u // 4 * BAND) * _GROUP_WORDS + u % 4
    words = (tl.load(source), tl.load(source + 4), tl.load(source + 8), tl.load(source + 12))
    even = tl.join(_word(words, 0), _word(words, 8))
    odd = tl.join(_word(words, 4), _word(words, 12))
    out = tl.reshape(tl.join(even, odd), [ROWS, GROUPS * _GROUP_WORDS])
    word = tl.arange(0, GROUPS * _GROUP_WORDS)[None, :]
    tl.store(out_words_ptr + (row0 * groups + group0) * _GROUP_WORDS + (i * groups * _GROUP_WORDS + word), out)

    block = tl.arange(0, GROUPS * BLOCKS)[None, :]
    line = i + block // BLOCKS * BAND
    scale = tl.load(scale_ptr + held * BLOCKS + (line * BLOCKS + block % BLOCKS))
    scale = tl.where(scale == NAN_BYTE, NAN_BYTE, scale.to(tl.int32) - ADDED).to(tl.uint8)
    tl.store(out_scale_ptr + (row0 * groups + group0) * BLOCKS + (i * groups * BLOCKS + block), scale)


@triton.jit
def _word(words, SHIFT: tl.constexpr):
    """The codes at bits SHIFT and SHIFT + 16 of four words, side by side."""
    word = _byte(words[0], SHIFT)
    for t in tl.static_range(1, 4):
        word |= _byte(words[t], SHIFT) << (8 * t)
    return word


@triton.jit
def _byte(word, SHIFT: tl.constexpr):
    codes = (word >> SHIFT) & 0x000F000F
    return (codes | codes >> 12) & 0xFF


def restore_tensors(
    codes: torch.Tensor, scale: torch.Tensor, out_codes: torch.Tensor, out_scale: torch.Tensor
) -> dict[str, torch.Tensor]:
    """What the kernel takes, in its order."""
    return {
        "words_ptr": codes.view(torch.int32),
        "scale_ptr": scale,
        "out_words_ptr": out_codes.view(torch.int32),
        "out_scale_ptr": out_scale,
    }


def restore_launch(
    codes: torch.Tensor, scale: torch.Tensor, added: int, out_codes: torch.Tensor, out_scale: torch.Tensor
) -> Launch:
    """The launch that writes the whole matrix as it is held, what fills its tiles included: codes `[bands * BAND,
    groups * 64]` and scale `[bands * BAND, groups * GROUP / c]`, contiguous."""
    bands, groups, _, blocks = scale.shape
    tile_groups = next(count for count in (_MOST_GROUPS, 2, 1) if groups % count == 0)
    return Launch(
        restore_kernel,
        bands * (BAND // _ROWS) * (groups // tile_groups),
        {**restore_tensors(codes, scale, out_codes, out_scale)},
        {
            "groups": groups,
            "ADDED": added,
            "BLOCKS": blocks,
            "BAND": BAND,
            "ROWS": _ROWS,
            "GROUPS": tile_groups,
        },
        {"num_warps": 4},
    )

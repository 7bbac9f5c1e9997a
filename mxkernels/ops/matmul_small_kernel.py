"""The product with few rows of activations (decoding): packed 4-bit weights are read once and decoded in registers.

`out[M, N] = x[M, K] W[N, K]^T`, M up to 64. Reading W is what takes the time, so W is the first operand of the
tensor cores, which may come from registers, and programs share it out along N and along K. What they sum is
summed by a second kernel, in order, so that the result is always the same.

A thread reads 16 bytes of a row, 32 codes, and keeps them. Which columns it has of the tensor cores' operand is the
hardware's affair. Either the codes have been put in that order once (`PreparedTensor`), or, as it does not matter in
which order a sum along K is made, the few columns of x are moved instead (`x_in_hardware_order`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .. import gpu, prepared
from ..spec import MXSpec
from ..tune import SmallMatmulConfig
from .launch import Launch
from .matmul_kernel import store_product
from .primitives import NAN_BYTE, bits_of, ceil_div, decode, scale_value, to_fp32
from .tiles import load_words

BAND = tl.constexpr(prepared.BAND)
GROUP = tl.constexpr(prepared.GROUP)


@triton.jit
def matmul_small_kernel(
    x_ptr, codes_ptr, scale_ptr, partial_ptr, M, N, K, x_stride, row_bytes,
    SPEC: tl.constexpr, X_ROWS: tl.constexpr, CONFIG: tl.constexpr, LAYOUT: tl.constexpr, WARPS: tl.constexpr,
    GPU: tl.constexpr,
):  # fmt: skip
    """`partial[split, M, N]`, the product over one part of K."""
    ROWS: tl.constexpr = CONFIG.rows
    COLS: tl.constexpr = CONFIG.cols
    SPLITS: tl.constexpr = CONFIG.splits
    if GPU.dependent_launch:
        gdc_launch_dependents()  # so that the second kernel is there when this one ends
    split = tl.program_id(0) % SPLITS
    tile = (tl.program_id(0) // SPLITS).to(tl.int64)
    steps = ceil_div(K, COLS)
    steps_each = ceil_div(steps, SPLITS)
    first = split * steps_each

    total = tl.zeros([ROWS, X_ROWS], tl.float32)
    for step in tl.range(first, tl.minimum(first + steps_each, steps)):
        if LAYOUT.prepared:
            words = load_prepared(
                codes_ptr.to(tl.pointer_type(tl.int32)), tile, step, N, K, GROUP // 8, ROWS, COLS, LAYOUT
            )
            scale = load_prepared(scale_ptr, tile, step, N, K, GROUP // SPEC.block.cols, ROWS, COLS, LAYOUT)
        else:
            words = load_words(codes_ptr, tile, step, N, row_bytes, ROWS, COLS, 4, LAYOUT)
            scale = load_scale(scale_ptr, tile, step, N, K, SPEC, ROWS, COLS, LAYOUT)
        x = load_x(x_ptr, step, M, K, x_stride, X_ROWS, COLS, LAYOUT)
        if not GPU.mma:
            x = to_fp32(x)  # which the interpreter multiplies rightly
        if not LAYOUT.prepared:
            x = x_in_hardware_order(x)
        w = weights_in_hardware_order(words, scale, WARPS, SPEC, LAYOUT, GPU)
        total = tl.dot(w, x.T, total, input_precision="ieee")

    i = tl.arange(0, X_ROWS)[:, None]
    j = tl.arange(0, ROWS)[None, :]
    total = memory_order(total, WARPS).T
    part = partial_ptr + i.to(tl.int64) * N + tile * ROWS + j
    inside = (i < M) & (j < N - tile * ROWS)
    tl.store(part + split.to(tl.int64) * M * N, total, mask=inside)


@triton.jit
def load_prepared(
    ptr, tile, step, N, K, EACH: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, LAYOUT: tl.constexpr
):  # fmt: skip
    """A tile of a `PreparedTensor`, EACH for a row's GROUP columns: `[ROWS, EACH * COLS / GROUP]`; 0 outside."""
    i = tl.arange(0, ROWS)[:, None]
    j = tl.arange(0, EACH * COLS // GROUP)[None, :]
    groups = ceil_div(K, GROUP)
    first = tile * ROWS // BAND * groups + step * (COLS // GROUP)
    within = (tile * ROWS % BAND + i % BAND) * EACH + j % EACH
    place = ptr + first * (BAND * EACH) + (i // BAND * groups + j // EACH) * (BAND * EACH) + within
    if LAYOUT.whole:
        return tl.load(place)
    else:
        return tl.load(place, mask=(i < N - tile * ROWS) & (step * (COLS // GROUP) + j // EACH < groups), other=0)


@triton.jit
def load_scale(
    ptr, tile, step, N, K, SPEC: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, LAYOUT: tl.constexpr
):  # fmt: skip
    """The scale bytes of a tile: uint8 `[ROWS, COLS / C]` for blocks of C columns; 0 outside the matrix."""
    BLOCKS: tl.constexpr = COLS // SPEC.block.cols
    i = tl.arange(0, ROWS)[:, None]
    j = tl.arange(0, BLOCKS)[None, :]
    row_blocks = ceil_div(K, SPEC.block.cols)
    if LAYOUT.whole:
        row_blocks = row_blocks // BLOCKS * BLOCKS  # what it is; so the compiler sees that a row's are aligned
    place = ptr + tile * ROWS * row_blocks + step * BLOCKS + (i.to(tl.int64) * row_blocks + j)
    if LAYOUT.whole:
        return tl.load(place)
    else:
        return tl.load(place, mask=(i < N - tile * ROWS) & (j < row_blocks - step * BLOCKS), other=0)


@triton.jit
def load_x(ptr, step, M, K, stride, ROWS: tl.constexpr, COLS: tl.constexpr, LAYOUT: tl.constexpr):
    """Columns of x `[ROWS, COLS]`, 0 outside the matrix."""
    i = tl.arange(0, ROWS)[:, None]
    k = step * COLS + tl.arange(0, COLS)[None, :]
    if LAYOUT.whole:
        inside = i < M
    else:
        inside = (i < M) & (k < K)
    return tl.load(ptr + i.to(tl.int64) * stride + k, mask=inside, other=0.0)


@triton.jit
def reduce_kernel(
    partial_ptr, bias_ptr, out_ptr, M, N, SPLITS: tl.constexpr, COLS: tl.constexpr, GPU: tl.constexpr
):  # fmt: skip
    """`out[M, N]`: the sum of `partial[SPLITS, M, N]` in order, plus `bias[N]` if there is one, rounded once."""
    if GPU.dependent_launch:
        gdc_wait()
    tiles = ceil_div(N, COLS)
    row = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    col = tile * COLS + tl.arange(0, COLS)[None, :]
    total = tl.zeros([1, COLS], tl.float32)
    for split in tl.static_range(SPLITS):
        part = partial_ptr + (split * M + row).to(tl.int64) * N
        total += tl.load(part + col, mask=col < N, other=0.0)
    store_product(total, row, tile, bias_ptr, out_ptr, M, N, None, GPU)


# --- the hardware's order ----------------------------------------------------------------------------------
#
# In the tensor cores' first operand, warp w of W has 16 rows of each 16 W, and its thread 4 g + t, of these and
# of each 16 columns, has rows g and g + 8 and columns 2 t, 2 t + 1, 2 t + 8 and 2 t + 9. In memory the thread's
# words are u = 0 … 3 of a row, at 4 t + u of 16, and the rows 8 w + g and 8 W + 8 w + g of each 16 W are warp w's.
# A word's codes i and i + 4, for i = 0 … 3, are decoded side by side, and are neighbours here too.


@triton.jit
def weights_in_hardware_order(
    words, scale, WARPS: tl.constexpr, SPEC: tl.constexpr, LAYOUT: tl.constexpr, GPU: tl.constexpr
):  # fmt: skip
    """Words `[ROWS, COLS / 8]` and the scale bytes of their blocks, to bf16 (fp32 without tensor cores)
    `[ROWS, COLS]`."""
    ROWS: tl.constexpr = words.shape[0]
    WORDS: tl.constexpr = words.shape[1]
    ELEMENT: tl.constexpr = SPEC.element
    factor = scale_factor(scale.to(tl.int32), LAYOUT.added, GPU)
    if not LAYOUT.prepared:
        low = spread_columns(factor, 1, WORDS)
        high = low
    elif SPEC.block.cols == 16:  # half of what a thread has of a word
        low, high = tl.split(tl.reshape(factor, [ROWS, WORDS // 4, 2]))
        low = spread_columns(low, 4, WORDS)
        high = spread_columns(high, 4, WORDS)
    else:
        low = spread_columns(factor, 4, WORDS)
        high = low
    first = decode_pair(words, low, 0, ELEMENT, LAYOUT, GPU)
    second = decode_pair(words, low, 1, ELEMENT, LAYOUT, GPU)
    third = decode_pair(words, high, 2, ELEMENT, LAYOUT, GPU)
    fourth = decode_pair(words, high, 3, ELEMENT, LAYOUT, GPU)
    pairs = tl.join(tl.join(first, second), tl.join(third, fourth))  # … half of the pair, low bit of i, high bit
    w = tl.reshape(pairs, [ROWS // (16 * WARPS), 2, WARPS, 8, WORDS // 16, 4, 4, 2, 2, 2])
    w = tl.permute(w, [0, 2, 1, 3, 4, 6, 9, 8, 5, 7])
    return tl.reshape(w, [ROWS, WORDS * 8])


@triton.jit
def x_in_hardware_order(x):
    """The columns of x as `weights_in_hardware_order` has those of W that was not prepared."""
    moved = tl.reshape(x, [x.shape[0], x.shape[1] // GROUP, 4, 4, 2, 4])  # … t, u, half of the pair, i
    moved = tl.permute(moved, [0, 1, 3, 5, 2, 4])
    return tl.reshape(moved, x.shape)


@triton.jit
def memory_order(total, WARPS: tl.constexpr):
    """Rows `[ROWS, n]` of the product back to the order of the rows of W in memory."""
    rows = tl.reshape(total, [total.shape[0] // (16 * WARPS), WARPS, 2, 8, total.shape[1]])
    return tl.reshape(tl.permute(rows, [0, 2, 1, 3, 4]), total.shape)


@triton.jit
def spread_columns(per_block, THREADS: tl.constexpr, WORDS: tl.constexpr):
    """One value a block `[R, B]` to one a word, `[R, WORDS]`; in each GROUP, each of THREADS has all blocks."""
    R: tl.constexpr = per_block.shape[0]
    GROUPS: tl.constexpr = WORDS // 16
    BLOCKS: tl.constexpr = per_block.shape[1] // GROUPS
    each = tl.reshape(per_block, [R, GROUPS, 1, BLOCKS, 1])
    return tl.reshape(tl.broadcast_to(each, [R, GROUPS, THREADS, BLOCKS, 16 // THREADS // BLOCKS]), [R, WORDS])


# --- decoding, two codes at a time -------------------------------------------------------------------------


@triton.jit
def scale_factor(byte, ADDED: tl.constexpr, GPU: tl.constexpr):
    """2**(byte - 127), or NaN: fp32, or with PTX twice in bf16, as int32. With PTX and ADDED, which is in the bytes,
    it stays in, and NaN is infinity."""
    if GPU.ptx:
        if ADDED:
            return byte * 0x00800080
        special = ((byte + 1) & 255) < 2  # 0 is a subnormal and 255 a NaN, so both have a bit more
        return byte * 0x00800080 | tl.where(special, 0x00400040, 0)
    else:
        return tl.where(byte == NAN_BYTE, float("nan"), scale_value(byte - ADDED))


@triton.jit
def decode_pair(words, factor, PAIR: tl.constexpr, ELEMENT: tl.constexpr, LAYOUT: tl.constexpr, GPU: tl.constexpr):
    """Codes PAIR and PAIR + 4 of words `[R, W]`, times the words' factors: `[R, W, 2]` in bf16, or in fp32 without
    tensor cores. bf16 holds both exactly, subnormals included."""
    if GPU.ptx:
        pair = multiply_add_pairs(code_pair(words, PAIR, ELEMENT, LAYOUT.added), factor, -0x7FFF8000)
        halves = tl.join(pair & 0xFFFF, pair >> 16)
    else:
        codes = tl.join((words >> (4 * PAIR)) & 15, (words >> (4 * PAIR + 16)) & 15)
        value = decode(codes, ELEMENT) * factor[:, :, None]
        if not GPU.mma:
            return value
        halves = bits_of(value) >> 16
    return halves.to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def code_pair(words, PAIR: tl.constexpr, ELEMENT: tl.constexpr, ADDED: tl.constexpr):
    """Codes PAIR and PAIR + 4 of words, as two bf16 numbers in an int32: their values, or, if ADDED, these times
    2**-ADDED.

    An integer's bits, with those of 128 above them and the sign's complement in place of the sign, are bf16's
    for the integer + 136. A float's bits, put where its subnormals are bf16's, are its value times
    2**(bias - 127); ADDED is 127 - bias.
    """
    LOW: tl.constexpr = 4 * (PAIR % 2)  # bits below the code, of those in question
    words = words >> (8 * (PAIR // 2))
    if ELEMENT.twos_complement:
        bits = ((words >> LOW) & 0x000F000F) ^ 0x43084308
        return multiply_add_pairs(bits, 0x3F803F80, -0x3CF73CF8)  # times 1, less 136
    else:
        DROPPED: tl.constexpr = 7 - ELEMENT.mantissa_bits
        # the code twice, its sign and its magnitude each in the right place
        twice = (words & (0x000F000F << LOW)) * (((1 << 12) + (1 << DROPPED)) >> LOW)
        bits = twice & (-0x7FFF8000 | (0x00070007 << DROPPED))
        if ADDED:
            return bits
        return multiply_add_pairs(bits, (254 - ELEMENT.bias) * 0x00800080, -0x7FFF8000)


@triton.jit
def multiply_add_pairs(a, b, c):
    """`a * b + c`, each two bf16 numbers in an int32, rounded once; -0x7FFF8000 is twice -0."""
    return tl.inline_asm_elementwise(
        "fma.rn.bf16x2 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], tl.int32, is_pure=True, pack=1
    )


# --- launches ----------------------------------------------------------------------------------------------


def matmul_small_launches(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    spec: MXSpec,
    bias: torch.Tensor | None,
    partial: torch.Tensor,
    out: torch.Tensor,
    config: SmallMatmulConfig,
    capabilities: gpu.Capabilities | None = None,
    added: int | None = None,
) -> tuple[Launch, Launch]:
    """The launches, one after the other, that write `out` `[M, N]`.

    Args:
        x: bfloat16 `[M, K]`, M at most 64, its rows contiguous.
        codes, scale: contiguous, of W `[N, K]`, whose symmetric `spec` has a 4-bit element and blocks of one row
            and 16 columns or more; or those of its `PreparedTensor`, with what was `added`.
        bias: `[N]`, or None.
        partial: float32, `config.splits * M * N` elements, which are overwritten.
        out: bfloat16, float16 or float32, contiguous.
    """
    (m, k), n = x.shape, out.shape[1]
    capabilities = capabilities or gpu.device_capabilities(x.device)
    product = Launch(
        matmul_small_kernel,
        triton.cdiv(n, config.rows) * config.splits,
        {"x_ptr": x, "codes_ptr": codes, "scale_ptr": scale, "partial_ptr": partial},
        {
            "M": m,
            "N": n,
            "K": k,
            "x_stride": x.stride(0),
            "row_bytes": (k + 1) // 2,
            "SPEC": spec,
            "X_ROWS": max(triton.next_power_of_2(m), 16),
            "CONFIG": config,
            "LAYOUT": WeightLayout.of(codes, n, k, config, added),
            "WARPS": config.num_warps,
            "GPU": capabilities,
        },
        {"num_warps": config.num_warps, "num_stages": config.num_stages},
    )
    cols = 256
    reduction = Launch(
        reduce_kernel,
        m * triton.cdiv(n, cols),
        {"partial_ptr": partial, "bias_ptr": bias, "out_ptr": out},
        {"M": m, "N": n, "SPLITS": config.splits, "COLS": cols, "GPU": capabilities},
        {"num_warps": 2, **({"launch_pdl": True} if capabilities.dependent_launch else {})},
    )
    return product, reduction


@dataclass(frozen=True)
class WeightLayout:
    """How W lies in memory.

    Attributes:
        alignment, whole: as `Layout` says, of rows that were not prepared.
        prepared: it is a `PreparedTensor`'s.
        added: to its scale bytes.
    """

    alignment: int
    whole: bool
    prepared: bool
    added: int

    @classmethod
    def of(cls, codes: torch.Tensor, n: int, k: int, config: SmallMatmulConfig, added: int | None) -> WeightLayout:
        """What may be taken for granted: 16 bytes at a time at the most."""
        bits = (k + 1) // 2 | codes.data_ptr() | 16
        whole = n % config.rows == 0 and k % config.cols == 0
        return cls(bits & -bits, whole, added is not None, added or 0)

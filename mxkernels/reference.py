"""The oracle: quantise and dequantise in plain PyTorch, by tables and search in float64.

It shares with the kernels nothing but the facts in `formats` and `spec`, so that a misunderstanding
cannot hide in both. It serves tensors on the CPU, and runs on any device. Speed is not its aim; large
tensors are worked on a band of rows at a time.
"""

from __future__ import annotations

import torch

from .folded import Window
from .formats import ElementFormat
from .spec import MXSpec

NAN_BYTE = 255
_BAND_ELEMENTS = 1 << 22
_NAN_BITS = {
    torch.bfloat16: (torch.int16, 0x7FC0),
    torch.float16: (torch.int16, 0x7E00),
    torch.float32: (torch.int32, 0x7FC00000),
}

Parts = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]
FoldedParts = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def quantize(matrix: torch.Tensor, spec: MXSpec, seed: int | None = None) -> Parts:
    """Quantise a matrix.

    Args:
        matrix: `[R, C]`, bfloat16, float16 or float32.
        spec: what to make of it.
        seed: 64 bits that key the random bits; needed if and only if `spec.rounding` is stochastic.

    Returns:
        codes: uint8 `[R, P]`; scale: uint8 `[ceil(R/r), ceil(C/c)]`; offset: float16, as scale, or None.
    """
    rows, cols = matrix.shape
    codes = matrix.new_empty((rows, spec.packed_cols(cols)), dtype=torch.uint8)
    scale = matrix.new_empty(spec.scale_shape(rows, cols), dtype=torch.uint8)
    offset = None if spec.symmetric else torch.empty_like(scale, dtype=torch.float16)
    block_rows = spec.block.rows
    band = max(_BAND_ELEMENTS // max(cols, 1) // block_rows, 1) * block_rows
    for first in range(0, rows if cols else 0, band):
        here = slice(first, min(first + band, rows))
        blocks = slice(first // block_rows, (here.stop + block_rows - 1) // block_rows)
        band_codes, band_scale, band_offset = _quantize_band(matrix[here], spec, seed, first)
        codes[here] = pack(band_codes, spec.element)
        scale[blocks] = band_scale
        if offset is not None and band_offset is not None:
            offset[blocks] = band_offset
    return codes, scale, offset


def dequantize(
    codes: torch.Tensor,
    scale: torch.Tensor,
    offset: torch.Tensor | None,
    spec: MXSpec,
    cols: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Decode a matrix of `cols` columns: `values[codes] * 2**(scale - 127) + offset`, rounded once to `dtype`.

    Scale byte 255 decodes to NaN. The sum with the offset is rounded to fp32 first, as the contract says.
    """
    rows = codes.shape[0]
    out = codes.new_empty((rows, cols), dtype=dtype)
    block_rows = spec.block.rows
    band = max(_BAND_ELEMENTS // max(cols, 1) // block_rows, 1) * block_rows
    values = torch.tensor(spec.element.values, dtype=torch.float64, device=codes.device)
    for first in range(0, rows if cols else 0, band):
        here = slice(first, min(first + band, rows))
        blocks = slice(first // block_rows, (here.stop + block_rows - 1) // block_rows)
        height = here.stop - first
        factor = power_of_two(scale[blocks].int() - 127)
        factor = factor.masked_fill(scale[blocks] == NAN_BYTE, torch.nan)
        decoded = values[unpack(codes[here], spec.element, cols).long()] * _spread(factor, spec, height, cols)
        if offset is not None:
            decoded = (decoded + _spread(offset[blocks].double(), spec, height, cols)).float()
        out[here] = round_to(decoded, dtype)
    return out


def fold(codes: torch.Tensor, scale: torch.Tensor, spec: MXSpec, window: Window) -> FoldedParts:
    """Rewrite a matrix in an FP8 format with one power of two a row, where that loses nothing.

    Args:
        codes: uint8 `[R, C]`, one element a byte; scale: uint8 `[ceil(R/r), ceil(C/c)]`.
        spec: a symmetric spec; window: how its elements fit the FP8 format.

    Returns:
        FP8 codes uint8 `[R, C]`; scale, as before; reference uint8 `[ceil(R/r)]`; int32 `[1]`, not 0 if a
        block has a scale of its own, and uint8 `[ceil(R/r)]`, in which rows of blocks: see `mxkernels.FoldedTensor`.
    """
    rows, cols = codes.shape
    is_nan = scale == NAN_BYTE
    largest = scale.int().masked_fill(is_nan, 0)
    largest = largest.amax(1) if scale.shape[1] else largest.new_zeros(scale.shape[0])
    reference = (largest - window.top).clamp(min=0)
    fits = is_nan | (scale.int() - reference[:, None] >= window.low)
    folded_scale = torch.where(fits, reference[:, None], (scale.int() - window.top).clamp(min=0))
    values = torch.tensor(spec.element.values, dtype=torch.float64, device=codes.device)[codes.long()]
    shift = (scale.int() - folded_scale).masked_fill(is_nan, 0)
    folded = encode(values * power_of_two(_spread(shift, spec, rows, cols)), window.carrier, None)
    folded = folded.masked_fill(_spread(is_nan, spec, rows, cols), 0x7F)
    row = ((values != 0) & ~_spread(fits, spec, rows, cols)).any(1)
    height = spec.block.rows
    outside = torch.nn.functional.pad(row, (0, -rows % height)).view(-1, height).any(1)
    folded_scale = folded_scale.masked_fill(is_nan, NAN_BYTE)
    flags = outside.any().int().reshape(1), outside.to(torch.uint8)
    return folded, folded_scale.to(torch.uint8), reference.to(torch.uint8), *flags


def matmul(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """`a @ b + bias` of decoded operands (fp32) in float64, rounded once to `dtype`."""
    product = a.double() @ b.double()
    return round_to(product if bias is None else product + bias.double(), dtype)


def hadamard(matrix: torch.Tensor, size: int, signs: torch.Tensor | None) -> torch.Tensor:
    """The block Hadamard transform of rows, `[R, C]` to `[R, ceil(C/size) * size]`, of `mxkernels.ops.hadamard`.

    The order of the sums is part of its definition, since each is rounded to fp32.
    """
    x = torch.nn.functional.pad(matrix.float(), (0, -matrix.shape[1] % size))
    if signs is not None:
        negated = signs.repeat(x.shape[1] // size) < 0
        x = torch.where(negated, -x, x)
    for distance in (1 << stage for stage in range(size.bit_length() - 1)):
        first, second = x.unflatten(1, (x.shape[1] // (2 * distance), 2, distance)).unbind(2)
        x = torch.stack([first + second, first - second], dim=2).flatten(1)
    factor = torch.tensor(size**-0.5, dtype=torch.float32, device=matrix.device)
    return round_to(x * factor, matrix.dtype)


def _quantize_band(x: torch.Tensor, spec: MXSpec, seed: int | None, first_row: int) -> Parts:
    """Codes (unpacked), scales and offsets of a few rows; a block's rows are all here."""
    rows, cols = x.shape
    element = spec.element
    finite = x.isfinite()
    bad = _blockwise(~finite, spec, fill=False).any(-1)
    x = x.float().masked_fill(~finite, 0.0)

    offset = None
    if not spec.symmetric:
        largest = _blockwise(x, spec, fill=-torch.inf).amax(-1)
        least = _blockwise(x, spec, fill=torch.inf).amin(-1)
        middle = (largest / 2 + least / 2).clamp(-65504, 65504).half()
        offset = torch.where(bad | (middle == 0), 0.0, middle).half()
        x = x - _spread(offset.float(), spec, rows, cols)

    amax = _blockwise(x.double().abs(), spec, fill=0.0).amax(-1)
    exponent = scale_exponent(amax, element, spec.scale_rounding).clamp(-127, 127)
    exponent = exponent.masked_fill(amax == 0, -127)
    scale = (exponent + 127).masked_fill(bad, NAN_BYTE).to(torch.uint8)

    v = x.double() * power_of_two(-_spread(exponent, spec, rows, cols))
    random = random_bits(rows, cols, seed, first_row, x.device) if spec.stochastic else None
    codes = encode(v, element, random).masked_fill(_spread(bad, spec, rows, cols), 0)
    return codes, scale, offset


def scale_exponent(amax: torch.Tensor, element: ElementFormat, scale_rounding: str) -> torch.Tensor:
    """Step 4 of the contract, before the clamp: the exponent `e` for blocks whose largest magnitude is
    `amax > 0` (float64)."""
    half_s, exponent = torch.frexp(amax)
    s, p = 2 * half_s, exponent - 1
    if scale_rounding == "floor":
        return p - element.emax
    if scale_rounding == "ceil":
        return p + (s > 1).int() - element.emax
    if scale_rounding == "even":
        return p + (s >= 2 - 2.0 ** -(element.scale_mantissa_bits + 1)).int() - element.emax
    smallest = p - 16  # rceil: try exponents upwards until the largest value fits
    for step in range(32):
        too_small = amax * power_of_two(-(p - 16 + step)) > element.max
        smallest = torch.where(too_small, p - 16 + step + 1, smallest)
    return smallest


def encode(v: torch.Tensor, element: ElementFormat, random: torch.Tensor | None) -> torch.Tensor:
    """Steps 6 and 7: round float64 `v` on the format's grid. `random` holds 16 bits an element, or None for
    nearest-even. Returns uint8 codes, one a byte."""
    table = torch.tensor(element.magnitudes, dtype=torch.float64, device=v.device)
    magnitude = v.abs().contiguous()
    lower = torch.searchsorted(table, magnitude, right=True) - 1
    upper = (lower + 1).clamp(max=element.max_code)
    gap = (table[upper] - table[lower]).masked_fill(upper == lower, torch.inf)
    position = (magnitude - table[lower]) / gap
    if random is None:
        up = (position > 0.5) | ((position == 0.5) & (lower % 2 == 1))
    else:
        # f * 2**16 + R + 1/2 >= 2**16, in integers: twice both sides, and the left one's fraction cannot matter
        up = (position * 2**17).floor() + 2 * random + 1 >= 2**17
    code = torch.where(up, upper, lower)
    if element.twos_complement:
        return (torch.where(v < 0, -code, code) & (2 * element.sign_bit - 1)).to(torch.uint8)
    return (code + element.sign_bit * v.signbit()).to(torch.uint8)


def random_bits(
    rows: int, cols: int, seed: int | None, first_row: int = 0, device: torch.device | None = None
) -> torch.Tensor:
    """The 16 random bits of each element of rows `first_row …` of a matrix of `cols` columns, as int64."""
    if seed is None:
        raise ValueError("seed is None; stochastic rounding needs 64 bits")
    groups = (cols + 7) // 8
    counter = torch.arange(first_row * groups, (first_row + rows) * groups, dtype=torch.int64, device=device)
    zero = torch.zeros_like(counter)
    words = philox((counter & 0xFFFFFFFF, counter >> 32, zero, zero), seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF)
    halves = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    return torch.stack(halves, dim=-1).reshape(rows, groups * 8)[:, :cols]


def philox(counter: tuple[torch.Tensor, ...], key_low: int, key_high: int) -> tuple[torch.Tensor, ...]:
    """Philox-4x32-10 (Salmon et al., SC 2011) on words held in int64 tensors."""
    c0, c1, c2, c3 = counter
    for _ in range(10):
        # int64 products wrap, but their 64 bits are right: mask what the arithmetic shift brings in
        product0, product1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        high0, low0 = (product0 >> 32) & 0xFFFFFFFF, product0 & 0xFFFFFFFF
        high1, low1 = (product1 >> 32) & 0xFFFFFFFF, product1 & 0xFFFFFFFF
        c0, c1, c2, c3 = high1 ^ c1 ^ key_low, low1, high0 ^ c3 ^ key_high, low0
        key_low = (key_low + 0x9E3779B9) & 0xFFFFFFFF
        key_high = (key_high + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


def pack(codes: torch.Tensor, element: ElementFormat) -> torch.Tensor:
    """`[R, C]` codes, one a byte, to `[R, P]` bytes: element j of a row at bits `bits*j …`, little-endian."""
    rows, cols = codes.shape
    padded = torch.nn.functional.pad(codes, (0, -cols % element.group))
    groups = padded.reshape(rows, -1, element.group).int()
    shifts = element.bits * torch.arange(element.group, dtype=torch.int32, device=codes.device)
    stream = (groups << shifts).sum(-1, dtype=torch.int32)
    planes = [(stream >> (8 * byte)) & 0xFF for byte in range(element.group_bytes)]
    return torch.stack(planes, dim=-1).to(torch.uint8).reshape(rows, -1)


def unpack(packed: torch.Tensor, element: ElementFormat, cols: int) -> torch.Tensor:
    """The inverse of `pack`: `[R, P]` bytes to `[R, cols]` codes."""
    rows = packed.shape[0]
    groups = packed.reshape(rows, -1, element.group_bytes).int()
    shifts = 8 * torch.arange(element.group_bytes, dtype=torch.int32, device=packed.device)
    stream = (groups << shifts).sum(-1, dtype=torch.int32)
    mask = (1 << element.bits) - 1
    codes = torch.stack([(stream >> (element.bits * j)) & mask for j in range(element.group)], dim=-1)
    return codes.to(torch.uint8).reshape(rows, -1)[:, :cols]


def power_of_two(exponent: torch.Tensor) -> torch.Tensor:
    """2**exponent, exactly, as float64, for integers in [-1022, 1023]. (torch.ldexp goes through fp32.)"""
    return ((exponent.long() + 1023) << 52).view(torch.float64)


def round_to(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Nearest-even, with the contract's NaN: torch's own casts differ in its bits between code paths."""
    int_dtype, nan_bits = _NAN_BITS[dtype]
    rounded = x.float().to(dtype)  # x fits fp32 or overflows it, so there is one rounding
    return rounded.view(int_dtype).masked_fill(x.isnan(), nan_bits).view(dtype)


def _blockwise(x: torch.Tensor, spec: MXSpec, fill: float) -> torch.Tensor:
    """`[R, C]` to `[R/r, C/c, r*c]`, the blocks cut by the edge filled up."""
    r, c = spec.block.rows, spec.block.cols
    rows, cols = x.shape
    padded = torch.nn.functional.pad(x, (0, -cols % c, 0, -rows % r), value=fill)
    down, across = spec.scale_shape(rows, cols)
    return padded.reshape(down, r, across, c).transpose(1, 2).reshape(down, across, r * c)


def _spread(per_block: torch.Tensor, spec: MXSpec, rows: int, cols: int) -> torch.Tensor:
    """One value a block to one an element."""
    return per_block.repeat_interleave(spec.block.rows, 0)[:rows].repeat_interleave(spec.block.cols, 1)[:, :cols]

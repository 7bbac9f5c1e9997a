"""The contract (`docs/numerics.md`) in exact rational arithmetic, a number at a time.

The authority that the tests hold the reference to. It shares no code and no table with the library: the small
grids are written out, those of 6 and 8 bits are ml_dtypes', and each rule is stated as the page states it.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache

import ml_dtypes
import numpy as np

NAMES = ("e2m1", "e3m0", "int4", "e2m3", "e3m2", "e4m3", "e5m2", "int8")
RULES = ("floor", "ceil", "even", "rceil")

BITS = {"e2m1": 4, "e3m0": 4, "int4": 4, "e2m3": 6, "e3m2": 6, "e4m3": 8, "e5m2": 8, "int8": 8}
MAX = {"e2m1": 6, "e3m0": 16, "int4": 7, "e2m3": 7.5, "e3m2": 28, "e4m3": 448, "e5m2": 57344, "int8": 127}
EMAX = {"e2m1": 2, "e3m0": 4, "int4": 3, "e2m3": 2, "e3m2": 4, "e4m3": 8, "e5m2": 15, "int8": 6}
EVEN_BITS = {"e2m1": 1, "e3m0": 0, "int4": 0, "e2m3": 3, "e3m2": 2, "e4m3": 3, "e5m2": 2, "int8": 6}
ML_DTYPES = {
    "e2m1": ml_dtypes.float4_e2m1fn,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e3m2": ml_dtypes.float6_e3m2fn,
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
}


def code_values(name: str) -> list[float]:
    """The value of every code, special ones included."""
    if name == "e3m0":
        magnitudes = [0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0]
        return magnitudes + [-magnitude for magnitude in magnitudes]
    if name in ML_DTYPES:
        codes = np.arange(1 << BITS[name], dtype=np.uint8)
        return codes.view(ML_DTYPES[name]).astype(np.float64).tolist()
    half = 1 << (BITS[name] - 1)
    return [float(integer) for integer in (*range(half), *range(-half, 0))]


GRID = {
    name: [Fraction(value) for value in code_values(name)[: 1 << (BITS[name] - 1)] if abs(value) <= MAX[name]]
    for name in NAMES
}


@lru_cache(None)
def two_to(exponent: int) -> Fraction:
    return Fraction(2) ** exponent


def floor_log2(x: Fraction) -> int:
    """The p with 2**p <= x < 2**(p + 1)."""
    p = x.numerator.bit_length() - x.denominator.bit_length()
    return p if x >= two_to(p) else p - 1


def ceil_log2(x: Fraction) -> int:
    p = floor_log2(x)
    return p if x == two_to(p) else p + 1


def scale_byte(amax: Fraction, name: str, rule: str) -> int:
    """Steps 3 to 5, each rule by what it promises of the block's largest value."""
    if amax == 0:
        return 0
    if rule == "floor":  # lands in [1, 2) * 2**emax
        e = floor_log2(amax) - EMAX[name]
    elif rule == "ceil":  # lands in (1/2, 1] * 2**emax
        e = ceil_log2(amax) - EMAX[name]
    elif rule == "even":  # rounded to m mantissa bits, ties to even (as Python's round), then as floor
        unit = two_to(floor_log2(amax) - EVEN_BITS[name])
        e = floor_log2(round(amax / unit) * unit) - EMAX[name]
    else:  # rceil: the smallest e with amax <= max * 2**e
        e = ceil_log2(amax / Fraction(MAX[name]))
    return min(max(e, -127), 127) + 127


def neighbours(magnitude: Fraction, name: str) -> tuple[int, Fraction]:
    """The code at or below a magnitude up to `max`, and the position in [0, 1) between it and the next one."""
    grid = GRID[name]
    lower = bisect_right(grid, magnitude) - 1
    if lower == len(grid) - 1:
        return lower, Fraction(0)
    return lower, (magnitude - grid[lower]) / (grid[lower + 1] - grid[lower])


def encode(v: Fraction, negative: bool, name: str, random: int | None = None) -> int:
    """Step 6: the code of `v`, to nearest-even or with 16 random bits; `negative` is the sign bit of v."""
    lower, position = neighbours(min(abs(v), GRID[name][-1]), name)
    if random is None:
        up = position > Fraction(1, 2) or (position == Fraction(1, 2) and lower % 2 == 1)
    else:
        up = position * 2**16 + random + Fraction(1, 2) >= 2**16
    code = lower + up
    if name.startswith("int"):
        return (-code if negative else code) % (1 << BITS[name])
    return code + (negative << (BITS[name] - 1))


FLOATS = {"bfloat16": (8, 7), "float16": (5, 10), "float32": (8, 23)}  # exponent bits, mantissa bits


def float_bits(x: Fraction, dtype: str) -> int:
    """The bits of a non-negative `x` in a float type, to nearest-even, subnormals and overflow to Inf included."""
    exponent_bits, mantissa_bits = FLOATS[dtype]
    lowest = 2 - (1 << (exponent_bits - 1))
    p = max(floor_log2(x), lowest) if x else lowest
    units = round(x / two_to(p - mantissa_bits))  # Python's round is half to even
    return min(units + ((p - lowest) << mantissa_bits), ((1 << exponent_bits) - 1) << mantissa_bits)


def to_float32(x: Fraction) -> Fraction:
    """`x` rounded to fp32 (within its range)."""
    bits = np.uint32(float_bits(abs(x), "float32"))
    return Fraction(float(bits.view(np.float32))) * (-1 if x < 0 else 1)


def block_offset(largest: Fraction, least: Fraction) -> Fraction:
    """Step 2: the fp16 middle of the range, within +-65504."""
    middle = to_float32(to_float32(largest / 2) + to_float32(least / 2))
    middle = min(max(middle, Fraction(-65504)), Fraction(65504))
    bits = np.uint16(float_bits(abs(middle), "float16"))
    return Fraction(float(bits.view(np.float16))) * (-1 if middle < 0 else 1)


def quantize_block(
    values: Sequence[float], name: str, rule: str, symmetric: bool, randoms: Sequence[int] | None
) -> tuple[list[int], int, float]:
    """One block: its codes, its scale byte, its offset."""
    if not all(math.isfinite(value) for value in values):
        return [0] * len(values), 255, 0.0
    exact = [Fraction(value) for value in values]
    negative = [math.copysign(1, value) < 0 for value in values]
    offset = Fraction(0)
    if not symmetric:
        offset = block_offset(max(exact), min(exact))
        shifted = [to_float32(value - offset) for value in exact]
        # x - O is +0 where they are equal; only -0 - 0 is -0
        negative = [y < 0 or (y == 0 and offset == 0 and sign) for y, sign in zip(shifted, negative, strict=True)]
        exact = shifted
    byte = scale_byte(max(map(abs, exact)), name, rule)
    scale = two_to(byte - 127)
    codes = [
        encode(value / scale, sign, name, None if randoms is None else randoms[k])
        for k, (value, sign) in enumerate(zip(exact, negative, strict=True))
    ]
    return codes, byte, float(offset)


def pack(codes: Sequence[int], name: str) -> list[int]:
    """A row of codes as bytes: one large little-endian integer, filled up to whole groups with zeros."""
    bits = BITS[name]
    group = {4: 2, 6: 4, 8: 1}[bits]
    groups = -(-len(codes) // group)
    stream = sum(code << (bits * j) for j, code in enumerate(codes))
    return list(stream.to_bytes(groups * group * bits // 8, "little"))


def philox(counter: Sequence[int], key: Sequence[int]) -> list[int]:
    """Philox-4x32-10 (Salmon et al., 2011) in Python's integers."""
    words, (k0, k1) = list(counter), key
    for _ in range(10):
        left, right = 0xD2511F53 * words[0], 0xCD9E8D57 * words[2]
        words = [
            (right >> 32) ^ words[1] ^ k0,
            right % 2**32,
            (left >> 32) ^ words[3] ^ k1,
            left % 2**32,
        ]
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return words


def random16(row: int, col: int, cols: int, seed: int) -> int:
    """The 16 random bits of the element (row, col) of a matrix of `cols` columns."""
    index = row * (-(-cols // 8) * 8) + col
    counter = index >> 3
    words = philox([counter % 2**32, counter >> 32, 0, 0], [seed % 2**32, seed >> 32 & 0xFFFFFFFF])
    word = words[(index >> 1) & 3]
    return word >> 16 if index % 2 else word & 0xFFFF


def quantize(
    matrix: Sequence[Sequence[float]],
    name: str,
    block: tuple[int, int],
    rule: str,
    symmetric: bool,
    seed: int | None = None,
) -> tuple[list[list[int]], list[list[int]], list[list[float]]]:
    """A matrix: packed codes, scale bytes, offsets. `seed` asks for stochastic rounding."""
    rows, cols = len(matrix), len(matrix[0])
    r, c = block
    codes = [[0] * cols for _ in range(rows)]
    scales: list[list[int]] = []
    offsets: list[list[float]] = []
    for top in range(0, rows, r):
        scales.append([])
        offsets.append([])
        for left in range(0, cols, c):
            inside = [(i, j) for i in range(top, min(top + r, rows)) for j in range(left, min(left + c, cols))]
            randoms = None if seed is None else [random16(i, j, cols, seed) for i, j in inside]
            values = [matrix[i][j] for i, j in inside]
            block_codes, byte, offset = quantize_block(values, name, rule, symmetric, randoms)
            for (i, j), code in zip(inside, block_codes, strict=True):
                codes[i][j] = code
            scales[-1].append(byte)
            offsets[-1].append(offset)
    return [pack(row, name) for row in codes], scales, offsets


@lru_cache(1 << 16)
def output_bits(magnitude: float | Fraction, dtype: str) -> int:
    """The bits of a magnitude that is first an fp32 number, then one of the output's type."""
    single = np.uint32(float_bits(Fraction(magnitude), "float32")).view(np.float32)
    return float_bits(Fraction(float(single)), dtype) if np.isfinite(single) else infinity_bits(dtype)


def infinity_bits(dtype: str) -> int:
    exponent_bits, mantissa_bits = FLOATS[dtype]
    return ((1 << exponent_bits) - 1) << mantissa_bits


def decoded_bits(value: float, byte: int, offset: float | None, dtype: str) -> int:
    """A code's value under a scale byte, with an offset (None: symmetric), as the bits of a float type."""
    exponent_bits, mantissa_bits = FLOATS[dtype]
    if byte == 255 or math.isnan(value):
        return infinity_bits(dtype) + (1 << (mantissa_bits - 1))
    total: float | Fraction = math.ldexp(value, byte - 127)  # exact: float64 has the range and the bits
    negative = math.copysign(1, value) < 0
    if math.isinf(value):
        magnitude = infinity_bits(dtype)
    elif offset is None:
        magnitude = output_bits(abs(total), dtype)
    else:
        both_minus_zero = total == 0 == offset and negative and math.copysign(1, offset) < 0
        total = Fraction(total) + Fraction(offset)
        negative = total < 0 or both_minus_zero
        magnitude = output_bits(abs(total), dtype)
    return magnitude + (negative << (exponent_bits + mantissa_bits))

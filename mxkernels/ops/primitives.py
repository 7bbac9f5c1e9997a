"""The bit arithmetic of the contract as small pure device functions: no pointers, no launches.

Each takes and returns tensors of any shape and broadcasts as Triton does. Integers are int32, values fp32.
What a GPU does in hardware is a branch inside one of these, with a twin in plain Triton for the rest.
"""

import triton
import triton.language as tl

from ..formats import ElementFormat  # noqa: F401  (what ELEMENT is, everywhere below)

MAGNITUDE = tl.constexpr(0x7FFFFFFF)  # fp32 without its sign
INFINITY = tl.constexpr(0x7F800000)  # fp32 bits; magnitudes from here on are Inf or NaN
NAN_BYTE = tl.constexpr(255)
INT_MIN = tl.constexpr(-0x80000000)
INT_MAX = tl.constexpr(0x7FFFFFFF)


# --- fp32 and its bits -------------------------------------------------------------------------------------


@triton.jit
def bits_of(x):
    return x.to(tl.int32, bitcast=True)


@triton.jit
def value_of(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def to_fp32(x):
    """bf16, fp16 or fp32 to fp32, exactly. bf16 by its bits: the interpreter flushes its subnormals."""
    if x.dtype == tl.bfloat16:
        return value_of(x.to(tl.int16, bitcast=True).to(tl.int32) << 16)
    else:
        return x.to(tl.float32)


@triton.jit
def from_fp32(x, is_nan, DTYPE: tl.constexpr):
    """fp32 to DTYPE, nearest-even; where `is_nan`, the contract's NaN, whose bits hardware casts vary."""
    if DTYPE == tl.float32:
        return value_of(tl.where(is_nan, 0x7FC00000, bits_of(x)))
    elif DTYPE == tl.bfloat16:
        bits = bits_of(x)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where(is_nan, 0x7FC0, bits).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        bits = x.to(tl.float16).to(tl.int16, bitcast=True)
        return tl.where(is_nan, 0x7E00, bits).to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def ordered(bits):
    """fp32 bits to integers in the order of the values (its own inverse); NaNs lie outside the infinities."""
    return bits ^ ((bits >> 31) & MAGNITUDE)


# --- scales ------------------------------------------------------------------------------------------------


@triton.jit
def scale_byte(amax, ELEMENT: tl.constexpr, SCALE_ROUNDING: tl.constexpr):
    """The E8M0 byte of blocks whose largest magnitude has the fp32 bits `amax`.

    Every rule compares the significand with a threshold: adding what carries it into the exponent from
    there on leaves one shift. The rules' emax (or max's own exponent) is subtracted in bytes and clamped;
    fp32 subnormals end at byte 0 by that clamp, so their exponent need not be exact (emax >= 1).
    """
    MANTISSA: tl.constexpr = 0x7FFFFF
    if SCALE_ROUNDING == "floor":
        carried = amax
        EMAX: tl.constexpr = ELEMENT.emax
    elif SCALE_ROUNDING == "ceil":
        carried = amax + MANTISSA
        EMAX: tl.constexpr = ELEMENT.emax
    elif SCALE_ROUNDING == "even":
        carried = amax + (1 << (22 - ELEMENT.scale_mantissa_bits))
        EMAX: tl.constexpr = ELEMENT.emax
    else:
        tl.static_assert(SCALE_ROUNDING == "rceil")
        carried = amax + (MANTISSA - ELEMENT.max_fp32_mantissa)
        EMAX: tl.constexpr = ELEMENT.max_exponent
    byte = tl.maximum((carried >> 23) - EMAX, 0)
    return tl.where(amax >= INFINITY, NAN_BYTE, byte)


@triton.jit
def scale_value(byte):
    """2**(byte - 127) as fp32, for bytes 0 … 254; 2**-127 is a subnormal."""
    return value_of(tl.maximum(byte << 23, 1 << 22))


@triton.jit
def block_offset(largest, least):
    """The fp32 value of the fp16 offset of blocks that span `least` … `largest` (fp32)."""
    middle = tl.minimum(tl.maximum(largest * 0.5 + least * 0.5, -65504.0), 65504.0)
    middle = middle.to(tl.float16).to(tl.float32)
    return tl.where(middle == 0, 0.0, middle)


# --- elements ----------------------------------------------------------------------------------------------


@triton.jit
def truncated_product(magnitude, EXPONENT: tl.constexpr, PTX: tl.constexpr):
    """The fp32 bits of `magnitude * 2**EXPONENT`, rounded toward zero; EXPONENT <= 0."""
    if PTX:
        factor = tl.full(magnitude.shape, 2.0**EXPONENT, tl.float32)
        product = tl.inline_asm_elementwise(
            "mul.rz.f32 $0, $1, $2;", "=f,f,f", [magnitude, factor], tl.float32, is_pure=True, pack=1
        )
        return bits_of(product)
    else:
        bits = bits_of(magnitude)
        field = bits >> 23
        LOWEST: tl.constexpr = 1 - EXPONENT  # the field that becomes fp32's smallest normal one
        shift = tl.minimum(tl.maximum(LOWEST - field, 0), 31)
        significand = (bits & 0x7FFFFF) | 0x800000
        return (significand >> shift) + (tl.maximum(field - LOWEST, 0) << 23)


@triton.jit
def round_to_odd(bits):
    """fp32 bits cut to 16 significant bits, the last one sticky: what is rounded to 15 bits or fewer
    afterwards comes out as if rounded once."""
    return (bits | ((bits & 0xFF) + 0xFF)) & ~0xFF


@triton.jit
def encode(v, random, ELEMENT: tl.constexpr, STOCHASTIC: tl.constexpr, SATURATE: tl.constexpr, EXACT_BITS: tl.constexpr, PTX: tl.constexpr):
    """Round fp32 `v` on the format's grid; int32 codes.

    v * 2**(bias - 127) puts the format's subnormals on fp32's: the wanted code is then the top of the
    product's bits, and rounding is an addition below them, for every format and magnitude alike.

    - nearest-even: half a step, less one, plus the kept bits' parity. The product itself is rounded, which
      is harmless while `v` has at most 16 significant bits (EXACT_BITS says how many it has): it is inexact
      only below 2**16 units, and the smallest half step is 2**16. Longer ones are first rounded to odd.
    - stochastic: `random` (16 bits) and a half, in units of 2**-16 of a step. The product is truncated,
      since a step's fraction must not round up.

    SATURATE: values beyond `max` occur and become `max`.
    """
    DROPPED: tl.constexpr = ELEMENT.dropped_bits
    EXPONENT: tl.constexpr = ELEMENT.bias - 127
    bits = bits_of(v)
    if STOCHASTIC:
        units = truncated_product(value_of(bits & MAGNITUDE), EXPONENT, PTX)
        code = (units + (random << (DROPPED - 16)) + (1 << (DROPPED - 17))) >> DROPPED
    else:
        magnitude = bits & MAGNITUDE
        if EXACT_BITS > 16:
            magnitude = round_to_odd(magnitude)
        units = bits_of(value_of(magnitude) * 2.0**EXPONENT)
        code = (units + ((1 << (DROPPED - 1)) - 1) + ((units >> DROPPED) & 1)) >> DROPPED
    if SATURATE:
        code = tl.minimum(code, ELEMENT.max_code)
    if ELEMENT.twos_complement:
        sign = bits >> 31
        return ((code ^ sign) - sign) & (2 * ELEMENT.sign_bit - 1)
    else:
        return code | ((bits >> (32 - ELEMENT.bits)) & ELEMENT.sign_bit)


@triton.jit
def decode(code, ELEMENT: tl.constexpr):
    """int32 codes to their fp32 values, exactly; special codes to Inf and NaN."""
    SIGN: tl.constexpr = ELEMENT.sign_bit
    if ELEMENT.twos_complement:
        # 1.5 * 2**23 + integer, by its bits, less 1.5 * 2**23
        return value_of(0x4B400000 + ((code ^ SIGN) - SIGN)) - 12582912.0
    magnitude = code & (SIGN - 1)
    value = value_of(magnitude << ELEMENT.dropped_bits) * 2.0 ** (127 - ELEMENT.bias)
    if ELEMENT.special == "nan":
        value = tl.where(magnitude > ELEMENT.max_code, float("nan"), value)
    elif ELEMENT.special == "ieee":
        value = tl.where(magnitude == ELEMENT.max_code + 1, float("inf"), value)
        value = tl.where(magnitude > ELEMENT.max_code + 1, float("nan"), value)
    return value_of(bits_of(value) | ((code & SIGN) << (32 - ELEMENT.bits)))


# --- packing along the last dimension ----------------------------------------------------------------------


@triton.jit
def split4(x):
    """`[..., 4 n]` to four tensors `[..., n]`: every fourth element, from the first, second, third, fourth."""
    quads = tl.reshape(x, [x.shape[0], x.shape[1] // 4, 2, 2])
    even, odd = tl.split(quads)
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def join4(first, second, third, fourth):
    """The inverse of `split4`."""
    even = tl.join(first, third)
    odd = tl.join(second, fourth)
    return tl.reshape(tl.join(even, odd), [first.shape[0], first.shape[1] * 4])


@triton.jit
def random_bits(seed, row, group, groups):
    """The 16 random bits of each element: Philox-4x32-10 at the contract's index.

    `row` is int64 `[R, 1]`, `group` int64 `[1, C/8]` (eight columns each), `groups` the matrix's groups a
    row. Returns int32 `[R, C]`.
    """
    counter = row * groups + group
    low = (counter & 0xFFFFFFFF).to(tl.uint32)
    high = (counter >> 32).to(tl.uint32)
    zero = tl.zeros_like(low)
    w0, w1, w2, w3 = tl.philox(seed, low, high, zero, zero)
    words = join4(w0, w1, w2, w3)
    halves = tl.join(words & 0xFFFF, words >> 16)
    return tl.reshape(halves, [words.shape[0], words.shape[1] * 2]).to(tl.int32)

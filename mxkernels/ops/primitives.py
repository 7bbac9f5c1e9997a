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


@triton.constexpr_function
def fp4_assembly(mantissa_bits, max_code, saturate):
    """PTX of `fp4_words`: $1 … $8 to $0."""
    shift = 10 - mantissa_bits
    both = "0x{0:04x}{0:04x}".format
    lines = [".reg .b32 t, even, odd, limit, h0, h1, h2, h3;"]
    if saturate:
        lines.append(f"mov.b32 limit, {both(max_code << shift)};")
    for pair in range(4):
        h = f"h{pair}"
        lines.append(f"cvt.rn.f16x2.f32 {h}, ${2 * pair + 2}, ${2 * pair + 1};")
        if saturate:
            lines.append(f"min.f16x2 {h}, {h}, limit; neg.f16x2 t, limit; max.f16x2 {h}, {h}, t;")
        lines.append(f"shr.b32 t, {h}, {shift}; and.b32 t, t, 0x00010001;")
        lines.append(f"add.u32 {h}, {h}, t; add.u32 {h}, {h}, {both((1 << (shift - 1)) - 1)};")
        # sign and code to the top four bits of each half, what is below them undefined
        lines.append(f"shl.b32 t, {h}, {12 - shift}; lop3.b32 {h}, t, {h}, 0x7fff7fff, 0xe4;")
    # bytes 1 and 3 of the halves: elements 0 2 4 6 and 1 3 5 7
    lines.append("prmt.b32 h0, h0, h1, 0x7351; prmt.b32 h2, h2, h3, 0x7351;")
    lines.append("prmt.b32 even, h0, h2, 0x5410; prmt.b32 odd, h0, h2, 0x7632;")
    lines.append("shr.b32 even, even, 4; lop3.b32 $0, even, odd, 0x0f0f0f0f, 0xe4;")
    return "{ " + " ".join(lines) + " }"


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
def from_fp32(x, is_nan, DTYPE: tl.constexpr, GPU: tl.constexpr):
    """fp32 `[R, 2 n]` to DTYPE, nearest-even; where `is_nan`, the contract's NaN, whose bits hardware varies."""
    if DTYPE == tl.float32:
        return value_of(tl.where(is_nan, 0x7FC00000, bits_of(x)))
    NAN: tl.constexpr = 0x7FC0 if DTYPE == tl.bfloat16 else 0x7E00
    if GPU.ptx:
        ASSEMBLY: tl.constexpr = (
            "cvt.rn.bf16x2.f32 $0, $2, $1;" if DTYPE == tl.bfloat16 else "cvt.rn.f16x2.f32 $0, $2, $1;"
        )
        even, odd = split2(x)
        words = tl.inline_asm_elementwise(ASSEMBLY, "=r,f,f", [even, odd], tl.int32, is_pure=True, pack=1)
        even_nan, odd_nan = split2(tl.where(is_nan, 0xFFFF, 0))
        nans = even_nan | (odd_nan << 16)
        words = (words & ~nans) | (nans & (NAN * 0x10001))
        bits = join2(words, words >> 16)
    elif DTYPE == tl.bfloat16:
        bits = bits_of(x)
        bits = tl.where(is_nan, NAN, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)
    else:
        bits = tl.where(is_nan, NAN, x.to(tl.float16).to(tl.int16, bitcast=True))
    return bits.to(tl.int16).to(DTYPE, bitcast=True)


# --- blocks: `[BLOCKS_DOWN, rows, BLOCKS_ACROSS, cols]` to one value a block -------------------------------


@triton.jit
def block_max(x, GPU: tl.constexpr):
    """The largest value of each block of fp32 `x`; NaN where there is one."""
    if GPU.ptx:
        return tl.reduce(tl.reduce(x, 3, max_or_nan), 1, max_or_nan)
    else:
        keys = tl.max(tl.max(ordered(bits_of(x)), axis=3), axis=1)
        nans = tl.max(tl.max((x != x).to(tl.int32), axis=3), axis=1)
        return tl.where(nans != 0, float("nan"), value_of(ordered(keys)))


@triton.jit
def spread(per_block, BLOCK: tl.constexpr):
    """One value a block to one an element."""
    DOWN: tl.constexpr = per_block.shape[0]
    ACROSS: tl.constexpr = per_block.shape[1]
    spread = tl.broadcast_to(per_block[:, None, :, None], [DOWN, BLOCK.rows, ACROSS, BLOCK.cols])
    return tl.reshape(spread, [DOWN * BLOCK.rows, ACROSS * BLOCK.cols])


@triton.jit
def max_or_nan(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def ordered(bits):
    """fp32 bits to integers in the order of the values; its own inverse."""
    return bits ^ ((bits >> 31) & MAGNITUDE)


# --- scales ------------------------------------------------------------------------------------------------


@triton.jit
def scale_byte(amax, SPEC: tl.constexpr):
    """The E8M0 byte of blocks whose largest magnitude has the fp32 bits `amax`.

    Every rule compares the significand with a threshold: adding what carries it into the exponent from
    there on leaves one shift. The rules' emax (or max's own exponent) is subtracted in bytes and clamped;
    fp32 subnormals end at byte 0 by that clamp, so their exponent need not be exact (emax >= 1).
    """
    ELEMENT: tl.constexpr = SPEC.element
    SCALE_ROUNDING: tl.constexpr = SPEC.scale_rounding
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
def round_to_odd(bits, BITS: tl.constexpr):
    """fp32 bits cut to BITS significant bits, the last one sticky: what is rounded to two bits fewer or
    less afterwards comes out as if rounded once."""
    BELOW: tl.constexpr = (1 << (24 - BITS)) - 1
    return (bits | ((bits & BELOW) + BELOW)) & ~BELOW


@triton.jit
def truncated_product(magnitude, EXPONENT: tl.constexpr, GPU: tl.constexpr):
    """The fp32 bits of `magnitude * 2**EXPONENT`, rounded toward zero; EXPONENT <= 0."""
    if GPU.ptx:
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
def encode(v, random, SPEC: tl.constexpr, EXACT_BITS: tl.constexpr, GPU: tl.constexpr):
    """Round fp32 `v`, of EXACT_BITS significant bits, on the format's grid; codes in the low bits of int32,
    those above undefined.

    v * 2**(bias - 127) puts the format's subnormals on fp32's: the wanted code is then the top of the
    product's bits, and rounding is an addition below them, for every format and magnitude alike.

    - nearest-even: half a step, less one, plus the kept bits' parity. The product itself is rounded, which
      is harmless while `v` has at most 16 significant bits: it is inexact only below 2**16 units, and the
      smallest half step is 2**16. Longer ones are first rounded to odd.
    - stochastic: `random` (16 bits) and a half, in units of 2**-16 of a step. The product is truncated,
      since a step's fraction must not round up.

    Integers to nearest-even need none of it: adding 1.5 * 2**23 rounds, and leaves them in the low bits.
    """
    ELEMENT: tl.constexpr = SPEC.element
    if ELEMENT.twos_complement and not SPEC.stochastic:
        if SPEC.can_saturate:
            v = tl.minimum(tl.maximum(v, -ELEMENT.max), ELEMENT.max)
        return bits_of(v + 12582912.0)
    DROPPED: tl.constexpr = ELEMENT.dropped_bits
    EXPONENT: tl.constexpr = ELEMENT.bias - 127
    bits = bits_of(v)
    if SPEC.stochastic:
        units = truncated_product(tl.abs(v), EXPONENT, GPU)
        code = (units + (random << (DROPPED - 16)) + (1 << (DROPPED - 17))) >> DROPPED
    else:
        magnitude = bits & MAGNITUDE
        if EXACT_BITS > 16:
            magnitude = round_to_odd(magnitude, 16)
        units = bits_of(value_of(magnitude) * 2.0**EXPONENT)
        code = (units + ((1 << (DROPPED - 1)) - 1) + ((units >> DROPPED) & 1)) >> DROPPED
    if SPEC.can_saturate:
        code = tl.minimum(code, ELEMENT.max_code)
    if ELEMENT.twos_complement:
        sign = bits >> 31
        return (code ^ sign) - sign
    else:
        return code | ((bits >> (32 - ELEMENT.bits)) & ELEMENT.sign_bit)


@triton.jit
def encode_words(x, factor, keep, random, SPEC: tl.constexpr, EXACT_BITS: tl.constexpr, GPU: tl.constexpr):
    """`x * factor` rounded on the format's grid and packed into words (`pack`); code 0 where not `keep`.

    All are `[R, C]`; `factor` is 2**-e of each element's block. Conversions in hardware stand in for
    `encode` where they give its very codes.
    """
    ELEMENT: tl.constexpr = SPEC.element
    NEAREST_FLOAT: tl.constexpr = not SPEC.stochastic and not ELEMENT.twos_complement
    kept = tl.where(keep, (1 << ELEMENT.bits) - 1, 0)
    if NEAREST_FLOAT and ELEMENT.bits >= 6 and GPU.cvt_fp8:
        words = fp8_words(x * (factor * fp8_alignment(ELEMENT)), ELEMENT.mantissa_bits)
        if ELEMENT.bits == 6:
            words = pack_bytes(fp6_of_fp8(words), 6)
    elif NEAREST_FLOAT and ELEMENT.bits == 4 and GPU.ptx:
        if EXACT_BITS > 8:
            x = value_of(round_to_odd(bits_of(x), 8))
        words = fp4_words(x * (factor * 2.0 ** (ELEMENT.bias - 15)), SPEC)
    else:
        # what is above a code's bits must not reach its neighbours
        words = pack(encode(x * factor, random, SPEC, EXACT_BITS, GPU) & kept, ELEMENT.bits)
    return words & pack(kept, ELEMENT.bits)


@triton.jit
def fp8_alignment(ELEMENT: tl.constexpr):
    """The power of two that puts the format's subnormals on those of the FP8 format with its mantissa."""
    return 2.0 ** (ELEMENT.bias - (7 if ELEMENT.mantissa_bits == 3 else 15))


@triton.jit
def fp8_words(v, MANTISSA_BITS: tl.constexpr):
    """fp32 `[R, 4 n]` to words of four E4M3 or E5M2 codes by the hardware: nearest-even, saturating."""
    NAME: tl.constexpr = "e4m3x2" if MANTISSA_BITS == 3 else "e5m2x2"
    v0, v1, v2, v3 = split4(v)
    return tl.inline_asm_elementwise(
        "{ .reg .b16 low, high;"
        " cvt.rn.satfinite." + NAME + ".f32 low, $2, $1;"
        " cvt.rn.satfinite." + NAME + ".f32 high, $4, $3;"
        " mov.b32 $0, {low, high}; }",
        "=r,f,f,f,f", [v0, v1, v2, v3], tl.int32, is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def fp6_of_fp8(words):
    """Bytes of FP8 codes to FP6 codes with the same mantissa, whose magnitudes are the low five bits. What
    rounded beyond the largest has the sixth set, and no other: it becomes the largest."""
    magnitude = words & 0x3F3F3F3F
    magnitude -= (magnitude >> 5) & 0x01010101
    return magnitude | ((words >> 2) & 0x20202020)


@triton.jit
def fp4_words(v, SPEC: tl.constexpr):
    """fp32 `[R, 8 n]`, times 2**(bias - 15), to words of eight E2M1 or E3M0 codes, two elements at a time.

    As fp16, the format's subnormals lie on fp16's: the code is the top of the bits, and rounding to
    nearest-even an addition below it, as in `encode`. `v` may have 8 significant bits: the conversion to
    fp16 is then inexact only below half a step.
    """
    ELEMENT: tl.constexpr = SPEC.element
    even, odd = split2(v)
    v0, v2, v4, v6 = split4(even)
    v1, v3, v5, v7 = split4(odd)
    return tl.inline_asm_elementwise(
        fp4_assembly(ELEMENT.mantissa_bits, ELEMENT.max_code, SPEC.can_saturate), "=r,f,f,f,f,f,f,f,f", [v0, v1, v2, v3, v4, v5, v6, v7], tl.int32, is_pure=True, pack=1
    )


@triton.jit
def decode(code, ELEMENT: tl.constexpr):
    """Codes, int32 with nothing above them, to their fp32 values, exactly; special codes to Inf and NaN.

    A float's bits, put where its subnormals are fp32's, are its value times 2**(bias - 127).
    """
    SIGN: tl.constexpr = ELEMENT.sign_bit
    if ELEMENT.twos_complement:
        return value_of((code ^ SIGN) | 0x4B000000) - (8388608.0 + SIGN)  # 2**23 + (integer + SIGN)
    TOP: tl.constexpr = 32 - ELEMENT.bits
    MASK: tl.constexpr = (SIGN - 1) << ELEMENT.dropped_bits
    bits = ((code << TOP) >> (TOP - ELEMENT.dropped_bits)) & (MASK - 0x80000000)
    value = value_of(bits) * 2.0 ** (127 - ELEMENT.bias)
    if ELEMENT.special != "none":
        magnitude = code & (SIGN - 1)
        beyond = float("nan") + tl.zeros_like(value)
        if ELEMENT.special == "ieee":
            beyond = tl.where(magnitude == ELEMENT.max_code + 1, value * float("inf"), beyond)
        value = tl.where(magnitude > ELEMENT.max_code, beyond, value)
    return value


# --- packing along the last dimension, into 32-bit words ---------------------------------------------------


@triton.jit
def split2(x):
    """`[R, 2 n]` to two tensors `[R, n]`: the even columns and the odd ones."""
    return tl.split(tl.reshape(x, [x.shape[0], x.shape[1] // 2, 2]))


@triton.jit
def split4(x):
    """`[R, 4 n]` to four tensors `[R, n]`: every fourth column, from the first, second, third and fourth."""
    even, odd = tl.split(tl.reshape(x, [x.shape[0], x.shape[1] // 4, 2, 2]))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def join2(even, odd):
    """The inverse of `split2`."""
    return tl.reshape(tl.join(even, odd), [even.shape[0], even.shape[1] * 2])


@triton.jit
def join4(first, second, third, fourth):
    """The inverse of `split4`."""
    even = tl.join(first, third)
    odd = tl.join(second, fourth)
    return tl.reshape(tl.join(even, odd), [first.shape[0], first.shape[1] * 4])


@triton.jit
def words_of_bytes(x):
    """int32 `[R, 4 n]`, a byte each, to little-endian words `[R, n]`."""
    first, second, third, fourth = split4(x)
    return first | (second << 8) | (third << 16) | (fourth << 24)


@triton.jit
def bytes_of_words(words):
    """The inverse of `words_of_bytes`."""
    return join4(words & 255, (words >> 8) & 255, (words >> 16) & 255, (words >> 24) & 255)


@triton.jit
def pack(codes, BITS: tl.constexpr):
    """Codes `[R, C]` to words `[R, W]`, a little-endian bit stream along each row.

    Of 6 bits a row takes 3/16 C words, which is no power of two: W is C/4, and the last quarter is unused.
    """
    if BITS == 4:
        low, high = split2(codes)
        return words_of_bytes(low | (high << 4))
    else:
        return pack_bytes(words_of_bytes(codes), BITS)


@triton.jit
def pack_bytes(codes, BITS: tl.constexpr):
    """As `pack`, from words of four codes, each in a byte; BITS is 6 or 8."""
    if BITS == 8:
        return codes
    else:
        stream = (codes & 0x3F) | ((codes >> 2) & 0xFC0) | ((codes >> 4) & 0x3F000) | ((codes >> 6) & 0xFC0000)
        s0, s1, s2, s3 = split4(stream)
        threes = join4(s0 | (s1 << 24), (s1 >> 8) | (s2 << 16), (s2 >> 16) | (s3 << 8), tl.zeros_like(s0))
        W: tl.constexpr = threes.shape[1]
        word = tl.arange(0, W)[None, :]
        source = tl.minimum(word // 3 * 4 + word % 3, W - 1)
        return tl.gather(threes, tl.broadcast_to(source, threes.shape), axis=1)


@triton.jit
def unpack(words, BITS: tl.constexpr):
    """The inverse of `pack`."""
    if BITS == 8:
        return bytes_of_words(words)
    elif BITS == 4:
        pairs = bytes_of_words(words)
        return join2(pairs & 15, pairs >> 4)
    else:
        W: tl.constexpr = words.shape[1]
        place = tl.arange(0, W)[None, :]
        source = place // 4 * 3 + tl.minimum(place % 4, 2)
        w0, w1, w2, _ = split4(tl.gather(words, tl.broadcast_to(source, words.shape), axis=1))
        LOW24: tl.constexpr = 0xFFFFFF
        stream = join4(
            w0 & LOW24,
            ((w0 >> 24) & 0xFF) | ((w1 & 0xFFFF) << 8),
            ((w1 >> 16) & 0xFFFF) | ((w2 & 0xFF) << 16),
            (w2 >> 8) & LOW24,
        )
        return join4(stream & 63, (stream >> 6) & 63, (stream >> 12) & 63, stream >> 18)


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
    return join2(words & 0xFFFF, words >> 16).to(tl.int32)

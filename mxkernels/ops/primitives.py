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
def nearest_fp4_assembly(element, saturate, xorsign):
    """PTX of `nearest_fp4`: fp32 $1 … $4 to 16 bits in $0."""
    shift = 10 - element.mantissa_bits
    both = "0x{0:04x}{0:04x}".format
    lines = [".reg .b32 t, limit, h0, h1;"]
    for pair in range(2):
        h = f"h{pair}"
        lines.append(f"cvt.rn.f16x2.f32 {h}, ${2 * pair + 2}, ${2 * pair + 1};")
        if saturate and xorsign:
            lines.append(f"mov.b32 limit, {both(element.max_code << shift)};")
            lines.append(f"min.xorsign.abs.f16x2 {h}, {h}, limit;")
        elif saturate:
            lines.append(f"mov.b32 limit, {both(element.max_code << shift)}; min.f16x2 {h}, {h}, limit;")
            lines.append(f"mov.b32 limit, {both(0x8000 | element.max_code << shift)}; max.f16x2 {h}, {h}, limit;")
        lines.append(f"shr.b32 t, {h}, {shift}; and.b32 t, t, 0x00010001;")
        lines.append(f"add.u32 {h}, {h}, t; add.u32 {h}, {h}, {both((1 << (shift - 1)) - 1)};")
        # sign and code to the top four bits of each half, what is below them undefined
        lines.append(f"shl.b32 t, {h}, {12 - shift}; lop3.b32 {h}, t, {h}, 0x7fff7fff, 0xe4;")
    # the halves' upper bytes: elements 0 2 1 3, then 0 2 moved beside 1 3
    lines.append("prmt.b32 h0, h0, h1, 0x7351; shr.b32 h1, h0, 4; shr.b32 h0, h0, 16;")
    lines.append("lop3.b32 $0, h1, h0, 0x0f0f, 0xe4; and.b32 $0, $0, 0xffff;")
    return "{ " + " ".join(lines) + " }"


@triton.constexpr_function
def stochastic_fp4_assembly(element, saturate):
    """PTX of `stochastic_fp4`: fp32 $1 … $4 and random words $5, $6 to 16 bits in $0."""
    lines = [".reg .b32 units, random, code; .reg .f32 v; mov.b32 $0, 0;"]
    for place in reversed(range(4)):
        word, x = f"${5 + place // 2}", f"${1 + place}"
        lines.append(f"abs.f32 v, {x};")
        if saturate:
            lines.append(f"min.f32 v, v, {element.max:.1f};")
        lines.append(f"mul.rz.f32 v, v, 0f{element.bias << 23:08x};")  # 2**(bias - 127)
        lines.append("mov.b32 units, v;")
        lines.append(f"{'shl' if place % 2 == 0 else 'shr'}.b32 random, {word}, {12 if place % 2 == 0 else 4};")
        lines.append("lop3.b32 random, random, 0x0ffff000, 0x800, 0xea;")  # (a & b) | c: 16 bits and a half
        lines.append(f"mad.lo.u32 code, units, {1 << (28 - element.dropped_bits)}, random;")
        lines.append(f"lop3.b32 code, code, {x}, 0x7fffffff, 0xe4;")  # sign and code in the top four bits
        lines.append("shf.l.wrap.b32 $0, code, $0, 4;")
    return "{ " + " ".join(lines) + " }"


@triton.constexpr_function
def fp8_table_assembly(element, carrier):
    """PTX of `fp8_table`: fp32 $2 to the FP8 bytes of its products with the eight magnitudes, in $0 and $1."""
    lines = [".reg .f32 v, w; .reg .b16 low, high;"]
    for word in range(2):
        for half, name in enumerate(("low", "high")):
            first, second = element.magnitudes[4 * word + 2 * half : 4 * word + 2 * half + 2]
            lines.append(f"mul.f32 v, $2, {float(first)}; mul.f32 w, $2, {float(second)};")
            lines.append(f"cvt.rn.satfinite.{carrier.name}x2.f32 {name}, w, v;")
        lines.append(f"mov.b32 ${word}, {{low, high}};")
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
    """fp32 `[R, 2 n]` to DTYPE, nearest-even, with the contract's NaN, whose bits hardware varies.

    `is_nan` says where, if that is known without looking at `x`; else it is None.
    """
    if DTYPE != tl.float32 and GPU.ptx:
        return from_fp32_pairs(x, is_nan, DTYPE)
    elif is_nan is None:
        return from_fp32(x, x != x, DTYPE, GPU)
    elif DTYPE == tl.float32:
        return value_of(tl.where(is_nan, 0x7FC00000, bits_of(x)))
    elif DTYPE == tl.bfloat16:
        bits = bits_of(x)
        bits = tl.where(is_nan, 0x7FC0, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)
        return bits.to(tl.int16).to(DTYPE, bitcast=True)
    else:
        bits = tl.where(is_nan, 0x7E00, x.to(tl.float16).to(tl.int16, bitcast=True))
        return bits.to(tl.int16).to(DTYPE, bitcast=True)


@triton.jit
def from_fp32_pairs(x, is_nan, DTYPE: tl.constexpr):
    """`from_fp32` by the hardware, whose NaN is 0x7FFF in both 16-bit types, two elements at a time."""
    NAN: tl.constexpr = 0x7FC07FC0 if DTYPE == tl.bfloat16 else 0x7E007E00
    CONVERT: tl.constexpr = "cvt.rn.bf16x2.f32" if DTYPE == tl.bfloat16 else "cvt.rn.f16x2.f32"
    even, odd = split2(x)
    words = tl.inline_asm_elementwise(CONVERT + " $0, $2, $1;", "=r,f,f", [even, odd], tl.int32, is_pure=True, pack=1)
    if is_nan is None:
        # 0x7FFF alone gets a sign by adding one; its surplus over NAN is subtracted
        ones = (((words + 0x00010001) & ~words) >> 15) & 0x00010001
        words -= ones * (0x7FFF - (NAN & 0xFFFF))
    else:
        low, high = split2(tl.where(is_nan, 0xFFFF, 0))
        nans = low | (high << 16)
        words = (words & ~nans) | (nans & NAN)
    return join2(words, words >> 16).to(tl.int16).to(DTYPE, bitcast=True)


@triton.jit
def below_bf16(x):
    """Not 0 where fp32 `x` is finite and has bits that bf16 lacks."""
    bits = bits_of(x)
    return tl.where((bits & MAGNITUDE) < INFINITY, bits & 0xFFFF, 0)


@triton.jit
def ceil_div(n, divisor: tl.constexpr):
    """n / divisor, rounded up, for n >= 1 up to its type's largest, to which nothing can be added."""
    return (n - 1) // divisor + 1


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
def spread_fours(per_block, BLOCK: tl.constexpr):
    """One value a block to one for each four elements of a row; blocks have four columns or more."""
    DOWN: tl.constexpr = per_block.shape[0]
    ACROSS: tl.constexpr = per_block.shape[1]
    spread = tl.broadcast_to(per_block[:, None, :, None], [DOWN, BLOCK.rows, ACROSS, BLOCK.cols // 4])
    return tl.reshape(spread, [DOWN * BLOCK.rows, ACROSS * BLOCK.cols // 4])


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

    All are `[R, C]`, but `random` is `[R, C/2]`, the 16 bits of two elements in a word; `factor` is 2**-e of
    each element's block, so that nothing kept reaches 2**(emax + 1): no scale rule leaves more. Conversions in
    hardware stand in for `encode` where they give its very codes.
    """
    ELEMENT: tl.constexpr = SPEC.element
    kept = tl.where(keep, (1 << ELEMENT.bits) - 1, 0)
    if not ELEMENT.twos_complement and not SPEC.stochastic and ELEMENT.bits >= 6 and GPU.cvt_fp8:
        codes = fp8_words(x * (factor * fp8_alignment(ELEMENT)), ELEMENT.mantissa_bits)
        if ELEMENT.bits == 6:
            codes = fp6_of_fp8(codes)
        return pack_bytes(codes & words_of_bytes(kept), ELEMENT.bits)
    elif not ELEMENT.twos_complement and ELEMENT.bits == 4 and GPU.ptx:
        if SPEC.stochastic:
            halves = stochastic_fp4(x * factor, random, SPEC)
        elif ELEMENT.name == "e2m1" and GPU.cvt_e2m1:
            halves = hardware_e2m1(x * factor)
        else:
            if EXACT_BITS > 8:
                x = value_of(round_to_odd(bits_of(x), 8))
            halves = nearest_fp4(x * (factor * 2.0 ** (ELEMENT.bias - 15)), SPEC, GPU)
        low, high = split2(halves)
        return (low | (high << 16)) & pack(kept, 4)
    else:
        if SPEC.stochastic:
            random = join2(random & 0xFFFF, (random >> 16) & 0xFFFF)
        # what is above a code's bits must not reach its neighbours
        return pack(encode(x * factor, random, SPEC, EXACT_BITS, GPU) & kept, ELEMENT.bits)


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
def fp8_table(factor, ELEMENT: tl.constexpr, CARRIER: tl.constexpr):
    """The FP8 codes of `factor` times each magnitude of a 4-bit float, in the bytes of two words."""
    return tl.inline_asm_elementwise(
        fp8_table_assembly(ELEMENT, CARRIER), "=&r,=&r,f", [factor], (tl.int32, tl.int32), is_pure=True, pack=1
    )


@triton.jit
def fp8_of_fp4(words, low, high, signs):
    """Words of eight 4-bit floats to words `[R, 2 n]` of four FP8 codes: magnitudes by their place in a table of
    two words, `low` and `high`, and the sign where `signs` allows it. Those three are `[R, 2 n]`, for four each."""
    low0, low1 = split2(low)
    high0, high1 = split2(high)
    signs0, signs1 = split2(signs)
    first, second = tl.inline_asm_elementwise(
        "{ .reg .b32 place, sign, shifted;"
        " and.b32 place, $2, 0x77777777; prmt.b32 $0, $3, $5, place;"
        " shr.u32 place, place, 16; prmt.b32 $1, $4, $6, place;"
        " shl.b32 shifted, $2, 4;"  # the signs of even codes to the tops of bytes, where the odd ones' are
        " prmt.b32 sign, shifted, $2, 0x5140; lop3.b32 $0, $0, sign, $7, 0xf8;"  # a | (b & c)
        " prmt.b32 sign, shifted, $2, 0x7362; lop3.b32 $1, $1, sign, $8, 0xf8; }",
        "=&r,=&r,r,r,r,r,r,r,r", [words, low0, low1, high0, high1, signs0, signs1], (tl.int32, tl.int32),
        is_pure=True, pack=1,
    )  # fmt: skip
    return join2(first, second)


@triton.jit
def fp6_of_fp8(words):
    """Bytes of FP8 codes to FP6 codes with the same mantissa, whose magnitudes are the low five bits. What
    rounded beyond the largest has the sixth set, and no other: it becomes the largest."""
    magnitude = words & 0x3F3F3F3F
    magnitude -= (magnitude >> 5) & 0x01010101
    return magnitude | ((words >> 2) & 0x20202020)


@triton.jit
def hardware_e2m1(v):
    """fp32 `[R, 4 n]` to four E2M1 codes in 16 bits: nearest-even, saturating."""
    v0, v1, v2, v3 = split4(v)
    return tl.inline_asm_elementwise(
        "{ .reg .b8 low, high; .reg .b16 both;"
        " cvt.rn.satfinite.e2m1x2.f32 low, $2, $1; cvt.rn.satfinite.e2m1x2.f32 high, $4, $3;"
        " mov.b16 both, {low, high}; cvt.u32.u16 $0, both; }",
        "=r,f,f,f,f", [v0, v1, v2, v3], tl.int32, is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def nearest_fp4(v, SPEC: tl.constexpr, GPU: tl.constexpr):
    """fp32 `[R, 4 n]`, times 2**(bias - 15), to four E2M1 or E3M0 codes in 16 bits, two elements at a time.

    As fp16, the format's subnormals lie on fp16's: the code is the top of the bits, and rounding to
    nearest-even an addition below it, as in `encode`. `v` may have 8 significant bits: the conversion to
    fp16 is then inexact only below half a step.
    """
    ELEMENT: tl.constexpr = SPEC.element
    v0, v1, v2, v3 = split4(v)
    return tl.inline_asm_elementwise(
        nearest_fp4_assembly(ELEMENT, SPEC.can_saturate, GPU.xorsign), "=r,f,f,f,f", [v0, v1, v2, v3],
        tl.int32, is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def stochastic_fp4(v, random, SPEC: tl.constexpr):
    """fp32 `[R, 4 n]` to four E2M1 or E3M0 codes in 16 bits: `encode`'s sum with the code in its top bits."""
    ELEMENT: tl.constexpr = SPEC.element
    v0, v1, v2, v3 = split4(v)
    r01, r23 = split2(random)
    return tl.inline_asm_elementwise(
        stochastic_fp4_assembly(ELEMENT, SPEC.can_saturate), "=&r,f,f,f,f,r,r", [v0, v1, v2, v3, r01, r23],
        tl.int32, is_pure=True, pack=1,
    )  # fmt: skip


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
        if ELEMENT.special == "ieee":
            value = tl.where(magnitude == ELEMENT.max_code + 1, value * float("inf"), value)
            value = tl.where(magnitude > ELEMENT.max_code + 1, float("nan"), value)
        else:
            value = tl.where(magnitude > ELEMENT.max_code, float("nan"), value)
    return value


@triton.jit
def decode_words(words, ELEMENT: tl.constexpr, GPU: tl.constexpr):
    """Packed words to the fp32 values of their codes: `decode(unpack(words))`."""
    if ELEMENT.special != "none" and GPU.cvt_fp8:
        CONVERT: tl.constexpr = "cvt.rn.f16x2.e4m3x2" if ELEMENT.special == "nan" else "cvt.rn.f16x2.e5m2x2"
        low, high = tl.inline_asm_elementwise(
            "{ .reg .b16 low, high; mov.b32 {low, high}, $2; " + CONVERT + " $0, low; " + CONVERT + " $1, high; }",
            "=r,=r,r", [words], (tl.int32, tl.int32), is_pure=True, pack=1,
        )  # fmt: skip
        halves = join4(low, low >> 16, high, high >> 16)
        return halves.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        return decode(unpack(words, ELEMENT.bits), ELEMENT)


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
def join8(x0, x1, x2, x3, x4, x5, x6, x7):
    """Eight tensors `[R, n]` to `[R, 8 n]`: every eighth column, from the first …"""
    return join2(join4(x0, x2, x4, x6), join4(x1, x3, x5, x7))


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
    """Codes `[R, C]`, with nothing above them, to words `[R, W]`, a little-endian bit stream along each row.

    Of 6 bits a row takes 3/16 C words, which is no power of two: W is C/4, and the last quarter is unused.
    """
    if BITS == 4:
        low, high = split2(codes)
        return words_of_bytes(low | (high << 4))
    else:
        return pack_bytes(words_of_bytes(codes), BITS)


@triton.jit
def pack_bytes(codes, BITS: tl.constexpr):
    """`pack`, from words of four codes, each in a byte; BITS is 6 or 8."""
    if BITS == 8:
        return codes
    else:
        stream = (codes & 0x3F) | ((codes >> 2) & 0xFC0) | ((codes >> 4) & 0x3F000) | ((codes >> 6) & 0xFC0000)
        s0, s1, s2, s3 = split4(stream)
        # sixteen codes are three words, and a fourth that is squeezed out
        threes = join4(s0 | (s1 << 24), (s1 >> 8) | (s2 << 16), (s2 >> 16) | (s3 << 8), tl.zeros_like(s0))
        word = tl.arange(0, threes.shape[1])[None, :]
        source = tl.minimum(word // 3 * 4 + word % 3, threes.shape[1] - 1)
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
        place = tl.arange(0, words.shape[1])[None, :]
        source = place // 4 * 3 + tl.minimum(place % 4, 2)
        w0, w1, w2, _ = split4(tl.gather(words, tl.broadcast_to(source, words.shape), axis=1))
        stream = join4(
            w0 & 0xFFFFFF,
            ((w0 >> 24) & 0xFF) | ((w1 & 0xFFFF) << 8),
            ((w1 >> 16) & 0xFFFF) | ((w2 & 0xFF) << 16),
            (w2 >> 8) & 0xFFFFFF,
        )
        return join4(stream & 63, (stream >> 6) & 63, (stream >> 12) & 63, stream >> 18)


# --- randomness --------------------------------------------------------------------------------------------


@triton.jit
def random_words(seed, row, group, groups):
    """The random bits of a tile, 16 an element, those of two neighbours in a word: the contract's Philox.

    `row` is int64 `[R, 1]`, `group` int64 `[1, C/8]` (eight columns each), `groups` the matrix's groups a
    row. Returns int32 `[R, C/2]`, an even element in the low half.
    """
    counter = (row * groups + group).to(tl.uint64, bitcast=True)
    seed = seed.to(tl.uint64, bitcast=True)
    zero = tl.zeros_like(counter).to(tl.uint32)
    w0, w1, w2, w3 = philox(
        counter.to(tl.uint32), (counter >> 32).to(tl.uint32), zero, zero, seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    )
    return join4(w0, w1, w2, w3).to(tl.int32, bitcast=True)


@triton.jit
def philox(c0, c1, c2, c3, key_low, key_high):
    """Philox-4x32-10 (Salmon et al., SC 2011) on uint32; each product is one 64-bit multiplication."""
    for _ in tl.static_range(10):
        product0 = c0.to(tl.uint64) * 0xD2511F53
        product1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (product1 >> 32).to(tl.uint32) ^ c1 ^ key_low
        c2 = (product0 >> 32).to(tl.uint32) ^ c3 ^ key_high
        c1 = product1.to(tl.uint32)
        c3 = product0.to(tl.uint32)
        key_low += 0x9E3779B9
        key_high += 0xBB67AE85
    return c0, c1, c2, c3

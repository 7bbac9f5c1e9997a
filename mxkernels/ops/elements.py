"""How elements are rounded on a format's grid and packed into words: pure device functions, as `primitives`.

Conversions in hardware and inline PTX are branches beside plain Triton that gives the same codes.
"""

import math

import triton
import triton.language as tl
from triton.experimental.gluon import language as gl

from .primitives import (
    MAGNITUDE,
    bits_of,
    join2,
    pack,
    pack_bytes,
    pairs_of,
    split2,
    split4,
    to_fp32,
    value_of,
    words_of_bytes,
)

# --- one code an element ------------------------------------------------------------------------------------


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
        return tl.inline_asm_elementwise(
            truncating_assembly(EXPONENT), "=r,f", [magnitude], tl.int32, is_pure=True, pack=1
        )
    else:
        bits = bits_of(magnitude)
        field = bits >> 23
        LOWEST: tl.constexpr = 1 - EXPONENT  # the field that becomes fp32's smallest normal one
        shift = tl.minimum(tl.maximum(LOWEST - field, 0), 31)
        significand = (bits & 0x7FFFFF) | 0x800000
        return (significand >> shift) + (tl.maximum(field - LOWEST, 0) << 23)


@triton.constexpr_function
def truncating_assembly(exponent):
    """PTX of the fp32 bits of $1 times 2**exponent, rounded toward zero."""
    bits = (127 + exponent) << 23 if exponent > -127 else 1 << (149 + exponent)
    return f"mul.rz.f32 $0, $1, 0f{bits:08x};"


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
def encode_words(x, factor, keep, random, SPEC: tl.constexpr, GPU: tl.constexpr):
    """`x * factor` rounded on the format's grid and packed into words (`pack`); code 0 where not `keep`.

    All are `[R, C]`, but `random` is `[R, C/2]`, the 16 bits of two elements in a word; `x` is bf16, fp16 or fp32;
    `factor` is 2**-e of each element's block, so that nothing kept reaches 2**(emax + 1): no scale rule leaves more.
    Conversions in hardware stand in for `encode` where they give its very codes.
    """
    ELEMENT: tl.constexpr = SPEC.element
    kept = tl.where(keep, (1 << ELEMENT.bits) - 1, 0)
    if not ELEMENT.twos_complement and not SPEC.stochastic and ELEMENT.bits >= 6 and GPU.cvt_fp8:
        codes = fp8_words(to_fp32(x) * (factor * fp8_alignment(ELEMENT)), ELEMENT.mantissa_bits)
        if ELEMENT.bits == 6:
            codes = fp6_of_fp8(codes)
        return pack_bytes(codes & words_of_bytes(kept), ELEMENT.bits)
    elif ELEMENT.name == "e2m1" and not SPEC.stochastic and GPU.cvt_e2m1:
        low, high = split2(hardware_e2m1(to_fp32(x) * factor))
        words = low | (high << 16)
        return words & laid_out(pack(kept, 4), words)
    elif not ELEMENT.twos_complement and ELEMENT.bits == 4 and GPU.ptx and fp4_serves(SPEC):
        return fp4_words(x, factor, random, SPEC, GPU) & pack(kept, 4)
    else:
        EXACT_BITS: tl.constexpr = 24 if x.dtype == tl.float32 else (8 if x.dtype == tl.bfloat16 else 11)
        if SPEC.stochastic:
            random = join2(random & 0xFFFF, (random >> 16) & 0xFFFF)
        # what is above a code's bits must not reach its neighbours
        return pack(encode(to_fp32(x) * factor, random, SPEC, EXACT_BITS, GPU) & kept, ELEMENT.bits)


@triton.jit
def laid_out(x, like):
    """`x`, whose threads are those of `like`. In Gluon one layout may have several names, which are no operands of one
    operation: `x` takes that of `like`. In plain Triton layouts come later, and `x` is what it was."""
    LAYOUT: tl.constexpr = layout_of(like.type)
    if LAYOUT is None:
        return x
    else:
        return gl.convert_layout(x, LAYOUT, assert_trivial=True)


@triton.constexpr_function
def layout_of(type):
    """Of a tensor's type in Gluon; None in plain Triton, which has none yet."""
    return getattr(type, "layout", None)


# --- conversions in hardware --------------------------------------------------------------------------------


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


# --- 4-bit floats by PTX: eight elements to a word ----------------------------------------------------------
#
# The elements are operands $1 … $8: fp32; or, `paired`, four words of two bf16, then four words of their factors.
# Random words follow, $9 … $12.


@triton.jit
def fp4_words(x, factor, random, SPEC: tl.constexpr, GPU: tl.constexpr):
    """`encode_words` of 4-bit floats, all kept, where `fp4_serves`."""
    PAIRED: tl.constexpr = x.dtype == tl.bfloat16 and (SPEC.stochastic or SPEC.element.mantissa_bits > 0)
    if PAIRED:
        # a power of two is its upper half
        low, high = split2(bits_of(factor))
        x0, x1, x2, x3 = split4(pairs_of(x))
        x4, x5, x6, x7 = split4(((low >> 16) & 0xFFFF) | (high & -0x10000))
    else:
        if not SPEC.stochastic:
            factor *= 2.0 ** (SPEC.element.bias - 15)
        even, odd = split2(to_fp32(x) * factor)
        x0, x2, x4, x6 = split4(even)
        x1, x3, x5, x7 = split4(odd)
    OPERANDS: tl.constexpr = ",r,r,r,r,r,r,r,r" if PAIRED else ",f,f,f,f,f,f,f,f"
    if SPEC.stochastic:
        r0, r1, r2, r3 = split4(random)
        return tl.inline_asm_elementwise(
            stochastic_fp4_assembly(SPEC, PAIRED), "=&r" + OPERANDS + ",r,r,r,r",
            [x0, x1, x2, x3, x4, x5, x6, x7, r0, r1, r2, r3], tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        return tl.inline_asm_elementwise(
            nearest_fp4_pairs_assembly(SPEC) if PAIRED else nearest_fp4_assembly(SPEC, GPU), "=&r" + OPERANDS,
            [x0, x1, x2, x3, x4, x5, x6, x7], tl.int32, is_pure=True, pack=1,
        )  # fmt: skip


@triton.constexpr_function
def fp4_serves(spec):
    """Whether what is below is right for a format: stochastic sums need a normal 2**(bias - 127), and a code beyond the
    largest to be the one that a fourth bit marks."""
    return not spec.stochastic or (spec.element.bias >= 1 and spec.element.max_code == 7)


@triton.constexpr_function
def nearest_fp4_pairs_assembly(spec):
    """PTX to nearest-even, of bf16 pairs, for formats with a mantissa.

    With p the power of two at or below |v|, but at least the format's smallest normal number, p * (128 + c) steps of
    p's binade plus v is rounded by the addition itself, on the format's grid. The last bits of the sum are then c plus
    v's steps, and its exponent counts binades: adding one to the other, by a multiplication, gives the code. An even c
    keeps ties even, and is such that the exponent's bias drops out.
    """
    element = spec.element
    m = element.mantissa_bits
    c = -(135 - m - element.bias << m) % 8
    lines = [".reg .b32 t, v, p, even, odd, h0, h1, h2, h3;"]
    for pair in range(4):
        lines.append(f"mov.b32 t, 0x80008000; fma.rn.bf16x2 v, ${1 + pair}, ${5 + pair}, t; abs.bf16x2 v, v;")
        if spec.can_saturate:
            lines.append(f"mov.b32 t, {_both(_bf16(element.max))}; min.bf16x2 v, v, t;")
        lines += [
            f"mov.b32 t, {_both(_bf16(2.0 ** (1 - element.bias)))}; max.bf16x2 p, v, t; and.b32 p, p, 0x7f807f80;",
            f"mov.b32 t, {_both(_bf16((128 + c) * 2.0**-m))}; fma.rn.bf16x2 v, p, t, v;",
            f"mul.lo.u32 v, v, {(1 << 12) + (1 << (5 + m))};",  # the codes to bits 12 to 14 of the halves
            _select(f"h{pair}", f"${1 + pair}", "v", "0x80008000"),
        ]
    lines += [
        *_upper_bytes("h0", "h1", "h2", "h3"),
        "shr.b32 even, even, 4;",
        _select("$0", "even", "odd", "0x0f0f0f0f"),
    ]
    return "{ " + " ".join(lines) + " }"


@triton.constexpr_function
def nearest_fp4_assembly(spec, gpu):
    """PTX to nearest-even, of fp32 that is already times 2**(bias - 15).

    So scaled and as fp16, the format's subnormals lie on fp16's, and the code is the top of the bits. Elements are
    truncated twice, as they are and less a unit in the last place: adding half a step rounds halves up in the one and
    down in the other, and where these differ the even one is right.
    """
    element = spec.element
    shift = 10 - element.mantissa_bits  # of the code in a half, whose top bit is the sign
    lines = [".reg .b32 t, v, w, even, odd, h0, h1, h2, h3; .reg .f32 x, y;"]
    for pair in range(4):
        even, odd = f"${2 * pair + 1}", f"${2 * pair + 2}"
        lines += [
            f"cvt.rz.f16x2.f32 v, {odd}, {even}; add.u32 v, v, {_both(1 << (shift - 1))};",
            f"mul.rz.f32 x, {even}, 0f3f7fffff; mul.rz.f32 y, {odd}, 0f3f7fffff;",  # 1 - 2**-24
            f"cvt.rz.f16x2.f32 w, y, x; add.u32 w, w, {_both(1 << (shift - 1))};",
            f"lop3.b32 h{pair}, v, w, {_both(1 << shift)}, 0xd0;",  # v & ~((v ^ w) & 1)
        ]
        if spec.can_saturate:
            largest = (element.max_code << shift) | ((1 << shift) - 1)  # whatever is below the code
            if gpu.xorsign:
                lines.append(f"mov.b32 t, {_both(largest)}; min.xorsign.abs.f16x2 h{pair}, h{pair}, t;")
            else:
                lines.append(f"mov.b32 t, {_both(largest)}; min.f16x2 h{pair}, h{pair}, t;")
                lines.append(f"mov.b32 t, {_both(0x8000 | largest)}; max.f16x2 h{pair}, h{pair}, t;")
    lines += [
        *_upper_bytes("h0", "h1", "h2", "h3"),
        # sign and code are bit 7 and three bits from `shift` - 8 on of each byte
        f"shl.b32 t, odd, {12 - shift}; {_select('odd', 't', 'odd', '0x70707070')}",
        f"shr.b32 t, even, {shift - 8}; shr.b32 even, even, 4; {_select('even', 't', 'even', '0x07070707')}",
        _select("$0", "even", "odd", "0x0f0f0f0f"),
    ]
    return "{ " + " ".join(lines) + " }"


@triton.constexpr_function
def stochastic_fp4_assembly(spec, paired):
    """PTX of `encode`'s stochastic sum, put so that the 16 random bits are whole bytes and codes are the top byte."""
    element = spec.element
    lines = [".reg .b32 t, v, low, high, even, odd, s0, s1, s2, s3, s4, s5, s6, s7; .reg .f32 x, y;"]
    for pair in range(4):
        if paired:
            lines.append(f"mov.b32 t, 0; fma.rn.bf16x2 v, ${1 + pair}, ${5 + pair}, t;")
            lines.append("shl.b32 low, v, 16;")
            if spec.block.cols > 1:  # both finite, or neither kept: a product with 0 below keeps other units busy
                lines.append(f"and.b32 high, ${5 + pair}, 0xffff0000; fma.rn.bf16x2 high, ${1 + pair}, high, t;")
            else:
                lines.append("and.b32 high, v, 0xffff0000;")
            lines.append("mov.b32 x, low; mov.b32 y, high;")
        else:
            lines.append(f"mov.b32 x, ${2 * pair + 1}; mov.b32 y, ${2 * pair + 2};")
        for place, value, bytes_ in ((2 * pair, "x", "0x7104"), (2 * pair + 1, "y", "0x7324")):
            lines += [
                f"abs.f32 {value}, {value}; mul.rz.f32 {value}, {value}, 0f{element.bias << 23:08x};",
                f"mov.b32 v, {value}; prmt.b32 t, ${9 + pair}, 0x80, {bytes_};",  # 16 bits and a half
                f"mad.lo.u32 s{place}, v, {1 << (24 - element.dropped_bits)}, t;",
            ]
    for name, sums in (("even", "s0 s2 s4 s6"), ("odd", "s1 s3 s5 s7")):
        first, second, third, fourth = sums.split()
        lines.append(f"prmt.b32 {name}, {first}, {second}, 0x0073; prmt.b32 t, {third}, {fourth}, 0x0073;")
        lines.append(f"prmt.b32 {name}, {name}, t, 0x5410;")
    lines.append(f"shl.b32 odd, odd, 4; {_select('v', 'odd', 'even', '0xf0f0f0f0')}")
    if spec.can_saturate:  # a code that went beyond the largest has the top bit of its four
        lines.append("shr.b32 t, v, 3; and.b32 t, t, 0x11111111; sub.u32 v, v, t;")
    if paired:
        lines += _upper_bytes("$1", "$2", "$3", "$4")
    else:
        for name, first in (("even", 1), ("odd", 2)):
            lines.append(f"prmt.b32 {name}, ${first}, ${first + 2}, 0x0073;")
            lines.append(f"prmt.b32 t, ${first + 4}, ${first + 6}, 0x0073; prmt.b32 {name}, {name}, t, 0x5410;")
    lines += [
        f"shr.b32 even, even, 4; {_select('t', 'even', 'odd', '0x0f0f0f0f')}",
        _select("$0", "v", "t", "0x77777777"),
    ]
    return "{ " + " ".join(lines) + " }"


@triton.constexpr_function
def _upper_bytes(first, second, third, fourth):
    """The upper bytes of the low halves of four words, in `even`, and of the high ones, in `odd`."""
    return [
        f"prmt.b32 t, {first}, {second}, 0x7351; prmt.b32 odd, {third}, {fourth}, 0x7351;",
        "prmt.b32 even, t, odd, 0x5410; prmt.b32 odd, t, odd, 0x7632;",
    ]


@triton.constexpr_function
def _select(into, ones, zeros, mask):
    return f"lop3.b32 {into}, {ones}, {zeros}, {mask}, 0xe4;"


@triton.constexpr_function
def _bf16(value):
    """The bits of a positive normal number of up to 8 significant bits."""
    mantissa, exponent = math.frexp(value)
    return (exponent + 126 << 7) + int(mantissa * 256) - 128


@triton.constexpr_function
def _both(half):
    """The same 16 bits in both halves of a word."""
    return f"0x{half:04x}{half:04x}"

"""The bit arithmetic of the contract as small pure device functions: no pointers, no launches. How elements are
rounded stands in `elements`.

Each takes and returns tensors of any shape and broadcasts as Triton does. Integers are int32, values fp32.
What a GPU does in hardware is a branch inside one of these, with a twin in plain Triton for the rest.
"""

import triton
import triton.language as tl

from ..formats import ElementFormat  # noqa: F401  (what ELEMENT is, everywhere below)

MAGNITUDE = tl.constexpr(0x7FFFFFFF)  # fp32 without its sign
INFINITY = tl.constexpr(0x7F800000)  # fp32 bits; magnitudes from here on are Inf or NaN
NAN_BYTE = tl.constexpr(255)


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
def pairs_of(x):
    """16-bit `[R, 2 n]` to words `[R, n]` of two neighbours, the even column in the low half."""
    even, odd = split2(x.to(tl.int16, bitcast=True))
    return (even.to(tl.int32) & 0xFFFF) | (odd.to(tl.int32) << 16)


@triton.jit
def values_of_pairs(words, DTYPE: tl.constexpr):
    """The fp32 values of the low halves and of the high ones, bf16 or fp16."""
    if DTYPE == tl.bfloat16:
        return value_of(words << 16), value_of(words & -0x10000)
    else:
        low = words.to(tl.int16).to(DTYPE, bitcast=True)
        high = (words >> 16).to(tl.int16).to(DTYPE, bitcast=True)
        return low.to(tl.float32), high.to(tl.float32)


@triton.jit
def below_bf16(x):
    """Not 0 where fp32 `x` is finite and has bits that bf16 lacks."""
    bits = bits_of(x)
    return tl.where((bits & MAGNITUDE) < INFINITY, bits & 0xFFFF, 0)


@triton.jit
def ceil_div(n, divisor: tl.constexpr):
    """n / divisor, rounded up, for n >= 1 up to its type's largest, to which nothing can be added."""
    return (n - 1) // divisor + 1


# --- blocks: a tile `[R, C]` to one value a block `[R / BLOCK.rows, C / BLOCK.cols]` ------------------------


@triton.jit
def block_magnitude(x, BLOCK: tl.constexpr, GPU: tl.constexpr):
    """The fp32 bits of the largest magnitude of each block; INFINITY or more where a block has an Inf or a NaN."""
    if GPU.ptx and x.dtype.primitive_bitwidth == 16:
        words = pairs_of(x)
        if not GPU.xorsign:
            words &= 0x7FFF7FFF
        LARGER: tl.constexpr = larger_magnitudes if GPU.xorsign else larger
        for _ in tl.static_range(max(halvings(BLOCK, x.dtype) - 1, 0)):
            even, odd = split2(words)
            words = LARGER(even, odd)
        words = by_block(words, BLOCK.rows, max(words.shape[1] * BLOCK.cols // x.shape[1], 1))
        if GPU.xorsign:
            words = tl.reduce(tl.reduce(words, 3, larger_magnitudes), 1, larger_magnitudes)
        else:
            words = tl.reduce(tl.reduce(words, 3, larger), 1, larger)
        low, high = values_of_pairs(words & 0x7FFF7FFF, x.dtype)
        if BLOCK.cols == 1:
            return bits_of(join2(low, high))
        else:
            return tl.maximum(bits_of(low), bits_of(high))
    else:
        return bits_of(block_max(tl.abs(to_fp32(x)), BLOCK, GPU))


@triton.jit
def block_range(x, inside, BLOCK: tl.constexpr, GPU: tl.constexpr):
    """The largest and the least of each block, as fp32, of what is `inside` (None: all is); one of them is Inf or NaN
    where a block has an Inf or a NaN."""
    if GPU.ptx and x.dtype.primitive_bitwidth == 16:
        INFINITE: tl.constexpr = 0x7F80 if x.dtype == tl.bfloat16 else 0x7C00
        above = x.to(tl.int16, bitcast=True)
        below = above
        if inside is not None:
            above = tl.where(inside, above, INFINITE - 0x8000)
            below = tl.where(inside, below, INFINITE)
        above = pairs_of(above)
        below = pairs_of(below)
        for _ in tl.static_range(max(halvings(BLOCK, x.dtype) - 1, 0)):
            even, odd = split2(above)
            above = larger(even, odd)
            even, odd = split2(below)
            below = smaller(even, odd)
        LEFT: tl.constexpr = max(above.shape[1] * BLOCK.cols // x.shape[1], 1)
        above = by_block(above, BLOCK.rows, LEFT)
        below = by_block(below, BLOCK.rows, LEFT)
        above_low, above_high = values_of_pairs(tl.reduce(tl.reduce(above, 3, larger), 1, larger), x.dtype)
        below_low, below_high = values_of_pairs(tl.reduce(tl.reduce(below, 3, smaller), 1, smaller), x.dtype)
        if BLOCK.cols == 1:
            return join2(above_low, above_high), join2(below_low, below_high)
        else:
            return max_or_nan(above_low, above_high), -max_or_nan(-below_low, -below_high)
    else:
        above = to_fp32(x)
        below = -above
        if inside is not None:
            above = tl.where(inside, above, float("-inf"))
            below = tl.where(inside, below, float("-inf"))
        return block_max(above, BLOCK, GPU), -block_max(below, BLOCK, GPU)


@triton.constexpr_function
def halvings(block, dtype):
    """How often a block's columns are halved, neighbour by neighbour, before `tl.reduce` does the rest: down to what
    one load gives a thread. That is the same in whatever order registers hold them, so that what Triton computes for
    two orders is computed once; and `spread` goes back the same way, to the threads that it came from."""
    return min(block.cols, 16 // (dtype.primitive_bitwidth // 8)).bit_length() - 1


@triton.jit
def block_max(x, BLOCK: tl.constexpr, GPU: tl.constexpr):
    """The largest value of each block of fp32 `x`; NaN where there is one."""
    ACROSS: tl.constexpr = x.shape[1] // BLOCK.cols
    if GPU.ptx:
        for _ in tl.static_range(halvings(BLOCK, x.dtype)):
            even, odd = split2(x)
            x = max_or_nan(even, odd)
        x = by_block(x, BLOCK.rows, x.shape[1] // ACROSS)
        return tl.reduce(tl.reduce(x, 3, max_or_nan), 1, max_or_nan)
    else:
        x = by_block(x, BLOCK.rows, BLOCK.cols)
        keys = tl.max(tl.max(ordered(bits_of(x)), axis=3), axis=1)
        nans = tl.max(tl.max((x != x).to(tl.int32), axis=3), axis=1)
        return tl.where(nans != 0, float("nan"), value_of(ordered(keys)))


# As bf16 both 16-bit types have the order of their bits, and what is no number in fp16 lies beyond all that is one.


@triton.jit
def larger_magnitudes(a, b):
    return tl.inline_asm_elementwise(
        "max.NaN.xorsign.abs.bf16x2 $0, $1, $2;", "=r,r,r", [a, b], tl.int32, is_pure=True, pack=1
    )


@triton.jit
def larger(a, b):
    return tl.inline_asm_elementwise("max.NaN.bf16x2 $0, $1, $2;", "=r,r,r", [a, b], tl.int32, is_pure=True, pack=1)


@triton.jit
def smaller(a, b):
    return tl.inline_asm_elementwise("min.NaN.bf16x2 $0, $1, $2;", "=r,r,r", [a, b], tl.int32, is_pure=True, pack=1)


@triton.jit
def by_block(x, ROWS: tl.constexpr, COLS: tl.constexpr):
    """`[R, C]` to `[R / ROWS, ROWS, C / COLS, COLS]`."""
    return tl.reshape(x, [x.shape[0] // ROWS, ROWS, x.shape[1] // COLS, COLS])


@triton.jit
def spread(per_block, BLOCK: tl.constexpr, DTYPE: tl.constexpr = None):
    """One value a block to one an element; DTYPE is that of the elements that the values were reduced from, if so."""
    DOWN: tl.constexpr = per_block.shape[0]
    ACROSS: tl.constexpr = per_block.shape[1]
    TIMES: tl.constexpr = 0 if DTYPE is None else halvings(BLOCK, DTYPE)
    COLS: tl.constexpr = BLOCK.cols >> TIMES
    spread = tl.broadcast_to(per_block[:, None, :, None], [DOWN, BLOCK.rows, ACROSS, COLS])
    spread = tl.reshape(spread, [DOWN * BLOCK.rows, ACROSS * COLS])
    for _ in tl.static_range(TIMES):
        spread = join2(spread, spread)
    return spread


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
def random_words(seed, row, group, groups, x, WIDE: tl.constexpr, GPU: tl.constexpr):
    """The random bits of a tile, 16 an element, those of two neighbours in a word: the contract's Philox.

    `row` is int64 `[R, 1]`, `group` int64 `[1, C/8]` (eight columns each), `groups` the matrix's groups a
    row; WIDE: their product may pass 32 bits. Returns int32 `[R, C/2]`, an even element in the low half, with the
    threads that have the elements `x`.
    """
    if WIDE:
        counter = row * groups + group
        low = counter.to(tl.int32)
        high = (counter >> 32).to(tl.int32)
    else:
        low = (row.to(tl.int32) * groups + group.to(tl.int32)).to(tl.int32)
        high = tl.zeros_like(low)
    w0, w1, w2, w3 = philox(low + zeros_beside(x), high, seed.to(tl.int32), (seed >> 32).to(tl.int32), GPU)
    return join4(w0, w1, w2, w3)


@triton.jit
def zeros_beside(x):
    """Zeros, one for eight columns of `x`: LLVM sees that they are, while Triton keeps them with the threads that have
    the elements, and so whatever they are added to."""
    first, _, _, _ = split4(x)
    first, _ = split2(first)
    BITS: tl.constexpr = tl.int16 if x.dtype.primitive_bitwidth == 16 else tl.int32
    return ((first.to(BITS, bitcast=True) | 1) == 0).to(tl.int32)


@triton.jit
def philox(c0, c1, key_low, key_high, GPU: tl.constexpr):
    """Philox-4x32-10 (Salmon et al., SC 2011) of the counter (c0, c1, 0, 0)."""
    if GPU.ptx:
        return tl.inline_asm_elementwise(
            philox_assembly(), "=&r,=&r,=&r,=&r,r,r,r,r", [c0, c1, key_low, key_high],
            (tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1,
        )  # fmt: skip
    else:
        c2 = tl.zeros_like(c0)
        c3 = c2
        for _ in tl.static_range(10):
            product0 = c0.to(tl.uint32, bitcast=True).to(tl.uint64) * 0xD2511F53
            product1 = c2.to(tl.uint32, bitcast=True).to(tl.uint64) * 0xCD9E8D57
            c0 = (product1 >> 32).to(tl.uint32).to(tl.int32, bitcast=True) ^ c1 ^ key_low
            c2 = (product0 >> 32).to(tl.uint32).to(tl.int32, bitcast=True) ^ c3 ^ key_high
            c1 = product1.to(tl.uint32).to(tl.int32, bitcast=True)
            c3 = product0.to(tl.uint32).to(tl.int32, bitcast=True)
            key_low += -0x61C88647  # 0x9E3779B9
            key_high += -0x4498517B  # 0xBB67AE85
        return c0, c1, c2, c3


@triton.constexpr_function
def philox_assembly():
    """PTX of `philox`, whose products are one instruction each, where LLVM makes two: $4 … $7 to $0 … $3."""
    lines = [
        ".reg .b32 c0, c1, c2, c3, low0, high0, low1, high1, key_low, key_high; .reg .b64 product;",
        "mov.b32 c0, $4; mov.b32 c1, $5; mov.b32 c2, 0; mov.b32 c3, 0; mov.b32 key_low, $6; mov.b32 key_high, $7;",
    ]
    for _ in range(10):
        lines += [
            "mul.wide.u32 product, c0, 0xd2511f53; mov.b64 {low0, high0}, product;",
            "mul.wide.u32 product, c2, 0xcd9e8d57; mov.b64 {low1, high1}, product;",
            "lop3.b32 c0, high1, c1, key_low, 0x96; lop3.b32 c2, high0, c3, key_high, 0x96;",  # a ^ b ^ c
            "mov.b32 c1, low1; mov.b32 c3, low0;",
            "add.u32 key_low, key_low, 0x9e3779b9; add.u32 key_high, key_high, 0xbb67ae85;",
        ]
    lines.append("mov.b32 $0, c0; mov.b32 $1, c1; mov.b32 $2, c2; mov.b32 $3, c3;")
    return "{ " + " ".join(lines) + " }"

"""The executor of inline PTX: against other implementations, exact arithmetic, the PTX ISA's words, and a GPU."""

from __future__ import annotations

import itertools
from fractions import Fraction
from typing import Any

import pytest

pytest.importorskip("triton", reason="kernels need Triton")

import exact
import numpy as np
import ptx
import torch
import triton
import triton.language as tl

from mxkernels import gpu

pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered", "ignore:overflow encountered")

FP8 = {"e4m3x2": torch.float8_e4m3fn, "e5m2x2": torch.float8_e5m2}
HALVES = {"bf16x2": torch.bfloat16, "f16x2": torch.float16}


def execute(assembly: str, *inputs: np.ndarray, constraints: str = "") -> np.ndarray:
    """The first output of assembly that has one, if nothing else is said."""
    words = [np.asarray(each).astype(np.uint64) for each in np.broadcast_arrays(*inputs)]
    return ptx.run(assembly, constraints or ",".join(["=&r"] + ["r"] * len(words)), words)[0]


def bits_of(x: torch.Tensor) -> np.ndarray:
    return x.contiguous().view({1: torch.uint8, 2: torch.uint16, 4: torch.uint32}[x.element_size()]).numpy()


# --- values ------------------------------------------------------------------------------------------------


def every_16_bit_value(dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)


def random_words(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**32, count, np.uint32)


def fp32_values() -> torch.Tensor:
    """All bf16 and fp16 values and what is halfway between them, all with their neighbours; and any bits."""
    anchors = []
    for dtype in HALVES.values():
        values = every_16_bit_value(dtype).float()
        values = values[values.isfinite()].sort().values
        anchors += [values, ((values[1:].double() + values[:-1].double()) / 2).float()]
    anchor = torch.cat(anchors)
    beside = [anchor.nextafter(torch.tensor(end)) for end in (torch.inf, -torch.inf)]
    specials = torch.tensor([torch.inf, -torch.inf, torch.nan])
    return torch.cat([anchor, *beside, specials, torch.from_numpy(random_words(2**16)).view(torch.float32)])


def words_of_all_kinds(count: int, seed: int) -> np.ndarray:
    """Of zeros, ones, largest and least numbers, infinities and NaNs, as fp32 or as pairs; and any bits."""
    single = [0, 1, 0x7FFFFF, 0x800000, 0x3F800000, 0x3F800001, 0x7F7FFFFF, 0x7F800000, 0x7F800001, 0x7FC00000]
    half = [0, 1, 0x7F, 0x80, 0x3C00, 0x3F80, 0x3F81, 0x7BFF, 0x7C00, 0x7C01, 0x7E00, 0x7F7F, 0x7F80, 0x7F81, 0x7FFF]
    singles = [word | sign for word in single for sign in (0, 1 << 31)]
    halves = [word | sign for word in half for sign in (0, 1 << 15)]
    pool = np.array(singles + [low | high << 16 for low in halves for high in halves], np.uint32)
    generator = np.random.default_rng(seed)
    return np.where(generator.random(count) < 0.5, generator.choice(pool, count), random_words(count, seed))


# --- conversions -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "largest"), [("e4m3x2", 448.0), ("e5m2x2", 57344.0), ("e2m1x2", 6.0)])
def test_to_a_narrow_float(name: str, largest: float) -> None:
    """As ml_dtypes has it and, to FP8, torch; saturated, and NaN as 0x7F, or 6 where there is none."""
    ml_dtypes = pytest.importorskip("ml_dtypes")
    x = fp32_values()
    bits, register = (4, ".b8") if name == "e2m1x2" else (8, ".b16")
    assembly = f"{{ .reg {register} t; cvt.rn.satfinite.{name}.f32 t, $1, $2; mov.b32 $0, t; }}"
    got = execute(assembly, bits_of(x), bits_of(x.flip(0)))
    low, high = got & ((1 << bits) - 1), got >> bits
    np.testing.assert_array_equal(low, high[::-1])

    nan = x.isnan().numpy()
    assert nan.any()
    assert (high[nan] == (1 << (bits - 1)) - 1).all()
    saturated = x.clamp(-largest, largest)[~nan]
    dtype = {"e4m3x2": "float8_e4m3fn", "e5m2x2": "float8_e5m2", "e2m1x2": "float4_e2m1fn"}[name]
    expected = saturated.numpy().astype(getattr(ml_dtypes, dtype)).view(np.uint8)
    np.testing.assert_array_equal(high[~nan], expected)
    if name in FP8:
        np.testing.assert_array_equal(high[~nan], bits_of(saturated.to(FP8[name])))


@pytest.mark.parametrize("name", HALVES)
def test_to_16_bits(name: str) -> None:
    """To nearest-even as torch has it; towards zero one step back from there, if that was away from zero."""
    x = fp32_values()
    nan = x.isnan().numpy()
    nearest = x.to(HALVES[name])
    expected = np.where(nan, 0x7FFF, bits_of(nearest))
    got = execute(f"cvt.rn.{name}.f32 $0, $1, $2;", bits_of(x), bits_of(x.flip(0)))
    np.testing.assert_array_equal(got >> 16, expected)
    np.testing.assert_array_equal(got & 0xFFFF, expected[::-1])

    away = (nearest.double().abs() > x.double().abs()).numpy()
    assert away.any()
    got = execute(f"cvt.rz.{name}.f32 $0, $1, $2;", bits_of(x), 0)
    np.testing.assert_array_equal(got >> 16, expected - away)


@pytest.mark.parametrize("name", FP8)
def test_from_fp8(name: str) -> None:
    """Every pair of codes, as torch has it; NaN is 0x7FFF."""
    pairs = torch.arange(-(2**15), 2**15).to(torch.int16)
    values = pairs.view(FP8[name]).half()
    expected = np.where(values.isnan(), 0x7FFF, bits_of(values).astype(int)).reshape(-1, 2)
    assembly = f"{{ .reg .b16 low, high; mov.b32 {{low, high}}, $1; cvt.rn.f16x2.{name} $0, low; }}"
    got = execute(assembly, bits_of(pairs))
    np.testing.assert_array_equal(got, expected[:, 0] | expected[:, 1] << 16)


def test_from_e2m1() -> None:
    got = execute("{ .reg .b8 t; mov.b32 t, $1; cvt.rn.f16x2.e2m1x2 $0, t; }", np.arange(256))
    values = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    expected = bits_of(torch.cat([values, -values]).half()).astype(int)
    np.testing.assert_array_equal(got, (expected[None, :] | expected[:, None] << 16).flatten())


# --- arithmetic --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("operation", "numpy"), [("mul", np.multiply), ("add", np.add)])
def test_fp32_to_nearest_as_numpy_has_it(operation: str, numpy: np.ufunc) -> None:
    a, b = words_of_all_kinds(2**16, 1), words_of_all_kinds(2**16, 2)
    b = np.where(random_words(2**16, 3) % 2, b, a ^ random_words(2**16, 4) % 2**25)  # half of them close together
    values = numpy(a.view(np.float32), b.view(np.float32))
    expected = np.where(np.isnan(values), 0x7FFFFFFF, values.view(np.uint32))
    for opcode in (f"{operation}.f32", f"{operation}.rn.f32"):
        np.testing.assert_array_equal(execute(f"{opcode} $0, $1, $2;", a, b), expected)


DTYPES = {"f32": "float32", "bf16x2": "bfloat16", "f16x2": "float16"}
BITS = {"float32": (32, 23, 127), "bfloat16": (16, 7, 127), "float16": (16, 10, 15)}


def value_of(code: int, dtype: str) -> Fraction | None:
    """What bits stand for; None for Inf and NaN."""
    bits, mantissa_bits, bias = BITS[dtype]
    field, fraction = divmod(code & ((1 << (bits - 1)) - 1), 1 << mantissa_bits)
    if field == 2 * bias + 1:
        return None
    significand = fraction + (1 << mantissa_bits if field else 0)
    return (-1) ** (code >> (bits - 1)) * significand * exact.two_to(max(field, 1) - bias - mantissa_bits)


def rounded(x: Fraction, negative_zero: bool, rounding: str, dtype: str) -> int:
    """The bits of `x`, by `exact` and, towards zero, one step back from there if that was away from zero."""
    code = exact.float_bits(abs(x), dtype)
    value = value_of(code, dtype)
    if rounding == "rz" and (value is None or value > abs(x)):
        code -= 1
    return code | ((x < 0 or (x == 0 and negative_zero)) << (BITS[dtype][0] - 1))


def close_codes(count: int, dtype: str) -> list[tuple[int, int, int]]:
    """Finite factors and addends, the addends in turn: anything; nearly what the product cancels; half a step of the
    product; far below it; above it."""
    bits, mantissa_bits, bias = BITS[dtype]
    infinity = (2 * bias + 1) << mantissa_bits
    generator = np.random.default_rng(9)
    signs, magnitudes = generator.integers(0, 2, (count, 3)), generator.integers(0, infinity, (count, 3))
    magnitudes[::2, :2] &= ~((1 << (mantissa_bits // 2)) - 1)  # products that are close to ties, or short
    rows = []
    for turn, (sign, magnitude) in enumerate(zip(signs.tolist(), magnitudes.tolist(), strict=True)):
        a, b, c = (each | here << (bits - 1) for each, here in zip(magnitude, sign, strict=True))
        product = exact.float_bits(abs(value_of(a, dtype) * value_of(b, dtype)), dtype)
        apart = (None, 0, -(mantissa_bits + 1), -(3 * mantissa_bits + 30), mantissa_bits + 1)[turn % 5]
        if apart is not None:
            near = product + (apart << mantissa_bits) + turn % 3 - 1
            if turn % 4 < 2:
                near &= ~((1 << mantissa_bits) - 1)
            c = min(max(near, turn % 7), infinity - 1) | sign[2] << (bits - 1)
        rows.append((a, b, c))
    return rows


@pytest.mark.parametrize(
    ("opcode", "name"),
    [
        *itertools.product(["mul.rn", "mul.rz", "add.rn", "add.rz", "fma.rn", "fma.rz"], ["f32"]),
        *itertools.product(["mul.rn", "add.rn", "fma.rn"], ["bf16x2", "f16x2"]),
    ],
)
def test_arithmetic_exactly(opcode: str, name: str) -> None:
    operation, rounding = opcode.split(".")
    dtype = DTYPES[name]
    rows = close_codes(3000, dtype)
    expected = []
    for row in rows:
        a, b, c = (value_of(code, dtype) for code in row)
        left, right, last = (code >> (BITS[dtype][0] - 1) for code in row)
        if operation == "add":
            expected.append(rounded(a + c, left & last, rounding, dtype))
        elif operation == "mul":
            expected.append(rounded(a * b, left ^ right, rounding, dtype))
        else:
            expected.append(rounded(a * b + c, (left ^ right) & last, rounding, dtype))
    a, b, c = np.array(rows, np.uint64).T
    inputs = {"add": (a, c), "mul": (a, b), "fma": (a, b, c)}[operation]
    if name != "f32":  # the high halves are the low ones of the other end
        inputs = [each | each[::-1] << np.uint64(16) for each in inputs]
    got = execute(f"{opcode}.{name} $0, {', '.join(['$1', '$2', '$3'][: len(inputs)])};", *inputs)
    if name != "f32":
        np.testing.assert_array_equal(got >> np.uint64(16), expected[::-1])
        got &= np.uint64(0xFFFF)
    np.testing.assert_array_equal(got, expected)


BY_HAND = [
    # an fp32 NaN, infinities, what overflows and what vanishes
    ("mul.rn.f32", 0xFF800001, 0x3F800000, 0x7FFFFFFF),
    ("mul.rz.f32", 0x7F800000, 0x80000000, 0x7FFFFFFF),
    ("mul.rz.f32", 0xFF800000, 0x3F800000, 0xFF800000),
    ("mul.rz.f32", 0x7F7FFFFF, 0xC0000000, 0xFF7FFFFF),
    ("mul.rn.f32", 0x7F7FFFFF, 0xC0000000, 0xFF800000),
    ("mul.rz.f32", 0x80000001, 0x3F7FFFFF, 0x80000000),
    ("mul.rn.f32", 0x80000001, 0x3F7FFFFF, 0x80000001),
    ("add.rn.f32", 0x7F800000, 0xFF800000, 0x7FFFFFFF),
    ("add.rn.f32", 0x80000000, 0x00000000, 0x00000000),
    ("abs.f32", 0xC0000000, 0x40000000),
    ("abs.bf16x2", 0xC0008000, 0x40000000),
    # 1.5 (1 + 2**-7) is halfway, above an odd number; 1.5 (1 + 3 * 2**-7), above an even one
    ("fma.rn.bf16x2", 0x3F813F81, 0x3FC03FC0, 0x80000000, 0x3FC23FC2),
    ("fma.rn.bf16x2", 0x3F813F81, 0x3FC03FC0, 0x2B80AB80, 0x3FC23FC1),
    ("fma.rn.bf16x2", 0x3F833F83, 0x3FC03FC0, 0x80000000, 0x3FC43FC4),
    ("fma.rn.bf16x2", 0x3F833F83, 0x3FC03FC0, 0x0001AB80, 0x3FC53FC4),
    # subnormals; overflow; signs of zero; NaN
    ("fma.rn.bf16x2", 0x00010080, 0x40003F00, 0x00000000, 0x00020040),
    ("fma.rn.bf16x2", 0x7F7FFF7F, 0x3F814000, 0x80008000, 0x7F80FF80),
    ("fma.rn.bf16x2", 0x3F80BF80, 0x80000000, 0x80000000, 0x80000000),
    ("fma.rn.bf16x2", 0xBF803F80, 0x3F803F80, 0x3F80BF80, 0x00000000),
    ("fma.rn.bf16x2", 0xFFC07F80, 0x3F803F80, 0x0000FF80, 0x7FFF7FFF),
    ("fma.rn.f16x2", 0x7C003C01, 0x00003E00, 0x00001400, 0x7FFF3E02),
    # the larger, the smaller: of numbers, of zeros, with a NaN
    ("max.bf16x2", 0xC0003F80, 0xBF803F00, 0xBF803F80),
    ("min.bf16x2", 0xC0003F80, 0xBF803F00, 0xC0003F00),
    ("max.f16x2", 0x80000000, 0x00008000, 0x00000000),
    ("min.f16x2", 0x80000000, 0x00008000, 0x80008000),
    ("max.bf16x2", 0x7FC0C000, 0xC000FFC0, 0xC000C000),
    ("min.bf16x2", 0x7FC0FF80, 0xFFC0FFC0, 0x7FFFFF80),
    ("max.NaN.bf16x2", 0x7FC0C000, 0xC000FFC1, 0x7FFF7FFF),
    ("min.NaN.f16x2", 0x7C01FC00, 0xC000BC00, 0x7FFFFC00),
    ("min.f32", 0x7FC00000, 0x40C00000, 0x40C00000),
    ("min.f32", 0x7FC00000, 0xFFC00000, 0x7FFFFFFF),
    ("min.f32", 0x40C00001, 0x40C00000, 0x40C00000),
    # magnitudes with the product of the signs, but for a NaN
    ("max.xorsign.abs.bf16x2", 0xC000BF80, 0xBF804000, 0x4000C000),
    ("min.xorsign.abs.f16x2", 0xC400BC00, 0xBC004400, 0x3C00BC00),
    ("min.xorsign.abs.f16x2", 0x80000000, 0x46004600, 0x80000000),
    ("max.NaN.xorsign.abs.bf16x2", 0xFFC0BF80, 0x3F807F80, 0x7FFFFF80),
    # `a` becomes the high half
    ("cvt.rn.f16x2.f32", 0x3F800000, 0xC0000000, 0x3C00C000),
    ("cvt.rz.f16x2.f32", 0x477FFF00, 0xFF800000, 0x7BFFFC00),
    # integers
    ("add.u32", 0xFFFFFFFF, 2, 1),
    ("sub.u32", 1, 2, 0xFFFFFFFF),
    ("mad.lo.u32", 0x80000001, 6, 0xFFFFFFFF, 5),
    ("not.b32", 0x0000FFFF, 0xFFFF0000),
    ("and.b32", 0xC, 0xA, 0x8),
    ("or.b32", 0xC, 0xA, 0xE),
    ("xor.b32", 0xC, 0xA, 0x6),
    ("shl.b32", 0x80000001, 4, 0x10),
    ("shr.b32", 0x80000001, 4, 0x08000000),
    ("shl.b32", 0xFFFFFFFF, 31, 0x80000000),
    ("shr.u32", 0xFFFFFFFF, 31, 1),
    ("shl.b32", 0xFFFFFFFF, 32, 0),
    ("shr.u32", 0xFFFFFFFF, 0x80000000, 0),
    ("shf.l.wrap.b32", 0x89ABCDEF, 0x01234567, 4, 0x12345678),
    ("shf.l.wrap.b32", 0x89ABCDEF, 0x01234567, 32, 0x01234567),
    ("shf.l.wrap.b32", 0x89ABCDEF, 0x01234567, 36, 0x12345678),
    # bytes 0 … 7 are 0x10 … 0xF7; above 7, a selector asks for the sign of one
    ("prmt.b32", 0xB3C20110, 0xF7E6D5C4, 0x7351, 0xF7B3D501),
    ("prmt.b32", 0xB3C20110, 0xF7E6D5C4, 0xFFFF0246, 0x10C2C4E6),
    ("prmt.b32", 0xB3C20110, 0xF7E6D5C4, 0x8BC9, 0x00FFFF00),
]


@pytest.mark.parametrize("row", BY_HAND, ids=lambda row: row[0])
def test_by_hand(row: tuple[Any, ...]) -> None:
    opcode, *inputs, expected = row
    operands = ", ".join(f"${index}" for index in range(len(inputs) + 1))
    got = execute(f"{opcode} {operands};", *([each] for each in inputs))
    assert f"{got[0]:#010x}" == f"{expected:#010x}"


def test_lop3() -> None:
    a, b, c = (random_words(1000, seed).astype(np.uint64) for seed in range(3))
    tables = {0x96: a ^ b ^ c, 0xE4: (a & c) | (b & ~c), 0xEA: (a & b) | c, 0xF8: a | (b & c), 0x07: ~a & ~(b & c)}
    for table, expected in tables.items():
        np.testing.assert_array_equal(execute(f"lop3.b32 $0, $1, $2, $3, {table:#x};", a, b, c), expected % 2**32)


# --- programs ----------------------------------------------------------------------------------------------


def test_registers_of_other_widths() -> None:
    """A word taken apart and put together, the first part lowest; products of 64 bits; constants of all kinds."""
    word = np.array([0x11223344])
    swap = "{ .reg .b16 low, high; mov.b32 {low, high}, $1; mov.b32 $0, {high, low}; }"
    assert execute(swap, word)[0] == 0x33441122
    bytes_of = "{ .reg .b8 a, b, c, d; mov.b32 {a, b, c, d}, $1; mov.b32 $0, {d, c, b, a}; }"
    assert execute(bytes_of, word)[0] == 0x44332211
    widen = "{ .reg .b8 a, b; .reg .b16 t; mov.b32 a, $1; mov.b32 b, 7; mov.b16 t, {a, b}; cvt.u32.u16 $0, t; }"
    assert execute(widen, word)[0] == 0x0744
    product = "{ .reg .b64 p; mul.wide.u32 p, $2, 0xD2511F53; mov.b64 {$0, $1}, p; }"
    low, high = ptx.run(product, "=r,=r,r", [word.astype(np.uint64)])
    assert int(high[0]) << 32 | int(low[0]) == 0x11223344 * 0xD2511F53
    constants = "{ .reg .f32 v; mov.f32 v, 0f3fc00000; mul.f32 v, v, 3.0; add.u32 $0, v, -1; }"
    assert execute(constants, word)[0] == 0x408FFFFF


@pytest.mark.parametrize(
    ("assembly", "constraints", "message"),
    [
        ("mul.rz.ftz.f32 $0, $1, $2;", "=r,r,r", r"mul\.rz\.ftz\.f32"),
        ("fma.rz.bf16x2 $0, $1, $2, $2;", "=r,r,r", r"fma\.rz\.bf16x2"),
        ("cvt.rn.e4m3x2.f32 $0, $1, $2;", "=r,r,r", r"cvt\.rn\.e4m3x2\.f32"),
        ("add.u32 $0, $1;", "=r,r,r", r"add\.u32 of 1"),
        ("mov.b32 $0, $1;", "=r,r,l", "constraints =r,r,l"),
        ("mov.b32 $0, $1;", "+r,r,r", r"constraints \+r,r,r"),
    ],
)
def test_what_it_does_not_know(assembly: str, constraints: str, message: str) -> None:
    with pytest.raises(NotImplementedError, match=message):
        execute(assembly, np.array([1]), np.array([2]), constraints=constraints)


@pytest.mark.parametrize(
    ("assembly", "message"),
    [
        ("{ .reg .b32 t; add.u32 $0, $1, t; }", "t is read before it is written"),
        ("add.u32 t, $1, $2;", "t is no register"),
        ("add.u32 $1, $1, $2;", r"\$1 is no register"),
        ("{ mov.b32 $0, $1; add.u32 $0, $0, $2; }", r"\$2 is read after \$0 was written"),
        ("{ .reg .b32 t; add.u32 t, $1, $2; }", r"\$0 is read before it is written"),
    ],
)
def test_what_is_wrong_with_a_program(assembly: str, message: str) -> None:
    """The last but one is right with `=&r`, which keeps the output's register apart from the inputs'."""
    with pytest.raises(ValueError, match=message):
        execute(assembly, np.array([1]), np.array([2]), constraints="=r,r,r")
    assert execute("{ mov.b32 $0, $1; add.u32 $0, $0, $2; }", np.array([1]), np.array([2]))[0] == 3


# --- a GPU's instructions ----------------------------------------------------------------------------------


@triton.jit
def program_kernel(a_ptr, b_ptr, c_ptr, out_ptr, ASSEMBLY: tl.constexpr, COUNT: tl.constexpr):
    place = tl.program_id(0) * COUNT + tl.arange(0, COUNT)
    inputs = [tl.load(a_ptr + place), tl.load(b_ptr + place), tl.load(c_ptr + place)]
    out = tl.inline_asm_elementwise(ASSEMBLY, "=&r,r,r,r", inputs, tl.int32, is_pure=True, pack=1)
    tl.store(out_ptr + place, out)


def programs(able: gpu.Capabilities) -> list[str]:
    """Each instruction that a GPU of these capabilities has, by itself. (What `abs` makes of a NaN is undefined.)"""
    two = ["add.u32", "sub.u32", "and.b32", "or.b32", "xor.b32", "shl.b32", "shr.u32"]
    two += [f"{operation}.{rounding}.f32" for operation in ("add", "mul") for rounding in ("rn", "rz")]
    two += [f"cvt.{rounding}.{to}.f32" for to in HALVES for rounding in ("rn", "rz")]
    modifiers = ["", ".NaN", *([".xorsign.abs", ".NaN.xorsign.abs"] if able.xorsign else [])]
    two += [f"{each}{how}.{name}" for each in ("min", "max") for how in modifiers for name in ("f32", *HALVES)]
    three = ["fma.rn.f32", "fma.rz.f32", "fma.rn.bf16x2", "fma.rn.f16x2", "mad.lo.u32", "shf.l.wrap.b32", "prmt.b32"]
    found = ["not.b32 $0, $1;", *(f"{opcode} $0, $1, $2;" for opcode in two)]
    found += [f"{opcode} $0, $1, $2, $3;" for opcode in three]
    found += [f"lop3.b32 $0, $1, $2, $3, {table:#x};" for table in (0x96, 0xE4, 0xEA, 0xF8)]
    found += ["{ .reg .b64 p; .reg .b32 t; mul.wide.u32 p, $1, $2; mov.b64 {$0, t}, p; xor.b32 $0, $0, t; }"]
    found += ["{ .reg .b16 low, high; mov.b32 {low, high}, $1; mov.b32 $0, {high, low}; }"]
    for name in FP8 if able.cvt_fp8 else ():
        found += [f"{{ .reg .b16 t; cvt.rn.satfinite.{name}.f32 t, $1, $2; cvt.u32.u16 $0, t; }}"]
        found += [f"{{ .reg .b16 low, high; mov.b32 {{low, high}}, $1; cvt.rn.f16x2.{name} $0, low; }}"]
    if able.cvt_e2m1:
        convert = "cvt.rn.satfinite.e2m1x2.f32 low, $1, $2; cvt.rn.satfinite.e2m1x2.f32 high, $3, $2;"
        found += [f"{{ .reg .b8 low, high; .reg .b16 t; {convert} mov.b16 t, {{low, high}}; cvt.u32.u16 $0, t; }}"]
    return found


@pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=pytest.mark.interpreter), pytest.param("cuda", marks=pytest.mark.gpu)]
)
def test_each_instruction_in_a_kernel(device: str) -> None:
    """Through Triton's interpreter, and as a GPU has it, to the bit."""
    able = gpu.capabilities("sm_100") if device == "cpu" else gpu.device_capabilities(torch.device(device, 0))
    if not able.ptx:
        pytest.skip("no PTX on this GPU")
    count = 2**16
    inputs = [words_of_all_kinds(count, seed) for seed in (5, 6, 7)]
    tensors = [torch.from_numpy(each.view(np.int32)).to(device) for each in inputs]
    wrong = []
    with ptx.interpreted(able):
        for assembly in programs(able):
            out = torch.full((count,), -1, dtype=torch.int32, device=device)
            rows = count if device == "cpu" else 1024
            program_kernel[(count // rows,)](*tensors, out, ASSEMBLY=assembly, COUNT=rows)
            got, expected = out.cpu().numpy().view(np.uint32), execute(assembly, *inputs)
            for place in np.flatnonzero(got != expected)[:3]:
                operands = ", ".join(f"{each[place]:#010x}" for each in inputs)
                wrong.append(f"{assembly} of {operands}: {got[place]:#010x}, not {expected[place]:#010x}")
    assert not wrong, "\n".join(wrong)


@triton.jit
def packed_kernel(x_ptr, out_ptr):
    place = tl.arange(0, 8)
    out = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [tl.load(x_ptr + place)], tl.int16, True, pack=2)
    tl.store(out_ptr + place, out)


@pytest.mark.interpreter
def test_elements_packed_into_registers_are_not_known() -> None:
    x = torch.zeros(8, dtype=torch.int16)
    with ptx.interpreted(gpu.NONE), pytest.raises(Exception, match="one element of 32 bits"):
        packed_kernel[(1,)](x, x)

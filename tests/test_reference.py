"""The reference against authorities that share nothing with it: ml_dtypes, numpy, exact fractions, worked examples."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from fractions import Fraction

import exact
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mxkernels import reference
from mxkernels.formats import FORMATS
from mxkernels.spec import MXSpec

SEED = 0x0123456789ABCDEF
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
UNSIGNED = {torch.bfloat16: torch.uint16, torch.float16: torch.uint16, torch.float32: torch.uint32}
BLOCKS = ((1, 32), (1, 16), (32, 1), (16, 1), (1, 2), (2, 2), (4, 4), (8, 4), (16, 16), (2, 32), (128, 1), (1, 128))


def spec_of(
    name: str, block: tuple[int, int] = (1, 2), rounding: str = "rtne", rule: str = "rceil", symmetric: bool = True
) -> MXSpec:
    return MXSpec(name, block, rounding, rule, symmetric)


def first_codes(packed: torch.Tensor, name: str) -> np.ndarray:
    """The code of column 0."""
    return (packed[:, 0] & ((1 << exact.BITS[name]) - 1)).numpy()


def beside_max(values: Iterable[float], name: str) -> torch.Tensor:
    """`[N, 2]` fp32 blocks of a value and the format's max, which under rceil have the scale 1: v is the value."""
    x = torch.tensor([float(value) for value in values], dtype=torch.float64)
    blocks = torch.stack([x, torch.full_like(x, exact.MAX[name])], dim=1)
    assert torch.equal(blocks.float().double(), blocks), "a value is not fp32"
    return blocks.float()


def codes_at_scale_one(values: Iterable[float], name: str) -> list[int]:
    packed, scale, _ = reference.quantize(beside_max(values, name), spec_of(name))
    assert scale.unique().tolist() == [127]
    return first_codes(packed, name).tolist()


def check_against_exact(x: torch.Tensor, spec: MXSpec, seed: int | None = None) -> None:
    """Every byte of a small matrix."""
    codes, scale, offset = reference.quantize(x, spec, seed)
    block = (spec.block.rows, spec.block.cols)
    expected = exact.quantize(x.double().tolist(), spec.element.name, block, spec.scale_rounding, spec.symmetric, seed)
    assert scale.tolist() == expected[1]
    if spec.symmetric:
        assert offset is None
    else:
        assert offset.view(torch.int16).tolist() == torch.tensor(expected[2]).half().view(torch.int16).tolist()
    assert codes.tolist() == expected[0]


# --- scales ------------------------------------------------------------------------------------------------

ULP = 2.0**-23
LARGEST = 2.0**128 - 2.0**104  # fp32's

# The scale's exponent, worked by hand:     amax            floor ceil even rceil
EXPONENTS = {
    "e2m1": [
        (1.0, -2, -2, -2, -2),
        (1.0 + ULP, -2, -1, -2, -2),
        (1.5, -2, -1, -2, -2),  # 1.5 * 4 = 6
        (1.5 + ULP, -2, -1, -2, -1),
        (1.75 - ULP, -2, -1, -2, -1),
        (1.75, -2, -1, -1, -1),
        (2.0 - ULP, -2, -1, -1, -1),
        (2.0, -1, -1, -1, -1),
        (LARGEST, 125, 126, 126, 126),
        (2.0**127, 125, 125, 125, 125),
        (2.0**-124, -126, -126, -126, -126),
        (2.0**-125, -127, -127, -127, -127),
        (2.0**-126, -127, -127, -127, -127),  # -128 clamps
        (2.0**-149, -127, -127, -127, -127),
    ],
    "e3m0": [
        (16.0, 0, 0, 0, 0),
        (16.0 + 16 * ULP, 0, 1, 0, 1),
        (24.0 - 16 * ULP, 0, 1, 0, 1),
        (24.0, 0, 1, 1, 1),
        (LARGEST, 123, 124, 124, 124),
        (2.0**-122, -126, -126, -126, -126),
        (2.0**-127, -127, -127, -127, -127),
    ],
    "int4": [
        (4.0, -1, -1, -1, 0),  # 4 * 2 = 8 > 7
        (3.5, -2, -1, -1, -1),  # 3.5 * 2 = 7
        (6.0 - 4 * ULP, -1, 0, -1, 0),
        (6.0, -1, 0, 0, 0),
        (7.0, -1, 0, 0, 0),
        (7.0 + 4 * ULP, -1, 0, 0, 1),
        (8.0, 0, 0, 0, 1),
        (LARGEST, 124, 125, 125, 126),
    ],
    "e2m3": [
        (4.0, 0, 0, 0, 0),
        (7.5, 0, 1, 0, 0),
        (7.5 + 4 * ULP, 0, 1, 0, 1),
        (7.75 - 4 * ULP, 0, 1, 0, 1),
        (7.75, 0, 1, 1, 1),
        (LARGEST, 125, 126, 126, 126),
    ],
    "e3m2": [
        (16.0, 0, 0, 0, 0),
        (28.0, 0, 1, 0, 0),
        (28.0 + 16 * ULP, 0, 1, 0, 1),
        (30.0 - 16 * ULP, 0, 1, 0, 1),
        (30.0, 0, 1, 1, 1),
        (LARGEST, 123, 124, 124, 124),
    ],
    "e4m3": [
        (256.0, 0, 0, 0, 0),
        (448.0, 0, 1, 0, 0),
        (448.0 + 256 * ULP, 0, 1, 0, 1),
        (496.0 - 256 * ULP, 0, 1, 0, 1),
        (496.0, 0, 1, 1, 1),
        (LARGEST, 119, 120, 120, 120),
        (2.0**-118, -126, -126, -126, -126),
    ],
    "e5m2": [
        (32768.0, 0, 0, 0, 0),
        (57344.0, 0, 1, 0, 0),
        (57344.0 + 32768 * ULP, 0, 1, 0, 1),
        (61440.0 - 32768 * ULP, 0, 1, 0, 1),
        (61440.0, 0, 1, 1, 1),
        (LARGEST, 112, 113, 113, 113),
        (2.0**-111, -126, -126, -126, -126),
        (2.0**-112, -127, -127, -127, -127),
        (1.75 * 2.0**-112, -127, -126, -127, -127),
    ],
    "int8": [
        (64.0, 0, 0, 0, 0),
        (127.0, 0, 1, 0, 0),
        (127.0 + 64 * ULP, 0, 1, 0, 1),
        (127.5 - 64 * ULP, 0, 1, 0, 1),
        (127.5, 0, 1, 1, 1),
        (LARGEST, 121, 122, 122, 122),
    ],
}


def scale_bytes(amax: Iterable[float], name: str, rule: str) -> list[int]:
    """The scale byte of each of `amax`, by way of a block of its own."""
    x = torch.tensor([[value, 0.0] for value in amax], dtype=torch.float32)
    return reference.quantize(x, spec_of(name, rule=rule))[1].flatten().tolist()


@pytest.mark.parametrize("rule", exact.RULES)
@pytest.mark.parametrize("name", exact.NAMES)
def test_scales_by_hand(name: str, rule: str) -> None:
    rows = EXPONENTS[name]
    expected = [row[1 + exact.RULES.index(rule)] + 127 for row in rows]
    assert scale_bytes([row[0] for row in rows], name, rule) == expected
    assert scale_bytes([-row[0] for row in rows], name, rule) == expected


def significands(name: str) -> list[int]:
    """24-bit integers: every rule's threshold for this format, and one ulp each side."""
    one = 1 << 23
    even = Fraction(2) - Fraction(1, 2 ** (exact.EVEN_BITS[name] + 1))
    largest = exact.GRID[name][-1]
    largest /= 2 ** exact.floor_log2(largest)
    thresholds = {one, 3 * one // 2, int(even * one), int(largest * one), 2 * one}
    near = {threshold + ulp for threshold in thresholds for ulp in (-1, 0, 1)}
    return sorted(significand for significand in near if one <= significand < 2 * one)


@pytest.mark.parametrize("rule", exact.RULES)
@pytest.mark.parametrize("name", exact.NAMES)
def test_scales_at_every_exponent(name: str, rule: str) -> None:
    amax = {Fraction(s) * Fraction(2) ** (p - 23) for p in range(-126, 128) for s in significands(name)}
    # fp32 subnormals: the same significands, as far as they have the bits, and their neighbours
    least = Fraction(2) ** -149
    for p in range(-149, -126):
        for units in (s >> (-126 - p) for s in significands(name)):
            amax |= {least * n for n in (units - 1, units, units + 1) if n > 0}
    amax = sorted(amax)
    assert scale_bytes(map(float, amax), name, rule) == [exact.scale_byte(a, name, rule) for a in amax]


@pytest.mark.parametrize("rule", exact.RULES)
@pytest.mark.parametrize("name", exact.NAMES)
def test_saturation_is_where_the_rules_allow_it(name: str, rule: str) -> None:
    """ceil never saturates a float format, rceil none at all; whatever is rounded beyond is announced by the spec."""
    spec = spec_of(name, rule=rule)
    landings = []
    for s in significands(name):
        e = exact.scale_byte(Fraction(s, 1 << 23), name, rule) - 127
        landings.append(Fraction(s, 1 << 23) / Fraction(2) ** e)
    saturates = max(landings) > exact.MAX[name]
    assert saturates == (rule in ("floor", "even") or (rule == "ceil" and name == "int4"))
    assert replace(spec, rounding="stochastic").can_saturate or not saturates
    beyond = Fraction(spec.element._magnitude(spec.element.max_code + 1))
    assert spec.can_saturate == (max(landings) >= (exact.MAX[name] + beyond) / 2)


# --- elements ----------------------------------------------------------------------------------------------


def nearest_codes(v: np.ndarray, name: str) -> np.ndarray:
    """Codes to nearest-even by an authority: ml_dtypes' cast, numpy's rint, fractions for e3m0. Beyond max: max."""
    v = np.clip(v, -float(exact.MAX[name]), float(exact.MAX[name]))
    if name in exact.ML_DTYPES:
        return v.astype(np.float32).astype(exact.ML_DTYPES[name]).view(np.uint8)
    if name.startswith("int"):
        return np.rint(v).astype(np.int64) & ((1 << exact.BITS[name]) - 1)
    return np.array([exact.encode(Fraction(value), bool(np.signbit(value)), name) for value in v.tolist()])


@pytest.mark.parametrize("rule", ["floor", "rceil"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", exact.NAMES)
def test_codes_of_all_16_bit_values(name: str, dtype: torch.dtype, rule: str) -> None:
    """Each value beside the format's max: those below it are rounded as they are, larger ones at their own scale."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    blocks = torch.stack([x, torch.full_like(x, exact.MAX[name])], dim=1)
    packed, scale, _ = reference.quantize(blocks, spec_of(name, rule=rule))
    codes, scale = first_codes(packed, name), scale.flatten().numpy()

    finite = x.isfinite().numpy()
    assert (scale[~finite] == 255).all()
    assert not codes[~finite].any()
    # a 16-bit value times a power of two is exact in float64, and below fp32's range it is as good as its zero
    v = np.ldexp(x[x.isfinite()].double().numpy(), 127 - scale[finite].astype(np.int64))
    assert np.array_equal(codes[finite], nearest_codes(v, name))


TIES_BY_HAND = {
    "e3m0": {0.125: 0, 0.375: 2, 0.75: 2, 1.5: 4, 3.0: 4, 6.0: 6, 12.0: 6},
    "int4": {0.5: 0, 1.5: 2, 2.5: 2, 3.5: 4, 4.5: 4, 5.5: 6, 6.5: 6},
    "int8": {0.5: 0, 1.5: 2, 2.5: 2, 63.5: 64, 64.5: 64, 125.5: 126, 126.5: 126},
    "e2m1": {0.25: 0, 0.75: 2, 1.25: 2, 1.75: 4, 2.5: 4, 3.5: 6, 5.0: 6},
}


@pytest.mark.parametrize("name", TIES_BY_HAND)
def test_ties_by_hand(name: str) -> None:
    ties = TIES_BY_HAND[name]
    assert codes_at_scale_one(ties, name) == list(ties.values())
    negative = codes_at_scale_one([-tie for tie in ties], name)
    if name.startswith("int"):
        assert negative == [-code % (1 << exact.BITS[name]) for code in ties.values()]
    else:
        assert negative == [code + FORMATS[name].sign_bit for code in ties.values()]


@pytest.mark.parametrize("name", exact.NAMES)
def test_every_midpoint_and_its_fp32_neighbours(name: str) -> None:
    values, expected = [], []
    for code, (lower, upper) in enumerate(itertools.pairwise(exact.GRID[name])):
        middle = np.float32((lower + upper) / 2)
        values += [np.nextafter(middle, np.float32(0)), middle, np.nextafter(middle, np.float32(np.inf))]
        expected += [code, code + code % 2, code + 1]
    assert codes_at_scale_one(values, name) == expected


@pytest.mark.parametrize("name", exact.NAMES)
def test_signs(name: str) -> None:
    """The sign bit of a float code is that of v, also where it rounds to zero; integers have one zero."""
    tiny = float(exact.GRID[name][1]) / 8
    minus = 0 if name.startswith("int") else FORMATS[name].sign_bit
    assert codes_at_scale_one([0.0, -0.0, tiny, -tiny, 2.0**-149, -(2.0**-149)], name) == [0, minus, 0, minus, 0, minus]


@pytest.mark.parametrize("rounding", ["rtne", "stochastic"])
@pytest.mark.parametrize("name", exact.NAMES)
def test_beyond_max_is_max(name: str, rounding: str) -> None:
    """Under floor, what is at max or beyond it, below the next power of two, lands at max or beyond it."""
    largest = np.float32(exact.MAX[name])
    beyond = np.nextafter(largest, np.float32(np.inf))
    top = np.nextafter(np.float32(2.0 ** (exact.floor_log2(exact.GRID[name][-1]) + 1)), np.float32(0))
    x = torch.tensor([largest, beyond, (beyond + top) / 2, top]).repeat_interleave(64)
    x = torch.stack([x, -x], dim=1)
    packed, _, _ = reference.quantize(x, spec_of(name, rounding=rounding, rule="floor"), SEED)
    codes = reference.unpack(packed, FORMATS[name], 2)
    largest = len(exact.GRID[name]) - 1
    minus = -largest % 2 ** exact.BITS[name] if name.startswith("int") else largest + FORMATS[name].sign_bit
    assert codes.unique(dim=0).tolist() == [[largest, minus]]


# --- blocks ------------------------------------------------------------------------------------------------

NOT_FINITE = [math.nan, -math.nan, math.inf, -math.inf]


@pytest.mark.parametrize("rounding", ["rtne", "stochastic"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("name", exact.NAMES)
def test_a_value_that_is_not_finite_makes_its_block_nan_and_no_other(name: str, symmetric: bool, rounding: str) -> None:
    spec = spec_of(name, (2, 4), rounding, symmetric=symmetric)
    clean = torch.randn(6, 12, generator=torch.Generator().manual_seed(1)) + 3
    before = reference.quantize(clean, spec, SEED)
    for (row, col), value in zip(itertools.product((2, 3), (4, 5, 6, 7)), NOT_FINITE * 2, strict=True):
        x = clean.clone()
        x[row, col] = value
        codes, scale, offset = reference.quantize(x, spec, SEED)
        assert scale[1, 1] == 255
        assert not reference.unpack(codes, spec.element, 12)[2:4, 4:8].any()
        assert reference.dequantize(codes, scale, offset, spec, 12, torch.float32)[2:4, 4:8].isnan().all()
        if not symmetric:
            assert offset.view(torch.int16)[1, 1] == 0
        scale[1, 1] = before[1][1, 1]
        assert torch.equal(scale, before[1])
        decoded = reference.unpack(codes, spec.element, 12)
        untouched = reference.unpack(before[0], spec.element, 12)
        untouched[2:4, 4:8] = 0
        assert torch.equal(decoded, untouched)


@pytest.mark.parametrize("bits", [0x7F800001, 0x7FFFFFFF, -1, 0x7F800000, -0x800000])
def test_every_kind_of_nan_and_inf_counts(bits: int) -> None:
    x = torch.tensor([[1.0, 0.0]])
    x.view(torch.int32)[0, 1] = bits
    codes, scale, _ = reference.quantize(x, spec_of("e2m1"))
    assert (scale.item(), codes.item()) == (255, 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rounding", ["rtne", "stochastic"])
@pytest.mark.parametrize("name", exact.NAMES)
def test_blocks_of_zeros(name: str, rounding: str, dtype: torch.dtype) -> None:
    x = torch.tensor([[0.0, -0.0, -0.0, 0.0]], dtype=dtype)
    for rule in exact.RULES:
        packed, scale, _ = reference.quantize(x, spec_of(name, (1, 4), rounding, rule), SEED)
        assert scale.item() == 0
        minus = 0 if name.startswith("int") else FORMATS[name].sign_bit
        assert reference.unpack(packed, FORMATS[name], 4).tolist() == [[0, minus, minus, 0]]


def test_the_scale_exponent_is_clamped_at_minus_127() -> None:
    # e2m1, floor: 1.5 * 2**-125 has e = -127; what is smaller keeps that scale and uses smaller codes
    x = torch.tensor([[1.5 * 2.0**-125, 0], [1.5 * 2.0**-127, 0], [2.0**-128, 0], [-(2.0**-149), 0]])
    codes, scale, _ = reference.quantize(x, spec_of("e2m1", rule="floor"))
    assert scale.flatten().tolist() == [0, 0, 0, 0]
    assert codes.flatten().tolist() == [7, 3, 1, 8]  # 6, 1.5, 0.5, -0


#   least, largest -> offset
OFFSETS = [
    (1.0, 3.0, 2.0),
    (-1.0, 3.0, 1.0),
    (-5.0, -3.0, -4.0),
    (-1.0, 1.0, 0.0),
    (-(2.0**-30), 0.0, 0.0),  # -2**-31 is -0 in fp16, stored as +0
    (-(2.0**-24), 2.0**-30, 0.0),  # a little less than half of fp16's smallest, below zero
    (0.0, 2.0**-23, 2.0**-24),  # fp16 subnormals
    (0.0, 3 * 2.0**-24, 2.0**-23),  # 1.5 of the smallest: a tie
    (1.0, 1.0 + 2.0**-10, 1.0),  # 1 + 2**-11 is a tie of fp16, and so is the next; to even
    (1.0 + 2.0**-10, 1.0 + 2.0**-9, 1.0 + 2.0**-9),
    (2.0**-39, 2 + 2.0**-10, 1.0),  # fp32 sum 1 + 2**-11, a tie of fp16; unrounded it would lie above
    (65504.0, 65504.0, 65504.0),
    (65503.0, 65537.0, 65504.0),  # 65520 would be Inf
    (1e6, 3e6, 65504.0),
    (-3e6, -1e6, -65504.0),
    (LARGEST, LARGEST, 65504.0),
    (-LARGEST, -LARGEST, -65504.0),
    (-LARGEST, LARGEST, 0.0),
]


@pytest.mark.parametrize(("least", "largest", "expected"), OFFSETS)
def test_offsets_by_hand(least: float, largest: float, expected: float) -> None:
    for pair in ((least, largest), (largest, least)):
        offset = reference.quantize(torch.tensor([pair]), spec_of("e2m1", symmetric=False))[2]
        assert offset.dtype == torch.float16
        assert offset.view(torch.int16).item() == torch.tensor(expected).half().view(torch.int16).item()


def test_asymmetric_is_symmetric_of_what_is_left() -> None:
    # offset 2; -1 and 1 are left: rceil gives e = -2, so +-4
    codes, scale, offset = reference.quantize(torch.tensor([[1.0, 3.0]]), spec_of("e2m1", symmetric=False))
    assert (codes.item(), scale.item(), offset.item()) == (0x6E, 125, 2.0)
    # a block of one value that fp16 has: nothing is left, +0
    codes, scale, offset = reference.quantize(torch.tensor([[-5.0, -5.0]]), spec_of("e2m1", symmetric=False))
    assert (codes.item(), scale.item(), offset.item()) == (0, 0, -5.0)
    # -0 - (+0) is -0
    codes, scale, offset = reference.quantize(torch.tensor([[-0.0, 0.0]]), spec_of("e2m1", symmetric=False))
    assert (codes.item(), scale.item(), offset.item()) == (0x08, 0, 0.0)


def test_the_difference_from_the_offset_is_rounded_to_fp32() -> None:
    # offset 1024; 128 + 2**-16 - 1024 needs 26 bits and becomes -896, at scale 2**8 the tie -3.5, which goes to -4
    x = torch.tensor([[1.0, 128 + 2.0**-16, 2047.0, 1024.0]])
    codes, scale, offset = reference.quantize(x, spec_of("e2m1", (1, 4), symmetric=False))
    assert (scale.item(), offset.item()) == (127 + 8, 1024.0)
    assert reference.unpack(codes, FORMATS["e2m1"], 4).tolist() == [[0xE, 0xE, 0x6, 0x0]]


def test_elements_outside_the_tensor_take_no_part() -> None:
    # were they zeros, the offsets would be 2, 2, 3 and 3.5
    x = torch.tensor([[4.0, 4.0, 4.0], [4.0, 4.0, 6.0], [4.0, 8.0, 7.0]])
    for sign in (1, -1):
        _, scale, offset = reference.quantize(sign * x, spec_of("int8", (2, 2), symmetric=False))
        assert (sign * offset).tolist() == [[4.0, 5.0], [6.0, 7.0]]
        assert scale.tolist() == [[0, 121], [122, 0]]  # left: nothing; 1 (64 * 2**-6); 2; nothing


# --- whole tensors -----------------------------------------------------------------------------------------


def hard_values(rows: int, cols: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Numbers of every kind: a block's own range, far smaller ones, zeros, ties, subnormals, a NaN, an Inf."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, cols, generator=generator, dtype=torch.float64)
    low, high = (-14, 14) if dtype == torch.float16 else (-140, 120)
    x *= 2.0 ** torch.randint(low, high, (rows, 1), generator=generator).double()
    kind = torch.randint(0, 40, (rows, cols), generator=generator)
    x = torch.where(kind == 0, 0.0 * x, x)
    x = torch.where(kind == 1, x * 2.0**-9, x)
    x = torch.where(kind == 2, x.sign() * 2.0 ** x.abs().log2().floor(), x)
    x = torch.where(kind == 3, x.sign() * 1.75 * 2.0 ** x.abs().log2().floor(), x)
    x = torch.where((kind == 4) & (x < -1), math.nan, x)
    x = torch.where((kind == 5) & (x < -1), -math.inf, x)
    x += (kind[:, :1] % 3 == 0) * x.abs().nan_to_num(0, 0, 0).amax(1, keepdim=True)  # rows away from zero
    return x.to(dtype)


PRODUCT = list(itertools.product(exact.NAMES, ("rtne", "stochastic"), exact.RULES, (True, False)))


@pytest.mark.parametrize("name", exact.NAMES)
def test_every_combination_against_fractions(name: str) -> None:
    shapes = ((5, 37), (9, 21), (33, 5), (130, 2), (3, 131), (1, 40), (17, 16), (1, 1))
    combinations = itertools.product(("rtne", "stochastic"), exact.RULES, (True, False))
    for k, (rounding, rule, symmetric) in enumerate(combinations):
        for turn in range(2):
            rows, cols = shapes[(k + 3 * turn) % len(shapes)]
            block = BLOCKS[(k + 5 * turn) % len(BLOCKS)]
            x = hard_values(rows, cols, DTYPES[(k + turn) % 3], seed=k)
            spec = spec_of(name, block, rounding, rule, symmetric)
            check_against_exact(x, spec, SEED + k if rounding == "stochastic" else None)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: f"{block[0]}x{block[1]}")
def test_every_block_shape_on_every_odd_shape(block: tuple[int, int]) -> None:
    combinations = itertools.cycle(PRODUCT)
    for k, (rows, cols) in enumerate([(1, 1), (1, 2), (2, 1), (1, 33), (33, 1), (3, 5), (7, 17), (16, 32), (4, 129)]):
        name, rounding, rule, symmetric = next(itertools.islice(combinations, 7 * k + block[0], None))
        x = hard_values(rows, cols, DTYPES[k % 3], seed=100 + k)
        spec = spec_of(name, block, rounding, rule, symmetric)
        check_against_exact(x, spec, SEED if rounding == "stochastic" else None)


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (3, 0)])
@pytest.mark.parametrize("name", ["e2m1", "e2m3", "int8"])
def test_empty_tensors(name: str, shape: tuple[int, int], symmetric: bool) -> None:
    for rounding, block in itertools.product(("rtne", "stochastic"), ((1, 32), (4, 4), (32, 1))):
        spec = spec_of(name, block, rounding, symmetric=symmetric)
        codes, scale, offset = reference.quantize(torch.empty(shape), spec, SEED)
        assert codes.shape == (shape[0], spec.packed_cols(shape[1]))
        assert scale.shape == spec.scale_shape(*shape)
        assert (offset is None) == symmetric
        decoded = reference.dequantize(codes, scale, offset, spec, shape[1], torch.bfloat16)
        assert decoded.shape == shape
        assert decoded.dtype == torch.bfloat16


def bits_of(dtype: torch.dtype) -> st.SearchStrategy[int]:
    """Any bits of a float type, and often ones with a middling exponent, so that blocks have some range."""
    width = 16 if dtype != torch.float32 else 32
    any_bits = st.integers(0, 2**width - 1)
    if dtype == torch.float32:
        return st.one_of(any_bits, st.integers(0x3F000000, 0x42FFFFFF), st.integers(0, 0xFFFFFF))
    middle = 0x3F00 if dtype == torch.bfloat16 else 0x3800
    return st.one_of(any_bits, st.integers(middle, middle + 0x3FF), st.integers(0, 0x1FF))


@st.composite
def matrices(draw: st.DrawFn) -> torch.Tensor:
    dtype = draw(st.sampled_from(DTYPES))
    rows, cols = draw(st.integers(1, 6)), draw(st.integers(1, 12))
    bits = draw(st.lists(bits_of(dtype), min_size=rows * cols, max_size=rows * cols))
    return torch.tensor(bits, dtype=UNSIGNED[dtype]).view(dtype).reshape(rows, cols)


@settings(max_examples=150)
@given(
    x=matrices(),
    name=st.sampled_from(exact.NAMES),
    block=st.sampled_from([(1, 2), (1, 4), (2, 2), (4, 1), (4, 4), (1, 8), (8, 4)]),
    rule=st.sampled_from(exact.RULES),
    symmetric=st.booleans(),
    seed=st.none() | st.integers(0, 2**64 - 1),
)
def test_any_bits_against_fractions(
    x: torch.Tensor, name: str, block: tuple[int, int], rule: str, symmetric: bool, seed: int | None
) -> None:
    rounding = "rtne" if seed is None else "stochastic"
    check_against_exact(x, spec_of(name, block, rounding, rule, symmetric), seed)


def test_bands_of_rows_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    x = hard_values(37, 19, torch.float32, seed=5)
    for name, block in (("e2m1", (4, 4)), ("e2m3", (2, 8)), ("int8", (1, 16))):
        spec = spec_of(name, block, "stochastic", "even", symmetric=False)
        whole = reference.quantize(x, spec, SEED)
        decoded = reference.dequantize(*whole, spec, 19, torch.float32)
        with monkeypatch.context() as patch:
            patch.setattr(reference, "_BAND_ELEMENTS", 100)
            for one_band, in_bands in zip(whole, reference.quantize(x, spec, SEED), strict=True):
                assert torch.equal(one_band, in_bands)
            again = reference.dequantize(*whole, spec, 19, torch.float32)
        assert torch.equal(decoded.view(torch.int32), again.view(torch.int32))


# --- storage -----------------------------------------------------------------------------------------------


def test_packing_by_hand() -> None:
    four = torch.tensor([[0x1, 0x2, 0x3]], dtype=torch.uint8)
    assert reference.pack(four, FORMATS["e2m1"]).tolist() == [[0x21, 0x03]]
    six = torch.tensor([[0b000001, 0b000010, 0b000011, 0b100000, 0b111111]], dtype=torch.uint8)
    # 100000 000011 000010 000001 and then 111111 with three zero codes, least significant byte first
    assert reference.pack(six, FORMATS["e2m3"]).tolist() == [[0b10000001, 0b00110000, 0b10000000, 0b00111111, 0, 0]]
    eight = torch.tensor([[0x80, 0x01]], dtype=torch.uint8)
    assert reference.pack(eight, FORMATS["e4m3"]).tolist() == [[0x80, 0x01]]


@pytest.mark.parametrize("cols", [1, 2, 3, 4, 5, 6, 7, 8, 9, 64, 101])
@pytest.mark.parametrize("name", ["e2m1", "int4", "e2m3", "e3m2", "e5m2", "int8"])
def test_packing_against_large_integers(name: str, cols: int) -> None:
    generator = torch.Generator().manual_seed(cols)
    codes = torch.randint(0, 1 << exact.BITS[name], (5, cols), generator=generator, dtype=torch.uint8)
    packed = reference.pack(codes, FORMATS[name])
    assert packed.tolist() == [exact.pack(row, name) for row in codes.tolist()]
    assert packed.shape[1] == MXSpec(name).packed_cols(cols)
    assert torch.equal(reference.unpack(packed, FORMATS[name], cols), codes)


# --- decoding ----------------------------------------------------------------------------------------------


def decode(
    codes: Sequence[int], scale: Sequence[int], offset: Sequence[float] | None, name: str, dtype: torch.dtype
) -> list[list[int]]:
    """The bits that `codes` decode to under each scale byte (and offset), a row each."""
    block = (1, min(len(codes), 128))
    spec = spec_of(name, block, symmetric=offset is None)
    packed = torch.tensor([exact.pack(codes, name)], dtype=torch.uint8).repeat(len(scale), 1)
    blocks = len(codes) // block[1]
    scales = torch.tensor(scale, dtype=torch.uint8)[:, None].repeat(1, blocks)
    offsets = None if offset is None else torch.tensor(offset, dtype=torch.float16)[:, None].repeat(1, blocks)
    out = reference.dequantize(packed, scales, offsets, spec, len(codes), dtype)
    assert out.dtype == dtype
    return out.view(UNSIGNED[dtype]).tolist()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", exact.NAMES)
def test_every_code_under_every_scale_byte(name: str, dtype: torch.dtype) -> None:
    codes, dtype_name = list(range(1 << exact.BITS[name])), str(dtype).removeprefix("torch.")
    bits = decode(codes, range(256), None, name, dtype)
    values = exact.code_values(name)
    expected = [[exact.decoded_bits(value, byte, None, dtype_name) for value in values] for byte in range(256)]
    assert bits == expected


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", exact.NAMES)
def test_every_code_with_offsets(name: str, dtype: torch.dtype) -> None:
    codes, dtype_name = list(range(1 << exact.BITS[name])), str(dtype).removeprefix("torch.")
    offsets = [0.0, -0.0, 2.0**-24, -(2.0**-14), 1 + 2.0**-8, -(1 + 2.0**-10), 65504.0, -65504.0]
    scales = [0, 1, 80, 100, 103, 110, 115, 118, 120, 121, 122, 124, 125, 126, 127, 128, 130, 135, 140, 200, 254, 255]
    pairs = list(itertools.product(offsets, scales))[:: 1 if len(codes) < 256 else 3]
    bits = decode(codes, [scale for _, scale in pairs], [offset for offset, _ in pairs], name, dtype)
    values = exact.code_values(name)
    expected = [[exact.decoded_bits(value, byte, offset, dtype_name) for value in values] for offset, byte in pairs]
    assert bits == expected


def test_decoding_by_hand() -> None:
    def bits(code: int, byte: int, name: str = "e2m1", dtype: torch.dtype = torch.bfloat16) -> int:
        return decode([code, code], [byte], None, name, dtype)[0][0]

    assert bits(0x7, 127) == 0x40C0  # 6
    assert bits(0x8, 127) == 0x8000  # -0
    assert bits(0x1, 0) == 0x0020  # 2**-128, a subnormal
    assert bits(0x1, 0, dtype=torch.float32) == 0x00200000
    assert bits(0x7, 254) == 0x7F80  # 6 * 2**127 is beyond bf16
    assert bits(0x1, 127 - 24, dtype=torch.float16) == 0x0000  # 2**-25: a tie of fp16's smallest, to the even zero
    assert bits(0x3, 127 - 24, dtype=torch.float16) == 0x0002  # 1.5 * 2**-24: a tie, to the even 2
    assert bits(0x8, 127, name="int4") == 0xC100  # -8 is never produced, and decodes
    assert bits(0x8, 0, name="int4") == 0x8180  # -2**-124
    assert bits(0x80, 127, name="int8") == 0xC300  # -128
    assert bits(0x7C, 127, name="e5m2") == 0x7F80
    assert bits(0xFC, 0, name="e5m2") == 0xFF80


NAN_BITS = {torch.bfloat16: 0x7FC0, torch.float16: 0x7E00, torch.float32: 0x7FC00000}


@pytest.mark.parametrize(("dtype", "expected"), NAN_BITS.items(), ids=str)
def test_nan_bits(dtype: torch.dtype, expected: int) -> None:
    for name, code in [("e2m1", 0), ("e2m1", 0xF), ("int4", 3)]:
        assert decode([code, code], [255], None, name, dtype) == [[expected, expected]]
        assert decode([code, code], [255], [-1.0], name, dtype) == [[expected, expected]]
    for name, code in [("e4m3", 0x7F), ("e4m3", 0xFF), ("e5m2", 0x7D), ("e5m2", 0xFF)]:
        assert decode([code, code], [127], None, name, dtype) == [[expected, expected]]
        assert decode([code, code], [3], [1.0], name, dtype) == [[expected, expected]]


def test_the_sum_with_the_offset_is_rounded_to_fp32_first() -> None:
    # 1 + 2**-8 is a tie of bf16; what is added lies below fp32's last bit there, and so cannot break it
    row = decode([0x1, 0x9], [127 - 40], [1 + 2.0**-8], "e2m1", torch.bfloat16)
    assert row == [[0x3F80, 0x3F80]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_round_to_by_ml_dtypes(dtype: torch.dtype) -> None:
    """fp32 to bf16 and fp16, both neighbours and the middle of neighbours included, in every binade."""
    authority = {torch.bfloat16: exact.ml_dtypes.bfloat16, torch.float16: np.float16}[dtype]
    mantissa = np.arange(0, 2**23, 2**10 + 1, dtype=np.int64)
    mantissa = np.concatenate([mantissa, *(np.arange(0, 2**23, 2**12) + ulp for ulp in (-1, 0, 1))]) % 2**23
    bits = (np.arange(0, 255)[:, None] << 23 | mantissa[None, :]).astype(np.uint32)
    x = bits.view(np.float32).flatten()
    with np.errstate(over="ignore"):
        expected = x.astype(authority).view(np.uint16)
    rounded = reference.round_to(torch.from_numpy(x), dtype).view(torch.int16).numpy().view(np.uint16)
    assert np.array_equal(rounded, expected)

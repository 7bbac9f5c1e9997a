"""The device functions, exhaustively: each against the reference or exact arithmetic, through a kernel of a few lines.

On a machine without a GPU they run in the interpreter, on one with a GPU compiled, with that GPU's own
instructions: the same values go through a fast path and its twin.
"""

from __future__ import annotations

from fractions import Fraction

import pytest

pytest.importorskip("triton", reason="kernels need Triton")

import exact
import torch
import triton
import triton.language as tl

from mxkernels import gpu, reference
from mxkernels.formats import FORMATS
from mxkernels.ops.elements import encode, encode_words
from mxkernels.ops.primitives import (
    block_offset,
    decode,
    decode_words,
    pack,
    random_words,
    scale_byte,
    scale_value,
    unpack,
)
from mxkernels.spec import MXSpec

pytestmark = [
    pytest.mark.parametrize(
        "device",
        [pytest.param("cpu", marks=pytest.mark.interpreter), pytest.param("cuda", marks=pytest.mark.gpu)],
    ),
    pytest.mark.filterwarnings("ignore:invalid value encountered", "ignore:overflow encountered"),
]

each_format = pytest.mark.parametrize("name", FORMATS)
each_rounding = pytest.mark.parametrize("rounding", ["rtne", "stochastic"])

COLS = 256  # of every matrix below, so that packed rows are whole words
DTYPES = {8: torch.bfloat16, 11: torch.float16, 24: torch.float32}  # by their significant bits


# --- kernels: a few rows a program -------------------------------------------------------------------------


@triton.jit
def encode_kernel(
    v_ptr, random_ptr, code_ptr,
    SPEC: tl.constexpr, EXACT_BITS: tl.constexpr, GPU: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    place = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]) * COLS + tl.arange(0, COLS)[None, :]
    code = encode(tl.load(v_ptr + place), tl.load(random_ptr + place), SPEC, EXACT_BITS, GPU)
    tl.store(code_ptr + place, code)


@triton.jit
def encode_words_kernel(
    x_ptr, factor_ptr, keep_ptr, random_ptr, code_ptr,
    SPEC: tl.constexpr, GPU: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    place = row * COLS + tl.arange(0, COLS)[None, :]
    x, factor, keep = tl.load(x_ptr + place), tl.load(factor_ptr + place), tl.load(keep_ptr + place) != 0
    random = tl.load(random_ptr + row * (COLS // 2) + tl.arange(0, COLS // 2)[None, :])  # two elements a word
    units = encode_words(x, factor, keep, random, SPEC, GPU)
    tl.store(code_ptr + place, unpack(units, SPEC.element.bits))


@triton.jit
def decode_kernel(code_ptr, byte_ptr, value_ptr, ELEMENT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    col = tl.arange(0, COLS)[None, :]
    value = decode(tl.load(code_ptr + col), ELEMENT) * scale_value(tl.load(byte_ptr + row))
    tl.store(value_ptr + row * COLS + col, value)


@triton.jit
def scale_byte_kernel(amax_ptr, byte_ptr, SPEC: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    place = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]) * COLS + tl.arange(0, COLS)[None, :]
    tl.store(byte_ptr + place, scale_byte(tl.load(amax_ptr + place), SPEC))


@triton.jit
def block_offset_kernel(largest_ptr, least_ptr, offset_ptr, ROWS: tl.constexpr, COLS: tl.constexpr):
    place = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]) * COLS + tl.arange(0, COLS)[None, :]
    tl.store(offset_ptr + place, block_offset(tl.load(largest_ptr + place), tl.load(least_ptr + place)))


@triton.jit
def pack_kernel(
    code_ptr, word_ptr, unpacked_ptr, value_ptr,
    ELEMENT: tl.constexpr, GPU: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    place = row * COLS + tl.arange(0, COLS)[None, :]
    words = pack(tl.load(code_ptr + place), ELEMENT.bits)
    tl.store(word_ptr + row * words.shape[1] + tl.arange(0, words.shape[1])[None, :], words)
    tl.store(unpacked_ptr + place, unpack(words, ELEMENT.bits))
    tl.store(value_ptr + place, decode_words(words, ELEMENT, GPU))


@triton.jit
def random_words_kernel(
    seed_ptr, x_ptr, word_ptr, first_row, groups,
    WIDE: tl.constexpr, GPU: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    i = tl.arange(0, ROWS)[:, None]
    group = tl.arange(0, COLS // 8)[None, :].to(tl.int64)
    x = tl.load(x_ptr + i * COLS + tl.arange(0, COLS)[None, :])
    words = random_words(tl.load(seed_ptr), first_row + i.to(tl.int64), group, groups, x, WIDE, GPU)
    tl.store(word_ptr + i * (COLS // 2) + tl.arange(0, COLS // 2)[None, :], words)


def rows_a_program(rows: int, device: str) -> int:
    """The interpreter's time goes with the programs; a GPU wants small ones."""
    return rows if device == "cpu" else 4


# --- values ------------------------------------------------------------------------------------------------


def every_16_bit_value(dtype: torch.dtype) -> torch.Tensor:
    """All bit patterns of bf16 or fp16, as fp32 `[256, 256]`."""
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).float().reshape(-1, COLS)


def beside(values: torch.Tensor) -> torch.Tensor:
    """fp32 values with both their neighbours, each with both signs: `[n, COLS]`, filled up with zeros."""
    values = values.float().flatten()
    around = [values, values.nextafter(torch.tensor(torch.inf)), values.nextafter(torch.tensor(-torch.inf))]
    return whole_rows(torch.cat([sign * side for side in around for sign in (1, -1)]))


def whole_rows(flat: torch.Tensor) -> torch.Tensor:
    """A vector as `[n, COLS]`, n a power of two of four or more (as the sizes of tiles), filled up with zeros."""
    rows = max(4, 1 << (-(-flat.numel() // COLS) - 1).bit_length())
    return torch.nn.functional.pad(flat, (0, rows * COLS - flat.numel())).reshape(rows, COLS)


def draws(shape: torch.Size) -> torch.Tensor:
    """16 random bits an element, as int32."""
    return torch.randint(0, 2**16, shape, generator=torch.Generator().manual_seed(5), dtype=torch.int32)


def check_encode(v: torch.Tensor, random: torch.Tensor | None, spec: MXSpec, exact_bits: int, device: str) -> None:
    """`encode` and `encode_words` against the reference, on fp32 `v` `[R, COLS]`. What a spec never hands them
    (NaN and Inf, and what is beyond all that its scale rule leaves) is 0 here, and not kept."""
    element = spec.element
    keep = v.isfinite() & (v.abs() < 2.0 ** (element.emax + 1) if spec.can_saturate else v.abs() <= element.max)
    v = v.masked_fill(~keep, 0.0)
    expected = reference.encode(v.double(), element, None if random is None else random.long())
    random = torch.zeros_like(v, dtype=torch.int32) if random is None else random

    codes = torch.full(v.shape, -1, dtype=torch.int32, device=device)
    rows = rows_a_program(len(v), device)
    capabilities = gpu.device_capabilities(codes.device)
    sizes = {"SPEC": spec, "EXACT_BITS": exact_bits, "GPU": capabilities, "ROWS": rows, "COLS": COLS}
    encode_kernel[(len(v) // rows,)](v.to(device), random.to(device), codes, **sizes, enable_fp_fusion=False)
    got = (codes.cpu() & (2 * element.sign_bit - 1)).to(torch.uint8)
    wrong = got != expected
    assert not wrong.any(), f"{v[wrong][:4]} became {got[wrong][:4]}, not {expected[wrong][:4]}"

    x = v.masked_fill(~keep, 1.0)  # what is not kept is 0, whatever it is
    factor = torch.ones_like(x)
    check_words(x.to(DTYPES[exact_bits]), factor, keep, random, expected.masked_fill(~keep, 0), spec, device)


def check_words(
    x: torch.Tensor,
    factor: torch.Tensor,
    keep: torch.Tensor,
    random: torch.Tensor,
    expected: torch.Tensor,
    spec: MXSpec,
    device: str,
) -> None:
    """`encode_words`, unpacked, gives the `expected` codes."""
    codes = torch.full(x.shape, -1, dtype=torch.int32, device=device)
    words = random[:, ::2] | (random[:, 1::2] << 16)
    rows = rows_a_program(len(x), device)
    encode_words_kernel[(len(x) // rows,)](
        *(tensor.to(device) for tensor in (x, factor, keep.to(torch.uint8), words)), codes,
        SPEC=spec, GPU=gpu.device_capabilities(codes.device), ROWS=rows, COLS=COLS,
        enable_fp_fusion=False,
    )  # fmt: skip
    got = codes.cpu()
    wrong = got != expected
    assert not wrong.any(), f"{x[wrong][:4]} times {factor[wrong][:4]}: {got[wrong][:4]}, not {expected[wrong][:4]}"


# --- encode ------------------------------------------------------------------------------------------------


@each_format
@pytest.mark.parametrize("scale_rounding", ["floor", "rceil"])  # with saturation and without
@pytest.mark.parametrize(("dtype", "exact_bits"), [(torch.bfloat16, 8), (torch.bfloat16, 24), (torch.float16, 11)])
def test_every_16_bit_value_to_nearest(
    name: str, scale_rounding: str, dtype: torch.dtype, exact_bits: int, device: str
) -> None:
    check_encode(every_16_bit_value(dtype), None, MXSpec(name, scale_rounding=scale_rounding), exact_bits, device)


@each_format
@pytest.mark.parametrize("scale_rounding", ["floor", "rceil"])
@pytest.mark.parametrize("draw", [0, 65535, "random"])
def test_every_bf16_value_stochastically(name: str, scale_rounding: str, draw: int | str, device: str) -> None:
    v = every_16_bit_value(torch.bfloat16)
    random = draws(v.shape) if draw == "random" else torch.full(v.shape, draw, dtype=torch.int32)
    check_encode(v, random, MXSpec(name, rounding="stochastic", scale_rounding=scale_rounding), 8, device)


@each_format
def test_long_significands_to_nearest(name: str, device: str) -> None:
    """Every grid point and midpoint with its fp32 neighbours, and values 2**-25 of a step off a midpoint."""
    grid = torch.tensor(FORMATS[name].magnitudes, dtype=torch.float64)
    midpoints = (grid[1:] + grid[:-1]) / 2
    off = torch.cat([midpoints + (grid[1:] - grid[:-1]) * 2.0**-k for k in (18, 20, 22, 25)])
    v = beside(torch.cat([grid, midpoints, off, 2 * grid[-1:], grid[1:2] * 2.0**-30]))
    check_encode(v, None, MXSpec(name, scale_rounding="floor"), 24, device)


@each_format
@pytest.mark.parametrize("random", [0, 1, 2**15 - 1, 2**15, 65534, 65535])
def test_stochastic_thresholds(name: str, random: int, device: str) -> None:
    """The smallest position that goes up with these bits, exactly, between every two neighbours, with its fp32
    neighbours: among them tiny values, such as 3.755e-6 of e2m1 under the largest draw."""
    grid = torch.tensor(FORMATS[name].magnitudes, dtype=torch.float64)
    position = (2**16 - random - 0.5) / 2**16
    thresholds = grid[:-1] + (grid[1:] - grid[:-1]) * position
    v = beside(torch.cat([thresholds, grid, torch.tensor([3.755e-6])]))
    random_tensor = torch.full(v.shape, random, dtype=torch.int32)
    check_encode(v, random_tensor, MXSpec(name, rounding="stochastic", scale_rounding="floor"), 24, device)


def test_the_traps_of_rounding_twice(device: str) -> None:
    """By hand: a hair above the tie goes up; a hair below 2**-17 of a step stays down with the largest draw."""
    v = torch.zeros(4, COLS)
    v[0, :4] = torch.tensor([0.25, 0.25 + 2**-25, -(0.25 + 2**-25), 0.25 - 2**-26])
    assert reference.encode(v[0, :4].double(), FORMATS["e2m1"], None).tolist() == [0, 1, 9, 0]
    check_encode(v, None, MXSpec("e2m1"), 24, device)
    v[0, :3] = torch.tensor([3.755e-6, 0.5 * 2**-17, -3.755e-6])
    largest = torch.full(v.shape, 65535, dtype=torch.int32)
    assert reference.encode(v[0, :3].double(), FORMATS["e2m1"], largest[0, :3].long()).tolist() == [0, 1, 8]
    check_encode(v, largest, MXSpec("e2m1", rounding="stochastic"), 24, device)


@each_format
@each_rounding
@pytest.mark.parametrize("exact_bits", [8, 24])
def test_every_factor(name: str, rounding: str, exact_bits: int, device: str) -> None:
    """Grid points and midpoints, of up to 8 significant bits, out of blocks of every scale byte."""
    spec = MXSpec(name, rounding=rounding, scale_rounding="floor")
    grid = torch.tensor(spec.element.magnitudes, dtype=torch.float64)
    some = torch.cat(
        [
            grid,
            (grid[1:] + grid[:-1]) / 2,
            grid[1:2] * 2.0**-20,
            torch.tensor([1.9 * 2.0**spec.element.emax]).bfloat16(),
        ]
    )
    v = torch.cat([some, -some]).bfloat16().double()
    v = v[torch.linspace(0, len(v) - 1, COLS).long()]
    factor = reference.power_of_two(127 - torch.arange(256).clamp(max=254))[:, None].expand(256, COLS)
    x = (v / factor).to(DTYPES[exact_bits])
    fits = x.double() * factor == v  # neither lost below the dtype's subnormals nor infinite
    x, v = x.masked_fill(~fits, 0.0), v.masked_fill(~fits, 0.0)
    random = draws(x.shape) if spec.stochastic else None
    expected = reference.encode(v, spec.element, None if random is None else random.long())
    keep = torch.ones_like(fits)
    random = torch.zeros_like(x, dtype=torch.int32) if random is None else random
    check_words(x, factor.float().contiguous(), keep, random, expected, spec, device)


# --- decode ------------------------------------------------------------------------------------------------


def assert_same_numbers(got: torch.Tensor, expected: torch.Tensor) -> None:
    """The same fp32 bits, but any NaN for a NaN."""
    got = got.cpu()
    assert torch.equal(got.isnan(), expected.isnan())
    numbers = ~expected.isnan()
    assert torch.equal(got[numbers].view(torch.int32), expected[numbers].view(torch.int32))


@each_format
def test_every_code_under_every_scale(name: str, device: str) -> None:
    element = FORMATS[name]
    codes = torch.arange(1 << element.bits, dtype=torch.int32)
    scales = torch.arange(256, dtype=torch.int32)
    got = torch.full((256, len(codes)), 3.0, device=device)
    rows = rows_a_program(256, device)
    decode_kernel[(256 // rows,)](
        codes.to(device), scales.to(device), got, ELEMENT=element, ROWS=rows, COLS=len(codes), enable_fp_fusion=False
    )
    values = torch.tensor(element.values, dtype=torch.float64)
    expected = (values * reference.power_of_two(scales[:255, None] - 127)).float()
    assert_same_numbers(got[:255], expected)  # byte 255 is NaN whatever the code, which is the kernel's part


# --- scales ------------------------------------------------------------------------------------------------


def significands() -> torch.Tensor:
    """fp32 mantissas: every multiple of 2**-8 with its neighbours, which holds every rule's threshold, and the
    ends; and powers of two with theirs, which are the subnormals' thresholds."""
    steps = torch.arange(0, 2**23, 2**15)
    powers = 2 ** torch.arange(23)
    around = torch.cat([anchor + delta for anchor in (steps, powers) for delta in (-1, 0, 1)])
    return around.clamp(0, 2**23 - 1).unique()


@each_format
@pytest.mark.parametrize("scale_rounding", ["floor", "ceil", "even", "rceil"])
def test_scale_rules_beside_their_thresholds(name: str, scale_rounding: str, device: str) -> None:
    """At every exponent, zero and the subnormals included; and every Inf and NaN is byte 255."""
    spec = MXSpec(name, scale_rounding=scale_rounding)
    bits = (torch.arange(256)[:, None] << 23) + significands()
    amax = whole_rows(bits.flatten().int())
    got = torch.full_like(amax, -1, device=device)
    rows = rows_a_program(len(amax), device)
    scale_byte_kernel[(len(amax) // rows,)](amax.to(device), got, SPEC=spec, ROWS=rows, COLS=COLS)

    values = amax.view(torch.float32).double()
    exponent = reference.scale_exponent(values.clamp(min=2.0**-149), spec.element, scale_rounding).clamp(-127, 127)
    expected = (exponent + 127).masked_fill(values == 0, 0).masked_fill(~values.isfinite(), 255)
    wrong = got.cpu() != expected
    assert not wrong.any(), f"{values[wrong][:4]}: {got.cpu()[wrong][:4]}, not {expected[wrong][:4]}"


def test_block_offsets(device: str) -> None:
    """The fp16 middle: at fp16's ties, beyond its range, at fp32's largest, near zero and of both signs."""
    largest_fp32 = 3.4028234663852886e38
    ends = [0.0, -0.0, 1.0, 1 + 2**-11, 1 + 3 * 2**-11, 2049.0, 65504.0, 65520.0, 7e4, 1e38, largest_fp32]
    ends += [2.0**-24, 2.0**-25, 3 * 2.0**-25, 2.0**-26, 2.0**-149, 2.0**-126, 6.0975e-5, 0.1, 1 / 3, 1e-3, 123.456]
    ends = [sign * end for end in torch.tensor(ends).tolist() for sign in (1, -1)]
    pairs = [(high, low) for high in ends for low in ends if high >= low]
    largest, least = (whole_rows(torch.tensor(side)).to(device) for side in zip(*pairs, strict=True))
    got = torch.full_like(largest, 7.0)
    rows = rows_a_program(len(got), device)
    block_offset_kernel[(len(got) // rows,)](largest, least, got, ROWS=rows, COLS=COLS, enable_fp_fusion=False)
    for (high, low), offset in zip(pairs, got.flatten().tolist(), strict=False):
        expected = float(exact.block_offset(Fraction(high), Fraction(low)))
        assert (offset, str(offset)) == (expected, str(expected)), (high, low)


# --- packing and random bits -------------------------------------------------------------------------------


@each_format
@pytest.mark.parametrize("cols", [16, 32, 64, 256])
def test_packing(name: str, cols: int, device: str) -> None:
    """Every code at every place of a few words, other codes around it; back, and straight to values."""
    element = FORMATS[name]
    count = 1 << element.bits
    codes = (torch.arange(count)[:, None] + torch.arange(cols)[None, :] * 5).remainder(count).int()
    words = torch.full((count, cols // (8 if element.bits == 4 else 4)), -1, dtype=torch.int32, device=device)
    unpacked = torch.full_like(codes, -1, device=device)
    values = torch.full(codes.shape, 3.0, device=device)
    rows = rows_a_program(count, device)
    sizes = {"ELEMENT": element, "GPU": gpu.device_capabilities(words.device), "ROWS": rows, "COLS": cols}
    pack_kernel[(count // rows,)](codes.to(device), words, unpacked, values, **sizes, enable_fp_fusion=False)
    expected = reference.pack(codes.to(torch.uint8), element)
    assert torch.equal(words.cpu().view(torch.uint8)[:, : expected.shape[1]], expected)
    assert torch.equal(unpacked.cpu(), codes)
    assert_same_numbers(values, torch.tensor(element.values)[codes.long()])


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1, 0x0123456789ABCDEF])
@pytest.mark.parametrize(
    ("first_row", "cols"),
    [(0, 64), (0, 57), (3, 64), (2**29 - 4, 64), (2**29 - 1, 64), (2**32 - 1, 8), (2**32 + 5, 64), (2**40 + 123, 24)],
)
def test_random_bits(seed: int, first_row: int, cols: int, device: str) -> None:
    """At the contract's index, also where the counter leaves 32 bits within the tile or before it."""
    seed_tensor = torch.tensor([seed - 2**64 if seed >= 2**63 else seed], device=device)
    words = torch.full((4, 32), -1, dtype=torch.int32, device=device)
    x = torch.zeros(4, 64, device=device)  # says which threads have the words
    groups = (cols + 7) // 8
    random_words_kernel[(1,)](
        seed_tensor, x, words, first_row, groups,
        WIDE=(first_row + 4) * groups > 2**32, GPU=gpu.device_capabilities(words.device), ROWS=4, COLS=64,
    )  # fmt: skip
    got = torch.stack([words & 0xFFFF, (words >> 16) & 0xFFFF], dim=-1).reshape(4, 64)
    expected = reference.random_bits(4, cols, seed, first_row)
    assert torch.equal(got.cpu()[:, :cols].long(), expected)
    for row, col in ((0, 0), (1, 3), (3, cols - 1)):
        assert expected[row, col] == exact.random16(first_row + row, col, cols, seed)

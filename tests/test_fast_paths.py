"""The cast kernels as a GPU of each kind runs them, inline PTX included, in Triton's interpreter: the same bytes.

Most of it are the tests of other modules, which ask for the device's capabilities and so meet those of a GPU here.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

pytest.importorskip("triton", reason="kernels need Triton")

import ptx
import test_kernels
import test_primitives
import torch
import triton
import triton.language as tl
from poisoned import assert_same_bytes, check_quantize, dequantize, expected_parts, expected_values
from test_kernels import DTYPES, ROUNDINGS, SCALE_ROUNDINGS, adversarial, cut_shape, one_tile, seed_of

from mxkernels import gpu
from mxkernels.folded import window
from mxkernels.formats import FORMATS
from mxkernels.ops.elements import fp8_of_fp4, fp8_table
from mxkernels.spec import MXSpec

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.filterwarnings("ignore:invalid value encountered", "ignore:overflow encountered"),
]

BLOCKS = ("1x32", "32x1", "4x4", "1x2", "1x16")  # five, so that they keep step with no axis of a product
FP4 = ("e2m1", "e3m0")

each_format = pytest.mark.parametrize("name", FORMATS)


@pytest.fixture(params=["sm_80", "sm_86", "sm_90", "sm_100"])
def able(request: pytest.FixtureRequest) -> gpu.Capabilities:
    """Those of the GPU that kernels are interpreted as running on."""
    return gpu.capabilities(request.param)


@pytest.fixture(autouse=True)
def executed(able: gpu.Capabilities) -> Iterator[set[str]]:
    """The instructions that kernels have executed there."""
    with ptx.interpreted(able) as opcodes:
        yield opcodes


# --- whole kernels -----------------------------------------------------------------------------------------


@each_format
def test_quantize(name: str, executed: set[str]) -> None:
    """Roundings x scale roundings x symmetry, x dtypes for floats of 4 bits; else those in turn, and the blocks."""
    choices = itertools.product(ROUNDINGS, SCALE_ROUNDINGS, (True, False), DTYPES if name in FP4 else (None,))
    for index, (rounding, scale_rounding, symmetric, dtype) in enumerate(choices):
        spec = MXSpec(name, BLOCKS[index % 5], rounding, scale_rounding, symmetric)
        rows, cols = cut_shape(spec.block)
        matrix = adversarial(spec.block, rows, cols, dtype or DTYPES[index % 3], seed=index)
        check_quantize(matrix, spec, seed_of(spec), config=one_tile(spec.block, rows, cols))
    assert executed


@each_format
def test_dequantize(name: str) -> None:
    for index, (symmetric, dtype) in enumerate(itertools.product((True, False), DTYPES)):
        spec = MXSpec(name, BLOCKS[index % 5], scale_rounding="floor", symmetric=symmetric)
        rows, cols = cut_shape(spec.block)
        parts = expected_parts(adversarial(spec.block, rows, cols, dtype, seed=index), spec)
        got = dequantize(parts, spec, cols, dtype, one_tile(spec.block, rows, cols))
        assert_same_bytes(got, expected_values(parts, spec, cols, dtype), f"{spec} to {dtype}")


@each_format
def test_every_code_under_every_scale(name: str) -> None:
    for dtype in DTYPES:
        test_kernels.test_every_code_under_every_scale(name, dtype)


@pytest.mark.parametrize("block", ["1x32", "4x4"])
def test_both_orientations(block: str) -> None:
    test_kernels.test_pair_is_both_quantisations(block)


def test_each_gpu_has_its_instructions(able: gpu.Capabilities, executed: set[str]) -> None:
    """What a GPU lacks is not executed, and what it has is, so that the tests here are of the paths they name."""
    for name, rounding in (("e2m1", "rtne"), ("e2m1", "stochastic"), ("e3m0", "rtne"), ("e4m3", "rtne")):
        spec = MXSpec(name, "1x32", rounding, "floor")
        parts = check_quantize(adversarial(spec.block, 16, 64, torch.bfloat16), spec, seed_of(spec))
        dequantize(parts, spec, 64, torch.bfloat16)
    assert any("xorsign" in opcode for opcode in executed) == able.xorsign
    assert ("cvt.rn.satfinite.e4m3x2.f32" in executed) == able.cvt_fp8
    assert ("cvt.rn.f16x2.e4m3x2" in executed) == able.cvt_fp8
    assert ("cvt.rn.satfinite.e2m1x2.f32" in executed) == able.cvt_e2m1
    assert {"mul.rz.f32", "cvt.rn.bf16x2.f32"} <= executed


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_a_new_format_is_a_row(rounding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the fast paths of 4 bits do not serve it: stochastically, for its bias."""
    test_kernels.test_a_new_format_is_a_row(rounding, monkeypatch)


# --- device functions --------------------------------------------------------------------------------------


@each_format
def test_every_16_bit_value_to_nearest(name: str) -> None:
    for scale_rounding in ("floor", "rceil"):
        for dtype, exact_bits in ((torch.bfloat16, 8), (torch.bfloat16, 24), (torch.float16, 11)):
            test_primitives.test_every_16_bit_value_to_nearest(name, scale_rounding, dtype, exact_bits, "cpu")


@each_format
def test_every_bf16_value_stochastically(name: str) -> None:
    for scale_rounding, draw in itertools.product(("floor", "rceil"), (0, 65535, "random")):
        test_primitives.test_every_bf16_value_stochastically(name, scale_rounding, draw, "cpu")


@each_format
def test_values_beside_what_decides(name: str) -> None:
    test_primitives.test_long_significands_to_nearest(name, "cpu")
    for random in (0, 1, 2**15 - 1, 2**15, 65534, 65535):
        test_primitives.test_stochastic_thresholds(name, random, "cpu")


def test_the_traps_of_rounding_twice() -> None:
    test_primitives.test_the_traps_of_rounding_twice("cpu")


@each_format
def test_every_factor(name: str) -> None:
    for rounding, exact_bits in itertools.product(ROUNDINGS, (8, 24)):
        test_primitives.test_every_factor(name, rounding, exact_bits, "cpu")


@each_format
def test_packing(name: str) -> None:
    for cols in (16, 32, 64, 256):
        test_primitives.test_packing(name, cols, "cpu")


def test_random_bits() -> None:
    places = ((0, 57), (3, 64), (2**29 - 4, 64), (2**29 - 1, 64), (2**32 - 1, 8), (2**40 + 123, 24))
    for seed, (first_row, cols) in itertools.product((0, 1, 2**63, 2**64 - 1, 0x0123456789ABCDEF), places):
        test_primitives.test_random_bits(seed, first_row, cols, "cpu")


@triton.jit
def fold_kernel(
    word_ptr, factor_ptr, sign_ptr, folded_ptr,
    ELEMENT: tl.constexpr, CARRIER: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    row = tl.arange(0, ROWS)[:, None]
    place = row * (2 * WORDS) + tl.arange(0, 2 * WORDS)[None, :]
    words = tl.load(word_ptr + row * WORDS + tl.arange(0, WORDS)[None, :])
    low, high = fp8_table(tl.load(factor_ptr + place), ELEMENT, CARRIER)
    tl.store(folded_ptr + place, fp8_of_fp4(words, low, high, tl.load(sign_ptr + place)))


@pytest.mark.parametrize("able", ["sm_90", "sm_100"], indirect=True)
@pytest.mark.parametrize("name", FP4)
def test_fp8_of_fp4(name: str) -> None:
    """Every four codes, times many powers of two and NaN, as torch makes FP8 of their products."""
    element, carrier = FORMATS[name], window(FORMATS[name]).carrier
    fours = torch.arange(2**16).view(256, 256)
    words = (fours | (fours.roll(1, 1) << 16)).to(torch.int32)  # each four in both halves of a word of eight
    factor = torch.exp2(torch.arange(512) % 31 - 15.0).expand(256, 512).contiguous()
    factor[:, ::37] = torch.nan
    signs = torch.where(factor.isnan(), 0, -0x7F7F7F80).int()
    folded = torch.full((256, 512), -1, dtype=torch.int32)
    fold_kernel[(1,)](words, factor, signs, folded, ELEMENT=element, CARRIER=carrier, ROWS=256, WORDS=256)
    codes = (torch.stack([fours, fours.roll(1, 1)], -1).view(256, 512, 1) >> torch.tensor([0, 4, 8, 12])) & 15
    values = torch.tensor(element.values)[codes] * factor[..., None]
    fp8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}[carrier.name]
    expected = values.clamp(-carrier.max, carrier.max).to(fp8).view(torch.uint8)
    expected = expected.masked_fill(values.isnan(), 0x7F)
    assert_same_bytes(folded.view(torch.uint8).view(256, 512, 4), expected)

"""The native product. No GPU is needed: what the kernel reads is compared with the reference, its arithmetic is
interpreted (by Triton 3.9, whose interpreter is the first to know `dot_scaled`), and it is compiled ahead of time."""

from __future__ import annotations

import json
import re
from itertools import product
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="kernels need Triton")

import torch
import triton
import triton.language as tl
from ahead_of_time_native import CASES, SHARED_BYTES, Case
from poisoned import POISON, assert_guards_hold, poisoned
from triton.runtime.interpreter import InterpreterBuilder
from triton.tools.tensor_descriptor import TensorDescriptor
from tritons import FETCHED, compiled, run_with

from mxkernels import reference
from mxkernels.folded import folded_spec, window
from mxkernels.formats import FORMATS
from mxkernels.ops.matmul_native_kernel import load_scales, matmul_native_launch, native_config
from mxkernels.ops.native_operand import (
    ELEMENTS,
    NativeOperand,
    native_obstacle,
    native_operand,
    pair_obstacle,
    spread_scales,
)
from mxkernels.spec import MXSpec
from mxkernels.swizzle import swizzle, unswizzle

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
FP32 = torch.float32

OLDEST, NEWEST = FETCHED

needs_dot_scaled = pytest.mark.skipif(
    not hasattr(InterpreterBuilder, "create_dot_scaled"),
    reason=f"the interpreter of Triton {triton.__version__} has no dot_scaled",
)


# --- operands ----------------------------------------------------------------------------------------------


def random_parts(spec: MXSpec, rows: int, cols: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of any finite values, and scales of a few binades."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (rows, spec.packed_cols(cols)), dtype=torch.uint8, generator=generator)
    if spec.element.bits == 8:
        codes = torch.where((codes & 0x7F) > spec.element.max_code, codes & 0x3F, codes)
    elif cols % 2:
        codes[:, -1] &= 0x0F  # a short last group is padded with zero codes
    scale = torch.randint(120, 135, spec.scale_shape(rows, cols), dtype=torch.uint8, generator=generator)
    return codes, scale


def read(operand: NativeOperand) -> torch.Tensor:
    """What the tensor cores make of an operand, as float64 `[rows, K]`."""
    codes = operand.codes
    if operand.element.bits == 4:
        codes = torch.stack((codes & 15, codes >> 4), 2).reshape(operand.rows, operand.k)
    values = torch.tensor(operand.element.values, dtype=torch.float64)[codes.long()]
    scale = unswizzle(operand.scale, operand.rows, operand.k // 32) if operand.swizzled else operand.scale
    power = reference.power_of_two(scale.int() - 127).masked_fill(scale == 255, torch.nan)
    return values * power.repeat_interleave(32, 1)


@pytest.mark.parametrize("swizzled", [True, False])
@pytest.mark.parametrize("cols", [32, 128, 200, 1027])
@pytest.mark.parametrize("block", ["1x32", "1x128", "4x32", "64x64"])
@pytest.mark.parametrize("element", ELEMENTS)
def test_what_the_kernel_reads_is_what_is_decoded(element: str, block: str, cols: int, swizzled: bool) -> None:
    spec = MXSpec(element, block)
    codes, scale = random_parts(spec, 150, cols)
    scale[1, 0] = 255
    scale[0] = 0
    operand = native_operand(codes, scale, spec, cols, swizzled)
    expected = reference.dequantize(codes, scale, None, spec, cols, FP32).double()
    found = read(operand)
    assert torch.equal(found[:, :cols].nan_to_num(7.0), expected.nan_to_num(7.0))
    assert not found[:, (cols + 31) // 32 * 32 :].any()  # in the last block, zeros are as NaN as the rest
    assert operand.k % 128 == 0
    assert operand.codes.is_contiguous()


@pytest.mark.parametrize("swizzled", [True, False])
@pytest.mark.parametrize("text", ["e2m1 4x4", "int4 1x16", "e3m0 2x8", "e2m3 16x16", "e3m2 32x1"])
def test_what_is_folded_is_read_with_a_scale_a_row(text: str, swizzled: bool) -> None:
    spec = MXSpec(*text.split())
    codes, scale = random_parts(spec, 70, 160)
    codes = reference.unpack(codes, spec.element, 160)
    scale = (scale - 120) // 4 + 120
    scale[2, 1] = 255
    folded, _, references, outside, _ = reference.fold(codes, scale, spec, window(spec.element))
    assert not outside.any()
    operand = native_operand(folded, scale, folded_spec(spec), 160, swizzled, references)
    packed = reference.pack(codes, spec.element)
    expected = reference.dequantize(packed, scale, None, spec, 160, FP32).double()
    assert torch.equal(read(operand)[:, :160].nan_to_num(7.0), expected.nan_to_num(7.0))


def test_codes_that_start_anywhere_are_copied() -> None:
    """The descriptor of e2m1 beside FP8 needs addresses of whole 32 bytes."""
    memory = torch.zeros(64 * 64 + 16, dtype=torch.uint8)
    codes = memory[16 - memory.data_ptr() % 16 :][16:].as_strided((63, 64), (64, 1))
    operand = native_operand(codes, torch.zeros((63, 4), dtype=torch.uint8), MXSpec("e2m1"), 128, True)
    assert operand.codes.data_ptr() % 32 == 0


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (MXSpec("e2m1"), None),
        (MXSpec("e4m3", "16x128"), None),
        (MXSpec("e5m2", "128x32"), None),
        (MXSpec("int4"), "elements are e2m1, e4m3, e5m2, not int4"),
        (MXSpec("e2m3"), "not e2m3"),
        (MXSpec("e2m1", "1x16"), "serve 32 of the reduction each, not 16 (1x16)"),
        (MXSpec("e4m3", "32x1"), "not 1 (32x1)"),
        (MXSpec("e2m1", symmetric=False), "know no offsets"),
    ],
    ids=str,
)
def test_native_obstacle(spec: MXSpec, reason: str | None) -> None:
    found = native_obstacle(spec)
    assert found is None if reason is None else found.endswith(reason)
    if reason:
        with pytest.raises(ValueError, match=re.escape(found)):
            native_operand(*random_parts(spec, 4, 64), spec, 64, True)


def test_pair_obstacle() -> None:
    e2m1, e4m3, e5m2 = (FORMATS[name] for name in ELEMENTS)
    assert pair_obstacle(e2m1, e4m3, mixed=True) is None
    assert pair_obstacle(e4m3, e5m2, mixed=False) is None
    assert pair_obstacle(e2m1, e2m1, mixed=False) is None
    assert pair_obstacle(e5m2, e2m1, mixed=False).endswith("but not e5m2 by e2m1")


# --- the interpreter ---------------------------------------------------------------------------------------


@triton.jit
def copy_scales_kernel(
    scales, out_ptr, rows, K, ROWS: tl.constexpr, COLS: tl.constexpr, SWIZZLED: tl.constexpr
):  # fmt: skip
    tile = load_scales(scales, 1, 1, rows, K, ROWS, COLS, SWIZZLED)
    row = tl.arange(0, ROWS)[:, None]
    col = tl.arange(0, COLS // 32)[None, :]
    tl.store(out_ptr + row * (COLS // 32) + col, tile)


@pytest.mark.interpreter
@pytest.mark.parametrize("swizzled", [True, False])
def test_scales_of_a_tile(swizzled: bool) -> None:
    """The second tile down and across, of 256 x 256 elements."""
    rows, k, side = 512, 512, 256
    scale = torch.randint(0, 256, (rows, k // 32), dtype=torch.uint8)
    source = scale
    if swizzled:
        source = TensorDescriptor.from_tensor(swizzle(scale).view(1, 4, 4, 2, 256), [1, 2, 2, 2, 256])
    out = torch.zeros((side, side // 32), dtype=torch.uint8)
    copy_scales_kernel[(1,)](source, out, rows, k, side, side, swizzled)
    assert torch.equal(out, scale[side:, side // 32 :])


def multiply(
    a: NativeOperand,
    b: NativeOperand,
    bias: torch.Tensor | None = None,
    guard: torch.Tensor | None = None,
    dtype: torch.dtype = FP32,
) -> torch.Tensor:
    """The kernel's product, by two programs."""
    out = poisoned((a.rows, b.rows), dtype, CPU)
    config = native_config(a.element, b.element, a.swizzled, SHARED_BYTES["sm_100"])
    matmul_native_launch(a, b, bias, guard, out, config, processors=2).run(CPU)
    assert_guards_hold(out)
    return out


def check(a: NativeOperand, b: NativeOperand, bias: torch.Tensor | None = None) -> None:
    """The product is within the contract's bound, and NaN where it has to be."""
    left, right = read(a), read(b)
    expected = left @ right.T + (0 if bias is None else bias.double())
    out = multiply(a, b, bias).double()
    assert torch.equal(out.isnan(), expected.isnan())
    bound = a.k * 2.0**-24 * (left.abs() @ right.abs().T + expected.abs()) + a.k * 2.0**-149
    assert ((out - expected).abs() <= bound)[~expected.isnan()].all()


def operand(element: str, rows: int, k: int, swizzled: bool, seed: int = 0) -> NativeOperand:
    spec = MXSpec(element)
    return native_operand(*random_parts(spec, rows, k, seed), spec, k, swizzled)


@pytest.mark.interpreter
@needs_dot_scaled
class TestInterpreted:
    @pytest.mark.parametrize("swizzled", [True, False])
    @pytest.mark.parametrize(("m", "n", "k"), [(130, 300, 600), (1, 31, 32), (257, 17, 128)])
    @pytest.mark.parametrize(
        ("a", "b"), [("e2m1", "e2m1"), ("e4m3", "e4m3"), ("e5m2", "e4m3"), ("e2m1", "e5m2"), ("e4m3", "e2m1")]
    )
    def test_product(self, a: str, b: str, m: int, n: int, k: int, swizzled: bool) -> None:
        check(operand(a, m, k, swizzled), operand(b, n, k, swizzled, 1), torch.randn(n))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_is_rounded_once(self, dtype: torch.dtype) -> None:
        a, b = operand("e2m1", 20, 64, True), operand("e2m1", 30, 64, True, 1)
        bias = torch.randn(30).to(dtype)
        assert torch.equal(multiply(a, b, bias, dtype=dtype), multiply(a, b, bias).to(dtype))

    def test_guard(self) -> None:
        a, b = operand("e2m1", 20, 64, True), operand("e2m1", 30, 64, True, 1)
        untouched = multiply(a, b, guard=torch.zeros(1, dtype=torch.int32))
        assert (untouched.view(torch.uint8) == POISON).all()
        assert torch.equal(multiply(a, b, guard=torch.ones(1, dtype=torch.int32)), multiply(a, b))

    @pytest.mark.parametrize("swizzled", [True, False])
    def test_extreme_scales(self, swizzled: bool) -> None:
        """Bytes 0 and 254 against each other, a block of zeros, and NaN in one row of either side."""
        spec = MXSpec("e2m1")
        codes, scale = random_parts(spec, 40, 96)
        codes &= 0x33  # at most 1.5, which 2**127 leaves finite
        a_scale, b_scale = scale.clone(), scale.clone()
        a_scale[:, 0], b_scale[:, 0] = 0, 254
        codes[:, 16:32] = 0
        a_scale[:, 1] = 0
        a_scale[5, 2] = b_scale[7, 1] = 255
        check(native_operand(codes, a_scale, spec, 96, swizzled), native_operand(codes, b_scale, spec, 96, swizzled))

    def test_no_scale_is_read_from_beyond(self) -> None:
        """Rows and columns that pad a tile are not those of another."""
        spec = MXSpec("e4m3")
        codes, scale = random_parts(spec, 129, 160)
        scale[-1] = 255
        check(native_operand(codes, scale, spec, 160, True), operand("e4m3", 129, 160, True, 1))


@pytest.mark.interpreter
def test_interpreted_by_the_newest_triton() -> None:
    """The tests above, in a process with a Triton whose interpreter has `dot_scaled`."""
    if hasattr(InterpreterBuilder, "create_dot_scaled"):
        pytest.skip("the installed Triton has run them")
    done = run_with(NEWEST, "-m", "pytest", "-q", "-k", "TestInterpreted", str(Path(__file__)))
    assert done.returncode == 0, done.stdout[-3000:]
    assert "skipped" not in done.stdout


def test_operands_of_different_length_are_an_error() -> None:
    with pytest.raises(ValueError, match="a is 128 long and b 256"):
        matmul_native_launch(
            operand("e2m1", 4, 128, True), operand("e2m1", 4, 256, True), None, None, torch.empty(4, 4)
        )


def test_spread_scales() -> None:
    scale = torch.arange(6, dtype=torch.uint8).view(2, 3)
    assert spread_scales(scale, 2, 64, 3, 140).tolist() == [
        [0, 0, 1, 1, 2, 0, 0, 0],
        [0, 0, 1, 1, 2, 0, 0, 0],
        [3, 3, 4, 4, 5, 0, 0, 0],
    ]


# --- ahead of time -----------------------------------------------------------------------------------------


def compile_all(architecture: str, version: str) -> dict[str, dict[str, Any]]:
    lines = compiled(version, "ahead_of_time_native.py", architecture).splitlines()
    return {outcome["case"]: outcome for outcome in map(json.loads, lines)}


def emulated(case: Case, architecture: str) -> bool:
    """What `pair_obstacle` is about."""
    return architecture == "sm_120" and (case.a == "e2m1") != (case.b == "e2m1")


def multiplies(case: Case, architecture: str) -> str:
    """A pattern of the instruction that a case is there for."""
    e2m1 = case.a == case.b == "e2m1"
    if emulated(case, architecture):
        return r"mma\.sync\..*\.f32\.bf16\.bf16\.f32"
    if architecture == "gfx950":
        return r"v_mfma_scale_f32_32x32x64_f8f6f4"
    if architecture == "sm_120":
        kind = "mxf4nvf4" if e2m1 else "mxf8f6f4"
        return rf"mma\.sync\..*kind::{kind}\.block_scale\..*\.{case.a}\.{case.b}\.f32\.ue8m0"
    return rf"tcgen05\.mma\..*kind::{'mxf4' if e2m1 else 'mxf8f6f4'}\.block_scale\.(scale_vec::[12]X|block32)"


def loads(architecture: str) -> set[str]:
    """Patterns of how codes and scales arrive; on sm_100 scales go to tensor memory as they are."""
    if architecture == "gfx950":
        return {r"global_load_(lds_)?dwordx4"}
    by_descriptor = {r"cp\.async\.bulk\.tensor\.2d", r"cp\.async\.bulk\.tensor\.5d"}
    return by_descriptor if architecture == "sm_120" else by_descriptor | {r"tcgen05\.cp\..*\.warpx4\.32x128b"}


@pytest.mark.parametrize(
    ("version", "architecture"),
    [*product(["installed"], SHARED_BYTES), *product([OLDEST, NEWEST], ["sm_100", "sm_120", "gfx950"])],
)
def test_compiles_to_block_scaled_instructions(version: str, architecture: str) -> None:
    found = compile_all(architecture, version)
    assert found.keys() == {case.name for case in CASES}
    for case in CASES:
        outcome = found[case.name]
        assert not outcome["error"], case.name
        instructions = outcome["instructions"]
        for pattern in {multiplies(case, architecture), *loads(architecture)}:
            assert any(re.fullmatch(pattern, each) for each in instructions), f"{case.name}: no {pattern}"
        products = [each for each in instructions if "mma" in each]
        assert all(re.fullmatch(multiplies(case, architecture), each) for each in products), f"{case.name}: {products}"
        assert outcome["shared_bytes"] <= SHARED_BYTES[architecture], case.name
        # Triton 3.6 zeroes eight bytes that nothing reads (sm_120), or spills one register (sm_100, odd N).
        allowed = 8 if outcome["triton"] == "3.6.0" else 0
        assert emulated(case, architecture) or outcome["spilled_bytes"] <= allowed, case.name

"""Matrix products in Triton's interpreter, within the contract's bounds; folding, equal to the reference."""

from __future__ import annotations

import itertools
from contextlib import nullcontext

import pytest

pytest.importorskip("triton", reason="kernels need Triton")

import torch
from operands import PoisonedPlan, check, decoded, operand, run

import mxkernels as mx
from mxkernels.folded import folded_spec, window
from mxkernels.formats import FORMATS
from mxkernels.ops import products
from mxkernels.ops.operand import Operand, launchable, operand_a, operand_b
from mxkernels.ops.paths import decodes_apart, streams
from mxkernels.spec import MXSpec
from mxkernels.tune import CastConfig, MatmulConfig, guarded_matmul_config, pinned

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.filterwarnings("ignore:invalid value encountered", "ignore:overflow encountered"),
]

FOLDABLE = ("e2m1", "e3m0", "int4", "e2m3", "e3m2")
BLOCKS = ("1x32", "32x1", "4x4", "1x16", "16x16")


def kernel_fold(q: mx.MXTensor) -> mx.FoldedTensor:
    whole = operand_a(q)
    part = Operand.of_kind(launchable(whole.parts, whole.kind), whole.kind, whole.rows)
    plan = PoisonedPlan(q.device, part.parts)
    codes, scale, reference, *flags = products.plan_fold(plan, part, q.shape[-1]).parts
    values = mx.MXTensor(codes.view(torch.uint8)[:, : q.shape[-1]], scale, None, mx.fold(q).values.spec, q.shape)
    return mx.FoldedTensor(values, reference, *flags)


def assert_same_fold(q: mx.MXTensor) -> None:
    found, expected = kernel_fold(q), mx.fold(q)
    assert torch.equal(found.values.codes, expected.values.codes)
    assert torch.equal(found.values.scale, expected.values.scale)
    assert torch.equal(found.reference, expected.reference)
    assert torch.equal(found.outside, expected.outside)
    assert torch.equal(found.outside_rows, expected.outside_rows)
    same = found.dequantize(torch.float32), q.dequantize(torch.float32)
    assert torch.equal(*(x.contiguous().view(torch.int32) for x in same))


@pytest.mark.parametrize("turned", ["", " T"])
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("element", FOLDABLE)
def test_fold_equals_the_reference(element: str, block: str, turned: str) -> None:
    assert_same_fold(operand(37, 70, f"{element} {block} rtne even symmetric{turned}"))


def kernel_quantize_fold(x: torch.Tensor, spec: MXSpec, seed: torch.Tensor | None) -> mx.FoldedTensor:
    plan = PoisonedPlan(x.device, [x, seed])
    codes, scale, reference, *flags = products.plan_quantize_fold(plan, x, spec, seed)
    values = mx.MXTensor(codes.view(torch.uint8)[:, : x.shape[1]], scale, None, folded_spec(spec), x.shape)
    return mx.FoldedTensor(values, reference, *flags)


@pytest.mark.parametrize("rounding", ["rtne", "stochastic"])
@pytest.mark.parametrize("block", ["1x32", "4x4"])
@pytest.mark.parametrize("element", ["e2m1", "int4", "e2m3"])
def test_quantising_and_folding_from_one_read(element: str, block: str, rounding: str) -> None:
    """Whole rows in a tile, pieces of them, and columns: the bytes of quantising, then folding."""
    spec = MXSpec(element, block, rounding, "even")
    seed = torch.tensor([7]) if spec.stochastic else None
    x = torch.randn(10, 200) * 2.0 ** torch.randint(-12, 13, (10, 200))
    x[3, 5], x[5], x[7, 60:70] = torch.nan, 0.0, 1e-30
    long, pieces = x.to(torch.bfloat16), CastConfig(4, 64, 1, wide=True)
    for plain, config in ((long, None), (long, pieces), (long[:8, :192], pieces), (x[:, :30].T, None)):
        with nullcontext() if config is None else pinned("quantize_fold", config):
            found = kernel_quantize_fold(plain, spec, seed)
        expected = mx.fold(mx.quantize(plain, spec, seed))
        assert torch.equal(found.values.codes, expected.values.codes)
        assert torch.equal(found.values.scale, expected.values.scale)
        assert torch.equal(found.reference, expected.reference)
        assert torch.equal(found.outside, expected.outside)
        assert torch.equal(found.outside_rows, expected.outside_rows)


@pytest.mark.parametrize("element", FOLDABLE)
def test_fold_at_the_edges_of_the_window(element: str) -> None:
    """One row whose exponents just fit, one that exceeds them by one, one with zeros and one with NaN far away."""
    found = window(FORMATS[element])
    q = operand(4, 128, f"{element} 1x32 rtne even symmetric", spread=0)
    width = found.top - found.low
    for row, bytes_ in enumerate(((200, 200 - width), (200, 199 - width), (254, 0), (0, 255))):
        q.scale[row, 0], q.scale[row, 1:] = bytes_
        alone = mx.MXTensor(q.codes[row : row + 1], q.scale[row : row + 1], None, q.spec, (1, 128))
        if row == 2:
            alone.codes[:, 16 * FORMATS[element].bits // 4 :] = 0
        assert_same_fold(alone)
        assert bool(mx.fold(alone).outside) == bool(mx.fold(alone).outside_rows) == (row == 1)


@pytest.mark.parametrize("turned", ["", " T"])
@pytest.mark.parametrize("block", ["1x32", "4x4", "16x16"])
def test_fold_says_which_rows_are_outside(block: str, turned: str) -> None:
    q = operand(70, 96, f"e2m1 {block} rtne even symmetric{turned}", spread=0)
    height = q.spec.block.rows
    for row in (5, 66):
        q.scale[row // height, 0], q.scale[row // height, -1] = 200, 100
    outside = mx.fold(q).outside_rows
    assert outside.nonzero().flatten().tolist() == sorted({5 // height, 66 // height})
    assert_same_fold(q)


def test_windows_are_those_of_the_facts() -> None:
    widths = {name: window(row) and window(row).top - window(row).low + 1 for name, row in FORMATS.items()}
    assert widths == {
        "e2m1": 29, "e3m0": 26, "int4": 29, "e2m3": 12, "e3m2": 24, "e4m3": None, "e5m2": None, "int8": None,
    }  # fmt: skip


@pytest.mark.parametrize("shape", [(3, 5, 7), (64, 48, 96), (70, 130, 200), (1, 1, 1), (33, 17, 1030)], ids=str)
@pytest.mark.parametrize(
    "kinds",
    [
        ("e2m1 1x32 rtne even symmetric", "e2m1 4x4 rtne even symmetric T"),
        ("e2m3 1x16 rtne even symmetric", "e3m2 32x1 stochastic even symmetric"),
    ],
    ids=" x ".join,
)
def test_fp8_path(shape: tuple[int, int, int], kinds: tuple[str, str]) -> None:
    m, n, k = shape
    check(operand(m, k, kinds[0]), operand(n, k, kinds[1], 1), "fp8")


@pytest.mark.parametrize("pair", tuple(itertools.product(FOLDABLE, FOLDABLE)), ids=" x ".join)
def test_fp8_path_of_every_pair(pair: tuple[str, str]) -> None:
    a, b = (operand(40, 96, f"{name} 1x32 rtne ceil symmetric", seed) for seed, name in enumerate(pair))
    check(a, b, "fp8")


WIDE = (
    "bfloat16", "float16", "bfloat16 T", "float16 T",
    "e2m1 1x32 rtne even symmetric", "e3m0 4x4 rtne ceil symmetric", "int4 32x1 rtne ceil asymmetric T",
    "e2m3 1x16 stochastic even symmetric", "e3m2 128x128 rtne even symmetric", "e4m3 1x32 rtne rceil asymmetric",
    "e5m2 1x128 rtne rceil symmetric", "int8 4x4 rtne floor symmetric T",
)  # fmt: skip


@pytest.mark.parametrize("kind", WIDE)
def test_wide_path(kind: str) -> None:
    other = operand(50, 130, "e2m1 1x32 rtne even symmetric", 1)
    check(operand(20, 130, kind), other, "wide")
    check(other, operand(20, 130, kind), "wide")


@pytest.mark.parametrize("kind", ["bfloat16 T", "float16 T"])
def test_plain_operands_that_lie_turned(kind: str) -> None:
    """Rows of whole 16 bytes or not; both sides, one, and a matrix that is part of another."""
    for rows in (24, 21):
        x, y = operand(rows, 130, kind), operand(50, 130, kind, 1)
        for a, b in ((x, y), (x, operand(50, 130, kind[:-2], 1)), (x[:, 3:90], y[:, 3:90]), (x[5:], y)):
            check(a, b, "wide")


def test_bf16_that_lies_turned_is_loaded_as_it_lies() -> None:
    """Its rows of 16 bytes are what the tensor cores' loads need; else the kernel that takes anything serves."""
    weights = operand_b(torch.zeros(512, 256, dtype=torch.bfloat16))
    assert (weights.turned, weights.kind, weights.rows) == (True, "plain turned", 256)
    assert decodes_apart(weights, 512)
    assert not decodes_apart(operand_b(torch.zeros(512, 250, dtype=torch.bfloat16)), 512)
    assert not decodes_apart(operand_b(torch.zeros(512, 256, dtype=torch.float16)), 512)
    assert operand_b(torch.zeros(256, 512, dtype=torch.bfloat16).T).kind == "plain"
    assert not streams(operand_a(torch.zeros(512, 8, dtype=torch.bfloat16).T))


def test_wide_path_of_two_asymmetric() -> None:
    a, b = (operand(20, 70, "int4 1x32 rtne ceil asymmetric", seed) for seed in range(2))
    check(a, b, "wide")


@pytest.mark.parametrize("element", FORMATS)
@pytest.mark.parametrize("byte", [0, 1, 2, 3, 9, 10, 250])
def test_wide_path_near_the_ends_of_the_scale(element: str, byte: int) -> None:
    """What bf16 cannot hold is redone in fp32; the other operand brings the product back among normal numbers."""
    a, b = (operand(16, 64, f"{element} 1x32 rtne rceil symmetric", seed, spread=0) for seed in range(2))
    a.scale.fill_(byte)
    b.scale.fill_(max(247 - byte, 0))
    check(a, b, "wide")


@pytest.mark.parametrize("path", ["fp8", "wide"])
def test_a_nan_block_makes_nan_what_it_enters(path: str) -> None:
    a, b = (operand(40, 96, "e2m1 4x4 rtne even symmetric", seed) for seed in range(2))
    a.scale[2, 3] = 255
    b.scale[9, 23] = 255
    check(a, b, path)


def test_exponents_beyond_the_window_take_the_wide_path() -> None:
    a, b = (operand(40, 96, "e2m1 1x32 rtne even symmetric", seed) for seed in range(2))
    a.scale[3, 1] = 240
    a.scale[3, 2] = 4
    b.scale[:] = b.scale - 100
    assert bool(mx.fold(a).outside)
    expected = run(a, b, "wide")
    assert torch.equal(run(a, b, "fp8")[3], expected[3])
    assert torch.equal(run(kernel_fold(a), kernel_fold(b), "fp8")[3], expected[3])


@pytest.mark.parametrize("block", ["1x32", "4x4"])
def test_only_what_is_outside_is_redone(block: str) -> None:
    """Whatever the tiles: the kernel that redoes a product writes rows and columns that are flagged, and no others."""
    from mxkernels.ops.matmul_wide_kernel import matmul_wide_launch

    a, b = (operand(rows, 96, f"e2m1 {block} rtne even symmetric", seed) for seed, rows in enumerate((70, 140)))
    height = a.spec.block.rows
    for q, row in ((a, 37), (b, 3), (b, 139)):
        q.scale[row // height, 1], q.scale[row // height, 2] = 170, 40
    sides = [operand_a(kernel_fold(q)) for q in (a, b)]
    sides = [Operand.of_kind(launchable(side.parts, side.kind), side.kind, side.rows) for side in sides]
    redone = torch.zeros(70, 140, dtype=torch.bool)
    redone[37 // height * height : 37 // height * height + height] = True
    redone[:, 3 // height * height : 3 // height * height + height] = True
    redone[:, 139 // height * height :] = True

    def multiply(config: MatmulConfig, flagged: bool, everything: torch.Tensor | None = None) -> torch.Tensor:
        out = torch.full((70, 140), torch.nan)
        left, right = (products.wide_operand(side, side if flagged else None) for side in sides)
        matmul_wide_launch((left, right), 96, None, out, everything, None, False, config).run(out.device)
        return out

    for config in (guarded_matmul_config(exact=False), MatmulConfig(128, 32, 32, 4, 1)):
        whole = multiply(config, flagged=False)
        assert whole.isfinite().all()
        found = multiply(config, flagged=True)
        assert torch.equal(found[redone], whole[redone])
        assert found[~redone].isnan().all()
        assert torch.equal(multiply(config, True, torch.ones(1, dtype=torch.int32)), whole)


@pytest.mark.parametrize("path", ["fp8", "wide"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_bias_and_output_dtypes(path: str, dtype: torch.dtype) -> None:
    """Integers are exact, and so is their sum with a bias."""
    a, b = (mx.quantize(torch.randint(-3, 4, (24, 64)).float(), MXSpec("int4", scale_rounding="floor")) for _ in "ab")
    bias = torch.randint(-8, 9, (24,)).to(torch.bfloat16)
    expected = (decoded(a) @ decoded(b).T + bias.double()).to(dtype)
    assert torch.equal(run(a, b, path, bias, dtype), expected)


@pytest.mark.parametrize("k", [24, 40, 1000])
def test_folded_operands_on_the_16_bit_path(k: int) -> None:
    """Their rows are padded to whole 16 bytes."""
    q = operand(30, k, "e2m1 1x32 rtne even symmetric")
    check(operand(20, k, "bfloat16", 1), kernel_fold(q), "wide")
    check(kernel_fold(q), kernel_fold(q), "wide")


@pytest.mark.parametrize("kind", ["float16", "e4m3 1x32 rtne rceil asymmetric", "e5m2 1x32 rtne rceil symmetric"])
def test_what_parts_hold_is_not_multiplied_again(kind: str) -> None:
    from mxkernels.ops.matmul_wide_kernel import matmul_wide_launch
    from mxkernels.tune import wide_matmul_config

    sides = []
    for seed, name in enumerate((kind, "e4m3 1x32 rtne rceil symmetric")):
        side = operand_a(operand(20, 70, name, seed))
        sides.append(products.wide_operand(Operand.of_kind(launchable(side.parts, side.kind), side.kind, 20)))
    lost, out = torch.zeros(1, dtype=torch.int32), torch.empty(20, 20)
    config = wide_matmul_config(20, 20, 70, exact=False)
    matmul_wide_launch((sides[0], sides[1]), 70, None, out, None, lost, False, config).run(out.device)
    assert not lost.any()


def test_an_infinite_number_of_two_parts() -> None:
    x = operand(4, 64, "float16")
    x[1, 5] = torch.inf
    w = mx.quantize(torch.rand(8, 64) + 1, mx.mxfp4)
    out = run(x, w, "wide")
    assert (out[1] == torch.inf).all()
    assert out[[0, 2, 3]].isfinite().all()

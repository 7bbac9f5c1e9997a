"""Asymmetric operands on the FP8 path, whose offsets add a small product over groups of K, in Triton's interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="kernels need Triton")

import torch
from operands import asymmetric_pairs, bound, decoded, operand, run

import mxkernels as mx
from mxkernels import gpu
from mxkernels.formats import FORMATS
from mxkernels.ops import products
from mxkernels.ops.correction import BITS, Columns, correction_columns, group_width, sum_parts
from mxkernels.ops.correction_kernel import correction_launch
from mxkernels.ops.operand import Operand, launchable, operand_a
from mxkernels.ops.paths import choose, refusal
from mxkernels.spec import MXSpec

pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered", "ignore:overflow encountered")
interpreted = pytest.mark.interpreter
HOPPER = gpu.capabilities("sm_90")
FOLDABLE = ("e2m1", "e3m0", "int4", "e2m3", "e3m2")
SYMMETRIC = "e2m1 1x32 rtne even symmetric"


def side(x: mx.MXTensor | mx.FoldedTensor) -> Operand:
    whole = operand_a(x)
    return Operand.of_kind(launchable(whole.parts, whole.kind), whole.kind, whole.rows)


def elements_and_offsets(q: mx.MXTensor) -> tuple[torch.Tensor, torch.Tensor]:
    """S q and O of each element, `[rows, K]`."""
    stored = q.T if q.transposed else q
    symmetric = MXSpec(stored.spec.element, stored.spec.block)
    elements = mx.MXTensor(stored.codes, stored.scale, None, symmetric, stored.shape).dequantize(torch.float32)
    offsets = torch.zeros_like(elements)
    if stored.offset is not None:
        down = stored.offset.float().repeat_interleave(stored.spec.block.rows, 0)[: stored.shape[0]]
        offsets = down.repeat_interleave(stored.spec.block.cols, 1)[:, : stored.shape[1]]
    return (elements.T, offsets.T) if q.transposed else (elements, offsets)


def tf32(x: torch.Tensor) -> torch.Tensor:
    return (x.contiguous().view(torch.int32) & -(1 << 13)).view(torch.float32)


def expected_columns(q: mx.MXTensor, columns: Columns) -> torch.Tensor:
    elements, offsets = (x.nan_to_num(0.0) for x in elements_and_offsets(q))
    width, k = columns.width, q.shape[-1]
    groups = torch.nn.functional.pad(elements, (0, -k % width)).reshape(len(elements), -1, width)
    sums, offset = groups.sum(2), offsets[:, ::width]
    weighted = offset * torch.tensor([min(width, k - first) for first in range(0, k, width)])
    made = {"O": offset, "S": tf32(sums), "s": sums - tf32(sums), "N": tf32(weighted), "n": weighted - tf32(weighted)}
    return torch.cat([made[section] for section in columns.sections], 1)


def kernel_columns(x: mx.MXTensor | mx.FoldedTensor, columns: Columns) -> tuple[torch.Tensor, bool]:
    """What the kernel makes, and whether it raised its flag."""
    k = x.shape[-1]
    out = torch.full((x.shape[0], columns.padded(k)), torch.nan)
    outside = torch.zeros(1, dtype=torch.int32)
    correction_launch(products.wide_operand(side(x)), k, columns, out, outside).run(out.device)
    assert out[:, columns.count(k) :].isnan().all(), "written beyond the columns"
    return out[:, : columns.count(k)], bool(outside)


@interpreted
@pytest.mark.parametrize(("block", "turned"), [("1x32", ""), ("4x4", " T"), ("1x16", " T"), ("16x128", "")])
@pytest.mark.parametrize("element", FOLDABLE)
def test_columns(element: str, block: str, turned: str) -> None:
    """All sections at once, or some; of a folded operand the same sums."""
    q = operand(17, 290, f"{element} {block} stochastic even asymmetric{turned}", spread=9)
    q.scale[0, 0] = 255
    width = q.spec.block.cols
    for columns in (Columns(width, "OSsNn"), Columns(min(width, 2), "sS"), Columns(width, "O")):
        found, outside = kernel_columns(q, columns)
        assert torch.equal(found, expected_columns(q, columns))
        assert not outside
    symmetric = operand(17, 290, f"{element} {block} stochastic even symmetric{turned}")
    columns = Columns(width, "Ss")
    assert torch.equal(kernel_columns(mx.fold(symmetric), columns)[0], expected_columns(symmetric, columns))


@pytest.mark.parametrize("element", FOLDABLE)
@pytest.mark.parametrize("width", [1, 4, 32, 128])
def test_sums_take_the_parts_that_hold_them(element: str, width: int) -> None:
    """Every integer up to the largest sum is a number of 11 bits, or the sum of two; beyond 11 bits one is not."""
    q = operand(1, 128, f"{element} 1x{max(width, 2)} rtne even symmetric")
    row = FORMATS[element]
    sums = torch.arange(max(map(abs, row.values)) / row.smallest * width + 1)
    left = sums - tf32(sums)
    assert torch.equal(left, tf32(left))
    assert sum_parts(side(q), width) == ("Ss" if left.any() else "S")
    assert sum_parts(side(mx.fold(q)), width) == "Ss"


def test_offsets_have_11_bits() -> None:
    every = torch.arange(0, 0x7C00, dtype=torch.int16).view(torch.float16).float()
    assert torch.equal(tf32(every), every)
    weighted = every[:, None] * torch.arange(1, 129)
    left = weighted - tf32(weighted)
    assert torch.equal(left, tf32(left))
    assert not left[:, [2**i - 1 for i in range(8)]].any()
    assert BITS == 11


@interpreted
@pytest.mark.parametrize("pair", asymmetric_pairs(), ids=" x ".join)
def test_fp8_path(pair: tuple[str, str]) -> None:
    """Sums are fp32 here, so the bound is that of two such products: that of FP8 might hide a missing term."""
    m, n, k = 20, 33, 135
    a, b = operand(m, k, pair[0]), operand(n, k, pair[1], 1)
    for left, right in ((a, b), (b, a)):
        error = (run(left, right, "fp8").double() - decoded(left) @ decoded(right).T).abs()
        assert (error <= 2 * bound(left, right, "wide")).all()


@interpreted
def test_beside_what_was_folded() -> None:
    a, b = operand(20, 200, SYMMETRIC.replace("symm", "asymm")), operand(40, 200, SYMMETRIC, 1)
    assert torch.equal(run(a, mx.fold(b), "fp8"), run(a, b, "fp8"))
    assert torch.equal(run(mx.fold(b), a, "fp8"), run(b, a, "fp8"))


@interpreted
def test_a_nan_block_makes_nan_what_it_enters() -> None:
    a, b = (operand(40, 96, "e2m1 4x4 rtne even asymmetric", seed) for seed in range(2))
    a.scale[2, 3], b.scale[9, 23] = 255, 255
    out, expected = run(a, b, "fp8"), decoded(a) @ decoded(b).T
    assert torch.equal(out.isnan(), expected.isnan())
    assert ((out - expected).abs() <= 2 * bound(a, b, "wide"))[~expected.isnan()].all()


@interpreted
@pytest.mark.parametrize(("byte", "normal"), [(0, False), (1, False), (2, True), (246, True), (248, False)])
def test_sums_that_are_no_normal_numbers_take_the_wide_path(byte: int, normal: bool) -> None:
    """Of numbers near fp32's ends a group's sum leaves its range, or the tensor cores'."""
    a, b = operand(8, 64, SYMMETRIC.replace("symm", "asymm")), operand(8, 64, SYMMETRIC, 1)
    a.scale.fill_(110)
    b.scale.fill_(byte)
    b.codes.fill_(0x77 if byte > 2 else 0x00)  # sums of 31 * 6, which times 2**121 are too large
    b.codes[:, 0] = 0x70 if byte > 2 else 0x01  # or of 2**-1, which times 2**-126 are too small
    assert kernel_columns(b, correction_columns(side(a), side(b), 64)[1])[1] != normal
    assert torch.equal(run(a, b, "fp8"), run(a, b, "wide"))


@interpreted
def test_exponents_beyond_the_window_take_the_wide_path() -> None:
    a, b = (operand(40, 96, "e2m1 1x32 rtne even asymmetric", seed) for seed in range(2))
    a.scale[3, 1], a.scale[3, 2] = 200, 100
    assert torch.equal(run(a, b, "fp8")[3], run(a, b, "wide")[3])


def test_the_columns_of_both_sides() -> None:
    """In pairs: what is O on one side is a sum on the other, or both are offsets."""
    plain, offset, wide = (
        side(operand(8, 256, kind))
        for kind in (SYMMETRIC, "int4 4x16 rtne ceil asymmetric T", "e3m2 1x128 rtne even asymmetric")
    )
    assert group_width(plain, offset) == 16
    assert correction_columns(plain, offset, 256) == (Columns(16, "S"), Columns(16, "O"))
    assert correction_columns(wide, offset, 256) == (Columns(16, "OSsO"), Columns(16, "SOON"))
    assert correction_columns(offset, wide, 250) == (Columns(16, "OOSOO"), Columns(16, "SsONn"))
    assert Columns(32, "OSO").count(8192) == 3 * 256
    assert Columns(32, "S").padded(70) == 4


def test_the_fp8_path_is_chosen_where_the_correction_is_small() -> None:
    def chosen(rows: int, kind: str) -> str:
        return choose(side(operand(rows, 256, kind)), side(operand(256, 256, SYMMETRIC)), HOPPER)

    asymmetric = SYMMETRIC.replace("symm", "asymm")
    assert chosen(256, asymmetric) == chosen(256, "e2m3 4x4 rtne even asymmetric") == "fp8"
    assert chosen(64, asymmetric) == chosen(256, "e2m1 32x1 rtne even asymmetric") == "wide"
    for kind in (asymmetric, "e2m1 32x1 rtne even asymmetric"):
        assert refusal("fp8", side(operand(256, 256, kind)), side(operand(256, 256, SYMMETRIC)), HOPPER) is None
    eight = side(operand(256, 256, "e4m3 1x32 rtne rceil asymmetric"))
    assert "8 bits fit FP8 at one power of two only" in str(refusal("fp8", eight, eight, HOPPER))
    assert "no offsets" in str(refusal("native", eight, eight, gpu.capabilities("sm_100")))


def test_it_compiles_without_spills() -> None:
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, str(root / "tests" / "ahead_of_time_correction.py")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    multiplies = {}
    for outcome in map(json.loads, done.stdout.splitlines()):
        if outcome["launch"] != "fp8" or outcome["gpu"] != "sm_89":  # that one spills without an addend too
            assert outcome["spilled_bytes"] == 0, outcome
        multiplies[outcome["gpu"], outcome["launch"]] = outcome["multiplies"]
    assert multiplies["sm_89", "tf32"] == ["mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32"]
    assert multiplies["sm_90", "tf32"] == ["wgmma.mma_async.sync.aligned.m64n128k8.f32.tf32.tf32"]
    assert multiplies["sm_100", "tf32"] == ["tcgen05.mma.cta_group::1.kind::tf32"]

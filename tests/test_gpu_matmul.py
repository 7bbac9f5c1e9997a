"""Matrix products on a GPU: every path in turn, within the contract's bounds; and as torch's machinery sees them."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="kernels need Triton")

import torch
from operands import asymmetric_pairs, bound, check, decoded, magnitude, operand, run

import mxkernels as mx
from mxkernels import gpu
from mxkernels.formats import FORMATS
from mxkernels.ops.operand import operand_a
from mxkernels.spec import MXSpec

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")
FOLDABLE = ("e2m1", "e3m0", "int4", "e2m3", "e3m2")
BLOCKS = ("1x32", "32x1", "4x4", "1x16", "16x16", "128x128", "1x2", "2x1")
SHAPES = ((3, 5, 7), (200, 328, 1040), (1, 129, 513), (256, 384, 4096), (1000, 24, 8190))


def here(rows: int, k: int, kind: str, seed: int = 0, spread: int = 2) -> torch.Tensor | mx.MXTensor:
    return operand(rows, k, kind, seed, spread, "cuda")


@pytest.mark.parametrize("turned", ["", " T"])
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("element", FOLDABLE)
def test_fold_equals_the_reference(element: str, block: str, turned: str) -> None:
    for shape in ((37, 70), (256, 2048)):
        q = operand(*shape, f"{element} {block} rtne even symmetric{turned}", spread=9)
        q.scale[0, 0] = 255
        q.scale[-1, -1] = 0
        found, expected = mx.fold(q.to(CUDA)), mx.fold(q)
        for one, other in (
            (found.values.codes, expected.values.codes),
            (found.values.scale, expected.values.scale),
            (found.reference, expected.reference),
            (found.outside, expected.outside),
            (found.outside_rows, expected.outside_rows),
        ):
            assert torch.equal(one.cpu(), other)


@pytest.mark.parametrize("rounding", ["rtne", "stochastic"])
@pytest.mark.parametrize("block", ["1x32", "4x4", "32x1", "1x16"])
@pytest.mark.parametrize("element", FOLDABLE)
def test_quantising_and_folding_from_one_read(element: str, block: str, rounding: str) -> None:
    spec = MXSpec(element, block, rounding, "even")
    seed = torch.tensor([7], device=CUDA) if spec.stochastic else None
    for rows, cols in ((37, 200), (256, 8192), (8, 14336)):
        x = torch.randn(rows, cols, device=CUDA) * 2.0 ** torch.randint(-12, 13, (rows, cols), device=CUDA)
        x[3, 5], x[5], x[7, 60:70] = torch.nan, 0.0, 1e-30
        for plain in (x, x.to(torch.bfloat16), x.T):
            found, expected = mx.fold(plain, spec, seed), mx.fold(mx.quantize(plain, spec, seed))
            assert torch.equal(found.values.codes, expected.values.codes)
            assert torch.equal(found.values.scale, expected.values.scale)
            assert torch.equal(found.reference, expected.reference)
            assert torch.equal(found.outside, expected.outside)
            assert torch.equal(found.outside_rows, expected.outside_rows)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    "kinds",
    [
        ("e2m1 1x32 rtne even symmetric", "e2m1 1x32 rtne even symmetric"),
        ("e2m1 4x4 stochastic even symmetric T", "e3m0 16x16 rtne ceil symmetric"),
        ("e2m3 1x32 rtne even symmetric", "e3m2 32x1 rtne even symmetric"),
        ("int4 1x16 rtne ceil symmetric", "e2m3 4x4 rtne even symmetric T"),
    ],
    ids=" x ".join,
)
def test_fp8_path(shape: tuple[int, int, int], kinds: tuple[str, str]) -> None:
    m, n, k = shape
    a, b = here(m, k, kinds[0], 0), here(n, k, kinds[1], 1)
    check(a, b, "fp8")
    check(mx.fold(a), mx.fold(b), "fp8")


@pytest.mark.parametrize("shape", [(3, 5, 7), (200, 328, 1040), (256, 384, 4096), (1000, 24, 8190)], ids=str)
@pytest.mark.parametrize("kinds", asymmetric_pairs(), ids=" x ".join)
def test_offsets_on_the_fp8_path(shape: tuple[int, int, int], kinds: tuple[str, str]) -> None:
    """Closer than the contract asks, so that no term of the correction can be missing: each step of 32 drops up to
    33 times 2**-13 of its largest number, and partial sums of signed data stay below the sum of magnitudes / 16."""
    m, n, k = shape
    a, b = here(m, k, kinds[0]), here(n, k, kinds[1], 1)
    for left, right in ((a, b), (b, a)):
        error = (run(left, right, "fp8").double() - decoded(left) @ decoded(right).T).abs()
        assert (error <= 33 * 2.0**-13 * (magnitude(left) @ magnitude(right).T)).all()


def test_offsets_beyond_the_window_take_the_wide_path() -> None:
    """A row that is outside alone; all, where a sum is no normal number."""
    a, b = (here(300, 1024, "e2m1 1x32 rtne even asymmetric", seed) for seed in range(2))
    a.codes[3, 16:32] = torch.tensor([1] + [0] * 15, dtype=torch.uint8)  # a block whose sum is half its scale
    for scale, redone in ((torch.tensor([200, 100], device=CUDA), [3]), (torch.tensor([0, 130], device=CUDA), None)):
        a.scale[3, 1:3] = scale
        found = mx.matmul(a, b.T, out_dtype=torch.float32)
        assert torch.equal(found[redone or slice(None)], run(a, b, "wide")[redone or slice(None)])


WIDE = (
    "bfloat16", "float16", "bfloat16 T", "float16 T",
    "e2m1 1x32 rtne even symmetric", "e3m0 4x4 rtne ceil symmetric", "int4 32x1 rtne ceil asymmetric T",
    "e2m3 1x16 stochastic even symmetric", "e3m2 128x128 rtne even symmetric", "e4m3 1x32 rtne rceil asymmetric",
    "e5m2 1x128 rtne rceil symmetric", "int8 4x4 rtne floor symmetric T", "e4m3 1x32 rtne rceil symmetric",
    "int8 1x32 rtne floor symmetric",
)  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", WIDE)
def test_wide_path(kind: str, shape: tuple[int, int, int]) -> None:
    m, n, k = shape
    check(here(m, k, kind), here(n, k, "e2m1 1x32 rtne even symmetric", 1), "wide")
    check(here(m, k, "bfloat16"), here(n, k, kind, 1), "wide")
    if kind.endswith("16 T"):
        check(here(m, k, kind), here(n, k, kind, 1), "wide")


@pytest.mark.parametrize("element", FORMATS)
@pytest.mark.parametrize("byte", [0, 1, 2, 3, 9, 10, 250])
def test_near_the_ends_of_the_scale(element: str, byte: int) -> None:
    for m, n, k in ((16, 48, 64), (1100, 520, 1024)):
        a, b = here(m, k, f"{element} 1x32 rtne rceil symmetric"), here(n, k, f"{element} 4x4 rtne rceil symmetric", 1)
        a.scale.fill_(byte)
        b.scale.fill_(max(247 - byte, 0))
        check(a, b, "wide")
        if element in FOLDABLE:
            check(a, b, "fp8")


@pytest.mark.parametrize("path", ["fp8", "wide"])
def test_a_nan_block_makes_nan_what_it_enters(path: str) -> None:
    a, b = (here(300, 1030, "e2m1 4x4 rtne even symmetric", seed) for seed in range(2))
    a.scale[2, 3] = b.scale[9, 23] = 255
    check(a, b, path)


def test_exponents_beyond_the_window_take_the_wide_path() -> None:
    """Rows of either side, and they alone: the others keep the bits that they have without such rows."""
    a, b = (here(300, 1024, "e2m1 1x32 rtne even symmetric", seed) for seed in range(2))
    before = mx.matmul(a, b.T, out_dtype=torch.float32)
    a.scale[3, 1], a.scale[3, 2] = 200, 100
    b.scale[77, 5], b.scale[77, 6] = 200, 100  # elsewhere, or fp32 would not hold the product of both
    redone = torch.zeros(300, 300, dtype=torch.bool, device=CUDA)
    redone[3], redone[:, 77] = True, True
    expected, error = decoded(a) @ decoded(b).T, bound(a, b, "wide")
    for found in (
        mx.matmul(a, b.T, out_dtype=torch.float32),
        mx.matmul(mx.fold(a), mx.fold(b).T, out_dtype=torch.float32),
    ):
        assert ((found - expected).abs() <= error)[redone].all()
        assert torch.equal(found[~redone], before[~redone])
    with pytest.raises(ValueError, match="too far apart"):
        mx.matmul(a, b.T, path="fp8")


@pytest.mark.parametrize("path", ["fp8", "wide"])
def test_integers_are_exact(path: str) -> None:
    spec = MXSpec("int4", scale_rounding="floor")
    a, b = (mx.quantize(torch.randint(-7, 8, (256, 160), device=CUDA).float(), spec) for _ in range(2))
    bias = torch.randint(-8, 9, (256,), device=CUDA).to(torch.bfloat16)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        expected = (decoded(a) @ decoded(b).T + bias.double()).to(dtype)
        assert torch.equal(run(a, b, path, bias, dtype), expected)


def test_all_positive_operands(record_property) -> None:
    """The worst that the FP8 accumulator meets, far inside the bound."""
    a, b = (here(256, 16384, "e2m1 1x32 rtne even symmetric", seed, spread=3) for seed in range(2))
    for q in (a, b):
        q.codes.bitwise_and_(0x77)
    error = (run(a, b, "fp8").double() - decoded(a) @ decoded(b).T).abs()
    share = (error / bound(a, b, "fp8")).max().item()
    assert share < 1
    record_property("share_of_bound", share)
    print(f"largest error {share:.3f} of the bound")


@pytest.mark.parametrize("name", ["e2m1", "e3m0", "int4"])
@pytest.mark.parametrize("shape", [(1, 8192, 8192), (16, 4096, 14336), (64, 1000, 1032), (33, 17, 130)], ids=str)
def test_few_rows(shape: tuple[int, int, int], name: str) -> None:
    """4-bit weights streamed, as they are and prepared; restored for more rows."""
    m, n, k = shape
    x, w = here(m, k, "bfloat16"), here(n, k, f"{name} 1x32 rtne even symmetric", 1)
    w.scale[0, 0], w.scale[-1, 0], w.scale[n // 2, -1] = 255, 0, 1
    bias = torch.randn(n, device=CUDA)
    prepared = mx.prepare(w)
    expected = decoded(x) @ decoded(w).T
    for weights in (w, prepared):
        out = mx.matmul(x, weights.T, out_dtype=torch.float32).double()
        assert torch.equal(out.isnan(), expected.isnan())
        assert ((out - expected).abs() <= bound(x, w, "wide"))[~expected.isnan()].all()
        with_bias = (out.float() + bias).to(torch.bfloat16)
        torch.testing.assert_close(mx.matmul(x, weights.T, bias=bias), with_bias, rtol=0, atol=0, equal_nan=True)
    many = here(70, k, "bfloat16")
    found = mx.matmul(many, prepared.T)
    torch.testing.assert_close(found, mx.matmul(many, w.T), rtol=0, atol=0, equal_nan=True)


def test_few_rows_in_a_graph() -> None:
    x, w = here(4, 2048, "bfloat16"), mx.prepare(here(1024, 2048, "e2m1 1x32 rtne even symmetric", 1))
    expected = mx.matmul(x, w.T)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = mx.matmul(x, w.T)
    for _ in range(20):
        out.zero_()
        graph.replay()
        assert torch.equal(out, expected)


def test_leading_dimensions_bias_and_the_three_products() -> None:
    spec = MXSpec("e2m1", "4x4")
    x, w, dy = (torch.randn(*shape, device=CUDA) for shape in ((2, 128, 512), (256, 512), (256, 256)))
    qx, qw, qdy = (mx.quantize(t, spec) for t in (x, w, dy))
    flat = mx.quantize(x.reshape(256, 512), spec)
    bias = torch.randn(256, device=CUDA)
    out = mx.matmul(qx, qw.T, bias=bias)
    assert out.shape == (2, 128, 256)
    assert out.dtype == torch.bfloat16
    sums = mx.matmul(flat, qw.T, out_dtype=torch.float32)
    assert ((sums.double() - decoded(flat) @ decoded(qw).T).abs() <= bound(flat, qw, "fp8")).all()
    # the same sums, whose rounding to bf16's 8 bits is all that may differ
    assert torch.equal(out.reshape(256, 256), (sums + bias).to(torch.bfloat16))
    for a, b in ((qdy, qw), (qdy.T, flat)):
        out = mx.matmul(a, b, out_dtype=torch.float32).double()
        assert ((out - decoded(a) @ decoded(b)).abs() <= bound(a, b.T, "fp8")).all()


def test_the_same_bits_every_time() -> None:
    a, b = (here(512, 2048, "e2m1 1x32 rtne even symmetric", seed) for seed in range(2))
    x = torch.randn(8, 2048, device=CUDA, dtype=torch.bfloat16)
    for left in (a, x):
        first = mx.matmul(left, b.T)
        assert all(torch.equal(mx.matmul(left, b.T), first) for _ in range(100))


def test_other_operands_of_the_same_shape() -> None:
    """What is remembered of a call is not its operands."""
    for seed in range(3):
        a, b = (here(256, 512, "e2m1 1x32 rtne even symmetric", 2 * seed + side) for side in range(2))
        for left, right in ((a, b), (a, a)):
            out = mx.matmul(left, right.T, out_dtype=torch.float32).double()
            assert ((out - decoded(left) @ decoded(right).T).abs() <= bound(left, right, "fp8")).all()


def test_empty() -> None:
    q = mx.quantize(torch.ones(0, 64, device=CUDA), mx.mxfp4)
    w = mx.quantize(torch.ones(32, 64, device=CUDA), mx.mxfp4)
    assert mx.matmul(q, w.T).shape == (0, 32)
    assert mx.matmul(torch.ones(3, 0, device=CUDA).half(), torch.ones(0, 5, device=CUDA).half()).abs().sum() == 0


@pytest.mark.parametrize(
    "kinds", [("e2m1 1x32 rtne even symmetric",) * 2, ("bfloat16", "e4m3 1x32 rtne rceil symmetric")]
)
def test_opcheck(kinds: tuple[str, str]) -> None:
    a, b = (operand_a(here(256, 512, kind, seed)) for seed, kind in enumerate(kinds))
    arguments = (a.parts, a.kind, [256], b.parts, b.kind, 256, 512, None, torch.bfloat16, "auto")
    torch.library.opcheck(torch.ops.mxkernels.matmul.default, arguments)
    if a.spec:
        torch.library.opcheck(torch.ops.mxkernels.fold.default, (*a.parts, a.kind, a.rows, 512))


def test_compiles_into_one_graph() -> None:
    w = here(256, 512, "e2m1 1x32 rtne even symmetric")

    def layer(x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        q = mx.MXTensor(codes, scale, None, mx.mxfp4, (256, 512))
        return mx.matmul(mx.quantize(x, mx.mxfp4), q.T).relu()

    for rows in (256, 130):
        x = torch.randn(rows, 512, device=CUDA, dtype=torch.bfloat16)
        expected = layer(x, w.codes, w.scale)
        assert torch.equal(torch.compile(layer, fullgraph=True)(x, w.codes, w.scale), expected)


@pytest.mark.parametrize("kind", ["bfloat16", "e2m1 1x32 rtne even symmetric", "e5m2 1x32 rtne rceil symmetric"])
def test_cuda_graph(kind: str) -> None:
    a, b = here(256, 512, kind), here(256, 512, "e2m1 1x32 rtne even symmetric", 1)
    expected = mx.matmul(a, b.T)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = mx.matmul(a, b.T)
    for _ in range(3):
        out.zero_()
        graph.replay()
        assert torch.equal(out, expected)


def test_insisting_on_a_path() -> None:
    x = torch.randn(64, 512, device=CUDA, dtype=torch.bfloat16)
    w = here(256, 512, "e2m1 1x32 rtne even symmetric")
    with pytest.raises(ValueError, match="a is bfloat16, which FP8 does not hold"):
        mx.matmul(x, w.T, path="fp8")
    with pytest.raises(ValueError, match="allowed: auto, native, fp8, wide"):
        mx.matmul(x, w.T, path="fast")
    explained = str(mx.explain(x, w.T))
    assert "wide" in explained
    assert "which FP8 does not hold" in explained
    if gpu.device_capabilities(torch.device("cuda:0")).fp8_mma:
        q = mx.quantize(torch.randn(256, 512, device=CUDA), mx.mxfp4)
        assert mx.explain(q, w.T).path == "fp8"
        offset = mx.quantize(torch.randn(256, 512, device=CUDA), MXSpec("e2m1", symmetric=False))
        assert "offsets in a product of tf32 numbers over 16 sums" in str(mx.explain(offset, w.T))
        assert "over 48 sums" in str(mx.explain(offset, offset.T))

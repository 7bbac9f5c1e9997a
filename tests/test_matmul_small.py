"""The product with few rows, in the interpreter, against the float64 product of what the reference decodes."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="kernels need Triton")

import torch
from poisoned import assert_guards_hold, poisoned

from mxkernels import reference
from mxkernels.ops.matmul_small_kernel import SmallMatmulConfig, matmul_small_launches
from mxkernels.prepared import prepare
from mxkernels.spec import MXSpec
from mxkernels.tensor import MXTensor

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.filterwarnings("ignore:invalid value encountered", "ignore:overflow encountered"),
]

CPU = torch.device("cpu")
SMALL = SmallMatmulConfig(rows=64, cols=128, splits=2, num_warps=4, num_stages=1)


def weights(n: int, k: int, spec: MXSpec, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales that are any at all, but near 1 and without NaN; of a short last byte, the rest is 0."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (n, spec.packed_cols(k)), generator=generator, dtype=torch.uint8)
    if k % 2:
        codes[:, -1] &= 15
    scale = torch.randint(120, 131, spec.scale_shape(n, k), generator=generator, dtype=torch.uint8)
    return codes, scale


def activations(m: int, k: int, seed: int = 1) -> torch.Tensor:
    return torch.randn((m, k), generator=torch.Generator().manual_seed(seed)).bfloat16()


def product(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    spec: MXSpec,
    bias: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    config: SmallMatmulConfig = SMALL,
) -> torch.Tensor:
    m, n = x.shape[0], codes.shape[0]
    partial = poisoned((config.splits, m, n), torch.float32, CPU)
    out = poisoned((m, n), dtype, CPU)
    for launch in matmul_small_launches(x, codes, scale, spec, bias, partial, out, config):
        launch.run(CPU)
    assert_guards_hold(partial)
    assert_guards_hold(out)
    return out


def assert_within_bound(out: torch.Tensor, x: torch.Tensor, w: torch.Tensor) -> None:
    """The contract's bound of the 16-bit path; `out` is fp32, so that its own rounding adds 2**-24 of it."""
    expected = x.double() @ w.double().T
    unit = 2.0**-24
    bound = x.shape[1] * (unit * (x.double().abs() @ w.double().abs().T) + 2.0**-149) + unit * expected.abs()
    error = (out.double() - expected).abs()
    assert (error <= bound).all(), f"{(error / bound).max()} of the bound"


def decoded(codes: torch.Tensor, scale: torch.Tensor, spec: MXSpec, k: int) -> torch.Tensor:
    return reference.dequantize(codes, scale, None, spec, k, torch.float32)


@pytest.mark.parametrize("block", ["1x16", "1x32", "1x64", "1x128"])
@pytest.mark.parametrize("name", ["e2m1", "e3m0", "int4"])
def test_formats_and_blocks(name: str, block: str) -> None:
    spec = MXSpec(name, block)
    codes, scale = weights(64, 256, spec)
    x = activations(5, 256)
    assert_within_bound(product(x, codes, scale, spec), x, decoded(codes, scale, spec, 256))


@pytest.mark.parametrize("m", [1, 16, 17, 64])
@pytest.mark.parametrize(("n", "k"), [(64, 128), (1, 1), (65, 130), (130, 257), (7, 40), (64, 264), (3, 1000)])
def test_shapes(m: int, n: int, k: int) -> None:
    spec = MXSpec("e2m1")
    codes, scale = weights(n, k, spec)
    x = activations(m, k)
    assert_within_bound(product(x, codes, scale, spec), x, decoded(codes, scale, spec, k))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_bias_and_output(dtype: torch.dtype) -> None:
    """Added in fp32 and rounded once: the output is the fp32 sum's nearest."""
    spec = MXSpec("e2m1")
    codes, scale = weights(70, 256, spec)
    x = activations(3, 256)
    bias = torch.randn(70, generator=torch.Generator().manual_seed(2)).bfloat16()
    exact = product(x, codes, scale, spec) + bias.float()
    assert torch.equal(product(x, codes, scale, spec, bias, dtype), exact.to(dtype))


def test_a_nan_block_reaches_its_own_outputs_only() -> None:
    spec = MXSpec("e2m1")
    codes, scale = weights(66, 300, spec)
    scale[65, 9] = scale[3, 0] = 255
    x = activations(4, 300)
    nan = product(x, codes, scale, spec).isnan()
    assert nan[:, [3, 65]].all()
    assert nan.sum() == 8


@pytest.mark.parametrize("name", ["e2m1", "e3m0", "int4"])
@pytest.mark.parametrize(("byte", "power"), [(0, 0), (0, 60), (0, 110), (254, -8), (254, -60), (254, -126)])
def test_extreme_scales(name: str, byte: int, power: int) -> None:
    """The smallest scale and the largest, alone and in a sum with the other blocks' 1; codes up to 1, so that
    what they decode to is finite."""
    spec = MXSpec(name)
    codes, scale = weights(64, 128, spec)
    codes &= 0x11
    scale[:] = 127
    scale[:, 1] = byte
    scale[32:] = byte
    x = (activations(2, 128).float().clamp(-2, 2) * 2.0**power).bfloat16()
    assert_within_bound(product(x, codes, scale, spec), x, decoded(codes, scale, spec, 128))


def test_every_code_under_every_scale() -> None:
    """x picks one column: the product is the decoded weight itself, subnormal ones but for what fp32 drops."""
    for name in ("e2m1", "e3m0", "int4"):
        spec = MXSpec(name, "1x16")
        codes = reference.pack(torch.arange(16, dtype=torch.uint8).expand(255, 16).contiguous(), spec.element)
        scale = torch.arange(255, dtype=torch.uint8)[:, None].contiguous()
        out = product(torch.eye(16).bfloat16(), codes, scale, spec)
        expected = decoded(codes, scale, spec, 16).T
        finite = expected.isfinite().all(0)  # else infinity times the zeros of x
        assert finite.sum() > 250
        assert torch.equal(out[:, finite], expected[:, finite])


def test_splits_change_nothing_beyond_the_order_of_the_sum() -> None:
    """Integers sum exactly in any order: whatever the tiles, the same bits; more splits than steps included."""
    spec = MXSpec("int4", "1x64")
    codes, scale = weights(130, 520, spec)
    scale[:] = 127
    x = activations(9, 520).mul(4).round()
    expected = (x.double() @ decoded(codes, scale, spec, 520).double().T).float()
    for rows, cols, splits, num_warps in ((64, 128, 1, 4), (128, 128, 3, 4), (64, 256, 2, 4), (128, 128, 7, 8)):
        config = SmallMatmulConfig(rows, cols, splits, num_warps, 1)
        assert torch.equal(product(x, codes, scale, spec, config=config), expected), config


def test_an_x_of_wider_rows() -> None:
    spec = MXSpec("e2m1")
    codes, scale = weights(64, 128, spec)
    wide = activations(4, 136)
    expected = product(wide[:, :128].contiguous(), codes, scale, spec)
    assert torch.equal(product(wide[:, :128], codes, scale, spec), expected)


# --- prepared weights --------------------------------------------------------------------------------------


def prepared_product(
    x: torch.Tensor,
    q: MXTensor,
    bias: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    config: SmallMatmulConfig = SMALL,
) -> torch.Tensor:
    w = prepare(q)
    (m, _), n = x.shape, q.shape[0]
    partial = poisoned((config.splits, m, n), torch.float32, CPU)
    out = poisoned((m, n), dtype, CPU)
    launches = matmul_small_launches(x, w.codes, w.scale, q.spec, bias, partial, out, config, None, w.added)
    for launch in launches:
        launch.run(CPU)
    assert_guards_hold(partial)
    assert_guards_hold(out)
    return out


def quantised(n: int, k: int, spec: MXSpec, largest_scale: int) -> MXTensor:
    codes, scale = weights(n, k, spec)
    return MXTensor(codes, scale.clamp(max=largest_scale), None, spec, (n, k))


@pytest.mark.parametrize("largest_scale", [127, 130])  # the scales are joined to the elements', or not
@pytest.mark.parametrize("block", ["1x16", "1x32", "1x64", "1x128"])
@pytest.mark.parametrize("name", ["e2m1", "e3m0", "int4"])
def test_prepared_formats_and_blocks(name: str, block: str, largest_scale: int) -> None:
    """The codes and scales come back, and the product is that of the same numbers."""
    spec = MXSpec(name, block)
    q = quantised(70, 384, spec, largest_scale)
    restored = prepare(q).restore()
    assert torch.equal(restored.codes, q.codes)
    assert torch.equal(restored.scale, q.scale)
    x = activations(5, 384)
    assert_within_bound(prepared_product(x, q), x, decoded(q.codes, q.scale, spec, 384))


@pytest.mark.parametrize("m", [1, 17, 64])
@pytest.mark.parametrize(("n", "k"), [(128, 128), (1, 1), (65, 130), (130, 257), (7, 40), (3, 1000)])
def test_prepared_shapes(m: int, n: int, k: int) -> None:
    spec = MXSpec("e2m1")
    q = quantised(n, k, spec, 128)
    x = activations(m, k)
    expected = decoded(q.codes, q.scale, spec, k)
    assert torch.equal(prepare(q).dequantize(torch.float32), expected)
    assert torch.equal(prepare(q).T.dequantize(torch.float32), expected.T)
    for config in (SMALL, SmallMatmulConfig(128, 256, 3, 8, 1)):
        assert_within_bound(prepared_product(x, q, config=config), x, expected)


@pytest.mark.parametrize("largest_scale", [128, 130])
def test_prepared_nan_reaches_its_own_outputs_only(largest_scale: int) -> None:
    spec = MXSpec("e2m1")
    q = quantised(66, 300, spec, largest_scale)
    q.scale[65, 9] = q.scale[3, 0] = 255
    nan = prepared_product(activations(4, 300), q).isnan()
    assert nan[:, [3, 65]].all()
    assert nan.sum() == 8
    assert torch.equal(prepare(q).dequantize(torch.float32).isnan(), q.dequantize(torch.float32).isnan())


@pytest.mark.parametrize("byte", [0, 128, 129, 254])
@pytest.mark.parametrize("name", ["e2m1", "e3m0", "int4"])
def test_prepared_extreme_scales(name: str, byte: int) -> None:
    spec = MXSpec(name)
    q = quantised(64, 128, spec, 127)
    q.codes &= 0x11
    q.scale[:, 1] = byte
    x = activations(2, 128) * 2.0**-8  # so that fp32 holds the sums
    assert_within_bound(prepared_product(x, q), x, decoded(q.codes, q.scale, spec, 128))


def test_what_cannot_be_prepared() -> None:
    for spec in (MXSpec("e4m3"), MXSpec("e2m1", "4x4"), MXSpec("e2m1", "1x8"), MXSpec("e2m1", symmetric=False)):
        q = MXTensor(
            torch.zeros(8, spec.packed_cols(32), dtype=torch.uint8),
            torch.zeros(spec.scale_shape(8, 32), dtype=torch.uint8),
            None if spec.symmetric else torch.zeros(spec.scale_shape(8, 32), dtype=torch.float16),
            spec,
            (8, 32),
        )
        with pytest.raises(ValueError, match="prepare needs"):
            prepare(q)
    with pytest.raises(ValueError, match="transposed; allowed: a matrix as it was quantised"):
        prepare(quantised(64, 128, MXSpec("e2m1"), 127).T)

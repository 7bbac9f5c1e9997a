"""Matrix products for the tests: operands of all kinds, the kernels run by path, and the contract's bounds."""

from __future__ import annotations

import torch

import mxkernels as mx
from mxkernels.ops import products
from mxkernels.ops.operand import Operand, launchable, operand_a
from mxkernels.spec import MXSpec

FP32 = torch.float32
POISON = 0xFF  # NaN in every floating-point format


def operand(
    rows: int, k: int, kind: str, seed: int = 0, spread: int = 2, device: str = "cpu"
) -> torch.Tensor | mx.MXTensor:
    """A matrix `[rows, k]`: "bfloat16", "float16", or quantised to "e2m1 4x4 rtne even symmetric" …, stored
    `[k, rows]` if that ends in " T". Rows of 32 differ by powers of two up to 2**`spread` either way. The same on
    every device, where it is quantised."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, k, generator=generator)
    x *= (
        2.0
        ** torch.randint(-spread, spread + 1, (rows, (k + 31) // 32), generator=generator).repeat_interleave(32, 1)[
            :, :k
        ]
    )
    x = x.to(device)
    if kind in ("bfloat16 T", "float16 T"):
        return x.T.to(getattr(torch, kind[:-2])).contiguous().T
    if kind in ("bfloat16", "float16"):
        return x.to(getattr(torch, kind))
    if kind.endswith(" T"):
        return mx.quantize(x.T.contiguous(), MXSpec.parse(kind[:-2]).T, None if "rtne" in kind else 1).T
    return mx.quantize(x, MXSpec.parse(kind), None if "rtne" in kind else 1)


def asymmetric_pairs() -> list[tuple[str, str]]:
    """Operands of 4 and 6 bits of which one at least has offsets: formats, blocks, orientations."""
    kinds = (
        "e2m1 1x32 rtne even symmetric",
        "e2m1 1x32 rtne even asymmetric",
        "int4 4x4 rtne ceil asymmetric T",
        "e3m2 1x128 stochastic even asymmetric",
        "e2m3 32x1 rtne even asymmetric",
        "e3m0 16x16 rtne ceil asymmetric",
    )
    return [(a, b) for i, a in enumerate(kinds[1:]) for b in kinds[: i + 2]]


def decoded(x: torch.Tensor | mx.MXTensor | mx.FoldedTensor) -> torch.Tensor:
    """The operand in float64."""
    return (x if isinstance(x, torch.Tensor) else x.dequantize(FP32)).double()


def magnitude(x: torch.Tensor | mx.MXTensor | mx.FoldedTensor) -> torch.Tensor:
    """|a| of the contract's bound: for an asymmetric operand, |S q| + |O|."""
    if not isinstance(x, mx.MXTensor) or x.spec.symmetric:
        return decoded(x).abs()
    stored = x.T if x.transposed else x
    plain = MXSpec(stored.spec.element, stored.spec.block)
    elements = mx.MXTensor(stored.codes, stored.scale, None, plain, stored.shape).dequantize(FP32).double().abs()
    r, c = stored.spec.block.rows, stored.spec.block.cols
    offset = stored.offset.double().abs().repeat_interleave(r, 0)[: stored.shape[0]]
    total = elements + offset.repeat_interleave(c, 1)[:, : stored.shape[1]]
    return total.T if x.transposed else total


class PoisonedPlan(products.Plan):
    """One whose buffers hold rubbish until a kernel writes them."""

    def _make(self, shape: tuple[int, ...], dtype: torch.dtype, zero: bool) -> torch.Tensor:
        made = super()._make(shape, dtype, zero)
        if not zero:
            made.view(torch.uint8).fill_(POISON)
        return made


def bound(a, b, path: str, group: int = 512) -> torch.Tensor:
    """The contract's largest error, for a `[M, K]` and b `[N, K]`."""
    k = a.shape[-1]
    factor = 33 * group / 32 * 2.0**-13 if path == "fp8" else k * 2.0**-24
    return factor * (magnitude(a) @ magnitude(b).T) + k * 2.0**-149


def run(
    a: torch.Tensor | mx.MXTensor | mx.FoldedTensor,
    b: torch.Tensor | mx.MXTensor | mx.FoldedTensor,
    path: str,
    bias: torch.Tensor | None = None,
    dtype: torch.dtype = FP32,
) -> torch.Tensor:
    """a `[M, K]` times b `[N, K]` transposed, by a path's kernels, on the device of the operands."""
    sides = [operand_a(x) for x in (a, b)]
    parts = [launchable(side.parts, side.kind) for side in sides]
    left, right = (Operand.of_kind(p, side.kind, side.rows) for p, side in zip(parts, sides, strict=True))
    plan = PoisonedPlan(a.device, [*left.parts, *right.parts, bias])
    return products.plan_product(plan, left, right, a.shape[-1], bias, dtype, path)


def check(a, b, path: str, **options: object) -> None:
    """The product is within the contract's bound, and NaN where it has to be."""
    out = run(a, b, path, **options).double()
    expected = decoded(a) @ decoded(b).T
    assert torch.equal(out.isnan(), expected.isnan())
    error = (out - expected).abs()
    limit = bound(a, b, path)
    finite = expected.isfinite() & limit.isfinite()
    assert (error <= limit)[finite].all(), f"error is {(error / limit)[finite].max():.3g} of the bound"

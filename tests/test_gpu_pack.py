"""Packed models on a GPU: the products of `matmul`, the bytes of the CPU, under graphs and compilation."""

from __future__ import annotations

import gc

import pytest

pytest.importorskip("triton", reason="kernels need Triton")

import torch
from torch import nn

import mxkernels as mx
from mxkernels.packed import PackedLinear

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")
SPECS = [mx.mxfp4, mx.mxint4, mx.mxfp6_e2m3, mx.mxfp8_e4m3, mx.MXSpec("e2m1", "16x16")]
ROWS = (1, 4, 64, 65, 300, 1024)


def linear(out_features: int = 512, in_features: int = 1024, seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(in_features, out_features).bfloat16().to(CUDA)


def activations(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(CUDA)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.mark.parametrize(("n", "k"), [(512, 1024), (8192, 8192), (130, 768), (50257, 768), (7, 322), (1, 1)])
@pytest.mark.parametrize("block", ["1x16", "1x32", "1x128"])
def test_restoring_gives_back_the_bytes(block: str, n: int, k: int) -> None:
    for largest in (1.0, 1e6):  # the scales are joined to the elements', or not
        q = mx.quantize(torch.randn(n, k, device=CUDA) * largest, mx.MXSpec("e2m1", block))
        held = mx.prepare(q)
        for _ in range(2):  # launched, and launched again as it was remembered
            found = held.restore()
            assert torch.equal(found.codes, q.codes)
            assert torch.equal(found.scale, q.scale)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_it_is_the_product_of_what_it_holds(spec: mx.MXSpec) -> None:
    original = linear()
    packed = PackedLinear.from_linear(original, spec)
    q = mx.quantize(original.weight, spec)
    few = mx.prepare(q) if spec.element.bits == 4 and spec.block.rows == 1 else q
    for rows in ROWS:
        x = activations(rows, 1024)
        expected = mx.matmul(x, (few if rows <= 64 else q).T, bias=original.bias)
        assert torch.equal(packed(x), expected), rows
        assert torch.equal(packed(x.view(1, rows, 1024)), expected[None]), rows


@pytest.mark.parametrize("inputs", [mx.mxfp4, mx.mxfp6_e2m3, mx.mxfp8_e4m3], ids=str)
def test_quantised_activations(inputs: mx.MXSpec) -> None:
    packed = PackedLinear.from_linear(linear(), mx.mxfp4, inputs)
    for rows in ROWS:
        x = activations(rows, 1024)
        q = mx.quantize(x, inputs)
        decoded = rows <= 64 and inputs.element.special == "none"
        weight = packed._held() if decoded else packed.weight
        assert torch.equal(packed(x), mx.matmul(q.dequantize() if decoded else q, weight.T, bias=packed.bias)), rows


def test_half_precision_and_autocast() -> None:
    packed, x = PackedLinear.from_linear(linear(), "mxfp4"), activations(5, 1024)
    expected = packed(x)
    with torch.autocast("cuda", torch.bfloat16):
        assert torch.equal(packed(x.float()), expected)
    half = packed.half()(x.half())
    assert half.dtype == torch.float16
    # The contract: both sums are within K * 2**-24 * sum |x||w| of the exact one. The latter is below 16 here, so they
    # differ by 2 * 2**-10 at most; then one is rounded to 2**-9 of it, the other to 2**-12.
    assert torch.allclose(half.float(), expected.float(), rtol=2**-8, atol=2**-9)


@pytest.mark.parametrize("spec", [*SPECS, mx.MXSpec("int4", "4x4", symmetric=False)], ids=str)
def test_the_state_is_the_cpus(spec: mx.MXSpec) -> None:
    original = linear()
    packed, on_cpu = PackedLinear.from_linear(original, spec), PackedLinear.from_linear(original.cpu(), spec)
    for found in (packed.state_dict(), PackedLinear.from_linear(original, spec).to(CUDA).state_dict()):
        for name, expected in on_cpu.state_dict().items():
            assert torch.equal(found[name].cpu(), expected), name
    other = PackedLinear(1024, 512, device=CUDA, dtype=torch.bfloat16, spec=spec)
    other.load_state_dict(on_cpu.state_dict())
    assert other.codes.is_cuda
    for rows in (3, 100):
        assert torch.equal(other(activations(rows, 1024)), packed(activations(rows, 1024)))


def test_memory() -> None:
    torch.cuda.synchronize()
    gc.collect()
    start = torch.cuda.memory_allocated()
    model = nn.Sequential(*(nn.Linear(2048, 2048, bias=False, device=CUDA, dtype=torch.bfloat16) for _ in range(4)))
    plain = torch.cuda.memory_allocated() - start
    mx.pack(model, "mxfp4")
    gc.collect()
    assert torch.cuda.memory_allocated() - start <= 0.27 * plain


@pytest.mark.parametrize("inputs", [None, mx.mxfp4], ids=str)
@pytest.mark.parametrize("rows", [1, 64, 300])
def test_graphs(rows: int, inputs: mx.MXSpec | None) -> None:
    """A replay reads new activations, and weights that were loaded since."""
    packed, other = (PackedLinear.from_linear(linear(seed=seed), "mxfp4", inputs) for seed in (0, 1))
    x = activations(rows, 1024)
    packed(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = packed(x)
    for change in (lambda: None, lambda: x.mul_(2), lambda: packed.load_state_dict(other.state_dict())):
        change()
        graph.replay()
        assert torch.equal(y, packed(x))


@pytest.mark.parametrize("inputs", [None, mx.mxfp4], ids=str)
def test_compiles_whole(inputs: mx.MXSpec | None) -> None:
    torch._dynamo.reset()
    packed = mx.pack(nn.Sequential(linear(1024, 512), linear(512, 1024)), "mxfp4", activations=inputs)
    compiled = torch.compile(packed, fullgraph=True)
    for rows in (1, 7, 300):
        x = activations(rows, 512)
        assert torch.equal(compiled(x), packed(x)), rows

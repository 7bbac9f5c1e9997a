"""The public functions on CUDA tensors: the CPU's bytes, under everything that torch does with them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import mxkernels as mx

pytestmark = pytest.mark.gpu

GPU = torch.device("cuda", 0)
SEED = -0x0FEDCBA912345678
NEAREST = mx.mxfp4
STOCHASTIC = mx.MXSpec("e2m3", "4x8", "stochastic", symmetric=False)
SPECS = (NEAREST, STOCHASTIC, mx.mxfp8_e4m3, mx.MXSpec("int4", "32x1", "stochastic", "ceil"))
ODD, EVEN = (33, 72), (64, 256)  # the same ones everywhere, since other shapes may need other kernels


def gaussian(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def seed_for(spec: mx.MXSpec) -> int | None:
    return SEED if spec.stochastic else None


def parts(q: mx.MXTensor) -> list[torch.Tensor]:
    return [part for part in (q.codes, q.scale, q.offset) if part is not None]


def assert_same(actual: mx.MXTensor, expected: mx.MXTensor) -> None:
    """The same tensor, wherever it is."""
    assert (actual.spec, actual.shape, actual.transposed) == (expected.spec, expected.shape, expected.transposed)
    for one, other in zip(parts(actual), parts(expected), strict=True):
        assert (one.dtype, one.stride()) == (other.dtype, other.stride())
        assert torch.equal(one.cpu(), other.cpu())


def differ(one: mx.MXTensor, other: mx.MXTensor) -> bool:
    return not torch.equal(one.codes, other.codes)


def assert_bits(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    assert torch.equal(actual.cpu().contiguous().view(torch.uint8), expected.cpu().contiguous().view(torch.uint8))


# --- the CPU's bytes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((100,), torch.float32), (ODD, torch.bfloat16), (EVEN, torch.bfloat16), ((3, 5, 40), torch.float16)],
    ids=str,
)
def test_equals_the_cpu(spec: mx.MXSpec, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, seed = gaussian(*shape, dtype=dtype), seed_for(spec)
    expected, actual = mx.quantize(x, spec, seed), mx.quantize(x.to(GPU), spec, seed)
    assert actual.device == GPU
    assert_same(actual, expected)
    assert_bits(actual.dequantize(dtype), expected.dequantize(dtype))
    pairs = zip(mx.quantize_pair(x.to(GPU), spec, seed), mx.quantize_pair(x, spec, seed), strict=True)
    for on_gpu, on_cpu in pairs:
        assert_same(on_gpu, on_cpu)
        if len(on_cpu.shape) == 2:
            assert_bits(on_gpu.T.dequantize(dtype), on_cpu.T.dequantize(dtype))


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("shape", [(0,), (0, 32), (3, 0), (2, 0, 4), (0, 0)], ids=str)
def test_nothing(spec: mx.MXSpec, shape: tuple[int, ...]) -> None:
    x, seed = gaussian(*shape), seed_for(spec)
    assert_same(mx.quantize(x.to(GPU), spec, seed), mx.quantize(x, spec, seed))
    for on_gpu, on_cpu in zip(mx.quantize_pair(x.to(GPU), spec, seed), mx.quantize_pair(x, spec, seed), strict=True):
        assert_same(on_gpu, on_cpu)
        assert_bits(on_gpu.dequantize(), on_cpu.dequantize())


@pytest.mark.parametrize("spec", [NEAREST, STOCHASTIC], ids=str)
def test_leading_dimensions_that_do_not_merge(spec: mx.MXSpec) -> None:
    x, seed = gaussian(6, 4, 5, 48), seed_for(spec)
    for view in (
        lambda x: x.transpose(0, 2),
        lambda x: x.permute(3, 1, 0, 2),
        lambda x: x[::2, 1:3, :, 5:41],
        lambda x: x[:, :1].expand(6, 3, 5, 48),
    ):
        assert_same(mx.quantize(view(x.to(GPU)), spec, seed), mx.quantize(view(x).contiguous(), spec, seed))


@pytest.mark.parametrize("seed", [0, 5, -1, 2**63, 2**64 - 1])
def test_seeds(seed: int) -> None:
    x = gaussian(*EVEN)
    expected = mx.quantize(x, STOCHASTIC, seed)
    assert_same(mx.quantize(x.to(GPU), STOCHASTIC, seed), expected)
    as_tensor = torch.tensor([seed - 2**64 if seed >= 2**63 else seed], device=GPU)
    assert_same(mx.quantize(x.to(GPU), STOCHASTIC, as_tensor), expected)
    assert_same(mx.quantize(x.to(GPU), STOCHASTIC, as_tensor[0]), expected)


def test_without_a_seed_torch_s_generator_decides() -> None:
    x = gaussian(*EVEN).to(GPU)
    torch.manual_seed(1)
    first, second = mx.quantize(x, STOCHASTIC), mx.quantize(x, STOCHASTIC)
    torch.manual_seed(1)
    assert_same(mx.quantize(x, STOCHASTIC), first)
    assert differ(first, second)


def test_a_seed_elsewhere_is_refused() -> None:
    with pytest.raises(ValueError, match="allowed: one int64 element on cuda:0"):
        mx.quantize(gaussian(4, 32).to(GPU), STOCHASTIC, torch.tensor([1]))


# --- torch's own machinery ---------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_opcheck(spec: mx.MXSpec) -> None:
    x = gaussian(*ODD).to(GPU)
    seed = torch.tensor([SEED], device=GPU) if spec.stochastic else None
    torch.library.opcheck(torch.ops.mxkernels.quantize, (x, str(spec), seed))
    torch.library.opcheck(torch.ops.mxkernels.quantize_pair, (x, str(spec), seed))
    q = mx.quantize(x, spec, seed)
    arguments = (q.codes, q.scale, q.offset, str(spec), ODD[1], torch.bfloat16)
    torch.library.opcheck(torch.ops.mxkernels.dequantize, arguments)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("spec", [NEAREST, STOCHASTIC], ids=str)
def test_compile(spec: mx.MXSpec, dynamic: bool) -> None:
    def function(x: torch.Tensor, seed: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        q, turned = mx.quantize_pair(x * 2, spec, seed)
        return q.dequantize() + 1, turned.T.dequantize(torch.float32), q.scale

    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic)
    for shape in (EVEN, ODD):
        x = gaussian(*shape).to(GPU)
        seed = torch.tensor([SEED], device=GPU) if spec.stochastic else None
        for actual, expected in zip(compiled(x, seed), function(x, seed), strict=True):
            assert_bits(actual, expected)


@pytest.mark.usefixtures("fresh_compiler")
def test_compile_takes_specs_as_arguments() -> None:
    def function(x: torch.Tensor, spec: mx.MXSpec) -> torch.Tensor:
        return mx.quantize(x, spec).dequantize()

    compiled = torch.compile(function, fullgraph=True)
    x = gaussian(*EVEN).to(GPU)
    for spec in (NEAREST, mx.mxfp8_e4m3, mx.MXSpec("e2m3", "4x8")):
        assert_bits(compiled(x, spec), function(x, spec))


@pytest.mark.usefixtures("fresh_compiler")
def test_compile_draws_a_seed_a_call() -> None:
    compiled = torch.compile(lambda x: mx.quantize(x, STOCHASTIC).codes, fullgraph=True)
    x = gaussian(*EVEN).to(GPU)
    torch.manual_seed(1)
    first, second = compiled(x), compiled(x)
    torch.manual_seed(1)
    assert torch.equal(compiled(x), first)
    assert not torch.equal(first, second)


def captured(x: torch.Tensor, spec: mx.MXSpec, seed: torch.Tensor | None) -> tuple[torch.cuda.CUDAGraph, mx.MXTensor]:
    """A graph that quantises `x`, and what its replays write."""
    mx.quantize(x, spec, seed)  # compiled and loaded before, which a capture forbids
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        q = mx.quantize(x, spec, seed)
    return graph, q


def replayed(graph: torch.cuda.CUDAGraph, q: mx.MXTensor) -> mx.MXTensor:
    graph.replay()
    return q.to("cpu")


def test_a_graph_replays_on_new_input() -> None:
    x = gaussian(*EVEN).to(GPU)
    graph, q = captured(x, NEAREST, None)
    decoding = torch.cuda.CUDAGraph()
    q.dequantize()
    with torch.cuda.graph(decoding):
        decoded = q.dequantize()
    for seed in (1, 2):
        x.copy_(gaussian(*EVEN, seed=seed))
        assert_same(replayed(graph, q), mx.quantize(x, NEAREST))
        decoding.replay()
        assert_bits(decoded, mx.quantize(x, NEAREST).dequantize())


def test_a_graph_draws_anew_at_each_replay() -> None:
    graph, q = captured(gaussian(*EVEN).to(GPU), STOCHASTIC, None)
    torch.manual_seed(3)
    first, second = replayed(graph, q), replayed(graph, q)
    torch.manual_seed(3)
    assert_same(replayed(graph, q), first)
    assert_same(replayed(graph, q), second)
    assert differ(first, second)


def test_a_graph_repeats_the_seed_it_was_given() -> None:
    x, seed = gaussian(*EVEN).to(GPU), torch.tensor([SEED], device=GPU)
    graph, q = captured(x, STOCHASTIC, seed)
    first = replayed(graph, q)
    assert_same(first, mx.quantize(x.cpu(), STOCHASTIC, SEED))
    assert_same(replayed(graph, q), first)
    seed.fill_(9)
    assert_same(replayed(graph, q), mx.quantize(x.cpu(), STOCHASTIC, 9))


# --- where it runs -----------------------------------------------------------------------------------------


def test_on_the_current_stream() -> None:
    """Behind what is queued there: a launch elsewhere would read x before it is written."""
    x, written = torch.zeros(EVEN, dtype=torch.bfloat16, device=GPU), gaussian(*EVEN)
    source = written.to(GPU)
    mx.quantize(x, NEAREST).dequantize()
    stream = torch.cuda.Stream(GPU)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # cycles, a tenth of a second
        x.copy_(source)
        q = mx.quantize(x, NEAREST)
        decoded = q.dequantize()
    stream.synchronize()
    expected = mx.quantize(written, NEAREST)
    assert_same(q, expected)
    assert_bits(decoded, expected.dequantize())


def test_on_the_tensor_s_own_device() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    other = torch.device("cuda", 1)
    with torch.cuda.device(GPU):
        for spec in SPECS:
            x, seed = gaussian(*EVEN), seed_for(spec)
            q, turned = mx.quantize_pair(x.to(other), spec, seed)
            expected = mx.quantize_pair(x, spec, seed)
            assert q.device == turned.device == q.dequantize().device == other
            assert_same(q, expected[0])
            assert_same(turned, expected[1])
            assert_bits(q.dequantize(), expected[0].dequantize())
        assert torch.cuda.current_device() == 0


def test_nothing_touches_cuda_before_a_cuda_tensor_does() -> None:
    code = """
import torch, mxkernels as mx, mxkernels.ops.quantize_kernel, mxkernels.ops.dequantize_kernel
mx.quantize(torch.ones(4, 32), mx.MXSpec("e2m1", rounding="stochastic")).dequantize()
print(torch.cuda.is_available(), torch.cuda.is_initialized())
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["True", "False"]


# --- moving and keeping ------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_to_and_from_the_gpu(spec: mx.MXSpec) -> None:
    q = mx.quantize(gaussian(*ODD), spec, seed_for(spec))
    for tensor in (q, q.T):
        moved = tensor.to("cuda")
        assert moved.device == GPU
        assert_same(moved, tensor)
        assert_same(moved.to("cpu"), tensor)
        assert_bits(moved.dequantize(), tensor.dequantize())


def test_saved_and_loaded(tmp_path: Path) -> None:
    saved = {str(spec): mx.quantize(gaussian(*ODD).to(GPU), spec, seed_for(spec)) for spec in SPECS}
    saved["turned"] = mx.quantize(gaussian(*ODD).to(GPU), mx.mxfp8_e5m2).T
    mx.save_file({**saved, "plain": torch.ones(3, device=GPU)}, tmp_path / "w.safetensors")
    for device in ("cpu", "cuda", GPU):
        loaded = mx.load_file(tmp_path / "w.safetensors", device)
        assert torch.equal(loaded.pop("plain").cpu(), torch.ones(3))
        assert loaded.keys() == saved.keys()
        for name, q in saved.items():
            assert loaded[name].device.type == torch.device(device).type
            assert_same(loaded[name], q)
            assert_bits(loaded[name].dequantize(), q.dequantize())


def test_what_is_stored_negated() -> None:
    """Its memory has the other sign: of what is given at first, and of what is like it later."""
    x = torch.randn(8, 64, dtype=torch.complex64, device="cuda").conj().imag
    assert x.is_neg()
    for _ in range(2):
        found, expected = mx.quantize(x, mx.mxfp4), mx.quantize(x.resolve_neg(), mx.mxfp4)
        assert torch.equal(found.codes, expected.codes)

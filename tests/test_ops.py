"""The ops as PyTorch sees them: registered, traced, compiled, repeated, and refused with a sentence."""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Callable

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import mxkernels as mx
from mxkernels import MXSpec, MXTensor, reference

OPS = torch.ops.mxkernels
SPECS = [
    "e2m1 1x32 rtne even symmetric",
    "e2m3 4x4 rtne ceil asymmetric",
    "e4m3 32x1 stochastic rceil symmetric",
    "int4 2x2 stochastic floor asymmetric",
]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
STOCHASTIC = MXSpec("e2m1", rounding="stochastic")

each_spec = pytest.mark.parametrize("text", SPECS)
on_each_backend = pytest.mark.parametrize(
    "backend",
    [
        "aot_eager",
        pytest.param("inductor", marks=pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")),
    ],
)


def ordinary(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(dtype)


def seed_for(text: str) -> torch.Tensor | None:
    return torch.tensor([12345]) if MXSpec.parse(text).stochastic else None


def same(left: MXTensor, right: MXTensor) -> bool:
    """Shapes, specs and all bytes."""
    assert (left.shape, left.spec) == (right.shape, right.spec)
    parts = [(left.codes, right.codes), (left.scale, right.scale)]
    if left.offset is not None and right.offset is not None:
        parts.append((left.offset.view(torch.int16), right.offset.view(torch.int16)))
    return all(torch.equal(a, b) for a, b in parts)


def equals_reference(q: MXTensor, x: torch.Tensor, seed: int | None = None) -> bool:
    codes, scale, offset = reference.quantize(x.reshape(-1, x.shape[-1]), q.spec, seed)
    return same(q, MXTensor(codes.view(*x.shape[:-1], -1), scale, offset, q.spec, x.shape))


# --- registration ------------------------------------------------------------------------------------------


@each_spec
@pytest.mark.parametrize("shape", [(33,), (7, 50), (2, 3, 40), (0, 8), (5, 0)], ids=str)
def test_opcheck(text: str, shape: tuple[int, ...]) -> None:
    x, seed = ordinary(*shape), seed_for(text)
    torch.library.opcheck(OPS.quantize.default, (x, text, seed))
    torch.library.opcheck(OPS.quantize_pair.default, (x, text, seed))
    codes, scale, *offset = OPS.quantize(x, text, seed)
    for dtype in DTYPES:
        torch.library.opcheck(OPS.dequantize.default, (codes, scale, *(offset or [None]), text, shape[-1], dtype))


@each_spec
def test_fake_kernels_know_shapes_and_dtypes(text: str) -> None:
    """On the meta device, where there is nothing to compute."""
    spec = MXSpec.parse(text)
    for shape in ((33,), (7, 50), (2, 3, 40), (0, 8)):
        x, seed = ordinary(*shape), seed_for(text)
        real = OPS.quantize_pair(x, text, seed)
        fake = OPS.quantize_pair(x.to("meta"), text, None if seed is None else seed.to("meta"))
        assert [(part.shape, part.dtype) for part in real] == [(part.shape, part.dtype) for part in fake]
        assert all(part.is_contiguous() for part in real)
        out = MXTensor(*fake[:2], None if spec.symmetric else fake[2], spec, shape).dequantize(torch.float16)
        assert (out.shape, out.dtype, out.device.type) == (shape, torch.float16, "meta")


# --- values ------------------------------------------------------------------------------------------------


@each_spec
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_number_of_dimensions(text: str, dtype: torch.dtype) -> None:
    """Leading dimensions flatten into rows, whatever their strides."""
    spec = MXSpec.parse(text)
    seed = 12345 if spec.stochastic else None
    for x in (
        ordinary(37, dtype=dtype),
        ordinary(5, 45, dtype=dtype),
        ordinary(2, 3, 4, 19, dtype=dtype),
        ordinary(6, 4, 19, dtype=dtype).transpose(0, 1),  # leading dimensions that do not merge
        ordinary(19, 4, 6, dtype=dtype).permute(2, 1, 0),
        ordinary(20, 40, dtype=dtype)[::3, ::2],
        ordinary(1, 40, dtype=dtype).expand(5, 40),
        ordinary(3, 1, 1, dtype=dtype).expand(3, 2, 8),
        ordinary(0, 5, dtype=dtype),
        ordinary(2, 0, 5, dtype=dtype),
        ordinary(5, 0, dtype=dtype),
        ordinary(0, dtype=dtype),
        ordinary(1, 1, dtype=dtype),
    ):
        q = mx.quantize(x, spec, seed)
        assert (q.shape, q.codes.shape[:-1], q.device) == (x.shape, x.shape[:-1], x.device)
        if x.numel():
            assert equals_reference(q, x, seed)
        for out in DTYPES:
            decoded = mx.dequantize(q, out)
            assert (decoded.shape, decoded.dtype) == (x.shape, out)
        straight, turned = mx.quantize_pair(x, spec, seed)
        assert same(straight, q)
        matrix = x.reshape(x.shape[:-1].numel(), x.shape[-1])
        assert same(turned, mx.quantize(matrix.T, spec, seed))


def test_the_input_is_left_alone() -> None:
    x = ordinary(5, 45)
    before = x.clone()
    mx.quantize_pair(x, mx.mxfp4)
    assert torch.equal(x, before)


def test_no_gradient_flows_through() -> None:
    x = ordinary(4, 32, dtype=torch.float32).requires_grad_()
    q = mx.quantize(x, mx.mxfp4)
    assert not q.codes.requires_grad
    y = mx.dequantize(q, torch.float32)
    assert not y.requires_grad
    straight_through = x + (y - x).detach()
    straight_through.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


# --- compilation -------------------------------------------------------------------------------------------


def round_trips(x: torch.Tensor, spec: MXSpec, seed: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    q = mx.quantize(x, spec, seed)
    straight, turned = mx.quantize_pair(x + 1, spec, seed)
    return (
        q.codes,
        mx.dequantize(q) * 2,
        straight.dequantize(torch.float32),
        turned.dequantize(torch.float16),
        turned.T.dequantize(torch.float32),
    )


@each_spec
@on_each_backend
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiled_without_a_break(text: str, backend: str, dynamic: bool) -> None:
    torch.compiler.reset()
    spec = MXSpec.parse(text)

    def function(x: torch.Tensor, seed: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        return round_trips(x, spec, seed)

    compiled = torch.compile(function, fullgraph=True, backend=backend, dynamic=dynamic)
    for rows, cols in ((6, 40), (9, 75)):
        x, seed = ordinary(rows, cols), seed_for(text)
        for got, expected in zip(compiled(x, seed), function(x, seed), strict=True):
            assert torch.equal(got, expected)


@pytest.mark.parametrize("dynamic", [None, False, True], ids=["automatic", "static", "dynamic"])
def test_compiled_with_specs_as_arguments(dynamic: bool | None) -> None:
    """One function for several specs, whose numbers must stay constants to the compiler."""
    torch.compiler.reset()
    compiled = torch.compile(round_trips, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    x = ordinary(6, 40)
    for text in ("e2m1 1x32 rtne even symmetric", "e2m1 4x4 rtne even symmetric", "e4m3 8x2 rtne rceil asymmetric"):
        spec = MXSpec.parse(text)
        for got, expected in zip(compiled(x, spec, None), round_trips(x, spec, None), strict=True):
            assert torch.equal(got, expected)


def test_dynamic_shapes_compile_once() -> None:
    torch.compiler.reset()
    graphs = []

    def count(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(
        lambda x: mx.quantize(x, mx.mxfp4).dequantize(), fullgraph=True, backend=count, dynamic=True
    )
    for rows, cols in ((6, 40), (9, 75), (31, 64)):
        x = ordinary(rows, cols)
        assert torch.equal(compiled(x), mx.quantize(x, mx.mxfp4).dequantize())
    assert len(graphs) == 1


@on_each_backend
def test_compiled_stochastic_rounding_draws(backend: str) -> None:
    """A seed of torch's generator each call: fresh bits, which torch.manual_seed repeats."""
    torch.compiler.reset()
    x = ordinary(8, 64)
    compiled = torch.compile(lambda x: mx.quantize(x, STOCHASTIC).codes, fullgraph=True, backend=backend)
    torch.manual_seed(1)
    first, second = compiled(x), compiled(x)
    torch.manual_seed(1)
    assert torch.equal(compiled(x), first)
    assert torch.equal(compiled(x), second)
    assert not torch.equal(first, second)


# --- seeds -------------------------------------------------------------------------------------------------


def test_manual_seed_repeats() -> None:
    x = ordinary(8, 64)
    torch.manual_seed(1)
    first, second = mx.quantize(x, STOCHASTIC), mx.quantize(x, STOCHASTIC)
    torch.manual_seed(1)
    assert same(mx.quantize(x, STOCHASTIC), first)
    assert same(mx.quantize(x, STOCHASTIC), second)
    assert not same(first, second)


def test_nearest_draws_nothing() -> None:
    before = torch.get_rng_state()
    mx.quantize_pair(ordinary(8, 64), mx.mxfp4)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("seed", [0, 1, -1, -(2**63), 2**63 - 1, 2**63, 2**64 - 1])
def test_seeds(seed: int) -> None:
    """64 bits, as an int of either sign or as a tensor of any shape with one element."""
    x = ordinary(8, 64)
    expected = mx.quantize(x, STOCHASTIC, seed)
    assert equals_reference(expected, x, seed % 2**64)
    signed = (seed + 2**63) % 2**64 - 2**63
    for tensor in (torch.tensor([signed]), torch.tensor(signed), torch.tensor([[signed]])):
        assert same(mx.quantize(x, STOCHASTIC, tensor), expected)
    for other in (0x1234567, seed ^ (1 << 40)):
        assert not same(mx.quantize(x, STOCHASTIC, other), expected)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_checkpoint_recomputes_the_same_bytes(reentrant: bool) -> None:
    codes = []

    def layer(x: torch.Tensor) -> torch.Tensor:
        q = mx.quantize(x, STOCHASTIC)
        codes.append(q.codes)
        return x * mx.dequantize(q, torch.float32).sum()

    x = ordinary(8, 64, dtype=torch.float32).requires_grad_()
    y = checkpoint(layer, x, use_reentrant=reentrant)
    torch.rand(3)  # the generator moves on between
    y.sum().backward()
    forward, recomputed = codes
    assert torch.equal(forward, recomputed)


# --- mistakes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantize", [mx.quantize, mx.quantize_pair], ids=lambda function: function.__name__)
@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (
            torch.ones(4, 4, dtype=torch.int32),
            TypeError,
            r"x is torch\.int32; allowed: torch\.bfloat16, torch\.float16, ",
        ),
        (torch.ones(4, 4, dtype=torch.float64), TypeError, r"x is torch\.float64; allowed: torch\.bfloat16"),
        (torch.ones(4, 4, dtype=torch.bool), TypeError, r"x is torch\.bool; allowed"),
        (torch.tensor(1.0), ValueError, "x has no dimensions; allowed: one or more"),
        ([[1.0, 2.0]], TypeError, r"x is a list; allowed: a torch\.Tensor"),
        (mx.quantize(torch.ones(4, 4), mx.mxfp4), TypeError, r"x is a MXTensor; allowed: a torch\.Tensor"),
    ],
    ids=["integers", "float64", "bool", "no dimensions", "list", "MXTensor"],
)
def test_wrong_inputs(quantize: Callable[..., object], x: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        quantize(x, mx.mxfp4)


@pytest.mark.parametrize(
    ("seed", "message"),
    [
        (torch.tensor([1], dtype=torch.int32), r"seed is torch\.int32 \[1\] on cpu; allowed: one int64 element on cpu"),
        (torch.tensor([1, 2]), r"seed is torch\.int64 \[2\] on cpu; allowed: one int64 element on cpu"),
        (torch.tensor([], dtype=torch.int64), r"seed is torch\.int64 \[0\] on cpu; allowed"),
        (torch.empty(1, dtype=torch.int64, device="meta"), r"seed is torch\.int64 \[1\] on meta; allowed: .* on cpu"),
        (2**64, "seed is 18446744073709551616; allowed: an integer of 64 bits"),
        (-(2**63) - 1, "seed is -9223372036854775809; allowed: an integer of 64 bits"),
    ],
    ids=["int32", "two", "none", "another device", "too large", "too small"],
)
def test_wrong_seeds(seed: int | torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mx.quantize(torch.ones(4, 4), STOCHASTIC, seed)


def test_a_seed_for_nearest_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="seed is given, but rounding is rtne, which draws nothing; allowed: None"):
        mx.quantize(torch.ones(4, 4), mx.mxfp4, seed=1)


@pytest.mark.parametrize("spec", ["e2m1", None, torch.float16])
def test_wrong_specs(spec: object) -> None:
    with pytest.raises(TypeError, match=f"spec is a {type(spec).__name__}; allowed: MXSpec"):
        mx.quantize(torch.ones(4, 4), spec)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.uint8])
def test_wrong_output_dtypes(dtype: torch.dtype) -> None:
    q = mx.quantize(torch.ones(4, 4), mx.mxfp4)
    for dequantize in (lambda: mx.dequantize(q, dtype), lambda: q.dequantize(dtype), lambda: q.T.dequantize(dtype)):
        with pytest.raises(TypeError, match=rf"dtype is {dtype}; allowed: torch\.bfloat16, torch\.f"):
            dequantize()


def test_only_an_mxtensor_is_dequantized() -> None:
    with pytest.raises(TypeError, match="q is a Tensor; allowed: MXTensor"):
        mx.dequantize(torch.ones(4, 4))  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["e2m1 2x2 rtne even symmetric", "e2m1 2x2 rtne even asymmetric"])
@pytest.mark.parametrize("part", ["codes", "scale", "offset"])
@pytest.mark.parametrize("damage", ["a row short", "a column short", "float32"])
def test_parts_that_do_not_fit(text: str, part: str, damage: str) -> None:
    """The op itself checks what it is handed: a kernel would read beyond the end."""
    codes, scale, *offset = OPS.quantize(ordinary(4, 8), text, None)
    parts = {"codes": codes, "scale": scale, "offset": offset[0] if offset else None}
    if parts[part] is None:
        parts[part], message = scale.half(), "offset is given, but"
    else:
        message = f"{part} is torch"
        parts[part] = {
            "a row short": lambda x: x[:-1],
            "a column short": lambda x: x[:, :-1],
            "float32": lambda x: x.float(),
        }[damage](parts[part])
        if (part, damage) == ("codes", "a row short"):
            message = "scale is torch"  # codes say how many rows there are
            parts["codes"] = codes[:-2]
    with pytest.raises(ValueError, match=message):
        OPS.dequantize(*parts.values(), text, 8, torch.float32)


def test_an_offset_that_is_missing() -> None:
    text = "e2m1 2x2 rtne even asymmetric"
    codes, scale, _ = OPS.quantize(ordinary(4, 8), text, None)
    with pytest.raises(ValueError, match="offset is None, but e2m1 2x2 rtne even asymmetric needs"):
        OPS.dequantize(codes, scale, None, text, 8, torch.float32)


def test_the_functions_stay_functions_once_the_kernels_are_imported() -> None:
    """A module of the kernels named as a function of the package would take its place."""
    for kernel in ("quantize_kernel", "dequantize_kernel"):
        importlib.import_module(f"mxkernels.ops.{kernel}")
    for name in mx.ops.__all__:
        function = getattr(mx.ops, name)
        assert callable(function)
        assert getattr(mx, name, function) is function

"""The block Hadamard transform: its definition, the kernel's bytes, and what it compiles to."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from ahead_of_time_hadamard import ARCHITECTURES, CASES
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch._dynamo.backends.common import aot_autograd
from torch.utils.checkpoint import checkpoint
from tritons import FETCHED, compiled

import mxkernels as mx
from mxkernels import reference
from mxkernels.ops import hadamard
from mxkernels.ops.transform import random_signs
from mxkernels.recipes import HADAMARD_SIZES, Product, Recipe

ROOT = Path(__file__).parents[1]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
OP = torch.ops.mxkernels.hadamard.default

each_size = pytest.mark.parametrize("size", HADAMARD_SIZES)
each_compiler = pytest.mark.parametrize(
    "backend",
    [
        "aot_eager",
        pytest.param("inductor", marks=pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")),
    ],
)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def ordinary(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(dtype)


def signs_of(size: int) -> torch.Tensor:
    return torch.randint(-1, 1, (size,), dtype=torch.int8, generator=torch.Generator().manual_seed(size))


def sylvester(size: int) -> torch.Tensor:
    """H[i, j] = (-1)**(number of common bits of i and j)."""
    return torch.tensor([[(-1.0) ** (i & j).bit_count() for j in range(size)] for i in range(size)]).double()


@each_size
@each_dtype
@pytest.mark.parametrize("signed", [False, True])
def test_definition(size: int, dtype: torch.dtype, signed: bool) -> None:
    """The product with Sylvester's matrix, in float64."""
    x = ordinary(7, 300, dtype=dtype)
    signs = signs_of(size) if signed else None
    blocks = torch.nn.functional.pad(x.double(), (0, -300 % size)).unflatten(-1, (-1, size))
    if signs is not None:
        blocks = torch.where(signs < 0, -blocks, blocks)
    exact = (blocks @ sylvester(size) / size**0.5).flatten(-2)
    # log2(size) additions, the factor's own rounding and the product's, each by 2**-24 of no more than the sum of
    # magnitudes; then the rounding to the dtype (fp16's subnormals are 2**-24 apart).
    magnitudes = blocks.abs().sum(-1, keepdim=True).expand(blocks.shape).flatten(-2) / size**0.5
    bound = (size.bit_length() + 1) * 2.0**-24 * magnitudes + torch.finfo(dtype).eps / 2 * exact.abs() + 2.0**-25
    assert ((hadamard(x, size, signs).double() - exact).abs() <= 1.001 * bound).all()


@each_size
def test_products_stay(size: int) -> None:
    """Of integers few and small enough, to the bit, where the factor is a power of two; signs and padding included."""
    a, b = ordinary(5, 200).round(), ordinary(9, 200).round()
    signs = signs_of(size)
    product = hadamard(a, size, signs).double() @ hadamard(b, size, signs).double().T
    exact = a.double() @ b.double().T
    if size in (16, 64):
        assert torch.equal(product, exact)
    else:  # two roundings of the factor, and one of each element
        assert (product - exact).abs().max() <= 4 * 2.0**-24 * (a.abs().sum(-1).max() * b.abs().sum(-1).max())


@pytest.mark.interpreter
@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered")  # numpy's, as intended
@each_size
@each_dtype
def test_the_kernel_has_the_references_bytes(size: int, dtype: torch.dtype) -> None:
    """Any strides, any edges, specials and signed zeros."""
    pytest.importorskip("triton", reason="kernels need Triton")
    from mxkernels.ops.hadamard_kernel import hadamard_launch

    x = ordinary(40, 200, dtype=dtype)
    x[3, 5], x[4, 6], x[4, 7], x[5, 8] = torch.inf, torch.inf, -torch.inf, torch.nan
    x[6] = 0.0
    x[7] = -0.0
    x[8] *= 2.0**-130 if dtype != torch.float16 else 2.0**-20
    x[9] = torch.finfo(dtype).max
    for matrix in (x, x.T, x[::3, ::2], x[:, :16], x[:1]):
        for signs in (None, signs_of(size)):
            expected = reference.hadamard(matrix, size, signs)
            out = torch.full_like(expected, torch.nan)
            hadamard_launch(matrix, size, signs, out).run(x.device)
            assert torch.equal(out.view(torch.uint8), expected.view(torch.uint8))


def test_any_number_of_dimensions() -> None:
    for x in (ordinary(40), ordinary(2, 3, 40), ordinary(4, 6, 40).transpose(0, 1), ordinary(0, 40), ordinary(5, 0)):
        out = hadamard(x, 32)
        assert out.shape == (*x.shape[:-1], (x.shape[-1] + 31) // 32 * 32)
        assert torch.equal(
            out,
            reference.hadamard(x.reshape(out.shape[:-1].numel(), -1 if x.numel() else x.shape[-1]), 32, None).view(
                out.shape
            ),
        )
    assert torch.equal(hadamard(ordinary(1, 40).expand(5, 40), 32)[4], hadamard(ordinary(1, 40), 32)[0])


def test_random_signs() -> None:
    x = ordinary(2, 128)
    torch.manual_seed(1)
    drawn = [random_signs(x, 128) for _ in range(2)]
    assert not torch.equal(*drawn)
    assert all(set(each.tolist()) == {-1, 0} for each in drawn)
    torch.manual_seed(1)
    assert torch.equal(random_signs(x, 128), drawn[0])


@each_compiler
def test_two_draws_stay_two(backend: str) -> None:
    """Of equal arguments, with gradients: then compilers merge calls that they take to be the same."""

    def twice(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return hadamard(x, 128, random_signs(x, 128)), hadamard(x, 128, random_signs(x, 128))

    torch.manual_seed(0)
    first, second = torch.compile(twice, backend=backend, fullgraph=True)(ordinary(4, 128).requires_grad_())
    assert not torch.equal(first, second)


@each_compiler
def test_checkpoints_draw_the_same_again(backend: str) -> None:
    """What is recomputed for the gradient of z is what forward multiplied it by."""

    def function(x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        return checkpoint(lambda x: hadamard(x, 128, random_signs(x, 128)).sin() * z, x, use_reentrant=False)

    torch.manual_seed(0)
    x, z = ordinary(4, 128).requires_grad_(), torch.ones(4, 128, requires_grad=True)
    out = torch.compile(function, backend=backend, fullgraph=True)(x, z)
    torch.rand(3)  # what moves the generator in between
    out.sum().backward()
    assert torch.equal(z.grad, out)


def two_layers(x: torch.Tensor, w: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """On one input, with random signs of one size in every product."""
    recipe = Recipe(*[Product(hadamard=16, random_signs=True)] * 3)
    return mx.ops.linear(x, w, recipe=recipe), mx.ops.linear(x, v, recipe=recipe)


def checkpointed(x: torch.Tensor, w: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return checkpoint(two_layers, x, w, v, use_reentrant=False)


def small_integers(seed: int) -> torch.Tensor:
    return torch.randint(-1, 2, (32, 32), generator=torch.Generator().manual_seed(seed)).float()


def gradients(function: Any) -> list[torch.Tensor]:
    inputs = [small_integers(seed).requires_grad_() for seed in range(3)]
    torch.manual_seed(0)
    torch.autograd.backward(function(*inputs), [small_integers(3), small_integers(4)])
    return [each.grad for each in inputs]


@each_compiler
@pytest.mark.parametrize("layers", [two_layers, checkpointed])
def test_both_operands_of_a_compiled_product_have_the_same_signs(layers: Any, backend: str) -> None:
    """Then signs change no product: these are exact, sums of 16 integers up to 1 being quarters in bfloat16."""
    expected = gradients(lambda x, w, v: (x @ w.T, x @ v.T))
    found = gradients(torch.compile(layers, backend=backend, fullgraph=True))
    assert all(map(torch.equal, found, expected))


def test_every_product_of_compiled_layers_draws_once() -> None:
    """In forward; backward finds what it needs."""
    draws: list[int] = []

    def count(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        draws.append(len(graph.graph.find_nodes(op="call_function", target=torch.ops.aten.randint.low)))
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=count, bw_compiler=count, partition_fn=min_cut_rematerialization_partition)
    gradients(torch.compile(two_layers, backend=backend, fullgraph=True))
    assert draws == [2 * 3, 0]


def test_float16_may_overflow() -> None:
    """To infinity, the sum of a block of its largest values being out of range; just below, not."""
    x = torch.full((1, 16), 65504.0, dtype=torch.float16)
    assert hadamard(x, 16).tolist() == [[torch.inf, *[0.0] * 15]]
    assert hadamard(x / 4, 16).tolist() == [[65504.0, *[0.0] * 15]]


@pytest.mark.parametrize("signed", [False, True])
def test_registration(signed: bool) -> None:
    """opcheck, the fake kernel, and gradients, which are those of a linear map."""
    signs = signs_of(32) if signed else None
    torch.library.opcheck(OP, (ordinary(3, 5, 40, dtype=torch.bfloat16).requires_grad_(), 32, signs))
    torch.library.opcheck(torch.ops.mxkernels.depend.default, (ordinary(3, 40), [signs_of(32)]))
    x, dy = ordinary(5, 40).requires_grad_(), ordinary(5, 64)
    hadamard(x, 32, signs).backward(dy)
    columns = hadamard(torch.eye(40), 32, signs).double()  # row j: what x[j] contributes
    assert (x.grad.double() - dy.double() @ columns.T).abs().max() < 1e-6
    compiled = torch.compile(lambda x: hadamard(x, 32, signs), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), hadamard(x, 32, signs))


def test_errors_name_the_argument() -> None:
    for arguments, error, message in (
        (([1.0], 16), TypeError, "x is a list; allowed: a torch.Tensor"),
        ((torch.ones(16).long(), 16), TypeError, "x is torch.int64; allowed: torch.bfloat16"),
        ((torch.ones(()), 16), ValueError, "x has no dimensions"),
        ((torch.ones(16), 8), ValueError, "size is 8; allowed: 16, 32, 64, 128"),
        (
            (torch.ones(16), 16, torch.ones(16)),
            ValueError,
            r"signs is torch.float32 \[16\] on cpu; allowed: torch.int8 \[16\]",
        ),
        ((torch.ones(16), 16, signs_of(32)), ValueError, r"signs is torch.int8 \[32\]"),
    ):
        with pytest.raises(error, match=message):
            mx.ops.hadamard(*arguments)


def test_recorded_transforms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import casts

    rows = casts.transforms(torch.device("cpu"), (4, 256), 0.0)
    expected = [(size, signed) for size in (16, 32, 64, 128) for signed in (False, True)]
    assert [(row["size"], row["signs"]) for row in rows] == expected
    for row in rows:
        assert row["traffic_bytes"] == 2 * 4 * 256 * 2
        assert row["gbps"] == row["traffic_bytes"] / row["median_us"] / 1e3
        assert row["fraction_of_limit"] == row["gbps"] / row["limit_gbps"]
    json.dumps(rows, allow_nan=False)


# --- compiled for GPUs that are not here -------------------------------------------------------------------


@pytest.mark.parametrize("version", FETCHED)
def test_compiles(version: str) -> None:
    """For every case and architecture: it compiles, and spills nothing."""
    pytest.importorskip("triton", reason="kernels need Triton")
    lines = compiled(version, "ahead_of_time_hadamard.py").splitlines()
    found: list[dict[str, Any]] = [json.loads(line) for line in lines]
    assert len(found) == len(CASES) * len(ARCHITECTURES)
    assert not [each for each in found if each["spilled_bytes"]]

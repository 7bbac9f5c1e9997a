"""The block Hadamard transform: its definition, the kernel's bytes, and what it compiles to."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ahead_of_time_hadamard import ARCHITECTURES, CASES

import mxkernels as mx
from mxkernels import reference
from mxkernels.ops import hadamard
from mxkernels.ops.transform import random_signs
from mxkernels.recipes import HADAMARD_SIZES

ROOT = Path(__file__).parents[1]
FETCHED = re.search(r"^TRITONS := (.+)$", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)[1].split()
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
OP = torch.ops.mxkernels.hadamard.default

each_size = pytest.mark.parametrize("size", HADAMARD_SIZES)
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


@pytest.mark.parametrize("signed", [False, True])
def test_registration(signed: bool) -> None:
    """opcheck, the fake kernel, and gradients, which are those of a linear map."""
    signs = signs_of(32) if signed else None
    torch.library.opcheck(OP, (ordinary(3, 5, 40, dtype=torch.bfloat16).requires_grad_(), 32, signs))
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


# --- compiled for GPUs that are not here -------------------------------------------------------------------


@pytest.mark.parametrize("version", FETCHED)
def test_compiles(version: str) -> None:
    """For every case and architecture: it compiles, and spills nothing."""
    pytest.importorskip("triton", reason="kernels need Triton")
    folder = ROOT / ".triton" / version
    if not (folder / "triton").is_dir():
        pytest.skip(f"Triton {version} is not in .triton/{version}; `make test` fetches it")
    path = [str(folder), str(ROOT)]
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "ahead_of_time_hadamard.py")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: list[dict[str, Any]] = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == len(CASES) * len(ARCHITECTURES)
    assert not [each for each in found if each["spilled_bytes"]]

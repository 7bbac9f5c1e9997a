"""The block Hadamard transform, registered as the other ops are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .. import reference
from ..recipes import HADAMARD_SIZES
from . import INPUT_DTYPES
from .operand import as_matrix
from .plan import Plan, Tensors, recorded

_library = torch.library.Library("mxkernels", "FRAGMENT")
_library.define("hadamard(Tensor x, int size, Tensor? signs) -> Tensor")
_library.define("depend(Tensor(a!) y, Tensor[] on) -> ()")


def hadamard(x: torch.Tensor, size: int, signs: torch.Tensor | None = None) -> torch.Tensor:
    """The orthonormal Hadamard transform of each `size` neighbours along the last dimension.

    It equals, with H Sylvester's matrix of ±1 (H[i, j] is -1 where the bits of `i & j` are odd in number),

        x = torch.nn.functional.pad(x, (0, -x.shape[-1] % size)).unflatten(-1, (-1, size))
        (x * signs @ H / size**0.5).flatten(-2)

    so `hadamard(a) @ hadamard(b).T` is `a @ b.T`, and what one element had is spread over all of its block.

    Args:
        x: bfloat16, float16 or float32, of any shape with at least one dimension and any strides.
        size: 16, 32, 64 or 128. A last block that is shorter is filled up with zeros: it comes out whole.
        signs: int8 `[size]`: elements where it is negative are negated first, in every block. `random_signs` draws
            some.

    Returns:
        A contiguous tensor of x's dtype, its last dimension rounded up to a multiple of `size`.

    Raises:
        TypeError, ValueError: names the argument and what is allowed.

    Sums are fp32, of pairs at distance 1, 2, 4 …, times `size**-0.5` rounded to fp32; the result is rounded once,
    to nearest-even. So every device gives the same bytes. It may be `size**0.5` times as large as the largest
    element: what is beyond the dtype's largest value comes out as infinity, in float16 from elements of
    `65504 / size**0.5` on, 5789 for 128.
    """
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"x is a {type(x).__name__}; allowed: a torch.Tensor")
    if x.dtype not in INPUT_DTYPES:
        raise TypeError(f"x is {x.dtype}; allowed: {', '.join(map(str, INPUT_DTYPES))}")
    if x.dim() == 0:
        raise ValueError("x has no dimensions; allowed: one or more")
    if size not in HADAMARD_SIZES:
        raise ValueError(f"size is {size!r}; allowed: {', '.join(map(str, HADAMARD_SIZES))}")
    if signs is not None and (signs.dtype != torch.int8 or signs.shape != (size,) or signs.device != x.device):
        found = f"{signs.dtype} {list(signs.shape)} on {signs.device}"
        raise ValueError(f"signs is {found}; allowed: torch.int8 [{size}] on {x.device}, or None")
    return torch.ops.mxkernels.hadamard(x, size, signs)


def random_signs(x: torch.Tensor, size: int) -> torch.Tensor:
    """Signs for `hadamard(x, size)`: -1 or 0, drawn from torch's generator of x's device.

    By torch.randint, of which compilers know that two equal calls are two draws. Of an op of our own they would make
    one, whatever its tags say.
    """
    return torch.randint(-1, 1, (size,), dtype=torch.int8, device=x.device)


def depend(y: torch.Tensor, on: Sequence[torch.Tensor | None]) -> None:
    """Have compilers believe that forward's output `y` depends on what was drawn.

    Then they draw it in forward and keep it for backward. What only backward needs they may draw in both, so that
    the two operands of a product, one made in forward, get different signs.
    """
    drawn = [each for each in on if each is not None]
    if drawn:
        torch.ops.mxkernels.depend(y, drawn)


def _depend(y: torch.Tensor, on: Sequence[torch.Tensor]) -> None:
    """Nothing: it only says that it writes to y, which costs no copy."""


def _transformed_shape(x: torch.Tensor, size: int) -> tuple[int, ...]:
    return (*x.shape[:-1], (x.shape[-1] + size - 1) // size * size)


def _hadamard_fake(x: torch.Tensor, size: int, signs: torch.Tensor | None) -> torch.Tensor:
    return x.new_empty(_transformed_shape(x, size))


def _hadamard_cpu(x: torch.Tensor, size: int, signs: torch.Tensor | None) -> torch.Tensor:
    return reference.hadamard(as_matrix(x), size, signs).view(_transformed_shape(x, size))


def _hadamard_cuda(x: torch.Tensor, size: int, signs: torch.Tensor | None) -> torch.Tensor:
    def run(plan: Plan, inputs: Tensors) -> Tensors:
        from .hadamard_kernel import hadamard_launch

        out = plan.buffer(*_transformed_shape(x, size), dtype=x.dtype)
        plan.launch(hadamard_launch(inputs[0], size, inputs[1], out.view(inputs[0].shape[0], out.shape[-1])))
        return [out]

    result: torch.Tensor = recorded(("hadamard", size), [x, signs], run, lambda: [as_matrix(x), signs])[0]
    return result


def _setup_context(ctx: Any, inputs: tuple[torch.Tensor, int, torch.Tensor | None], output: torch.Tensor) -> None:
    x, ctx.size, signs = inputs
    ctx.cols = x.shape[-1]
    ctx.save_for_backward(signs)


def _backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """H is its own transpose; the signs come last here."""
    (signs,) = ctx.saved_tensors
    turned = torch.ops.mxkernels.hadamard(gradient, ctx.size, None)
    if signs is not None:
        negated = signs.repeat(turned.shape[-1] // ctx.size) < 0
        turned = torch.where(negated, -turned, turned)
    return turned[..., : ctx.cols], None, None


_library.impl("hadamard", _hadamard_cpu, "CPU")
_library.impl("hadamard", _hadamard_cuda, "CUDA")
_library.impl("depend", _depend, "CPU")
_library.impl("depend", _depend, "CUDA")
torch.library.register_fake("mxkernels::hadamard", _hadamard_fake, lib=_library)
torch.library.register_fake("mxkernels::depend", _depend, lib=_library)
torch.library.register_autograd("mxkernels::hadamard", _backward, setup_context=_setup_context, lib=_library)

"""The operands of a layer's products: made as a recipe says, multiplied, and kept from forward to backward.

Each is a matrix whose rows run along the reduction.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch

from ..folded import FoldedTensor, window
from ..recipes import OperandSpec, Product, Recipe, RowScaled
from ..spec import MXSpec
from ..tensor import MXTensor
from . import fold, is_eager, matmul, quantize, quantize_pair
from .paths import LEAST_FP8_ROWS
from .plain import half_precision, plain_product
from .plan import traced
from .row_scaled import RowScaledTensor, row_scaled, row_scaled_product
from .transform import hadamard, random_signs

Matrix: TypeAlias = torch.Tensor | MXTensor | FoldedTensor | RowScaledTensor
# A matrix that waits for backward: plain; or codes, scale and, if it is asymmetric, offset.
Parts: TypeAlias = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]
NOTHING: Parts = (None, None, None)


class Use(NamedTuple):
    """What a product makes of a matrix: a transform of `hadamard` elements with `signs`, if that is not 0; then what
    the spec says, with `seed` if it is stochastic."""

    spec: OperandSpec
    hadamard: int
    signs: torch.Tensor | None
    seed: torch.Tensor | None

    @classmethod
    def of(cls, product: Product, spec: OperandSpec, signs: torch.Tensor | None, seed: torch.Tensor | None) -> Use:
        return cls(spec, product.hadamard, signs, seed)


def made(x: torch.Tensor, use: Use, dtype: torch.dtype, folds: bool = False) -> Matrix:
    """The operand, in a layer with outputs of `dtype`; `folds`: for FP8 tensor cores, at once."""
    if use.hadamard:
        x = hadamard(x, use.hadamard, use.signs)
    if use.spec is None:
        return x.to(half_precision(dtype))
    if isinstance(use.spec, RowScaled):
        return row_scaled(x, use.spec)
    return fold(x, use.spec, use.seed) if folds else quantize(x, use.spec, use.seed)


def made_both(x: torch.Tensor, along: Use, across: Use, dtype: torch.dtype) -> tuple[Matrix, Matrix]:
    """The operands that two products make of x and x.T: from one read where they are the same."""
    if along.spec == across.spec and isinstance(along.spec, MXSpec) and not (along.hadamard or across.hadamard):
        return quantize_pair(x, along.spec, along.seed)
    return made(x, along, dtype), made(x.T, across, dtype)


def folds_at_once(product: Product, device: torch.device, rows: int, cols: int) -> bool:
    """Whether operands of `rows` and `cols` rows that are not kept are best folded from the read that quantises them:
    where `matmul` would fold them too, so that a product has the same bits whether one of them is kept or not."""
    if device.type != "cuda" or not (_foldable(product.left) and _foldable(product.right)):
        return False
    if min(rows, cols) < LEAST_FP8_ROWS:
        return False
    from .device_facts import needs_folding

    return needs_folding(device)


def _foldable(spec: OperandSpec) -> bool:
    return isinstance(spec, MXSpec) and spec.symmetric and window(spec.element) is not None


def multiplied(left: Matrix, right: Matrix, bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """`left @ right.T + bias`."""
    if isinstance(left, RowScaledTensor):
        assert isinstance(right, RowScaledTensor)
        return row_scaled_product(left, right, bias, dtype)
    assert not isinstance(right, RowScaledTensor)
    if isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor):
        return plain_product(left, right, bias, dtype)
    return matmul(left, right.T, bias=bias, out_dtype=dtype)


def parts(matrix: Matrix) -> Parts:
    """The tensors to save of a matrix that `made` made, not folded."""
    if isinstance(matrix, torch.Tensor):
        return matrix, None, None
    if isinstance(matrix, RowScaledTensor):
        return matrix.codes, matrix.scale, None
    assert isinstance(matrix, MXTensor)
    return matrix.codes, matrix.scale, matrix.offset


def restored(saved: Sequence[torch.Tensor | None], spec: OperandSpec, rows: int, cols: int) -> Matrix:
    """The inverse of `parts`."""
    codes, scale, offset = saved
    assert codes is not None
    if spec is None:
        return codes
    assert scale is not None
    if isinstance(spec, RowScaled):
        return RowScaledTensor(codes, scale)
    return MXTensor.unchecked(codes, scale, offset, spec, (rows, cols))


def draw(specs: Sequence[OperandSpec], device: torch.device) -> torch.Tensor | None:
    """What `seeds` makes seeds of, from one draw; None if no spec rounds stochastically."""
    if not any(isinstance(spec, MXSpec) and spec.stochastic for spec in specs):
        return None
    return torch.randint(-(2**63), 2**63 - 1, (2 * len(specs),), dtype=torch.int64, device=device)


def seeds(drawn: torch.Tensor | None, specs: Sequence[OperandSpec]) -> list[torch.Tensor | None]:
    """A seed for each spec that rounds stochastically; None for the others."""
    stochastic = [isinstance(spec, MXSpec) and spec.stochastic for spec in specs]
    # Each stands at a multiple of 16 bytes, so that kernels are not compiled for other alignments too.
    return [drawn[2 * i : 2 * i + 1] if drawn is not None and needed else None for i, needed in enumerate(stochastic)]


def draw_signs(product: Product, x: torch.Tensor) -> torch.Tensor | None:
    """Random signs for a product's transform; None if it has none."""
    return random_signs(x, product.hadamard) if product.random_signs else None


def in_one(
    function: Callable[..., Sequence[torch.Tensor | None]],
    tensors: Sequence[torch.Tensor | None],
    recipe: Recipe,
    *settings: Any,
) -> Sequence[Any]:
    """`function(*tensors, recipe, *settings)`, where it can be as one plan of all that it launches: where every
    operand of the recipe is MX, and none is transformed, there is nothing else to do."""
    specs: list[OperandSpec] = []
    if is_eager(*tensors):
        for product in (recipe.forward, recipe.data_gradient, recipe.weight_gradient):
            specs += (None, None) if product.hadamard else (product.left, product.right)
    if not specs or not all(isinstance(spec, MXSpec) for spec in specs):
        return function(*tensors, recipe, *settings)
    key = (function.__name__, *map(str, specs), recipe.keep_weights, *settings)
    return traced(key, tensors, lambda *tensors: function(*tensors, recipe, *settings))

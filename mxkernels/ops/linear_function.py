"""The linear layer's function: three products, each as a recipe says, behind one `autograd.Function`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from ..recipes import OperandSpec, Recipe, recipe_named
from ..tensor import MXTensor
from . import INPUT_DTYPES
from .emulation import emulated_linear
from .layer_operand import (
    NOTHING,
    Matrix,
    Parts,
    Use,
    draw,
    draw_signs,
    folds_at_once,
    in_one,
    made,
    made_both,
    multiplied,
    parts,
    restored,
    seeds,
)
from .operand import as_matrix, in_shape
from .plain import autocast_dtype
from .transform import depend


def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, recipe: Recipe | str = "mxfp4"
) -> torch.Tensor:
    """`torch.nn.functional.linear`, each of whose three products has the operands that a recipe makes of them.

    Of matrices, where Q(x, spec) is `quantize(x, spec).dequantize()`, it equals

        y = Q(x, forward.left) @ Q(weight, forward.right).T + bias
        dx = Q(dy, data_gradient.left) @ Q(weight.T, data_gradient.right).T
        dweight = Q(dy.T, weight_gradient.left) @ Q(x.T, weight_gradient.right).T
        dbias = dy.sum(0)  # in fp32

    so gradients pass straight through forward's rounding.

    Args:
        x: `[..., in]`; weight: `[out, in]`; bias: `[out]`; each bfloat16, float16 or float32.
        recipe: a Recipe, or the name of one in `mxkernels.recipes.RECIPES`.

    Returns:
        `[..., out]` in autocast's dtype, or else x's. A gradient has the dtype of what it is the gradient of.

    Raises:
        TypeError, ValueError: names the argument and what is allowed.

    Backward finds x as the weight gradient takes it, packed, and the weight itself. Random numbers are drawn from
    torch's generator of the device.
    """
    recipe = recipe_named(recipe)
    _check(x, weight, bias)
    dtype = autocast_dtype(x.device.type) or x.dtype
    if recipe.emulate:
        return emulated_linear(x, weight, bias, recipe, dtype)
    given = (x, weight) if bias is None else (x, weight, bias)
    if torch.is_grad_enabled() and any(each.requires_grad for each in given):
        return _Linear.apply(x, weight, bias, recipe, dtype)
    return _forward(x, weight, bias, recipe, dtype, keep_x=False, keep_weight=False)[0]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, recipe: Recipe, dtype: torch.dtype
    ) -> torch.Tensor:
        for_x, for_weight, *_ = ctx.needs_input_grad
        y, kept = _forward(x, weight, bias, recipe, dtype, keep_x=for_weight, keep_weight=for_x)
        ctx.save_for_backward(*kept)
        ctx.recipe = recipe
        ctx.features = tuple(weight.shape)
        ctx.dtypes = (dtype, x.dtype, weight.dtype, None if bias is None else bias.dtype)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        for_x, for_weight, for_bias, *_ = ctx.needs_input_grad
        recipe, features = ctx.recipe, ctx.features
        dtype, x_dtype, weight_dtype, bias_dtype = ctx.dtypes
        saved = ctx.saved_tensors  # once: a checkpoint gives them no second time
        dy = _matrix(gradient)
        drawn = draw(_backward_specs(recipe), dy.device)
        dx = dweight = dbias = None
        if for_x:
            (dx,) = in_one(_data_gradient, (dy, drawn, *saved[4:]), recipe, features, dtype, x_dtype)
            if dy is not gradient:
                dx = dx.view(*gradient.shape[:-1], features[1])
        if for_weight:
            (dweight,) = in_one(_weight_gradient, (dy, drawn, *saved[:4]), recipe, features, dtype, weight_dtype)
        if for_bias:
            dbias = as_matrix(dy).sum(0, dtype=torch.float32).to(bias_dtype)
        return dx, dweight, dbias, None, None


def _matrix(x: torch.Tensor) -> torch.Tensor:
    """x, or the matrix that its leading dimensions flatten to, if they do so by a copy only."""
    return x if x.is_contiguous() else as_matrix(x)


def _forward_specs(recipe: Recipe) -> tuple[OperandSpec, ...]:
    """Of what forward makes: its operands, and those of x and the weight that wait for backward."""
    forward = recipe.forward
    return forward.left, forward.right, recipe.weight_gradient.right, recipe.data_gradient.right


def _backward_specs(recipe: Recipe) -> tuple[OperandSpec, ...]:
    return recipe.data_gradient.left, recipe.data_gradient.right, recipe.weight_gradient.left


def _forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    recipe: Recipe,
    dtype: torch.dtype,
    keep_x: bool,
    keep_weight: bool,
) -> tuple[torch.Tensor, tuple[torch.Tensor | None, ...]]:
    """The output; and, of x and of the weight, the parts and the signs that backward needs, eight in all."""
    # Drawn whatever is kept: a reentrant checkpoint runs without gradients first, and must draw the same again.
    drawn = draw(_forward_specs(recipe), x.device)
    matrix = _matrix(x)
    y, *kept = in_one(_output, (matrix, weight, bias, drawn), recipe, dtype, keep_x, keep_weight)
    assert y is not None
    return y if matrix is x else in_shape(y, *x.shape[:-1], weight.shape[0]), tuple(kept)


def _output(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    drawn: torch.Tensor | None,
    recipe: Recipe,
    dtype: torch.dtype,
    keep_x: bool,
    keep_weight: bool,
) -> Sequence[torch.Tensor | None]:
    """What `_forward` returns, in a row."""
    forward, data_gradient, weight_gradient = recipe.forward, recipe.data_gradient, recipe.weight_gradient
    matrix = as_matrix(x)
    seed = seeds(drawn, _forward_specs(recipe))
    signs = draw_signs(forward, matrix)
    x_signs = draw_signs(weight_gradient, matrix)
    weight_signs = draw_signs(data_gradient, matrix)
    folds = folds_at_once(forward, x.device, matrix.shape[0], weight.shape[0])

    use = Use.of(forward, forward.left, signs, seed[0])
    if keep_x:
        across = Use.of(weight_gradient, weight_gradient.right, x_signs, seed[2])
        left, kept = made_both(matrix, use, across, dtype)
        x_parts = parts(kept)
    else:
        left, x_parts = made(matrix, use, dtype, folds), NOTHING

    use = Use.of(forward, forward.right, signs, seed[1])
    weight_parts: Parts
    if not (keep_weight and recipe.packs_weights):
        right = made(weight, use, dtype, folds)
        weight_parts = (weight, None, None) if keep_weight else NOTHING
    elif recipe.one_packed_weight:
        right = made(weight, use, dtype)
        weight_parts = parts(right)
    else:
        across = Use.of(data_gradient, data_gradient.right, weight_signs, seed[3])
        right, kept = made_both(weight, use, across, dtype)
        weight_parts = parts(kept)

    y = in_shape(multiplied(left, right, bias, dtype), *x.shape[:-1], weight.shape[0])
    depend(y, (x_signs, weight_signs))
    return y, *x_parts, x_signs, *weight_parts, weight_signs


def _data_gradient(
    dy: torch.Tensor,
    drawn: torch.Tensor | None,
    codes: torch.Tensor,
    scale: torch.Tensor | None,
    offset: torch.Tensor | None,
    signs: torch.Tensor | None,
    recipe: Recipe,
    features: tuple[int, int],
    dtype: torch.dtype,
    out_dtype: torch.dtype,
) -> Sequence[torch.Tensor]:
    """dx, from what was kept of the weight."""
    product, matrix, k = recipe.data_gradient, as_matrix(dy), features[1]
    seed = seeds(drawn, _backward_specs(recipe))
    folds = folds_at_once(product, dy.device, matrix.shape[0], k)
    use = Use.of(product, product.right, signs, seed[1])
    right = _weight_for_backward((codes, scale, offset), recipe, features, use, dtype, folds)
    left = made(matrix, Use.of(product, product.left, signs, seed[0]), dtype, folds)
    return (in_shape(multiplied(left, right, None, out_dtype), *dy.shape[:-1], k),)


def _weight_gradient(
    dy: torch.Tensor,
    drawn: torch.Tensor | None,
    codes: torch.Tensor,
    scale: torch.Tensor | None,
    offset: torch.Tensor | None,
    signs: torch.Tensor | None,
    recipe: Recipe,
    features: tuple[int, int],
    dtype: torch.dtype,
    out_dtype: torch.dtype,
) -> Sequence[torch.Tensor]:
    """dweight, from what was kept of x."""
    product, matrix, (n, k) = recipe.weight_gradient, as_matrix(dy), features
    use = Use.of(product, product.left, signs, seeds(drawn, _backward_specs(recipe))[2])
    left = made(matrix.T, use, dtype, folds_at_once(product, dy.device, n, k))
    right = restored((codes, scale, offset), product.right, k, product.length(matrix.shape[0]))
    return (multiplied(left, right, None, out_dtype),)


def _weight_for_backward(
    saved: Sequence[torch.Tensor | None],
    recipe: Recipe,
    features: tuple[int, int],
    use: Use,
    dtype: torch.dtype,
    folds: bool,
) -> Matrix:
    """The right operand of the data gradient's product, `[in, out]`."""
    n, k = features
    if recipe.one_packed_weight:
        packed = restored(saved, recipe.forward.right, n, k)
        assert isinstance(packed, MXTensor)
        return packed.T
    if recipe.packs_weights:
        return restored(saved, use.spec, k, recipe.data_gradient.length(n))
    assert saved[0] is not None
    return made(saved[0].T, use, dtype, folds)


def _check(x: Any, weight: Any, bias: Any) -> None:
    """Raise TypeError or ValueError for what `linear` does not take."""
    for name, each in (("x", x), ("weight", weight), *([] if bias is None else [("bias", bias)])):
        if not isinstance(each, torch.Tensor):
            raise TypeError(f"{name} is a {type(each).__name__}; allowed: a torch.Tensor")
        if each.dtype not in INPUT_DTYPES:
            raise TypeError(f"{name} is {each.dtype}; allowed: {', '.join(map(str, INPUT_DTYPES))}")
        if each.device != x.device:
            raise ValueError(f"{name} is on {each.device} and x on {x.device}; allowed: one device")
    if weight.dim() != 2:
        raise ValueError(f"weight is {list(weight.shape)}; allowed: [out, in]")
    if x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x is {list(x.shape)} and weight {list(weight.shape)}; allowed: [..., in] and [out, in]")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias is {list(bias.shape)}; allowed: [{weight.shape[0]}]")

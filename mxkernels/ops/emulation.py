"""A linear layer as the study emulated it: tensors are quantised, decoded, and multiplied in 16 bits."""

from __future__ import annotations

from typing import Any

import torch

from ..recipes import OperandSpec, Recipe
from .layer_operand import Use, draw, made, seeds
from .operand import as_matrix
from .plain import half_precision


def emulated_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, recipe: Recipe, dtype: torch.dtype
) -> torch.Tensor:
    """`x @ weight.T + bias` with outputs of `dtype`; one copy of x, weight and dy for both products of each."""
    x = _Rounded.apply(x, recipe.forward.left, dtype)
    weight = _Rounded.apply(weight, recipe.forward.right, dtype)
    y = _RoundedGradient.apply(torch.nn.functional.linear(x, weight), recipe.data_gradient.left).to(dtype)
    return y if bias is None else y + bias.to(dtype)


class _Rounded(torch.autograd.Function):
    """A tensor, quantised and decoded to 16 bits; its gradient is that of what it was."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, spec: OperandSpec, dtype: torch.dtype) -> torch.Tensor:
        ctx.dtype = x.dtype
        return _rounded(x, spec, dtype)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return gradient.to(ctx.dtype), None, None


class _RoundedGradient(torch.autograd.Function):
    """A tensor whose gradient is quantised and decoded."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, spec: OperandSpec) -> torch.Tensor:
        ctx.spec = spec
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return _rounded(gradient, ctx.spec, gradient.dtype), None


def _rounded(x: torch.Tensor, spec: OperandSpec, dtype: torch.dtype) -> torch.Tensor:
    (seed,) = seeds(draw([spec], x.device), [spec])
    quantized = made(as_matrix(x), Use(spec, 0, None, seed), dtype)
    decoded = quantized if isinstance(quantized, torch.Tensor) else quantized.dequantize(half_precision(dtype))
    return decoded.view(x.shape)

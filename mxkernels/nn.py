"""Layers that train as a recipe says."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import nn

from .modules import replace_linears
from .ops import linear
from .packed import PackedLinear
from .recipes import Recipe, recipe_named

__all__ = ["MXLinear", "PackedLinear", "convert"]


class MXLinear(nn.Linear):
    """`torch.nn.Linear` whose products have the operands that a recipe makes of them: see `mxkernels.ops.linear`.

    Parameters, their initialisation and the state dict are those of nn.Linear: master weights stay in their dtype.

    Args:
        in_features, out_features, bias, device: as nn.Linear takes them.
        dtype: of the parameters: bfloat16, float16 or float32.
        recipe: a Recipe, or the name of one in `mxkernels.recipes.RECIPES`. `layer.recipe` may be set later.

    Raises:
        TypeError, ValueError: names the argument and what is allowed.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        recipe: Recipe | str = "mxfp4",
    ) -> None:
        found = recipe_named(recipe)
        super().__init__(in_features, out_features, bias, device, dtype)
        self.recipe = found

    @classmethod
    def from_linear(cls, layer: nn.Linear, recipe: Recipe | str = "mxfp4") -> MXLinear:
        """A layer with the very parameters of another, not copies."""
        if not isinstance(layer, nn.Linear):
            raise TypeError(f"layer is a {type(layer).__name__}; allowed: torch.nn.Linear")
        made = cls(layer.in_features, layer.out_features, layer.bias is not None, "meta", recipe=recipe)
        made.weight, made.bias = layer.weight, layer.bias
        return made.train(layer.training)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return linear(input, self.weight, self.bias, recipe=self.recipe)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, recipe={self.recipe}"


def convert(model: nn.Module, recipe: Recipe | str = "mxfp4", skip: str | Collection[str] = ()) -> nn.Module:
    """Replace each nn.Linear of a model, in place, by an MXLinear with the same parameters.

    Args:
        model: any module. Linears that are MXLinear already get the recipe too.
        recipe: a Recipe, or the name of one in `mxkernels.recipes.RECIPES`.
        skip: what to leave alone, by path or pattern: `("lm_head", "layers.0", "*.router")`. See
            `mxkernels.modules.replace_linears`.

    Returns:
        The model; or, if it is itself a linear, what replaces it.

    Raises:
        TypeError, ValueError: names the argument and what is allowed.

    Optimisers that have the parameters keep them. A linear with hooks is an error, since it would lose them.
    """
    found = recipe_named(recipe)
    return replace_linears(model, lambda layer: MXLinear.from_linear(layer, found), skip, (nn.Linear, MXLinear))

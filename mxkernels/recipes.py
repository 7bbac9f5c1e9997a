"""Recipes: what becomes of the operands of a linear layer's three products while it trains. Data, no arithmetic."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from .spec import Block, MXSpec, mxfp4, mxfp6_e2m3, mxfp8_e4m3

HADAMARD_SIZES = (16, 32, 64, 128)


@dataclass(frozen=True)
class RowScaled:
    """FP8 elements, to nearest-even, with one fp32 scale a row: its largest magnitude / the format's. No MX
    format, but the usual FP8 baseline.

    Args:
        element: "e4m3" or "e5m2".
    """

    element: str = "e4m3"

    def __post_init__(self) -> None:
        if self.element not in ("e4m3", "e5m2"):
            raise ValueError(f"element is {self.element!r}; allowed: e4m3, e5m2")

    def __str__(self) -> str:
        return f"{self.element} row-scaled"


# What becomes of an operand; None leaves it in 16 bits: in the output's dtype, or bfloat16 if that is float32.
OperandSpec: TypeAlias = MXSpec | RowScaled | None


@dataclass(frozen=True)
class Product:
    """One matrix product, `left @ right.T`, of matrices whose rows run along the reduction.

    Args:
        left, right: what becomes of the operands. Blocks are those of such matrices, so `1x32` always shares
            scales along the reduction.
        hadamard: 0; or 16, 32, 64 or 128, the size of the block Hadamard transform that both operands pass
            along the reduction before they are quantised (`mxkernels.ops.hadamard`), which leaves the product
            of what was not quantised as it is.
        random_signs: the transform begins with random signs, drawn at each call, the same for both operands.

    Raises:
        TypeError, ValueError: names the argument and what is allowed.
    """

    left: OperandSpec = None
    right: OperandSpec = None
    hadamard: int = 0
    random_signs: bool = False

    def __post_init__(self) -> None:
        for name, operand in (("left", self.left), ("right", self.right)):
            if operand is not None and not isinstance(operand, (MXSpec, RowScaled)):
                raise TypeError(f"{name} is a {type(operand).__name__}; allowed: MXSpec, RowScaled, None")
        if isinstance(self.left, RowScaled) != isinstance(self.right, RowScaled):
            raise ValueError(f"left is {self.left} and right is {self.right}; allowed: RowScaled for both or neither")
        if self.hadamard not in (0, *HADAMARD_SIZES):
            raise ValueError(f"hadamard is {self.hadamard!r}; allowed: 0, {', '.join(map(str, HADAMARD_SIZES))}")
        if self.random_signs and not self.hadamard:
            raise ValueError("random_signs is True, but hadamard is 0; allowed with random signs: a size")

    def length(self, reduction: int) -> int:
        """The columns of its operands: the transform makes whole blocks of a reduction."""
        return (reduction + self.hadamard - 1) // self.hadamard * self.hadamard if self.hadamard else reduction

    def __str__(self) -> str:
        transform = f", hadamard {self.hadamard}{' with random signs' * self.random_signs}" if self.hadamard else ""
        return f"{self.left or '16 bits'} by {self.right or '16 bits'}{transform}"


@dataclass(frozen=True)
class Recipe:
    """How a linear layer `y = x @ w.T` trains, of x `[tokens, in]`, w `[out, in]` and dy `[tokens, out]`.

    Args:
        forward: x @ w.T, of x and w, along `in`.
        data_gradient: dy @ w, of dy and w.T, along `out`.
        weight_gradient: dy.T @ x, of dy.T and x.T, along the tokens.
        keep_weights: keep the packed weight from forward to backward, rather than quantise it twice. It is one
            copy for both where both products take the same of it, as after `replace(weight_block=...)`.
        emulate: the study's emulation. One copy of each tensor (x and w as forward's, dy as the data gradient's),
            decoded to 16 bits, serves both of the tensor's products. In backward blocks then lie across the
            reduction. Slower than a layer in 16 bits.

    Raises:
        TypeError, ValueError: names the argument and what is allowed.

    The named ones are in `RECIPES`; `replace` derives others from them.
    """

    forward: Product = Product()
    data_gradient: Product = Product()
    weight_gradient: Product = Product()
    keep_weights: bool = False
    emulate: bool = False

    def __post_init__(self) -> None:
        for name in ("forward", "data_gradient", "weight_gradient"):
            product = getattr(self, name)
            if not isinstance(product, Product):
                raise TypeError(f"{name} is a {type(product).__name__}; allowed: Product")
            if self.emulate and product.hadamard:
                raise ValueError(f"{name} has a Hadamard transform; allowed with emulate, where one copy serves: none")

    @classmethod
    def of(cls, *, activations: OperandSpec, weights: OperandSpec, gradients: OperandSpec, **fields: Any) -> Recipe:
        """The recipe that has one spec for each kind of tensor, in both of its products. `fields` are Recipe's.

        A spec is that of x, w or dy as it lies. In the other product blocks of one row lie along the reduction
        again, others turn with the tensor.
        """
        return cls(
            Product(activations, weights),
            Product(gradients, _turned(weights)),
            Product(_turned(gradients), _turned(activations)),
            **fields,
        )

    def replace(self, *, weight_block: Block | str | Sequence[int] | None = None, **fields: Any) -> Recipe:
        """A copy with other fields.

        Args:
            weight_block: blocks of the weight `[out, in]` in both of its products, such as "16x16": then both have
                the same weights.
            fields: those of Recipe.

        Raises:
            TypeError, ValueError: as Recipe; or weight_block is given, but weights are not MX.
        """
        recipe = dataclasses.replace(self, **fields)
        if weight_block is None:
            return recipe
        forward = _blocked(recipe.forward.right, weight_block)
        data_gradient = _blocked(recipe.data_gradient.right, weight_block)
        return dataclasses.replace(
            recipe,
            forward=dataclasses.replace(recipe.forward, right=forward),
            data_gradient=dataclasses.replace(recipe.data_gradient, right=data_gradient.T),
        )

    @property
    def packs_weights(self) -> bool:
        """Whether backward gets the weight as its product takes it, and not the weight itself."""
        return self.keep_weights and self.data_gradient.right is not None

    @property
    def one_packed_weight(self) -> bool:
        """Whether that is what forward's product takes, transposed."""
        right = self.data_gradient.right
        same = isinstance(right, MXSpec) and right.T == self.forward.right
        return self.packs_weights and same and not (self.forward.hadamard or self.data_gradient.hadamard)

    @property
    def name(self) -> str | None:
        """That in RECIPES; None for others."""
        return next((name for name, recipe in RECIPES.items() if recipe == self), None)

    def __str__(self) -> str:
        if self.name:
            return self.name
        fields = [f"{field.name}: {getattr(self, field.name)}" for field in dataclasses.fields(self)]
        return "; ".join(field for field in fields if not field.endswith(": False"))


def _turned(spec: OperandSpec) -> OperandSpec:
    """That of the transposed tensor, for a product along the other dimension."""
    return spec.T if isinstance(spec, MXSpec) and spec.block.rows > 1 else spec


def _blocked(spec: OperandSpec, block: Block | str | Sequence[int]) -> MXSpec:
    if not isinstance(spec, MXSpec):
        raise ValueError(f"weight_block is {block}, but weights are {spec or '16 bits'}; allowed without blocks: None")
    return MXSpec(spec.element, block, spec.rounding, spec.scale_rounding, spec.symmetric)


def _stochastic(spec: MXSpec) -> MXSpec:
    return dataclasses.replace(spec, rounding="stochastic")


_e2m1_ceil = MXSpec("e2m1", scale_rounding="ceil")
_e3m0_ceil = MXSpec("e3m0", scale_rounding="ceil")

RECIPES: dict[str, Recipe] = {
    "mxfp4": Recipe.of(activations=mxfp4, weights=mxfp4, gradients=_stochastic(mxfp4)),
    "mxfp4_e3m0": Recipe.of(activations=_e2m1_ceil, weights=_e2m1_ceil, gradients=_stochastic(_e3m0_ceil)),
    "mxfp6_mxfp4": Recipe.of(activations=mxfp6_e2m3, weights=mxfp6_e2m3, gradients=_stochastic(mxfp4)),
    "mxfp8": Recipe.of(activations=mxfp8_e4m3, weights=mxfp8_e4m3, gradients=mxfp8_e4m3),
    "fp8": Recipe.of(activations=RowScaled(), weights=RowScaled(), gradients=RowScaled()),
    "bf16": Recipe(),
}


def recipe_named(recipe: Recipe | str) -> Recipe:
    """A recipe, or the one in RECIPES of that name.

    Raises:
        TypeError, ValueError: names what is allowed.
    """
    if isinstance(recipe, Recipe):
        return recipe
    if not isinstance(recipe, str):
        raise TypeError(f"recipe is a {type(recipe).__name__}; allowed: a Recipe, or {', '.join(RECIPES)}")
    if recipe not in RECIPES:
        raise ValueError(f"recipe is {recipe!r}; allowed: a Recipe, or {', '.join(RECIPES)}")
    return RECIPES[recipe]

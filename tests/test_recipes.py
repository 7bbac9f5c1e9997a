"""Recipes: that the named ones are the study's, and that others are derived, or refused with a sentence."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace

import pytest

import mxkernels as mx
from mxkernels import MXSpec
from mxkernels.recipes import RECIPES, Product, Recipe, RowScaled, recipe_named

# Of each named recipe, what the study and the field say it is: activations, weights, gradients.
NAMED = {
    "mxfp4": ("e2m1 1x32 rtne even", "e2m1 1x32 rtne even", "e2m1 1x32 stochastic even"),
    "mxfp4_e3m0": ("e2m1 1x32 rtne ceil", "e2m1 1x32 rtne ceil", "e3m0 1x32 stochastic ceil"),
    "mxfp6_mxfp4": ("e2m3 1x32 rtne even", "e2m3 1x32 rtne even", "e2m1 1x32 stochastic even"),
    "mxfp8": ("e4m3 1x32 rtne rceil",) * 3,
}


@pytest.mark.parametrize("name", NAMED)
def test_named_recipes(name: str) -> None:
    activations, weights, gradients = (MXSpec.parse(f"{text} symmetric") for text in NAMED[name])
    recipe = RECIPES[name]
    assert recipe.forward == Product(activations, weights)
    assert recipe.data_gradient == Product(gradients, weights)
    assert recipe.weight_gradient == Product(gradients, activations)
    assert (recipe.keep_weights, recipe.emulate) == (False, False)


def test_the_baselines() -> None:
    assert list(RECIPES) == [*NAMED, "fp8", "bf16"]
    for product in (RECIPES["fp8"].forward, RECIPES["fp8"].data_gradient, RECIPES["fp8"].weight_gradient):
        assert product == Product(RowScaled("e4m3"), RowScaled("e4m3"))
    assert RECIPES["bf16"] == Recipe(Product(None, None), Product(None, None), Product(None, None))


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("block", ["16x16", (32, 32), mx.Block(4, 8)], ids=str)
def test_weight_blocks(name: str, block: object) -> None:
    """The weight has those blocks in both of its products, which then share it; nothing else changes."""
    before = RECIPES[name]
    recipe = before.replace(weight_block=block, keep_weights=True)
    assert recipe.forward.right == MXSpec(
        before.forward.right.element, block, "rtne", before.forward.right.scale_rounding
    )
    assert recipe.data_gradient.right == recipe.forward.right.T
    assert recipe.one_packed_weight
    assert (recipe.forward.left, recipe.data_gradient.left) == (before.forward.left, before.data_gradient.left)
    assert recipe.weight_gradient == before.weight_gradient
    assert not before.replace(keep_weights=True).one_packed_weight
    transform = replace(recipe.data_gradient, hadamard=16)
    assert not recipe.replace(data_gradient=transform).one_packed_weight


def test_one_spec_a_tensor() -> None:
    """Blocks of one row lie along every product's reduction; others turn with the tensor."""
    recipe = Recipe.of(
        activations=MXSpec("e2m1", "4x8"), weights=MXSpec("e2m1", "2x4"), gradients=MXSpec("e2m1", "1x16")
    )
    blocks = [
        (str(product.left.block), str(product.right.block))
        for product in (recipe.forward, recipe.data_gradient, recipe.weight_gradient)
    ]
    assert blocks == [("4x8", "2x4"), ("1x16", "4x2"), ("1x16", "8x4")]


def test_names() -> None:
    for name, recipe in RECIPES.items():
        assert recipe_named(name) is recipe_named(recipe) is recipe
        assert recipe.name == str(recipe) == name
        assert hash(recipe.replace()) == hash(recipe)
    derived = RECIPES["mxfp4"].replace(emulate=True)
    assert derived.name is None
    assert str(derived) == (
        "forward: e2m1 1x32 rtne even symmetric by e2m1 1x32 rtne even symmetric; "
        "data_gradient: e2m1 1x32 stochastic even symmetric by e2m1 1x32 rtne even symmetric; "
        "weight_gradient: e2m1 1x32 stochastic even symmetric by e2m1 1x32 rtne even symmetric; emulate: True"
    )
    assert (
        str(Product(None, mx.mxfp4, 16, True))
        == "16 bits by e2m1 1x32 rtne even symmetric, hadamard 16 with random signs"
    )
    with pytest.raises(FrozenInstanceError):
        derived.emulate = False


def test_errors_name_the_argument() -> None:
    for make, message in (
        (
            lambda: recipe_named("mxfp5"),
            "recipe is 'mxfp5'; allowed: a Recipe, or mxfp4, mxfp4_e3m0, mxfp6_mxfp4, mxfp8",
        ),
        (lambda: Product(hadamard=8), "hadamard is 8; allowed: 0, 16, 32, 64, 128"),
        (lambda: Product(random_signs=True), "random_signs is True, but hadamard is 0"),
        (lambda: Product(RowScaled(), mx.mxfp8_e4m3), "left is e4m3 row-scaled and right is e4m3 1x32"),
        (lambda: RowScaled("e3m4"), "element is 'e3m4'; allowed: e4m3, e5m2"),
        (lambda: Recipe(Product(mx.mxfp4, mx.mxfp4, 16), emulate=True), "forward has a Hadamard transform"),
        (
            lambda: RECIPES["fp8"].replace(weight_block="16x16"),
            "weight_block is 16x16, but weights are e4m3 row-scaled",
        ),
        (lambda: RECIPES["bf16"].replace(weight_block="16x16"), "weight_block is 16x16, but weights are 16 bits"),
        (lambda: RECIPES["mxfp4"].replace(weight_block="16"), "block '16': write rows x columns"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    for make, message in (
        (lambda: recipe_named(4), "recipe is a int; allowed: a Recipe, or mxfp4"),
        (lambda: Product("mxfp4"), "left is a str; allowed: MXSpec, RowScaled, None"),
        (lambda: Recipe(mx.mxfp4), "forward is a MXSpec; allowed: Product"),
    ):
        with pytest.raises(TypeError, match=message):
            make()

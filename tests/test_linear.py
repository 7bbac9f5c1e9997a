"""The layer's function against autograd through the reference, product by product; and what it keeps and draws."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import mxkernels as mx
from mxkernels import MXSpec, reference
from mxkernels.ops import layer_operand, linear, linear_function
from mxkernels.recipes import RECIPES, OperandSpec, Product, Recipe

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
MX_RECIPES = [name for name, recipe in RECIPES.items() if isinstance(recipe.forward.left, MXSpec)]
STOCHASTIC = MXSpec("e2m1", rounding="stochastic")

# One draw a product and operand, none the same; e2m3 makes all three products differ in every operand.
EVERYWHERE = Recipe(
    Product(STOCHASTIC, MXSpec("e2m3", rounding="stochastic")),
    Product(MXSpec("e3m2", rounding="stochastic"), MXSpec("e2m1", (1, 16), "stochastic")),
    Product(MXSpec("e4m3", (1, 16), "stochastic"), MXSpec("int4", rounding="stochastic")),
)
VARIANTS: dict[str, Recipe] = {
    **{name: RECIPES[name] for name in MX_RECIPES},
    "16 bits": RECIPES["bf16"],
    "weight block": RECIPES["mxfp4"].replace(weight_block="16x16"),
    "kept weight block": RECIPES["mxfp4"].replace(weight_block="16x16", keep_weights=True),
    "kept block of other sides": RECIPES["mxfp4"].replace(weight_block="8x32", keep_weights=True),
    "kept weights": RECIPES["mxfp4"].replace(keep_weights=True),
    "kept weights, other spec": EVERYWHERE.replace(keep_weights=True),
    "kept weights in 16 bits": RECIPES["bf16"].replace(keep_weights=True),
    "stochastic everywhere": EVERYWHERE,
    "asymmetric": Recipe.of(
        activations=MXSpec("int4", symmetric=False),
        weights=mx.mxint4,
        gradients=MXSpec("int4", (4, 8), symmetric=False),
    ),
    "some in 16 bits": Recipe(Product(mx.mxfp4, None), Product(None, mx.mxfp8_e4m3), Product()),
    "hadamard": Recipe(
        Product(mx.mxfp4, mx.mxfp4, hadamard=16),
        Product(STOCHASTIC, mx.mxfp4, hadamard=32, random_signs=True),
        Product(STOCHASTIC, mx.mxfp4, hadamard=64, random_signs=True),
    ),
    "hadamard, kept weights": RECIPES["mxfp4"].replace(
        data_gradient=Product(STOCHASTIC, mx.mxfp4, hadamard=16, random_signs=True), keep_weights=True
    ),
}


def ordinary(*shape: int, dtype: torch.dtype = FP32, seed: int = 3) -> torch.Tensor:
    """Values with a scale of their own for each row, so that blocks along the wrong dimension are seen."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.randint(-6, 6, (*shape[:-1], 1), generator=generator)
    return (torch.randn(shape, generator=generator) * 2.0**spread).to(dtype)


class Draws:
    """What the function drew: seeds as consecutive integers, signs as asked for first, second …"""

    def __init__(self) -> None:
        self.seeds: list[list[torch.Tensor | None]] = []
        self.signs: list[torch.Tensor | None] = []

    def draw(self, specs: Any, device: torch.device) -> torch.Tensor:
        first = 100 * len(self.seeds)
        drawn = torch.arange(first, first + len(specs)).repeat_interleave(2)
        self.seeds.append(layer_operand.seeds(drawn, specs))
        return drawn

    def draw_signs(self, product: Product, x: torch.Tensor) -> torch.Tensor | None:
        generator = torch.Generator().manual_seed(len(self.signs))
        signs = torch.randint(-1, 1, (product.hadamard,), dtype=torch.int8, generator=generator)
        self.signs.append(signs if product.random_signs else None)
        return self.signs[-1]


@pytest.fixture
def draws(monkeypatch: pytest.MonkeyPatch) -> Draws:
    found = Draws()
    monkeypatch.setattr(linear_function, "draw", found.draw)
    monkeypatch.setattr(linear_function, "draw_signs", found.draw_signs)
    return found


def operand(
    x: torch.Tensor,
    product: Product,
    spec: OperandSpec,
    seed: torch.Tensor | None,
    signs: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """What a product has of a matrix, decoded to fp32, by the reference alone."""
    if product.hadamard:
        x = reference.hadamard(x, product.hadamard, signs)
    if spec is None:
        return x.to(BF16 if dtype == FP32 else dtype).float()
    assert isinstance(spec, MXSpec)
    parts = reference.quantize(x, spec, None if seed is None else int(seed))
    return reference.dequantize(*parts, spec, x.shape[1], FP32)


def expected(
    recipe: Recipe,
    x: torch.Tensor,
    w: torch.Tensor,
    b: torch.Tensor,
    dy: torch.Tensor,
    draws: Draws,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """y, dx, dw and db of matrices, each of three products for itself."""
    forward, data, weight = recipe.forward, recipe.data_gradient, recipe.weight_gradient
    (x_seed, w_seed, xt_seed, wt_seed), (dy_seed, late_wt_seed, dyt_seed) = draws.seeds
    signs, weight_signs, data_signs = draws.signs
    if forward.left == weight.right and not (forward.hadamard or weight.hadamard):
        xt_seed = x_seed  # quantize_pair
    if not recipe.keep_weights:
        wt_seed = late_wt_seed
    elif forward.right == data.right and not (forward.hadamard or data.hadamard):
        wt_seed = w_seed
    y = reference.matmul(
        operand(x, forward, forward.left, x_seed, signs, dtype),
        operand(w, forward, forward.right, w_seed, signs, dtype).T,
        b,
        dtype,
    )
    dx = reference.matmul(
        operand(dy, data, data.left, dy_seed, data_signs, dtype),
        operand(w.T, data, data.right, wt_seed, data_signs, dtype).T,
        None,
        x.dtype,
    )
    dw = reference.matmul(
        operand(dy.T, weight, weight.left, dyt_seed, weight_signs, dtype),
        operand(x.T, weight, weight.right, xt_seed, weight_signs, dtype).T,
        None,
        w.dtype,
    )
    return y, dx, dw, dy.sum(0, dtype=FP32).to(b.dtype)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("dtypes", [(FP32, FP32), (BF16, FP32), (FP16, BF16)], ids=str)
def test_three_products(name: str, dtypes: tuple[torch.dtype, torch.dtype], draws: Draws) -> None:
    """Output and gradients are, to the bit, products of what the reference decodes: each of its own operands, in
    blocks along its own reduction."""
    recipe = VARIANTS[name]
    x_dtype, w_dtype = dtypes
    x = ordinary(2, 25, 72, dtype=x_dtype).requires_grad_()
    w = ordinary(40, 72, dtype=w_dtype, seed=4).requires_grad_()
    b = ordinary(40, dtype=w_dtype, seed=5).requires_grad_()
    y = linear(x, w, b, recipe=recipe)
    dy = ordinary(2, 25, 40, dtype=x_dtype, seed=6)
    y.backward(dy)
    with torch.no_grad():
        want = expected(recipe, x.flatten(0, 1), w, b, dy.flatten(0, 1), draws, x_dtype)
    found = (y, x.grad, w.grad, b.grad)
    for one, other in zip(found, want, strict=True):
        assert one is not None
        assert one.dtype == other.dtype
        assert torch.equal(one.detach(), other.view(one.shape))
    assert (y.shape, x.grad.shape) == ((2, 25, 40), x.shape)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_row_scaled_baseline(dtype: torch.dtype) -> None:
    """The FP8 baseline: elements and scales as its definition has them, in float64."""
    x = ordinary(50, 72, dtype=dtype).requires_grad_()
    w = ordinary(40, 72, seed=4).requires_grad_()
    b = ordinary(40, seed=5)
    y = linear(x, w, b, recipe="fp8")
    dy = ordinary(50, 40, dtype=dtype, seed=6)
    y.backward(dy)

    def decode(a: torch.Tensor) -> torch.Tensor:
        scale = a.detach().float().abs().amax(1, keepdim=True) * (1 / 448)
        return (a.detach().float() / scale).to(torch.float8_e4m3fn).double() * scale.double()

    products = ((y, x, w, b), (x.grad, dy, w.T, torch.zeros(72)), (w.grad, dy.T, x.T, torch.zeros(72)))
    for found, left, right, bias in products:
        exact = decode(left) @ decode(right).T
        # The sum is rounded to fp32, then multiplied by two scales and added to the bias: four roundings; then one
        # to the output's dtype.
        bound = 4 * 2.0**-24 * (exact.abs() + bias.abs()) + torch.finfo(found.dtype).eps / 2 * (exact + bias).abs()
        assert ((found.double() - exact - bias).abs() <= 1.001 * bound).all()


def test_row_scaled_corner_cases() -> None:
    """A row of zeros gives zeros, a row with Inf or NaN gives NaN and spoils no other, no rows give none."""
    x, w = torch.full((4, 32), 448.0), torch.full((16, 32), 448.0)
    x[0] = 0
    x[1, 3] = torch.inf
    x[2, 3] = torch.nan
    y = linear(x, w, recipe="fp8")
    assert (y[0] == 0).all()
    assert y[1:3].isnan().all()
    assert (y[3] == 32 * 448 * 448).all()
    tiny = torch.full((1, 32), 1e-44)
    assert torch.isfinite(linear(tiny, torch.ones(16, 32), recipe="fp8")).all()
    w = torch.ones(16, 32, requires_grad=True)
    linear(torch.ones(0, 32), w, recipe="fp8").sum().backward()
    assert (w.grad == 0).all()


@pytest.mark.parametrize("name", ["mxfp4", "mxfp8", "fp8", "bf16"])
def test_the_emulation(name: str) -> None:
    """One copy of each tensor, decoded to bf16, in ordinary products of bf16."""
    recipe = RECIPES[name].replace(emulate=True)
    recipe = replace(recipe, data_gradient=replace(recipe.data_gradient, left=recipe.forward.left))  # nothing to draw
    x = ordinary(50, 72, dtype=BF16).requires_grad_()
    w = ordinary(40, 72, seed=4).requires_grad_()
    b = ordinary(40, seed=5).requires_grad_()
    y = linear(x, w, b, recipe=recipe)
    dy = ordinary(50, 40, dtype=BF16, seed=6)
    y.backward(dy)

    def decode(a: torch.Tensor) -> torch.Tensor:
        spec = recipe.forward.left
        if isinstance(spec, MXSpec):
            return mx.quantize(a, spec).dequantize(BF16)
        return a.detach().to(BF16) if spec is None else layer_operand.row_scaled(a.detach(), spec).dequantize(BF16)

    assert torch.equal(y, torch.nn.functional.linear(decode(x), decode(w)) + b.to(BF16))
    assert torch.equal(x.grad, decode(dy) @ decode(w))
    assert torch.equal(w.grad, (decode(dy).T @ decode(x)).float())
    assert torch.equal(b.grad, dy.sum(0).float())


def test_the_emulation_draws_gradients_once() -> None:
    """Both products of dy have the same stochastic copy: their results agree on what dy was."""
    recipe = RECIPES["mxfp4"].replace(emulate=True)
    x, w = torch.eye(32, dtype=BF16, requires_grad=True), torch.eye(32, dtype=BF16, requires_grad=True)
    linear(x, w, recipe=recipe).backward(ordinary(32, 32, dtype=BF16))
    assert torch.equal(x.grad, w.grad.T)


# --- what it keeps and computes ----------------------------------------------------------------------------


@contextmanager
def saved_tensors() -> Iterator[list[torch.Tensor]]:
    """What is saved for backward meanwhile."""
    saved: list[torch.Tensor] = []

    def pack(x: torch.Tensor) -> torch.Tensor:
        saved.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        yield saved


def kept_bytes(recipe: Recipe | str, x: torch.Tensor, *parameters: torch.Tensor) -> int:
    """Bytes saved for backward, parameters aside: they are there anyway."""
    with saved_tensors() as saved:
        linear(x, *parameters, recipe=recipe)
    owned = {parameter.data_ptr() for parameter in parameters}
    return sum(each.nbytes for each in saved if each.data_ptr() not in owned)


def test_memory_kept_for_backward() -> None:
    """4.25 bits an element of x, and no copy of the weight unless it is to be kept."""
    x = ordinary(512, 256, dtype=BF16).requires_grad_()
    w = ordinary(128, 256, dtype=BF16).requires_grad_()
    assert kept_bytes("bf16", x, w) == x.nbytes
    assert kept_bytes("mxfp4", x, w) == x.numel() * 17 // 32
    assert kept_bytes("mxfp4", x, w) <= 0.27 * kept_bytes("bf16", x, w)
    assert kept_bytes("fp8", x, w) == x.numel() + 4 * 256
    kept = kept_bytes(RECIPES["mxfp4"].replace(keep_weights=True), x, w)
    assert kept == (x.numel() + w.numel()) * 17 // 32
    block = RECIPES["mxfp4"].replace(keep_weights=True, weight_block="16x16")
    assert kept_bytes(block, x, w) == x.numel() * 17 // 32 + w.numel() // 2 + w.numel() // 256


@pytest.mark.parametrize("name", ["mxfp4", "fp8", "bf16"])
def test_only_what_is_asked_for(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Frozen weights, inputs that need no gradient, and no_grad: neither products nor memory for what nobody wants."""
    products: list[None] = []

    def counted(*arguments: Any) -> torch.Tensor:
        products.append(None)
        return layer_operand.multiplied(*arguments)

    monkeypatch.setattr(linear_function, "multiplied", counted)
    for for_x in (False, True):
        for for_w in (False, True):
            for for_b in (False, True):
                x = ordinary(64, 32).requires_grad_(for_x)
                w = ordinary(32, 32).requires_grad_(for_w)
                b = ordinary(32).requires_grad_(for_b)
                with saved_tensors() as saved:
                    y = linear(x, w, b, recipe=name)
                assert any(each is w or each.data_ptr() == w.data_ptr() for each in saved) == for_x
                assert bool(sum(each.data_ptr() != w.data_ptr() for each in saved)) == for_w
                products.clear()
                assert y.requires_grad == (for_x or for_w or for_b)
                if y.requires_grad:
                    y.sum().backward()
                assert len(products) == for_x + for_w
                assert [each.grad is not None for each in (x, w, b)] == [for_x, for_w, for_b]
    x, w = ordinary(64, 32).requires_grad_(), ordinary(32, 32).requires_grad_()
    with saved_tensors() as saved, torch.no_grad():
        quiet = linear(x, w, recipe=name)
    assert not saved
    assert not quiet.requires_grad
    assert torch.equal(quiet, linear(x, w, recipe=name))


@pytest.mark.parametrize("name", ["mxfp4", "fp8", "bf16"])
@pytest.mark.parametrize("emulate", [False, True])
@pytest.mark.parametrize("shape", [(32,), (1, 32), (0, 32), (2, 0, 32), (2, 3, 5, 32)], ids=str)
def test_leading_dimensions(name: str, emulate: bool, shape: tuple[int, ...]) -> None:
    """Those of nn.Linear; the result is that of the matrix of all rows."""
    recipe = RECIPES[name].replace(emulate=emulate)
    w, b = ordinary(48, 32).requires_grad_(), ordinary(48).requires_grad_()
    x = ordinary(*shape).requires_grad_()
    y = linear(x, w, b, recipe=recipe)
    assert y.shape == torch.nn.functional.linear(x, w, b).shape
    assert torch.equal(y.flatten(), linear(x.reshape(-1, 32), w, b, recipe=recipe).flatten())
    y.sum().backward()  # dy is one element, expanded
    assert (x.grad.shape, w.grad.shape, b.grad.shape) == (x.shape, w.shape, b.shape)


def test_any_strides() -> None:
    w = ordinary(48, 32).T.contiguous().T
    x = ordinary(32, 7, 5).permute(2, 1, 0)
    assert torch.equal(linear(x, w), linear(x.contiguous(), w.contiguous()))


def test_double_use_and_accumulation(draws: Draws) -> None:
    """Gradients of two uses of one weight add up, within a graph and across backwards."""
    recipe = RECIPES["mxfp8"]
    a, b = ordinary(32, 32).requires_grad_(), ordinary(32, 32, seed=5)
    w = ordinary(32, 32, seed=6).requires_grad_()

    def gradient(*inputs: torch.Tensor) -> torch.Tensor:
        w.grad = None
        sum(linear(x, w, recipe=recipe).square().sum() for x in inputs).backward()
        assert w.grad is not None
        return w.grad

    apart = gradient(a) + gradient(b)
    assert torch.equal(gradient(a, b), apart)
    gradient(a)
    linear(b, w, recipe=recipe).square().sum().backward()
    assert torch.equal(w.grad, apart)
    y = linear(linear(a, w, recipe=recipe), w, recipe=recipe)
    y.sum().backward()
    assert a.grad is not None


def test_no_second_derivative() -> None:
    x, w = ordinary(32, 32).requires_grad_(), ordinary(32, 32).requires_grad_()
    (gradient,) = torch.autograd.grad(linear(x, w).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


# --- dtypes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("name", ["mxfp4", "fp8", "bf16"])
def test_autocast_says_the_output(name: str, dtype: torch.dtype) -> None:
    """Within autocast the output is its dtype, and master parameters are quantised as they are."""
    x, w = ordinary(64, 32).requires_grad_(), ordinary(32, 32, seed=4).requires_grad_()
    with torch.autocast("cpu", dtype):
        y = linear(x, w, recipe=name)
        assert linear(x.to(BF16), w, recipe=name).dtype == dtype
    assert y.dtype == dtype
    if name == "mxfp4":
        assert torch.equal(y, linear(x, w, recipe=name).to(dtype))
    y.sum().backward()
    assert x.grad.dtype == w.grad.dtype == FP32


# --- random numbers ----------------------------------------------------------------------------------------


def gradients(recipe: Recipe | str, seed: int, through: Any = None) -> tuple[torch.Tensor, ...]:
    """Output and gradients of two layers after torch.manual_seed."""
    x = ordinary(64, 32, dtype=BF16).requires_grad_()
    w, v = ordinary(32, 32, seed=4).requires_grad_(), ordinary(32, 32, seed=5).requires_grad_()

    def block(x: torch.Tensor) -> torch.Tensor:
        return linear(torch.relu(linear(x, w, recipe=recipe)), v, recipe=recipe)

    torch.manual_seed(seed)
    y = block(x) if through is None else through(block, x)
    y.backward(ordinary(64, 32, dtype=BF16, seed=6))
    return y.detach(), x.grad, w.grad, v.grad


def all_equal(left: tuple[torch.Tensor, ...], right: tuple[torch.Tensor, ...]) -> bool:
    return all(map(torch.equal, left, right))


def test_manual_seed_repeats() -> None:
    for recipe in ("mxfp4", EVERYWHERE, VARIANTS["hadamard"]):
        assert all_equal(gradients(recipe, 1), gradients(recipe, 1))
        assert not all_equal(gradients(recipe, 1), gradients(recipe, 2))


def test_forward_draws_only_for_stochastic_operands() -> None:
    """Evaluating a model does not move the random numbers of its training."""
    x, w = ordinary(64, 32), ordinary(32, 32).requires_grad_()
    before = torch.get_rng_state()
    linear(x, w, recipe="mxfp4")
    assert torch.equal(torch.get_rng_state(), before)


def test_products_of_a_gradient_draw_apart() -> None:
    """dx and dw round dy independently, and without bias: the means of many draws agree, single ones do not."""
    spec = MXSpec("e2m1", (1, 32), "stochastic", "ceil")
    recipe = Recipe(Product(), Product(spec, None), Product(spec, None))
    dy = torch.full((32, 32), 4.0)
    dy[1:, 1:] = 1.25  # between 1 and 1.5, in blocks that 4 scales, along rows and columns alike
    x, w = torch.eye(32, requires_grad=True), torch.eye(32, requires_grad=True)
    linear(x, w, recipe=recipe).backward(dy)
    rounded = [each[1:, 1:] for each in (x.grad, w.grad.T)]
    assert all(set(each.flatten().tolist()) == {1.0, 1.5} for each in rounded)
    agree = (rounded[0] == rounded[1]).double().mean()
    # of 961 elements; independent draws agree with probability 1/2: five standard deviations
    assert abs(agree - 0.5) < 5 * 0.5 / 961**0.5


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("recipe", ["mxfp4", EVERYWHERE, VARIANTS["hadamard"]], ids=["mxfp4", "everywhere", "hadamard"])
def test_checkpoints_recompute_the_same_bits(recipe: Recipe | str, use_reentrant: bool) -> None:
    """Activation checkpointing changes no bit, though the recomputation draws again."""
    through = partial(checkpoint, use_reentrant=use_reentrant)
    assert all_equal(gradients(recipe, 1, through), gradients(recipe, 1))


# --- errors ------------------------------------------------------------------------------------------------


def test_errors_name_the_argument() -> None:
    x, w = torch.ones(4, 32), torch.ones(16, 32)
    for arguments, message in (
        ((x.numpy(), w), "x is a ndarray; allowed: a torch.Tensor"),
        ((x.int(), w), "x is torch.int32; allowed: torch.bfloat16"),
        ((x, w.double()), "weight is torch.float64; allowed"),
        ((x, w, torch.ones(16).long()), "bias is torch.int64; allowed"),
    ):
        with pytest.raises(TypeError, match=message):
            linear(*arguments)
    for arguments, message in (
        ((torch.ones(4, 16), w), r"x is \[4, 16\] and weight \[16, 32\]; allowed: \[..., in\] and \[out, in\]"),
        ((torch.ones(()), w), r"x is \[\]"),
        ((x, torch.ones(32)), r"weight is \[32\]; allowed: \[out, in\]"),
        ((x, w, torch.ones(8)), r"bias is \[8\]; allowed: \[16\]"),
        ((x.to("meta"), w), "weight is on cpu and x on meta; allowed: one device"),
    ):
        with pytest.raises(ValueError, match=message):
            linear(*arguments)
    with pytest.raises(ValueError, match=r"recipe is 'fp4'; allowed: a Recipe, or mxfp4, mxfp4_e3m0"):
        linear(x, w, recipe="fp4")

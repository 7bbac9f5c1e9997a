"""MXLinear and convert: nn.Linear in all but its products; under the compiler, and in a training loop."""

from __future__ import annotations

import copy
import io
import shutil
from typing import Any

import pytest
import torch
from torch import nn

import mxkernels as mx
from mxkernels.nn import MXLinear
from mxkernels.ops import linear
from mxkernels.recipes import RECIPES, Product, Recipe

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
each_recipe = pytest.mark.parametrize("name", RECIPES)


def ordinary(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 3) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


class Model(nn.Module):
    """Two blocks and a head; one linear stands in two places, and one has its weight from an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(48, 32)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32)) for _ in range(2))
        self.again = self.layers[0][0]
        self.lm_head = nn.Linear(32, 48, bias=False)
        self.lm_head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = x + layer(x)
        return self.lm_head(x)


# --- the module --------------------------------------------------------------------------------------------


@each_recipe
def test_a_linear_with_a_recipe(name: str) -> None:
    """The same parameters from the same seed, the same state dict, and the function's result."""
    torch.manual_seed(1)
    plain = nn.Linear(32, 48)
    torch.manual_seed(1)
    layer = MXLinear(32, 48, recipe=name)
    assert layer.state_dict().keys() == plain.state_dict().keys()
    assert all(torch.equal(layer.state_dict()[key], value) for key, value in plain.state_dict().items())
    x = ordinary(4, 32)
    assert torch.equal(layer(x), linear(x, layer.weight, layer.bias, recipe=name))
    plain.load_state_dict(layer.state_dict())
    layer.load_state_dict(plain.state_dict())
    assert repr(layer) == f"MXLinear(in_features=32, out_features=48, bias=True, recipe={name})"


def test_parameters_as_in_linear() -> None:
    layer = MXLinear(32, 48, False, "meta", torch.bfloat16, recipe=RECIPES["mxfp8"])
    assert (layer.bias, layer.weight.dtype, layer.weight.device.type) == (None, torch.bfloat16, "meta")
    layer.recipe = RECIPES["mxfp4"]
    layer = MXLinear(32, 48)
    assert layer.recipe is RECIPES["mxfp4"]
    for copied in (copy.deepcopy(layer), saved_and_loaded(layer)):
        assert copied.recipe == layer.recipe
        assert torch.equal(copied(ordinary(4, 32)), layer(ordinary(4, 32)))


@each_recipe
def test_shapes_without_data(name: str) -> None:
    """On the meta device, with gradients."""
    layer, x = MXLinear(32, 48, device="meta", recipe=name), torch.ones(4, 32, device="meta", requires_grad=True)
    y = layer(x)
    y.backward(torch.ones_like(y))
    assert (y.shape, x.grad.shape, layer.weight.grad.shape) == ((4, 48), (4, 32), (48, 32))


def saved_and_loaded(module: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_from_linear_shares_parameters() -> None:
    plain = nn.Linear(32, 48).requires_grad_(False).eval()
    layer = MXLinear.from_linear(plain, "mxfp8")
    assert layer.weight is plain.weight
    assert layer.bias is plain.bias
    assert (layer.recipe, layer.training) == (RECIPES["mxfp8"], False)
    assert MXLinear.from_linear(nn.Linear(32, 48, bias=False)).bias is None


def test_errors_name_the_argument() -> None:
    with pytest.raises(ValueError, match="recipe is 'fp4'; allowed: a Recipe, or mxfp4"):
        MXLinear(32, 48, recipe="fp4")
    with pytest.raises(TypeError, match="recipe is a dict"):
        mx.convert(nn.Linear(32, 48), {})
    with pytest.raises(TypeError, match=r"layer is a Conv2d; allowed: torch\.nn\.Linear"):
        MXLinear.from_linear(nn.Conv2d(1, 1, 1))
    with pytest.raises(TypeError, match=r"weight is torch\.float64; allowed: torch\.bfloat16"):
        MXLinear(32, 48, dtype=torch.float64)(ordinary(4, 32))


# --- convert -----------------------------------------------------------------------------------------------


def test_convert() -> None:
    """Every linear but those skipped, with the same parameters in the same order; the shared one stays shared."""
    model = Model()
    before, keys = list(model.parameters()), list(model.state_dict())
    assert mx.convert(model, "mxfp4", skip=("lm_head", "layers.1.*")) is model
    kinds = {path: type(module) for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert kinds == {
        "layers.0.0": MXLinear, "layers.0.2": MXLinear, "layers.1.0": nn.Linear, "layers.1.2": nn.Linear,
        "lm_head": nn.Linear,
    }  # fmt: skip
    assert model.again is model.layers[0][0]
    assert all(one is other for one, other in zip(model.parameters(), before, strict=True))
    assert list(model.state_dict()) == keys
    mx.convert(model, "mxfp8")
    assert model.layers[0][0].recipe is model.lm_head.recipe is RECIPES["mxfp8"]
    assert model.lm_head.weight is model.embedding.weight
    with pytest.raises(ValueError, match="lm_heda"):
        mx.convert(Model(), skip="lm_heda")
    assert type(mx.convert(nn.Linear(32, 48))) is MXLinear


# --- training ----------------------------------------------------------------------------------------------


def trained(model: nn.Module, seed: int = 0) -> list[float]:
    """Losses of learning to repeat tokens."""
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    tokens = torch.randint(0, 48, (4, 16), generator=torch.Generator().manual_seed(5))
    losses = []
    for _ in range(10):
        loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", ["mxfp4", "fp8", "bf16"])
def test_a_model_trains(name: str) -> None:
    """The loss falls to a fifth; torch.manual_seed repeats it to the bit, and another seed does not."""
    torch.manual_seed(2)
    model = mx.convert(Model(), name, skip=("layers.1", "lm_head"))
    runs = [trained(copy.deepcopy(model), seed) for seed in (0, 0, 1)]
    assert runs[0][-1] < runs[0][0] / 5
    assert runs[0] == runs[1]
    assert (runs[0] == runs[2]) == (name != "mxfp4")


# --- the compiler ------------------------------------------------------------------------------------------

COMPILED = {
    **{name: RECIPES[name] for name in ("mxfp4", "fp8", "bf16")},
    "emulated": RECIPES["mxfp4"].replace(emulate=True),
    "kept": RECIPES["mxfp4"].replace(keep_weights=True, weight_block="16x16"),
    "hadamard": Recipe(*[Product(mx.mxfp4, mx.mxfp4, 16)] * 3),
}


def outcome(model: nn.Module, dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    """Output and gradients after torch.manual_seed."""
    model.zero_grad()
    x = ordinary(2, 16, 32, dtype=dtype).requires_grad_()
    torch.manual_seed(7)
    y = model(x)
    y.sum().backward()
    return [y, x.grad, *(parameter.grad for parameter in model.parameters())]


def two_layers(recipe: Recipe) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(MXLinear(32, 64, recipe=recipe), nn.ReLU(), MXLinear(64, 32, False, recipe=recipe))


@pytest.mark.parametrize("name", COMPILED)
def test_traced_in_one_graph(name: str) -> None:
    """Forward and backward without a graph break, with the bits of the eager layer, those drawn too."""
    torch._dynamo.reset()
    model = two_layers(COMPILED[name])
    traced = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, outcome(traced), outcome(model)))


def test_both_operands_have_the_same_signs_when_traced() -> None:
    """Signs are drawn in forward and used in backward too, where a compiler may not draw them again: products of
    what is not quantised do not see the transform."""
    torch._dynamo.reset()
    signed = two_layers(Recipe(*[Product(hadamard=16, random_signs=True)] * 3))
    traced = torch.compile(signed, fullgraph=True, backend="aot_eager")
    results = zip(outcome(traced, torch.float32), outcome(two_layers(RECIPES["bf16"]), torch.float32), strict=True)
    # Each of two operands is rounded to bf16 once or twice, by 2**-9 of its elements at most, and so is what the
    # second layer makes of it. Other signs would leave nothing in common.
    assert all((one - other).norm() < 8 * 2.0**-9 * other.norm() for one, other in results)


@needs_compiler
def test_compiled_by_inductor() -> None:
    """Gradients to the bit where nothing is drawn (inductor draws otherwise than eager PyTorch); repeated where it
    is."""
    torch._dynamo.reset()
    model = two_layers(COMPILED["mxfp4"])
    compiled = torch.compile(model, fullgraph=True)
    found, again, eager = outcome(compiled), outcome(compiled), outcome(model)
    assert all(map(torch.equal, found, again))
    assert torch.equal(found[0], eager[0])
    spread = [
        (one - other).float().norm() / other.float().norm() for one, other in zip(found[1:], eager[1:], strict=True)
    ]
    assert max(spread) < 0.5  # two stochastic roundings of e2m1 differ by a quarter or so


@needs_compiler
def test_inductor_keeps_what_is_packed() -> None:
    """Between forward and backward x is there in 4.25 bits, though the compiler chooses what to keep."""
    torch._dynamo.reset()
    x = ordinary(128, 256, dtype=torch.bfloat16).requires_grad_()
    y = torch.compile(MXLinear(256, 32, False), fullgraph=True)(x)
    kept = [each for each in y.grad_fn.saved_tensors if each.shape != (32, 256)]
    assert sum(each.nbytes for each in kept) == x.numel() * 17 // 32


def test_compiled_evaluation() -> None:
    torch._dynamo.reset()
    model = two_layers(COMPILED["mxfp4"]).eval()
    with torch.no_grad():
        x = ordinary(2, 16, 32)
        assert torch.equal(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x))
        with torch.autocast("cpu", torch.bfloat16):
            y = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
            assert y.dtype == torch.bfloat16
            assert torch.equal(y, model(x))

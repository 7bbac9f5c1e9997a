"""Linears of a model replaced in place: which, which not, and what is said about mistakes."""

from __future__ import annotations

import weakref
from collections import OrderedDict

import pytest
import torch
from torch import nn

from mxkernels.modules import replace_linears


class Replaced(nn.Module):
    def __init__(self, original: nn.Linear) -> None:
        super().__init__()
        self.features = original.in_features


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = nn.ModuleDict({name: nn.Linear(width, width) for name in ("q", "k", "v")})
        self.mlp = nn.Sequential(OrderedDict(up=nn.Linear(width, 16), act=nn.GELU(), down=nn.Linear(16, 3)))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(8) for _ in range(11))
        self.lm_head = nn.Linear(8, 4)


def replaced(model: nn.Module) -> set[str]:
    return {path for path, module in model.named_modules() if isinstance(module, Replaced)}


EVERY = {path for path, module in Model().named_modules() if type(module) is nn.Linear}


def test_everywhere_in_place() -> None:
    model = Model()
    assert len(EVERY) == 11 * 5 + 1
    assert replace_linears(model, Replaced) is model
    assert replaced(model) == EVERY
    assert [type(module) for module in model.layers[3].mlp] == [Replaced, nn.GELU, Replaced]
    assert model.layers[1].mlp.down.features == 16


@pytest.mark.parametrize(
    ("skip", "kept"),
    [
        ("lm_head", {"lm_head"}),
        (("lm_head",), {"lm_head"}),
        (["layers.1"], {path for path in EVERY if path.startswith("layers.1.")}),  # not layers.10
        (("layers.2.mlp", "lm_head"), {"layers.2.mlp.up", "layers.2.mlp.down", "lm_head"}),
        ({"*.down"}, {path for path in EVERY if path.endswith("down")}),
        (("*.attention.[qk]",), {path for path in EVERY if path.endswith((".q", ".k"))}),
        (("layers",), EVERY - {"lm_head"}),
        (("*",), EVERY),
    ],
)
def test_skip(skip: object, kept: set[str]) -> None:
    model = Model()
    replace_linears(model, Replaced, skip)
    assert replaced(model) == EVERY - kept


@pytest.mark.parametrize("pattern", ["head", "lm_haed", "LM_HEAD", "layers.11", "attention", ""])
def test_a_pattern_that_matches_nothing_changes_nothing(pattern: str) -> None:
    model = Model()
    message = rf"skip has '{pattern}', which matches no linear; allowed here: layers\.0\.attention\.q, .* \(56 in all\)"
    with pytest.raises(ValueError, match=message):
        replace_linears(model, Replaced, ("lm_head", pattern))
    assert not replaced(model)


def test_a_pattern_for_what_is_no_linear() -> None:
    with pytest.raises(ValueError, match=r"skip has '0', which matches no linear; allowed here: 1$"):
        replace_linears(nn.Sequential(nn.GELU(), nn.Linear(2, 2)), Replaced, "0")


def test_a_model_that_is_a_linear() -> None:
    made = replace_linears(nn.Linear(3, 2).eval(), Replaced)
    assert isinstance(made, Replaced)
    assert not made.training


def test_a_module_in_two_places_stays_one() -> None:
    shared = nn.Linear(2, 2)
    model = nn.Sequential(shared, nn.Sequential(shared), shared)
    replace_linears(model, Replaced)
    assert isinstance(model[0], Replaced)
    assert model[0] is model[1][0] is model[2]


def test_a_module_in_two_places_is_skipped_by_either() -> None:
    shared = nn.Linear(2, 2)
    model = nn.Sequential(shared, nn.Sequential(shared), nn.Linear(2, 2))
    replace_linears(model, Replaced, "1")
    assert model[0] is shared
    assert model[1][0] is shared
    assert isinstance(model[2], Replaced)


def test_a_parent_in_two_places() -> None:
    shared = nn.Sequential(nn.Linear(2, 2))
    model = nn.ModuleList([shared, shared])
    replace_linears(model, Replaced)
    assert model[0] is model[1] is shared
    assert isinstance(shared[0], Replaced)


def test_subclasses_stay_unless_named() -> None:
    """torch's attention reads the weight of its own subclass of nn.Linear, and never calls it."""

    class Special(nn.Linear):
        pass

    model = nn.ModuleDict(
        {"attention": nn.MultiheadAttention(8, 2), "special": Special(2, 2), "plain": nn.Linear(2, 2)}
    )
    replace_linears(model, Replaced)
    assert replaced(model) == {"plain"}
    replace_linears(model, Replaced, kinds=(nn.Linear, Special))
    assert replaced(model) == {"plain", "special"}


def test_each_original_is_let_go_before_the_next() -> None:
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(5)))
    originals = [weakref.ref(module) for module in model]
    alive = []

    def make(linear: nn.Linear) -> Replaced:
        alive.append(sum(each() is not None for each in originals))
        return Replaced(linear)

    replace_linears(model, make)
    assert alive == [5, 4, 3, 2, 1]
    assert all(each() is None for each in originals)


def test_training_is_kept() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].eval()
    replace_linears(model, Replaced)
    assert [module.training for module in model] == [True, False]


@pytest.mark.parametrize(
    "hook",
    [
        lambda linear: linear.register_forward_hook(lambda *_: None),
        lambda linear: linear.register_forward_pre_hook(lambda *_: None),
        lambda linear: linear.register_full_backward_hook(lambda *_: None),
        lambda linear: nn.utils.spectral_norm(linear),
    ],
)
def test_hooks_are_not_lost(hook: object) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)))
    hook(model[1][0])
    with pytest.raises(ValueError, match=r"1\.0 has hooks, which a replacement would lack; remove them, or skip it"):
        replace_linears(model, Replaced)
    assert not replaced(model)
    replace_linears(model, Replaced, "1.0")
    assert replaced(model) == {"0"}


def test_parametrised_linears_stay() -> None:
    """Their type is a subclass that torch makes."""
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)))
    replace_linears(model, Replaced)
    assert not replaced(model)


def test_what_is_no_model() -> None:
    with pytest.raises(TypeError, match=r"model is a Tensor; allowed: a torch\.nn\.Module"):
        replace_linears(torch.ones(2), Replaced)


def test_errors_of_make_name_the_path() -> None:
    def refuse(linear: nn.Linear) -> nn.Module:
        raise TypeError("x is torch.float64")

    with pytest.raises(TypeError, match=r"layers\.0\.attention\.q: x is torch\.float64"):
        replace_linears(Model(), refuse)
    with pytest.raises(TypeError, match=r"^x is torch\.float64"):
        replace_linears(nn.Linear(2, 2), refuse)

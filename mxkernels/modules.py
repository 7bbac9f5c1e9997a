"""Linears of a model, replaced in place: what `convert` and `pack` have in common."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from fnmatch import fnmatchcase
from typing import Any

from torch import nn


def replace_linears(
    model: nn.Module,
    make: Callable[[Any], nn.Module],
    skip: str | Collection[str] = (),
    kinds: tuple[type[nn.Module], ...] = (nn.Linear,),
) -> nn.Module:
    """Put `make(module)` in the place of each module whose type is one of `kinds`.

    Args:
        model: changed in place, unless it is itself such a module.
        make: gives the replacement. A module that the model has in several places is replaced by one. Each
            original is let go of before the next is replaced.
        skip: paths of modules that stay as they are, with all that is in them, as `model.named_modules()` spells
            them, or patterns of such paths as in `fnmatch`: `"lm_head"`, `"layers.0"`, `"*.attention.*"`.
        kinds: the types themselves. A subclass may do more than its `forward` says (torch's attention reads the
            weight of its own subclass of nn.Linear), so it stays.

    Returns:
        The model; or its replacement, if it is itself one of `kinds`.

    Raises:
        TypeError, ValueError: a pattern matches nothing that would be replaced, or a module has hooks, which its
            replacement would lack: nothing has been changed then. Or what `make` raises, with the module's path.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; allowed: a torch.nn.Module")
    places = _places(model, kinds)
    for each in _skipped(places, [skip] if isinstance(skip, str) else skip):
        del places[each]
    for paths in places.values():
        _refuse_hooks(paths[0], model.get_submodule(paths[0]))
    for paths in places.values():
        made = _made(make, paths[0], model.get_submodule(paths[0]))
        if "" in paths:
            return made
        for path in paths:
            model.set_submodule(path, made)
    return model


def _places(model: nn.Module, kinds: tuple[type[nn.Module], ...]) -> dict[int, list[str]]:
    """The paths of each module to replace, by its id: holding the modules themselves would keep their memory."""
    places: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if type(module) in kinds:
            places.setdefault(id(module), []).append(path)
    return places


def _skipped(places: dict[int, list[str]], patterns: Iterable[str]) -> set[int]:
    """The modules that patterns match, in any of their places."""
    skipped = set()
    for pattern in patterns:
        matched = {each for each, paths in places.items() if any(_within(path, pattern) for path in paths)}
        if not matched:
            raise ValueError(f"skip has {pattern!r}, which matches no linear; allowed here: {_sample(places)}")
        skipped |= matched
    return skipped


def _within(path: str, pattern: str) -> bool:
    """Whether a pattern matches a module's path, or that of a module around it."""
    names = path.split(".")
    return any(fnmatchcase(".".join(names[:depth]), pattern) for depth in range(1, len(names) + 1))


def _sample(places: dict[int, list[str]], most: int = 8) -> str:
    """The first few paths, for an error message."""
    paths = [path for each in places.values() for path in each]
    if not any(paths):
        return "nothing"
    return ", ".join(paths[:most]) + (f" … ({len(paths)} in all)" if len(paths) > most else "")


def _refuse_hooks(path: str, module: nn.Module) -> None:
    hooks = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    if any(hooks):
        raise ValueError(f"{path or 'model'} has hooks, which a replacement would lack; remove them, or skip it")


def _made(make: Callable[[Any], nn.Module], path: str, module: nn.Module) -> nn.Module:
    try:
        made = make(module)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{path}: {error}" if path else str(error)) from error
    return made.train(module.training)

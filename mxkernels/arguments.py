"""The command's arguments: text in, checked values out. What is wrong with one is said before anything runs.

A mistake is one sentence on stderr that names the argument and what is allowed, with exit code 2.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import torch

from . import report
from .bench import OPS
from .bench_products import Source
from .environment import triton_version
from .formats import FORMATS
from .perf import SHAPES, Shape
from .spec import PRESETS, MXSpec
from .support import OPS as KNOWN_OPS

MEASURED = (*OPS, "matmul")
PLAIN = ("bfloat16", "float16")

Callback = Callable[[click.Context, click.Parameter, Any], Any]


class Mistake(click.ClickException):
    """What the user can put right."""

    exit_code = 2

    def show(self, file: Any = None) -> None:
        click.echo(f"mxkernels: {self.format_message()}", err=True)


class Program(click.Group):
    """A group whose usage errors are one sentence, without the usage lines before it."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        with _one_sentence():
            return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        with _one_sentence():
            return super().invoke(ctx)


@contextmanager
def _one_sentence() -> Iterator[None]:
    try:
        yield
    except click.UsageError as error:
        raise Mistake(error.format_message()) from None


def checked(convert: Callable[[Any], Any]) -> Callback:
    """A callback for an option that may be left out: its ValueError becomes a mistake in that option."""

    def callback(ctx: click.Context, parameter: click.Parameter, value: Any) -> Any:
        try:
            return None if value is None else convert(value)
        except ValueError as error:
            raise click.BadParameter(str(error), ctx, parameter) from None

    return callback


def each(convert: Callable[[str], Any]) -> Callback:
    """The same for an option that is given several times, or once with commas: a list."""
    return checked(lambda values: [convert(text.strip()) for value in values for text in value.split(",")])


def spec_named(text: str) -> MXSpec:
    if text not in PRESETS and text not in FORMATS:
        raise ValueError(f"{text!r} is no format; allowed: {', '.join(FORMATS)}, or a preset: {', '.join(PRESETS)}")
    return PRESETS[text] if text in PRESETS else MXSpec(text)


def op_named(text: str) -> str:
    if text not in MEASURED:
        why = "is not there yet" if text in KNOWN_OPS else "is no op"
        raise ValueError(f"{text!r} {why}; allowed: {', '.join(MEASURED)}")
    return text


def activations_named(text: str) -> Source:
    """A spec, or the dtype of activations that stay plain."""
    if text in PLAIN:
        dtype: torch.dtype = getattr(torch, text)
        return dtype
    try:
        return spec_named(text)
    except ValueError as error:
        raise ValueError(f"{error}; or {', '.join(PLAIN)}") from None


def shapes_named(text: str) -> list[tuple[str, Shape]]:
    """The shapes of a preset, each with where it is from, or the one that is spelt out."""
    if text in SHAPES:
        return [(f"{text} {layer}", shape) for layer, shape in SHAPES[text].items()]
    sides = text.lower().split("x")
    if not all(side.isdecimal() and int(side) > 0 for side in sides):
        presets = ", ".join(SHAPES)
        raise ValueError(f"{text!r} is no shape; allowed: sizes such as 4096x4096, or a preset: {presets}")
    return [("", tuple(map(int, sides)))]


def product_shapes(named: list[tuple[str, Shape]], rows: Sequence[int]) -> list[tuple[str, tuple[int, int, int]]]:
    """M, N and K of the products that shapes ask for: of weights N x K, one for each of `rows`."""
    products: list[tuple[str, tuple[int, int, int]]] = []
    for name, shape in named:
        if len(shape) == 3:
            products.append((name, shape))
        elif len(shape) == 2:
            products += [(name, (m, *shape)) for m in rows]
        else:
            text = "x".join(map(str, shape))
            raise Mistake(f"Invalid value for '--shape': {text}; allowed for matmul: MxNxK, or NxK, the weights'")
    return products


def writable(path: Path) -> Path:
    """Refuse before the measuring what could not be written after it."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder; allowed: a file")
    if not path.parent.is_dir():
        raise ValueError(f"there is no folder {path.parent}; allowed: a file in a folder that exists")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ValueError(f"{path} cannot be written; allowed: a file that can")
    return path


def plottable(path: Path) -> Path:
    try:
        endings = report.plot_endings()
    except ImportError:
        raise ValueError("it needs matplotlib: pip install 'mxkernels[plot]'") from None
    if path.suffix.removeprefix(".") not in endings:
        raise ValueError(f"{path} is no picture; allowed endings: {', '.join(endings)}")
    return writable(path)


def usable_device(name: str) -> torch.device:
    """`auto`, `cpu` or `cuda` to a device that ops can run on."""
    usable = torch.cuda.is_available() and triton_version() is not None
    if name == "cuda" and not usable:
        missing = "Triton is not installed" if torch.cuda.is_available() else "torch sees no GPU"
        raise ValueError(f"{missing}; allowed here: auto, cpu")
    return torch.device("cpu" if name == "cpu" or not usable else f"cuda:{torch.cuda.current_device()}")

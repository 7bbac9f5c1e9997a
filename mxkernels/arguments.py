"""The command's arguments: text in, checked values out. What is wrong with one is said before anything runs.

A mistake is one sentence on stderr that names the argument and what is allowed, with exit code 2; what goes wrong
later is one sentence with exit code 1.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import click
import torch

from . import report
from .bench import OPS
from .bench_products import Source
from .environment import triton_version
from .formats import FORMATS
from .perf import SHAPES, Shape
from .spec import PRESETS, Block, MXSpec, ScaleRounding
from .support import OPS as KNOWN_OPS

MEASURED = (*OPS, "matmul")
PLAIN = ("bfloat16", "float16")

Callback = Callable[[click.Context, click.Parameter, Any], Any]


class Mistake(click.ClickException):
    """What the user can put right."""

    exit_code = 2

    def show(self, file: Any = None) -> None:
        click.echo(f"mxkernels: {self.format_message()}", err=True)


class Failed(Mistake):
    """What went wrong without anybody's mistake, after work was done."""

    exit_code = 1


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


_SPEC_OPTIONS = (
    click.option(
        "--fmt",
        "specs",
        multiple=True,
        default=["e2m1"],
        metavar="NAME",
        callback=each(spec_named),
        help="Element format (e2m1, e3m0, int4, e2m3, e3m2, e4m3, e5m2, int8), or a preset such as mxfp4, which sets "
        "block and roundings too, where no option does. Repeat it, or separate with commas.  [default: e2m1]",
    ),
    click.option(
        "--block",
        "blocks",
        multiple=True,
        metavar="RxC",
        callback=each(Block.parse),
        help="Elements that share a scale, powers of two to 128: 1x32 along a row, 32x1 down a column, 4x4 a tile. "
        "Repeat it, or separate with commas.  [default: 1x32, or the preset's]",
    ),
    click.option(
        "--rounding",
        type=click.Choice(["rtne", "stochastic", "sr"]),
        help="Of the elements: to nearest, ties to even, or stochastic (sr for short).  [default: rtne]",
    ),
    click.option(
        "--scale-rounding",
        "--scale",
        type=click.Choice(get_args(ScaleRounding)),
        help="How a block's scale becomes a power of two.  [default: even, or the preset's]",
    ),
    click.option("--asymmetric", is_flag=True, help="Store an fp16 offset a block, the middle of its range."),
)


def spec_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that say what to quantise to: specs, blocks, rounding, scale_rounding and asymmetric."""
    for option in reversed(_SPEC_OPTIONS):
        command = option(command)
    return command


def spec_overrides(
    blocks: Sequence[Block], rounding: str | None, scale_rounding: str | None, asymmetric: bool
) -> list[dict[str, Any]]:
    """For each block, or once if there is none, what the options change of a spec; None is an option left out."""
    given: dict[str, Any] = {
        "rounding": "stochastic" if rounding == "sr" else rounding,
        "scale_rounding": scale_rounding,
        "symmetric": False if asymmetric else None,
    }
    return [{**given, "block": block} for block in blocks] or [given]


def overridden(spec: MXSpec, override: dict[str, Any]) -> MXSpec:
    """The spec with what is not None."""
    return replace(spec, **{name: value for name, value in override.items() if value is not None})


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

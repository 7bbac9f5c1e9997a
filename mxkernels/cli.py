"""The `mxkernels` command: puts `arguments`, `bench`, `report` and `support` together, and computes nothing."""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch

from . import __version__, gpu, report
from .arguments import (
    Mistake,
    Program,
    activations_named,
    checked,
    each,
    op_named,
    overridden,
    plottable,
    product_shapes,
    shapes_named,
    spec_options,
    spec_overrides,
    usable_device,
    writable,
)
from .bench import DTYPES, Bench, Case
from .bench_products import ProductBench, ProductCase, Source, timings
from .cli_cache import cache
from .cli_tune import tune
from .environment import device_name, driver_version, environment, triton_version
from .inputs import load_tensor
from .perf import DEFAULT_SHAPE, DEFAULT_WEIGHT, ROWS, SHAPES, Shape
from .spec import Block, MXSpec

_FORM_BY_ENDING = {".json": "json", ".csv": "csv", ".md": "markdown"}


@click.group(cls=Program, invoke_without_command=True)
@click.version_option(__version__, prog_name="mxkernels")
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Microscaling (MX) formats: measure casts and products, look up the formats, see what this machine can do.

    \b
    mxkernels bench --fmt e2m1 --block 4x4      how fast, how small, how far off
    mxkernels bench --op matmul                 the same of products, beside bf16 and FP8
    mxkernels formats                           every element format and its values
    mxkernels doctor                            versions, GPUs, and what runs how on them
    mxkernels tune                              the fastest configs for this GPU, found and kept
    mxkernels cache list                        the configs that were tuned here, and those that are shipped
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


@cli.command(short_help="Measure casts and matrix products: time, bytes and error.")
@spec_options
@click.option(
    "--op",
    "ops",
    multiple=True,
    default=["quantize", "dequantize"],
    metavar="OP",
    callback=each(op_named),
    help="quantize, dequantize, or quantize_pair (both orientations from one read; its bytes are those of both). "
    "Repeat it, or separate with commas. Or matmul, alone.  [default: quantize,dequantize]",
)
@click.option(
    "--shape",
    "shapes",
    multiple=True,
    metavar="SHAPE",
    callback=each(shapes_named),
    help="Of the tensor, such as 4096x4096 or 8x512x4096 (leading dimensions are rows), or the layers of a model: "
    f"{', '.join(SHAPES)}. Repeat it, or separate with commas. For matmul, MxNxK; or NxK, the weights', and M is "
    f"{', '.join(map(str, ROWS['cuda']))} ({', '.join(map(str, ROWS['cpu']))} on a CPU).  [default: 16384x16384 on a "
    "GPU, 512x512 on a CPU; for matmul 8192x8192 and 256x256]",
)
@click.option(
    "--activations",
    metavar="NAME",
    callback=checked(activations_named),
    help="For matmul: the left operand's element format or preset, with the options of the weights; or bfloat16 or "
    "float16, to leave it plain beside quantised weights.  [default: as --fmt]",
)
@click.option(
    "--dtype",
    type=click.Choice(list(DTYPES)),
    help="Of the tensor; one from a file is converted.  [default: bf16, or the file's]",
)
@click.option(
    "--input",
    "tensor",
    metavar="FILE[:TENSOR]",
    callback=checked(load_tensor),
    help="A real tensor in place of Gaussian values: .safetensors, .npy, or .pt (loaded with weights_only=True).",
)
@click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    callback=checked(usable_device),
    help="auto is the GPU, if there is one; the CPU runs the reference.  [default: auto]",
)
@click.option(
    "--seed",
    type=click.IntRange(0, 2**63 - 1),
    default=0,
    metavar="N",
    help="Of the Gaussian values and of stochastic rounding.  [default: 0]",
)
@click.option(
    "--format",
    "form",
    type=click.Choice(["table", "markdown", "csv", "json"]),
    help="Of the results. csv and json hold everything.  [default: what --output's ending says, or table]",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    metavar="F",
    callback=checked(writable),
    help="Write the results to F (.json, .csv, .md, or as --format says), not to the terminal.",
)
@click.option(
    "--plot",
    type=click.Path(path_type=Path),
    metavar="F",
    callback=checked(plottable),
    help="Draw speed and error to F (.png, .svg, .pdf). Needs matplotlib: pip install 'mxkernels[plot]'.",
)
@click.option(
    "--compare",
    "earlier",
    type=click.Path(path_type=Path),
    metavar="F",
    callback=checked(report.read_results),
    help="Show the median times of an earlier --format json beside the new ones.",
)
def bench(
    specs: list[MXSpec],
    blocks: list[Block],
    rounding: str | None,
    scale_rounding: str | None,
    asymmetric: bool,
    ops: list[str],
    shapes: list[list[tuple[str, Shape]]],
    activations: Source | None,
    dtype: str | None,
    tensor: torch.Tensor | None,
    device: torch.device,
    seed: int,
    form: str | None,
    output: Path | None,
    plot: Path | None,
    earlier: list[report.Row] | None,
) -> None:
    """Measure casts or products: time, share of the limit, bytes, and the error against the original.

    \b
    mxkernels bench --fmt e2m1 --block 4x4
    mxkernels bench --fmt e2m1,e4m3 --block 1x32,4x4,32x1 --op quantize
    mxkernels bench --fmt mxfp4 --rounding sr --shape llama3-8b
    mxkernels bench --fmt int4 --asymmetric --input model.safetensors:lm_head.weight
    mxkernels bench --fmt mxfp4 --output before.json
    mxkernels bench --fmt mxfp4 --compare before.json
    mxkernels bench --op matmul --fmt mxfp4 --shape 4096x14336x4096
    mxkernels bench --op matmul --fmt mxfp4 --activations bfloat16 --shape 8192x8192

    One row an op, format, block and shape. Times are medians, with the 10th and 90th percentiles; on a GPU the
    L2 cache is flushed before each call. GB/s counts what the op must read and write, and the limit is a copy
    that reads and writes as many bytes, measured in the same run. Bytes are those stored (codes, scales and
    offsets); bf16/ and FP8/ say how many times smaller that is than bf16 (2 bytes an element) and than FP8 (1
    byte, and a 32-bit scale a row). The error is that of decoding to fp32, summed in float64. A block that holds
    NaN or Inf decodes to NaN as a whole; such elements are left out of the error, and counted.

    matmul multiplies activations [M, K] by weights [N, K], transposed, both Gaussian and quantised. A row for
    each start: operands folded before, stored codes, and plain operands, which are both quantised in the call.
    "vs bf16" is how many times faster that is than torch.mm in bf16, timed just before and just after; beside it
    FP8 by torch._scaled_mm with a scale a tensor, and a plain Triton kernel with tl.dot_scaled, where the GPU
    has them. The limit is a copy again, or the rate of a large product by torch. The error is against the
    product of the plain operands; "of bound" is the largest error against that of the decoded ones, as a share
    of what docs/numerics.md allows. At the end: from which M on it pays.

    Without a GPU the same ops run through the reference: bytes and errors are real, times are the CPU's.
    """
    if tensor is not None and shapes:
        raise Mistake("Invalid value for '--shape': the tensor of --input has one; allowed: one of the two options")
    overrides = spec_overrides(blocks, rounding, scale_rounding, asymmetric)
    named = [pair for preset in shapes for pair in preset]
    runner: Bench | ProductBench
    cases: list[Case] | list[ProductCase]
    if "matmul" in ops:
        _check_products(ops, tensor)
        named = named or [("", DEFAULT_WEIGHT[device.type])]
        cases = _product_cases(named, specs, activations, overrides, DTYPES[dtype or "bf16"], ROWS[device.type])
        runner = ProductBench(device, seed)
    else:
        if activations is not None:
            raise Mistake("Invalid value for '--activations': only matmul has them; allowed: with --op matmul")
        tensor, dtype = _converted(tensor, dtype)
        named = named or [("", DEFAULT_SHAPE[device.type] if tensor is None else tuple(tensor.shape))]
        cases = [
            Case(op, overridden(spec, override), shape, DTYPES[dtype], name=name)
            for name, shape in named
            for spec in specs
            for override in overrides
            for op in ops
        ]
        runner = Bench(device, seed)
    if device.type == "cpu":
        click.echo("On the CPU, through the reference: bytes and errors are real, the times are this CPU's.", err=True)
    rows = _measure(runner, cases, tensor)
    if earlier is not None:
        rows = _compared(rows, earlier)
    form = form or _FORM_BY_ENDING.get(output.suffix if output else "", "table")
    text = report.render(form, environment(device), rows)
    if output is None:
        click.echo(text, nl=False)
    else:
        output.write_text(text, encoding="utf-8")
    if plot is not None:
        report.plot(plot, rows)


def _converted(tensor: torch.Tensor | None, dtype: str | None) -> tuple[torch.Tensor | None, str]:
    if tensor is None:
        return None, dtype or "bf16"
    if dtype is not None:
        return tensor.to(DTYPES[dtype]), dtype
    for name, allowed in DTYPES.items():
        if tensor.dtype == allowed:
            return tensor, name
    raise Mistake(f"Invalid value for '--input': it is {tensor.dtype}; allowed: {', '.join(DTYPES)} (--dtype converts)")


def _check_products(ops: list[str], tensor: torch.Tensor | None) -> None:
    if set(ops) != {"matmul"}:
        raise Mistake("Invalid value for '--op': matmul is measured on shapes of its own; allowed: matmul alone")
    if tensor is not None:
        raise Mistake("Invalid value for '--input': matmul draws its operands; allowed: with the other ops")


def _product_cases(
    named: list[tuple[str, Shape]],
    specs: list[MXSpec],
    activations: Source | None,
    overrides: list[dict[str, Any]],
    dtype: torch.dtype,
    rows: tuple[int, ...],
) -> list[ProductCase]:
    cases = []
    for name, shape in product_shapes(named, rows):
        for spec in specs:
            for override in overrides:
                b = overridden(spec, override)
                a = activations or spec
                a = overridden(a, override) if isinstance(a, MXSpec) else a
                cases += [ProductCase(shape, a, b, timed, dtype, name=name) for timed in timings(a, b, shape[0])]
    return cases


def _measure(
    runner: Bench | ProductBench, cases: Sequence[Case | ProductCase], tensor: torch.Tensor | None
) -> list[report.Row]:
    measure: Callable[..., report.Row] = runner.row
    if tensor is not None:
        measure = partial(measure, x=tensor.to(runner.device))
    rows = []
    for number, case in enumerate(cases, 1):
        _progress(f"{number}/{len(cases)} {case}")
        try:
            rows.append(measure(case))
        except (RuntimeError, MemoryError) as error:
            if not _does_not_fit(error):
                raise
            what = "--shape" if tensor is None else "--input"
            shape = "x".join(map(str, case.shape))
            raise Mistake(
                f"Invalid value for '{what}': {shape} does not fit in the memory of {runner.device}"
            ) from None
    _progress("")
    left_out = max(row.get("nonfinite", 0) for row in rows)  # products have none
    if left_out:
        click.echo(
            f"{left_out} elements decode to NaN or Inf (they or others of their block are); the error leaves them out.",
            err=True,
        )
    return rows


def _progress(text: str) -> None:
    """Replace the terminal's last line."""
    if sys.stderr.isatty():
        click.echo(f"\r\x1b[K{text}", nl=False, err=True)


def _does_not_fit(error: Exception) -> bool:
    """Whether memory ran out; the CPU's allocator says so in words only."""
    words = ("DefaultCPUAllocator", "Storage size calculation overflowed")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(word in str(error) for word in words)


def _compared(rows: list[report.Row], earlier: list[report.Row]) -> list[report.Row]:
    devices = {row["device"] for row in earlier} - {rows[0]["device"]}
    if devices:
        click.echo(f"The earlier run was on {', '.join(sorted(devices))}, this one on {rows[0]['device']}.", err=True)
    return report.compare(rows, earlier)


@cli.command(short_help="The element formats and their values.")
def formats() -> None:
    """The element formats: bits, scale constant, largest and smallest value, and the values.

    emax is the constant of the scale rules. The smallest value is also the distance between the smallest ones.
    Integers are two's complement, and their most negative code is never produced.
    """
    click.echo(report.formats_table())


@cli.command(short_help="Versions, GPUs, and what runs how on them.")
def doctor() -> None:
    """Versions, GPUs, and what runs how: native, folded or decoded, for each op and format.

    native: the hardware knows the format. folded: it is rewritten, without loss, into one that the hardware
    knows. decoded: its bits are computed by ordinary arithmetic.
    """
    versions = {
        "mxkernels": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton_version() or "not installed",
        "driver": driver_version() or "none found",
    }
    for name, version in versions.items():
        click.echo(f"{name:<10} {version}")
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        click.echo(f"\n{device}: {device_name(device)} ({gpu.architecture(device)})")
        click.echo(f"{report.configs_text(device)}\n")
        click.echo(report.support_table(gpu.device_capabilities(device)))
    if not torch.cuda.is_available():
        click.echo("\nNo GPU: on the CPU everything runs through the reference.\n")
        click.echo(report.support_table(None))


cli.add_command(cache)
cli.add_command(tune)


def main() -> None:
    """The entry point."""
    cli(prog_name="mxkernels")

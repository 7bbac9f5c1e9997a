"""The `mxkernels tune` command."""

from __future__ import annotations

import math
import shutil
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from tabulate import tabulate

from . import gpu
from .arguments import (
    Failed,
    Mistake,
    activations_named,
    checked,
    each,
    overridden,
    product_shapes,
    shapes_named,
    spec_options,
    spec_overrides,
    writable,
)
from .bench import DTYPES
from .bench_products import Source
from .environment import triton_version
from .perf import DEFAULT_SHAPE, DEFAULT_WEIGHT, ROWS, SHAPES, Shape
from .prepared import MAX_ROWS
from .problems import CASTS, cast_problems, product_problems
from .spec import Block, MXSpec
from .tune import Problem, Stamp, TableError, cache_path
from .tune.limits import MODELS, Footprint, Limits
from .tune.ranks import one_of_many
from .tune.search import BREADTHS, Request, by_rank, compile_all, shortlist, survivors, usable_cpus
from .tune.task import Fault, Result
from .tune.worker import Failure
from .tuner import make_compiler, problems_of, task, tune_problems, tuning_device, untuned

OPS = (*CASTS, "matmul")
_MAX_ELEMENTS = 1 << 56  # of a matrix; torch counts its bytes in 63 bits
_UNITS = {"s": 1, "m": 60, "h": 3600}


def op_named(text: str) -> str:
    if text not in OPS:
        raise ValueError(f"{text!r} is no op; allowed: {', '.join(OPS)}")
    return text


def seconds_named(text: str) -> float:
    """`90`, `90s`, `1.5m`, `1h`."""
    number, unit = (text[:-1], text[-1]) if text[-1:] in _UNITS else (text, "s")
    try:
        seconds = float(number) * _UNITS[unit]
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise ValueError(f"{text!r} is no time; allowed: seconds such as 60 or 60s, or 2m, 1h")
    return seconds


def architecture_named(text: str) -> str:
    if text not in gpu.ARCHITECTURES:
        raise ValueError(f"{text!r} is no architecture; allowed: {', '.join(gpu.ARCHITECTURES)}")
    return text


@click.command(short_help="Find the fastest configs for this GPU, and keep them.")
@click.option(
    "--op",
    "ops",
    multiple=True,
    default=["quantize", "dequantize", "matmul"],
    metavar="OP",
    callback=each(op_named),
    help=f"{', '.join(OPS)}. A matmul brings the casts and folds of its operands with it. Repeat it, or separate with "
    "commas.  [default: quantize,dequantize,matmul]",
)
@spec_options
@click.option(
    "--shape",
    "shapes",
    multiple=True,
    metavar="SHAPE",
    callback=each(shapes_named),
    help="RxC of a matrix (what quantize_transposed takes, such as w.T; what fold_transposed turns, as it is stored), "
    "which is the weights [N, K] of a matmul whose M is "
    f"{', '.join(map(str, ROWS['cuda']))}; MxNxK of a matmul; or the layers of a model: {', '.join(SHAPES)}. A config "
    "serves all M up to the next power of two. Repeat it, or separate with commas.  [default: 16384x16384 and, of a "
    "matmul, 8192x8192]",
)
@click.option(
    "--activations",
    metavar="NAME",
    callback=checked(activations_named),
    help="A matmul's left operand: a format or preset, bfloat16 or float16.  [default: as --fmt]",
)
@click.option("--dtype", type=click.Choice(list(DTYPES)), default="bf16", help="Of the plain side of casts.")
@click.option(
    "--budget",
    default="60s",
    metavar="TIME",
    callback=checked(seconds_named),
    help="For each problem, on average: 90, 90s or 2m. Most need far less.  [default: 60s]",
)
@click.option(
    "--jobs", type=click.IntRange(1), help="Processes that compile.  [default: one for each CPU that it may use]"
)
@click.option("--resume", is_flag=True, help="Leave out what is stored for this GPU, Triton and these kernels already.")
@click.option("--dry-run", is_flag=True, help="Say what would be done. Needs no GPU.")
@click.option(
    "--architecture",
    metavar="NAME",
    callback=checked(architecture_named),
    help="With --dry-run: compile for such a GPU, sm_90 for one, and say how many candidates are left then. Its other "
    "limits are a well-known GPU's.",
)
@click.option(
    "--export",
    "path",
    type=click.Path(path_type=Path),
    metavar="FILE",
    callback=checked(writable),
    help="Store the configs in FILE, a table that can be shipped, and not in the cache.",
)
def tune(
    ops: list[str],
    specs: list[MXSpec],
    blocks: list[Block],
    rounding: str | None,
    scale_rounding: str | None,
    asymmetric: bool,
    shapes: list[list[tuple[str, Shape]]],
    activations: Source | None,
    dtype: str,
    budget: float,
    jobs: int | None,
    resume: bool,
    dry_run: bool,
    architecture: str | None,
    path: Path | None,
) -> None:
    """Find the fastest configs for the GPU at hand. Later calls use them; they decide speed, never a byte of a cast.

    \b
    mxkernels tune                                             the most common problems
    mxkernels tune --shape llama3-8b --fmt mxfp4               the layers of a model
    mxkernels tune --op quantize --block 4x4 --shape 8192x4096
    mxkernels tune --op matmul --shape 4096x14336x4096 --budget 20s
    mxkernels tune --shape llama3-70b --resume                 go on after an interruption
    mxkernels tune --dry-run                                   what would be done
    mxkernels tune --export nvidia-h200.json                   a table for others

    A problem is one kernel on one kind of operands and shape. Its candidates are ranked by a model, the best few are
    compiled, and what does not spill is run, in a process of its own: one that crashes, hangs or writes something
    wrong is reported, and out. Where one of the few gains much, more are tried. Casts are compared to the byte,
    products with the bound of docs/numerics.md. What beats the present config by more than the noise is kept.
    Each result is stored when it is found.

    From Python, for the problems of a training step: mxkernels.autotune(lambda: step(model, batch)).
    """
    if architecture is not None and not dry_run:
        raise Mistake("Invalid value for '--architecture': configs are measured on the GPU at hand; allowed: --dry-run")
    if dry_run and path is not None and not resume:
        raise Mistake("Invalid value for '--export': a dry run stores nothing; allowed: with --resume, or no --dry-run")
    if activations is not None and "matmul" not in ops:
        raise Mistake(f"Invalid value for '--activations': {', '.join(ops)} have none; allowed: with --op matmul")
    if triton_version() is None:
        raise Mistake("Triton is not installed, and nothing can be compiled; pip install 'mxkernels[triton]'")
    (overrides,) = spec_overrides([], rounding, scale_rounding, asymmetric)
    blocked = spec_overrides(blocks, rounding, scale_rounding, asymmetric)
    chosen = [overridden(spec, override) for spec in specs for override in blocked]
    device = None if architecture or (dry_run and not torch.cuda.is_available()) else _device()
    if resume and device is None:
        raise Mistake(
            "Invalid value for '--resume': what is stored is looked up for the GPU at hand; allowed: where torch sees "
            "one, without --architecture"
        )
    limits = Limits.of(device) if device else Limits.assumed(architecture or "sm_90")
    problems = _problems(ops, chosen, shapes, activations, overrides, DTYPES[dtype], limits)
    if not problems:
        raise Mistake("There is nothing to tune: no --op serves these; allowed for fold: symmetric, 4 or 6 bits")
    if resume:
        assert device is not None
        problems = _remaining(problems, device, path)
        if not problems:
            return
    if dry_run:
        _dry_run(problems, limits, device, budget, jobs, architecture is not None)
        return
    if one_of_many():
        raise Mistake(
            "WORLD_SIZE says that this process is one of many, which use no cache; allowed: without it, or "
            "mxkernels.autotune in all of them"
        )
    assert device is not None
    _tune(problems, device, budget=budget, jobs=jobs, path=path)


def _device() -> torch.device:
    try:
        return tuning_device()
    except ValueError as error:
        raise Mistake(str(error)) from None


def _problems(
    ops: list[str],
    specs: list[MXSpec],
    shapes: list[list[tuple[str, Shape]]],
    activations: Source | None,
    overrides: dict[str, Any],
    dtype: torch.dtype,
    limits: Limits,
) -> list[Problem]:
    """Shape by shape, so that what compiles to the same kernels is far apart."""
    named = [pair for preset in shapes for pair in preset]
    casts = [op for op in ops if op in CASTS]
    matrices = [shape for _, shape in named if len(shape) == 2] if named else [DEFAULT_SHAPE["cuda"]]
    if any(len(shape) not in (2, 3) for _, shape in named) or (named and not matrices and "matmul" not in ops):
        raise Mistake("Invalid value for '--shape': allowed: RxC, or MxNxK of a matmul")
    able = limits.capabilities
    found = [
        problem
        for rows, cols in map(_countable, matrices)
        for spec in specs
        for op in casts
        for problem in cast_problems(op, spec, rows, cols, dtype, able)
    ]
    if "matmul" in ops:
        for _, shape in product_shapes(named or [("", DEFAULT_WEIGHT["cuda"])], ROWS["cuda"]):
            m, n, k = _countable(shape)
            for b in specs:
                for a in _left(activations, b, overrides, m):
                    found += product_problems(m, n, k, a, b, able)
    return problems_of(found)


def _countable(shape: Shape) -> Shape:
    """A shape whose matrices have as many elements as can be reckoned with."""
    if math.prod(sorted(shape)[-2:]) > _MAX_ELEMENTS:
        text = "x".join(map(str, shape))
        raise Mistake(f"Invalid value for '--shape': {text}; allowed: at most {_MAX_ELEMENTS} elements a matrix")
    return shape


def _left(activations: Source | None, b: MXSpec, overrides: dict[str, Any], m: int) -> list[Source]:
    """The left operands of products with m rows of activations: few rows are multiplied plain too, unless they are
    said to be something else."""
    if isinstance(activations, MXSpec):
        return [overridden(activations, overrides)]
    if activations is not None:
        return [activations]
    return [b, torch.bfloat16] if m <= MAX_ROWS else [b]


def _remaining(problems: list[Problem], device: torch.device, path: Path | None) -> list[Problem]:
    try:
        left = untuned(problems, device, path)
    except TableError as error:
        raise Mistake(str(error)) from None
    click.echo(f"{len(problems) - len(left)} of {len(problems)} problems are stored already.", err=True)
    return left


def _tune(problems: list[Problem], device: torch.device, **options: Any) -> None:
    """Print what was measured, whatever ends it."""
    results: dict[Problem, Result] = {}

    def found(result: Result) -> None:
        results[result.problem] = result

    line = ProgressLine(options["budget"] * len(problems))
    try:
        place = options["path"] or cache_path(Stamp.of(device, problems[0].op))
        tune_problems(problems, device, progress=line, found=found, **options)
    except TableError as error:
        if not results:
            raise Mistake(str(error)) from None
        raise Failed(f"{error}; what was stored before the last of these stays, and --resume does the rest") from None
    finally:
        line.clear()
        if results:
            click.echo(results_table(list(results.values())))
    missing = sum(result.after_us is None for result in results.values())
    if missing == len(results):
        raise Failed("no problem could be measured, and nothing was stored; the table above says why")
    click.echo(f"Stored in {place}.", err=True)
    if missing:
        raise Failed(f"{missing} of {len(results)} problems could not be measured; the table above says why")


class ProgressLine:
    """The terminal's last line: how much of a stage is done, and the stage's time left. Off a terminal plain lines,
    each with the seconds since the start: one as a stage begins, and then at most one every `SECONDS`.

    Args:
        seconds: that all of it may take, from when processes are there: no more than is left of that is the time left.
    """

    SECONDS = 15.0
    BAR = 20  # characters

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._end: float | None = None  # not known before something is done
        self._stage = ""
        self._begin = time.monotonic()
        self._start = self._begin  # of the stage
        self._next = self._begin

    def __call__(self, stage: str, done: int, total: int, text: str) -> None:
        now = time.monotonic()
        begins = stage != self._stage
        if begins:
            self._stage, self._start = stage, now
        left = ""
        if done:
            self._end = self._end or now + self._seconds
            left_s = min((now - self._start) / done * (total - done), max(self._end - now, 0.0))
            left = f", {clock(left_s)} left"
        verb = {"compile": "compiling", "measure": "measuring"}[stage]
        line = f"{verb} {done}/{total}{left}  {text}".rstrip()
        if sys.stderr.isatty():
            filled = self.BAR * done // max(total, 1)
            line = f"[{'#' * filled:{self.BAR}}] {line}"[: shutil.get_terminal_size().columns - 1]
            click.echo(f"\r\x1b[K{line}", nl=False, err=True)
        elif begins or now >= self._next:
            self._next = now + self.SECONDS
            click.echo(f"{now - self._begin:4.0f} s  {line}", err=True)

    def clear(self) -> None:
        if sys.stderr.isatty():
            click.echo("\r\x1b[K", nl=False, err=True)


def clock(seconds: float) -> str:
    """`1:05`."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"


def results_table(results: Sequence[Result]) -> str:
    """A line for each problem; and below what failed, candidate by candidate."""
    rows = []
    for result in results:
        times = [f"{us:.1f}" if us else "–" for us in (result.before_us, result.after_us)]
        shares = [f"{value:.2f}" if value else "–" for value in (result.gain, result.share_of_limit)]
        rows.append([result.problem, *times, *shares, result.before.origin, result.config])
    headers = ["problem", "before µs", "after µs", "gain", "of limit", "before by", "config"]
    lines = [tabulate(rows, headers, tablefmt="simple", disable_numparse=True)]
    for result in results:
        lines += [f"failed: {result.problem}, {fault}" for fault in result.faults]
    return "\n".join(lines)


def _dry_run(
    problems: list[Problem],
    limits: Limits,
    device: torch.device | None,
    budget: float,
    jobs: int | None,
    compiles: bool,
) -> None:
    tasks = [task(problem, limits, device) for problem in problems]
    chosen = [shortlist(each, limits, BREADTHS[0].compiled) for each in tasks]
    outcomes: dict[Request, Footprint | Failure] = {}
    rows: list[list[Any]] = [
        [each.problem, each.before.origin, len(each.candidates), len(configs)]
        for each, configs in zip(tasks, chosen, strict=True)
    ]
    headers = ["problem", "config by", "candidates", "to compile"]
    if compiles:
        requests = by_rank(tasks, chosen)
        seconds = budget * len(problems)
        line = ProgressLine(seconds)
        outcomes = compile_all(requests, partial(make_compiler, limits), jobs or usable_cpus(), seconds / 2, line)
        line.clear()
        headers += ["compiled", "to run"]
        for row, each, configs in zip(rows, tasks, chosen, strict=True):
            found = {config: outcomes.get((each.problem, config)) for config in configs}
            row += [sum(isinstance(one, Footprint) for one in found.values())]
            row += [len(survivors(each, found, limits, BREADTHS[0].run)[0])]
    click.echo(tabulate(rows, headers, tablefmt="simple"))
    for (problem, config), outcome in outcomes.items():
        if isinstance(outcome, Failure):
            click.echo(f"failed: {problem}, {Fault(config, str(outcome))}")
    if device is None:
        click.echo(
            f"Assumed: a GPU like {MODELS[limits.architecture]}, of {limits.processors} multiprocessors, "
            f"{limits.shared_bytes} bytes of shared memory a program and {limits.gbps:.0f} GB/s.",
            err=True,
        )
    problems_s = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
    click.echo(
        f"{problems_s}, up to {clock(budget * len(problems))}, and what setting them up takes. A search is wider than "
        "this where it gains much.",
        err=True,
    )

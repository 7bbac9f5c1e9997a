"""The problems that casts and products come down to, each of which has a config of its own."""

from __future__ import annotations

from dataclasses import replace

import torch

from .bench_products import Source
from .folded import window
from .gpu import Capabilities
from .ops.operand import FP8_DTYPES, Operand
from .ops.paths import choose, decodes_apart, native_folds, streams_weights
from .prepared import preparable
from .spec import MXSpec
from .tune import Problem, quantize_fold_config

CASTS = ("quantize", "quantize_transposed", "quantize_pair", "dequantize", "fold", "fold_transposed")
_META = torch.device("meta")
_BF16 = torch.bfloat16


def cast_problems(
    op: str, spec: MXSpec, rows: int, cols: int, dtype: torch.dtype, capabilities: Capabilities
) -> list[Problem]:
    """Of one of `CASTS` on a matrix; none where the spec does not fold. What is `quantize_transposed` is the transpose
    of a matrix in memory, what is `fold_transposed` lies as it was quantised, across the reduction."""
    if op == "quantize_transposed":
        return [Problem.of("quantize", spec, dtype, "columns", rows, cols)]
    if op in ("fold", "fold_transposed"):
        if not _folds(spec):
            return []
        if op == "fold":
            return _fold_problems(spec, rows, cols, dtype, capabilities)
        return [Problem.of("fold", spec, _carrier(spec, capabilities), "turned", rows, cols)]
    return [Problem.of(op, spec, dtype, "rows", rows, cols)]


def product_problems(m: int, n: int, k: int, a: Source, b: MXSpec, capabilities: Capabilities) -> list[Problem]:
    """Of `[M, K]` by `[K, N]`, from plain operands (of which those that have a spec are quantised), from stored codes,
    and from operands that were made ready: folded, or weights prepared."""
    sides = [_operand(m, k, a), _operand(n, k, b)]
    shapes = ((m, k), (n, k))
    found: list[Problem] = []
    for side, shape in zip(sides, shapes, strict=True):
        if side.spec is not None:
            found.append(Problem.of("quantize", side.spec, _BF16, "rows", *shape))
    path = choose(sides[0], sides[1], capabilities)
    foldable = all(side.spec is not None and window(side.spec.element) is not None for side in sides)
    if capabilities.fp8_mma and foldable and (path == "fp8" or all(side.symmetric for side in sides)):
        for side, shape in zip(sides, shapes, strict=True):
            assert side.spec is not None
            found += _fold_problems(side.spec, *shape, _BF16, capabilities)
        carriers = [_carrier(side.spec, capabilities) for side in sides if side.spec]
        found.append(_multiply(m, n, k, carriers[0], carriers[1]))
    if path == "native":
        found.append(_native(sides, m, n, k, capabilities))
    if path == "wide":
        found += _wide(sides, shapes, m, n, k)
    return found


def _wide(sides: list[Operand], shapes: tuple[tuple[int, int], ...], m: int, n: int, k: int) -> list[Problem]:
    """Of the path that multiplies in bf16."""
    left, right = sides
    if streams_weights(left, right):
        assert right.spec is not None
        layouts = ("prepared", "stored") if preparable(right.spec) else ("stored",)
        return [Problem.of("stream", right.spec, _BF16, layout, m, n, k) for layout in layouts]
    if not all(decodes_apart(side, k) for side in sides):
        return [Problem.of("decode_multiply", f"{left.kind} * {right.kind}", _BF16, "parts", m, n, k)]
    decoded = [
        Problem.of("dequantize", side.spec, _BF16, "rows", *shape)
        for side, shape in zip(sides, shapes, strict=True)
        if side.spec is not None
    ]
    return [*decoded, _multiply(m, n, k, _BF16, _BF16)]


def _native(sides: list[Operand], m: int, n: int, k: int, capabilities: Capabilities) -> Problem:
    names = []
    for side, fold in zip(sides, native_folds(sides[0], sides[1], capabilities), strict=True):
        assert side.spec is not None
        found = window(side.spec.element) if fold else None
        names.append((found.carrier if found else side.spec.element).name)
    layout = "swizzled" if capabilities.ptx else "plain"
    return Problem.of("native", " * ".join(names), _BF16, layout, m, n, k)


def _fold_problems(spec: MXSpec, rows: int, cols: int, dtype: torch.dtype, capabilities: Capabilities) -> list[Problem]:
    """Of codes without their offsets, and of a plain matrix where one kernel quantises and folds it."""
    found = [Problem.of("fold", replace(spec, symmetric=True), _carrier(spec, capabilities), "straight", rows, cols)]
    if spec.symmetric and quantize_fold_config(spec, cols, dtype.itemsize) is not None:
        found.append(Problem.of("quantize_fold", spec, dtype, "rows", rows, cols))
    return found


def _multiply(m: int, n: int, k: int, a: torch.dtype, b: torch.dtype) -> Problem:
    formats = " * ".join(str(each).removeprefix("torch.") for each in (a, b))
    return Problem.of("multiply", formats, _BF16, "straight * straight", m, n, k)


def _carrier(spec: MXSpec, capabilities: Capabilities) -> torch.dtype:
    found = window(spec.element)
    assert found is not None
    return FP8_DTYPES[found.carrier.name] if capabilities.fp8_mma else torch.uint8


def _folds(spec: MXSpec) -> bool:
    return spec.symmetric and window(spec.element) is not None


def _operand(rows: int, k: int, source: Source) -> Operand:
    """On the meta device."""
    x = torch.empty(rows, k, dtype=source if isinstance(source, torch.dtype) else _BF16, device=_META)
    if isinstance(source, torch.dtype):
        return Operand([x], rows)
    seed = torch.empty(1, dtype=torch.int64, device=_META) if source.stochastic else None
    return Operand(torch.ops.mxkernels.quantize(x, str(source), seed), rows, source)

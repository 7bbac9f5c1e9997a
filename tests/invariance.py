"""Every op under other configs than the rule's, on the device of the case: configs decide speed and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import poisoned
import torch
from operands import PoisonedPlan, operand, run
from triton.runtime.errors import OutOfResources

import mxkernels as mx
from mxkernels import tune
from mxkernels.ops import products
from mxkernels.ops.operand import Operand, launchable, operand_a
from mxkernels.spec import MXSpec
from mxkernels.tune.limits import Limits
from mxkernels.tune.space import candidates
from mxkernels.workloads import serves

Outputs = list[torch.Tensor]
Shape = tuple[int, int, int]  # M, N, K of products; M and K of casts
Maker = Callable[[torch.device, Shape], Callable[[], Outputs]]  # of a call, for a device and sizes
Values = Callable[[int, int], torch.Tensor]  # rows and columns to a matrix


@dataclass(frozen=True)
class Case:
    """An op, and a call that launches it, perhaps among others."""

    op: str
    call: Maker


def quantizing(text: str, dtype: torch.dtype = torch.bfloat16, turned: bool = False, pair: bool = False) -> Maker:
    spec = MXSpec.parse(text)

    def call(device: torch.device, shape: Shape) -> Callable[[], Outputs]:
        m, _, k = shape
        x = data(k, m).T if turned else data(m, k)
        x = x.to(device, dtype)
        return lambda: poisoned.quantize(x, spec, 7 if spec.stochastic else None, pair)

    return call


def dequantizing(text: str, dtype: torch.dtype) -> Maker:
    def call(device: torch.device, shape: Shape) -> Callable[[], Outputs]:
        q = operand(shape[0], shape[2], text).to(device)
        return lambda: [poisoned.dequantize([q.codes, q.scale], q.spec, shape[2], dtype)]

    return call


def folding(text: str) -> Maker:
    def call(device: torch.device, shape: Shape) -> Callable[[], Outputs]:
        whole = operand_a(operand(shape[0], shape[2], text).to(device))
        part = Operand.of_kind(launchable(whole.parts, whole.kind), whole.kind, whole.rows)

        def fold() -> Outputs:
            plan = PoisonedPlan(device, part.parts)
            codes, *rest = products.plan_fold(plan, part, shape[2]).parts[:4]
            return [codes.view(torch.uint8)[:, : shape[2]], *rest]

        return fold

    return call


def quantizing_and_folding(text: str) -> Maker:
    spec = MXSpec.parse(text)

    def call(device: torch.device, shape: Shape) -> Callable[[], Outputs]:
        x = data(shape[0], shape[2]).to(device, torch.bfloat16)
        seed = torch.tensor([7], device=device) if spec.stochastic else None

        def fold() -> Outputs:
            plan = PoisonedPlan(device, [x, seed])
            codes, *rest = products.plan_quantize_fold(plan, x, spec, seed)[:4]
            return [codes.view(torch.uint8)[:, : shape[2]], *rest]

        return fold

    return call


def multiplying(a: str, b: str, path: str, values: Values, prepared: bool = False) -> Maker:
    def call(device: torch.device, shape: Shape) -> Callable[[], Outputs]:
        m, n, k = shape
        left, right = side(values(m, k), a).to(device), side(values(n, k), b).to(device)
        weights = mx.prepare(right) if prepared else right
        return lambda: [run(left, weights, path)]

    return call


def side(x: torch.Tensor, kind: str) -> torch.Tensor | mx.MXTensor:
    return x.to(getattr(torch, kind)) if " " not in kind else mx.quantize(x, MXSpec.parse(kind))


def signs(rows: int, cols: int) -> torch.Tensor:
    """-1, 0 and 1, whose products are exact in any order."""
    return torch.randint(-1, 2, (rows, cols), generator=torch.Generator().manual_seed(rows)).float()


def gaussian(rows: int, cols: int) -> torch.Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(rows))


def data(rows: int, cols: int) -> torch.Tensor:
    """Gaussians, far apart, with NaN, Inf and zeros among them."""
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, cols, generator=generator) * 2.0 ** torch.randint(-8, 9, (rows, cols), generator=generator)
    x[3, 5], x[7, 9], x[5] = torch.nan, torch.inf, 0.0
    return x


MXFP4 = "e2m1 1x32 rtne even symmetric"
CASTS = {
    "quantize e2m1": Case("quantize", quantizing(MXFP4)),
    "quantize e3m2, random": Case("quantize", quantizing("e3m2 1x16 stochastic ceil asymmetric", torch.float32)),
    "quantize int4 in tiles": Case("quantize", quantizing("int4 4x4 rtne ceil symmetric", torch.float16)),
    "quantize e4m3 down columns": Case("quantize", quantizing("e4m3 32x1 rtne rceil symmetric")),
    "quantize e2m1, turned": Case("quantize", quantizing("e2m1 1x32 stochastic even symmetric", turned=True)),
    "quantize_pair e2m1": Case("quantize_pair", quantizing("e2m1 16x16 stochastic even symmetric", pair=True)),
    "quantize_pair e2m3": Case("quantize_pair", quantizing("e2m3 1x32 rtne even asymmetric", pair=True)),
    "dequantize e2m1": Case("dequantize", dequantizing(MXFP4, torch.bfloat16)),
    "dequantize e3m2": Case("dequantize", dequantizing("e3m2 4x4 rtne even symmetric", torch.float32)),
    "fold e2m1": Case("fold", folding(MXFP4)),
    "fold e2m3, turned": Case("fold", folding("e2m3 4x4 rtne even symmetric T")),
    "quantize_fold e2m1": Case("quantize_fold", quantizing_and_folding("e2m1 1x32 stochastic even symmetric")),
    "quantize_fold int4": Case("quantize_fold", quantizing_and_folding("int4 4x4 rtne ceil symmetric")),
}


def products_of(values: Values) -> dict[str, Case]:
    offsets = "e2m1 4x4 rtne even asymmetric"
    return {
        "multiply FP8": Case("multiply", multiplying(MXFP4, "e3m2 1x32 rtne even symmetric", "fp8", values)),
        "multiply FP8 with offsets": Case("multiply", multiplying(MXFP4, offsets, "fp8", values)),
        "multiply bf16": Case("multiply", multiplying(MXFP4, MXFP4, "wide", values)),
        "decode_multiply": Case("decode_multiply", multiplying("float16", offsets, "wide", values)),
    }


def streams_of(values: Values) -> dict[str, Case]:
    """Products of few rows."""
    return {
        "stream": Case("stream", multiplying("bfloat16", MXFP4, "wide", values)),
        "stream prepared": Case("stream", multiplying("bfloat16", MXFP4, "wide", values, prepared=True)),
    }


def sampled(problem: tune.Problem, rule: tune.Config, count: int, device: torch.device) -> list[tune.Config]:
    """Configs from all over the tuner's space."""
    limits = Limits.of(device)
    found = candidates(problem, rule, limits, lambda config: serves(problem, config, limits))
    return found[:: max(len(found) // count, 1)]


def order_of_sums(config: tune.Config) -> tuple[object, ...]:
    """What the order of a product's sums follows from."""
    if isinstance(config, tune.MatmulConfig):
        return (type(config), config.block_k, config.promote)
    if isinstance(config, tune.SmallMatmulConfig):
        return (type(config), config.cols, config.splits)
    if isinstance(config, tune.HopperConfig):
        return (type(config), config.promote)
    return ()


def outputs(case: Case, device: torch.device, shape: Shape, count: int) -> Iterator[tuple[tune.Config, Outputs]]:
    """What a case gives under the rule's config, and under others for each of its op's problems in turn."""
    call = case.call(device, shape)
    with tune.recording() as seen:
        expected = call()
    problems = {problem: choice.config for problem, choice in seen.items() if problem.op == case.op}
    assert problems
    for problem, rule in problems.items():
        yield rule, expected
        for config in sampled(problem, rule, count, device):
            with tune.pinned(problem, config), tune.recording() as seen:
                try:
                    found = call()
                except OutOfResources:  # which only the compiler knows
                    continue
            assert seen[problem].config == config
            yield config, found


def check_bytes(case: Case, device: torch.device, shape: Shape, count: int) -> None:
    """The same bytes under all configs."""
    expected, configs = None, set()
    for config, found in outputs(case, device, shape, count):
        expected = expected or found
        poisoned.assert_same_parts(found, expected, config)
        configs.add(config)
    assert len(configs) > 1


def check_order(case: Case, device: torch.device, shape: Shape, count: int) -> None:
    """The same bits under configs that take the sums in the same order."""
    first: dict[tuple[object, ...], Outputs] = {}
    compared = 0
    for config, found in outputs(case, device, shape, count):
        known = first.setdefault(order_of_sums(config), found)
        compared += known is not found
        poisoned.assert_same_parts(found, known, config)
    assert compared

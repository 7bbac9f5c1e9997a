"""The recorded measurements of the casts: groups of cases, and a command that measures one of them.

    python bench/casts.py GROUP --results DIR      writes DIR/<gpu>-<GROUP>.json

The schema is that of `mxkernels bench --format json`; that of `transforms`, and of what `overhead` compares with, is
what remains of it without a spec.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from recording import record

sys.path.insert(0, str(Path(__file__).parents[1]))

from mxkernels import FORMATS, MXSpec
from mxkernels.bench import Bench, Case
from mxkernels.environment import device_name
from mxkernels.ops import hadamard
from mxkernels.ops import quantize as quantize_tensor
from mxkernels.ops.transform import random_signs
from mxkernels.perf import DEFAULT_SHAPE, Ceilings, time_call, time_host
from mxkernels.recipes import HADAMARD_SIZES
from mxkernels.tune import Problem, find_config, quantize_config

LARGE = DEFAULT_SHAPE["cuda"]
E2M1 = MXSpec("e2m1")
TILES = replace(E2M1, block=MXSpec("e2m1", "4x4").block)


def quantize(*specs: MXSpec, shape: tuple[int, ...] = LARGE, **options: Any) -> list[Case]:
    return [Case("quantize", spec, shape, **options) for spec in specs]


def dequantize(*specs: MXSpec, shape: tuple[int, ...] = LARGE, **options: Any) -> list[Case]:
    return [Case("dequantize", spec, shape, **options) for spec in specs]


def casts() -> list[Case]:
    """Every axis of the contract, one at a time away from e2m1, 1x32, rtne, even, symmetric, bf16."""
    stochastic = [replace(spec, rounding="stochastic") for spec in (E2M1, TILES)]
    asymmetric = [MXSpec(element, symmetric=False) for element in ("e2m1", "int4")]
    few = [E2M1, TILES, MXSpec("e4m3")]
    return [
        *quantize(*(MXSpec(element) for element in FORMATS)),
        *quantize(*(MXSpec("e2m1", block) for block in ("1x16", "4x4", "16x16", "32x32", "32x1"))),
        *quantize(*(MXSpec("e2m1", scale_rounding=rule) for rule in ("floor", "ceil", "rceil"))),
        *quantize(*stochastic, *asymmetric),
        *quantize(*few, transposed=True),
        *(Case("quantize_pair", spec, LARGE) for spec in (*few, MXSpec("e2m1", "16x16"))),
        *dequantize(*(MXSpec(element, block) for element in FORMATS for block in ("1x32", "4x4"))),
        *dequantize(*asymmetric),
        *(case for dtype in (torch.float16, torch.float32) for case in quantize(*few, dtype=dtype)),
        *(case for dtype in (torch.float16, torch.float32) for case in dequantize(*few, dtype=dtype)),
        *quantize(*few, *stochastic, shape=(4096, 4096)),
        *(Case("quantize_pair", spec, (4096, 4096)) for spec in few),
        *dequantize(*few, shape=(4096, 4096)),
    ]


def sizes() -> list[Case]:
    """Time against size, 2**20 to 2**32 elements."""
    shapes = [(1 << (bits // 2), 1 << (bits - bits // 2)) for bits in range(20, 33, 2)]
    return [Case(op, E2M1, shape) for shape in shapes for op in ("quantize", "dequantize")]


def overhead() -> list[Case]:
    """Tensors so small that the host's work is what a call costs."""
    specs = [E2M1, TILES, replace(E2M1, rounding="stochastic")]
    return [Case(op, spec, (64, 64)) for spec in specs for op in ("quantize", "dequantize", "quantize_pair")]


GROUPS = {"casts": casts, "sizes": sizes, "overhead": overhead}


def measure(group: str, bench: Bench, cases: Sequence[Case]) -> list[dict[str, Any]]:
    """The rows of a group; those of `overhead` also say how long the host is busy with one call (`host_us`)."""
    rows = []
    for number, case in enumerate(cases, 1):
        row = bench.row(case)
        if group == "overhead":
            row["host_us"] = bench.host(case).median_us
        rows.append(row)
        print(f"{number}/{len(cases)} {case}: {row['median_us']:.1f} us, {row['fraction_of_limit']:.3f}", flush=True)
    return rows


def transforms(device: torch.device, shape: tuple[int, ...] = LARGE, seconds: float = 0.3) -> list[dict[str, Any]]:
    """A row for `hadamard` of bfloat16 at each size, with signs and without, beside a copy of the same run."""
    x = torch.randn(shape, dtype=torch.bfloat16, device=device)
    ceiling = Ceilings(device, seconds).copy(x.nbytes, x.nbytes)
    rows = []
    for size, signed in product(HADAMARD_SIZES, (False, True)):
        call = partial(hadamard, x, size, random_signs(x, size) if signed else None)
        timing = time_call(call, device, seconds)
        gbps = ceiling.traffic_bytes / timing.median_us / 1e3
        row = {
            "op": "hadamard",
            "size": size,
            "signs": signed,
            "shape": list(shape),
            "dtype": "bf16",
            "device": device_name(device),
            "median_us": timing.median_us,
            "p10_us": timing.p10_us,
            "p90_us": timing.p90_us,
            "samples": len(timing.samples_us),
            "gbps": gbps,
            "fraction_of_limit": gbps / ceiling.gbps,
            "limit": ceiling.name,
            "limit_gbps": ceiling.gbps,
            "traffic_bytes": ceiling.traffic_bytes,
        }
        rows.append(row)
        words = f"hadamard {size}{', signs' * signed}"
        print(f"{words}: {timing.median_us:.1f} us, {row['fraction_of_limit']:.3f}", flush=True)
    return rows


def host_parts(device: torch.device) -> list[dict[str, Any]]:
    """A row for how long the host is busy with looking a config up that is known, which is part of a first call; one
    for a call of torch's that does what a cast does: it allocates two tensors and launches a kernel; and, on a GPU, one
    for the launch alone, by the driver and Triton's launcher."""
    x = torch.randn(64, 64, device=device)
    problem = Problem.of("quantize", E2M1, x.dtype, "rows", *x.shape)
    rule = partial(quantize_config, E2M1, *x.shape, x.element_size(), True, False)
    calls: dict[str, Any] = {
        "find_config": partial(find_config, problem, device, rule),
        "torch.frexp": partial(torch.frexp, x),
    }
    if device.type == "cuda":
        calls["launch"] = bare_launch(x)
    rows = []
    for name, call in calls.items():
        rows.append({"op": name, "device": device_name(device), "host_us": time_host(call, device).median_us})
        print(f"{name}: {rows[-1]['host_us']:.2f} us of the host", flush=True)
    return rows


def bare_launch(x: torch.Tensor) -> Callable[[], Any]:
    """The launch of a cast of `x`, on memory that is there."""
    from mxkernels.ops.quantize_kernel import quantize_launch

    q = quantize_tensor(x, E2M1)
    launch = quantize_launch(x, E2M1, None, [q.codes, q.scale])
    addresses = [None if each is None else each.data_ptr() for each in launch.tensors.values()]
    again = launch.run(x.device).directly()
    stream = torch.cuda.current_stream(x.device).cuda_stream

    def call() -> Any:
        again(stream, addresses)
        return x, q  # whose memory it is on, which so is not freed

    return call


def rows_of(group: str, device: torch.device) -> list[dict[str, Any]]:
    if group == "transforms":
        return transforms(device)
    rows = measure(group, Bench(device), GROUPS[group]())
    return rows + host_parts(device) if group == "overhead" else rows


if __name__ == "__main__":
    record(__doc__, [*GROUPS, "transforms"], rows_of)

"""The recorded measurements of the matrix products: groups of cases, and a command that measures one of them.

    python bench/products.py GROUP --results DIR      writes DIR/<gpu>-<GROUP>.json

The schema is that of `mxkernels bench --op matmul --format json`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from recording import record

sys.path.insert(0, str(Path(__file__).parents[1]))

from mxkernels import MXSpec, mxfp8_e4m3, mxint8
from mxkernels.bench_products import ProductBench, ProductCase, timings

Shape = tuple[int, int, int]

SQUARE: Shape = (8192, 8192, 8192)
LAYERS: tuple[Shape, ...] = (SQUARE, (4096, 14336, 4096))  # M, N, K of a layer's forward product
WEIGHTS = ((8192, 8192), (4096, 14336))  # N, K while decoding
E2M1, TILES, LARGER_TILES, E2M3 = MXSpec("e2m1"), MXSpec("e2m1", "4x4"), MXSpec("e2m1", "16x16"), MXSpec("e2m3")

BOTH_MX = ("folded", "codes", "plain")


def alike(spec: MXSpec, shape: Shape, *timed_from: str, **options: Any) -> list[ProductCase]:
    """Both operands of one spec."""
    return [ProductCase(shape, spec, spec, start, **options) for start in timed_from]


def training(shape: Shape, spec: MXSpec, *timed_from: str) -> list[ProductCase]:
    """The three products of a layer y = x wᵀ, whose x, w and dy lie row-major.

    From codes, square blocks have one copy of each, and others one for each orientation.
    """
    tokens, outputs, inputs = shape
    return [
        *alike(spec, (tokens, outputs, inputs), *timed_from, name="forward, x wᵀ"),
        *alike(spec, (tokens, inputs, outputs), *timed_from, b_turned=True, name="dgrad, dy w"),
        *alike(spec, (outputs, inputs, tokens), *timed_from, a_turned=True, b_turned=True, name="wgrad, dyᵀ x"),
    ]


def products() -> list[ProductCase]:
    """Large products from every start, those of training among them; decoding; the path that multiplies in bf16."""
    return [
        *(case for shape in LAYERS for case in alike(E2M1, shape, "folded")),
        *(case for shape in LAYERS for case in alike(E2M3, shape, *BOTH_MX)),
        *(case for shape in LAYERS for case in alike(LARGER_TILES, shape, "codes")),
        *(case for shape in LAYERS for spec in (E2M1, TILES) for case in training(shape, spec, "codes", "plain")),
        *(
            ProductCase((m, *weight), torch.bfloat16, E2M1, start, name="weights only")
            for weight in WEIGHTS
            for m in (1, 4, 16, 64, 256, 1024)
            for start in timings(torch.bfloat16, E2M1, m)
        ),
        *(case for weight in WEIGHTS for m in (64, 256, 1024) for case in alike(E2M1, (m, *weight), "folded")),
        *(
            case
            for spec in (E2M1, mxfp8_e4m3, mxint8)
            for case in alike(spec, SQUARE, "codes", path="wide", name="in bf16")
        ),
    ]


def overhead() -> list[ProductCase]:
    """Operands so small that the host's work is what a call costs."""
    both = [case for spec in (E2M1, TILES) for case in alike(spec, (64, 64, 64), *BOTH_MX)]
    return [*both, replace(both[1], a=torch.bfloat16), replace(both[1], a=torch.bfloat16, shape=(1, 64, 64))]


GROUPS = {"products": products, "products-overhead": overhead}


def measure(group: str, bench: ProductBench, cases: Sequence[ProductCase]) -> list[dict[str, Any]]:
    """The rows of a group; those of the overhead also say how long the host is busy with one call (`host_us`)."""
    rows = []
    for number, case in enumerate(cases, 1):
        row = bench.row(case)
        if group == "products-overhead":
            row["host_us"] = bench.host(case).median_us
        rows.append(row)
        print(f"{number}/{len(cases)} {case}: {row['median_us']:.1f} us, {row['vs_bf16']:.2f} of bf16", flush=True)
    return rows


if __name__ == "__main__":
    record(__doc__, GROUPS, lambda group, device: measure(group, ProductBench(device), GROUPS[group]()))

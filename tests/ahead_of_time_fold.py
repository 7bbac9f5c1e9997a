"""Compile what folds, and what redoes that which does not fold, for GPUs that are not here: a line of JSON each.

    python tests/ahead_of_time_fold.py

It is a process of its own, since that of the tests interprets kernels.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator

if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton

from mxkernels import gpu
from mxkernels.folded import Outside, folded_spec, window
from mxkernels.ops.fold_kernel import fold_launch, quantize_fold_launch, reference_launch
from mxkernels.ops.launch import Launch
from mxkernels.ops.matmul_wide_kernel import WideOperand, matmul_wide_launch
from mxkernels.spec import MXSpec
from mxkernels.tune import fold_config, guarded_matmul_config, quantize_fold_config
from mxkernels.tune.aot import compile_launch

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx950")
ROWS, U8, I32 = 4096, torch.uint8, torch.int32


def empty(*shape: int, dtype: torch.dtype = U8) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def flags(spec: MXSpec, rows: int, k: int) -> Outside:
    return Outside(empty(1, dtype=I32), empty(spec.scale_shape(rows, k)[0]))


def fold(text: str, turned: bool, capabilities: gpu.Capabilities) -> Iterator[tuple[str, Launch]]:
    spec, cols = MXSpec.parse(text), 2048
    found = window(spec.element)
    codes, scale = empty(ROWS, spec.packed_cols(cols)), empty(*spec.scale_shape(ROWS, cols))
    lines, k, after = (cols, ROWS, spec.T) if turned else (ROWS, cols, spec)
    reference, outside = empty(after.scale_shape(lines, k)[0]), flags(after, lines, k)
    yield f"reference {text}", reference_launch(scale, reference, found.top, turned, outside=outside)
    folded, byte = empty(lines, k, dtype=carrier(spec, capabilities)), empty(*after.scale_shape(lines, k))
    config = fold_config(spec, ROWS, cols, turned)
    parts = (reference, folded, byte, outside, config, capabilities)
    yield f"fold {text}", fold_launch(codes, scale, cols, spec, turned, found, *parts)


def quantize_fold(text: str, cols: int, dtype: torch.dtype, capabilities: gpu.Capabilities) -> tuple[str, Launch]:
    spec = MXSpec.parse(text)
    seed = empty(1, dtype=torch.int64) if spec.stochastic else None
    outputs = (
        empty(spec.scale_shape(ROWS, cols)[0]),
        empty(ROWS, cols, dtype=carrier(spec, capabilities)),
        empty(*spec.scale_shape(ROWS, cols)),
    )
    config = quantize_fold_config(spec, cols, dtype.itemsize)
    parts = (*outputs, flags(spec, ROWS, cols), config, capabilities)
    return f"quantize_fold {text} {cols}", quantize_fold_launch(
        empty(ROWS, cols, dtype=dtype), spec, seed, window(spec.element), *parts
    )


def redo(exact: bool, capabilities: gpu.Capabilities) -> tuple[str, Launch]:
    k, spec = 2048, folded_spec(MXSpec("e2m1"))
    side = WideOperand(empty(ROWS, k), empty(*spec.scale_shape(ROWS, k)), None, spec, False, flags(spec, ROWS, k))
    lost, out = empty(1, dtype=I32), empty(ROWS, ROWS, dtype=torch.bfloat16)
    config = guarded_matmul_config(exact)
    return f"redo exact={exact}", matmul_wide_launch(
        (side, side), k, None, out, lost, lost, exact, config, capabilities
    )


def carrier(spec: MXSpec, capabilities: gpu.Capabilities) -> torch.dtype:
    if not capabilities.fp8_mma:
        return U8
    return torch.float8_e4m3fn if window(spec.element).carrier.name == "e4m3" else torch.float8_e5m2


def launches(capabilities: gpu.Capabilities) -> Iterator[tuple[str, Launch]]:
    yield from fold("e2m1 1x32 rtne even symmetric", False, capabilities)
    yield from fold("e2m3 4x4 rtne even symmetric", True, capabilities)
    yield quantize_fold("e2m1 1x32 rtne even symmetric", 2048, torch.float32, capabilities)
    yield quantize_fold("e2m1 1x32 stochastic even symmetric", 6144, torch.bfloat16, capabilities)
    yield quantize_fold("e2m1 1x32 stochastic even symmetric", 14336, torch.float32, capabilities)
    yield quantize_fold("int4 4x4 rtne ceil symmetric", 14336, torch.bfloat16, capabilities)
    if capabilities.fp8_mma:  # without which products fold nothing
        yield quantize_fold("e2m1 128x128 stochastic even symmetric", 14336, torch.bfloat16, capabilities)
        yield quantize_fold("e2m1 32x32 rtne even symmetric", 14336, torch.float32, capabilities)
        yield redo(False, capabilities)
        yield redo(True, capabilities)


if __name__ == "__main__":
    for architecture in ARCHITECTURES:
        for name, launch in launches(gpu.capabilities(architecture)):
            made = compile_launch(launch, architecture)
            outcome = {
                "launch": name, "gpu": architecture, "triton": triton.__version__, "spilled_bytes": made.spilled_bytes
            }  # fmt: skip
            print(json.dumps(outcome), flush=True)

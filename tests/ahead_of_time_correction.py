"""Compile what the FP8 path runs for offsets, for GPUs that are not here, and say what came of it: a line of JSON each.

    python tests/ahead_of_time_correction.py

It is a process of its own, since that of the tests interprets kernels.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator

if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)

import torch

from mxkernels import gpu
from mxkernels.ops.correction import Columns
from mxkernels.ops.correction_kernel import correction_launch
from mxkernels.ops.launch import Launch
from mxkernels.ops.matmul_kernel import addend_shape, matmul_launch
from mxkernels.ops.matmul_wide_kernel import WideOperand
from mxkernels.spec import MXSpec
from mxkernels.tune import MatmulConfig
from mxkernels.tune.aot import compile_launch

FP16, FP32, E5M2, U8 = torch.float16, torch.float32, torch.float8_e5m2, torch.uint8
ROWS, K = 4096, 8192
SIDES = (("e2m1 1x32", False, "OSO"), ("e2m1 1x32", False, "O"), ("int4 4x4", True, "SON"), ("e3m2 128x1", True, "SsO"))
MULTIPLIES = re.compile(r"(?:wgmma\.mma_async|mma\.sync|tcgen05\.mma)\S+tf32|v_mfma_f32\S+")


def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def columns(kind: str, turned: bool, sections: str, capabilities: gpu.Capabilities) -> Launch:
    spec = MXSpec(*kind.split(), symmetric=False)
    shape = (K, ROWS) if turned else (ROWS, K)
    blocks = spec.scale_shape(*shape)
    codes = empty(shape[0], spec.packed_cols(shape[1]), dtype=U8)
    operand = WideOperand(codes, empty(*blocks, dtype=U8), empty(*blocks, dtype=FP16), spec, turned)
    made = Columns(spec.block.rows if turned else spec.block.cols, sections)
    out = empty(ROWS, made.padded(K), dtype=FP32)
    return correction_launch(operand, K, made, out, empty(1, dtype=torch.int32), capabilities)


def launches(capabilities: gpu.Capabilities) -> Iterator[tuple[str, Launch]]:
    for side in SIDES:
        yield " ".join(map(str, side)), columns(*side, capabilities)
    addend, small = empty(*addend_shape(ROWS, ROWS), dtype=FP32), empty(ROWS, 768, dtype=FP32)
    config = MatmulConfig(128, 128, 32, 8, 3)
    yield "tf32", matmul_launch(small, small, 768, None, (1, 1), None, addend, config, capabilities=capabilities)
    codes, reference, out = empty(ROWS, K, dtype=E5M2), empty(ROWS, dtype=U8), empty(ROWS, ROWS, dtype=torch.bfloat16)
    config = MatmulConfig(128, 128, 128, 8, 4, promote=512)
    sides = (codes, codes, K, (reference, reference), (1, 1), None, out, config)
    yield "fp8", matmul_launch(*sides, addend=addend, capabilities=capabilities)


if __name__ == "__main__":
    for architecture in ("sm_89", "sm_90", "sm_100"):
        for name, launch in launches(gpu.capabilities(architecture)):
            made = compile_launch(launch, architecture)
            found = sorted(set(MULTIPLIES.findall(made.assembly)))
            outcome = {"launch": name, "gpu": architecture, "spilled_bytes": made.spilled_bytes, "multiplies": found}
            print(json.dumps(outcome), flush=True)

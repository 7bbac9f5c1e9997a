"""Compile Hopper's product for a GPU that is not here, and say what came of it: a line of JSON for each case.

    python tests/ahead_of_time_hopper.py

It is a process of its own, since that of the tests interprets kernels, and may find another Triton on PYTHONPATH.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict, dataclass

if __name__ == "__main__":  # not where a test imports the list of cases
    os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton

from mxkernels.ops.launch import Launch
from mxkernels.ops.matmul_hopper_kernel import hopper_matmul_launch
from mxkernels.ops.matmul_kernel import addend_shape
from mxkernels.tune import hopper_tile_config
from mxkernels.tune.aot import compile_launch

META = torch.device("meta")
E5M2, E4M3, BF16 = torch.float8_e5m2, torch.float8_e4m3fn, torch.bfloat16
FP16, FP32 = torch.float16, torch.float32

# What multiplies, loads, stores, and shares registers out.
INSTRUCTIONS = re.compile(r"wgmma\.mma_async\S+|setmaxnreg\.\w+|cp\.async\.bulk\.tensor\.2d\.(?:shared|global)")


@dataclass(frozen=True)
class Case:
    """A product of two carriers in tiles of 128 x `cols * pieces`, and the instruction that it is there for."""

    a: torch.dtype
    b: torch.dtype
    out: torch.dtype
    cols: int
    pieces: int
    instruction: str
    bias: bool = False
    addend: bool = False

    @property
    def name(self) -> str:
        a, b, out = (str(dtype).removeprefix("torch.") for dtype in (self.a, self.b, self.out))
        added = f"{' bias' if self.bias else ''}{' addend' if self.addend else ''}"
        return f"{a} x {b} to {out} {self.cols} x {self.pieces}{added}"

    def launch(self) -> Launch:
        def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=META)

        m, n, k = 8192, 4096, 2048
        return hopper_matmul_launch(
            empty(m, k, dtype=self.a),
            empty(n, k, dtype=self.b),
            k,
            None if self.a.itemsize > 1 else (empty(m, dtype=torch.uint8), empty(n // 4, dtype=torch.uint8)),
            (1, 4),
            empty(n, dtype=self.out) if self.bias else None,
            empty(m, n, dtype=self.out),
            hopper_tile_config(self.cols, self.pieces, self.a, self.out),
            processors=132,
            addend=empty(*addend_shape(m, n), dtype=FP32) if self.addend else None,
        )


CASES = (
    Case(E5M2, E5M2, BF16, 128, 2, "m64n128k32.f32.e5m2.e5m2"),
    Case(E5M2, E4M3, FP16, 128, 2, "m64n128k32.f32.e5m2.e4m3", bias=True),
    Case(E4M3, E5M2, FP32, 128, 2, "m64n128k32.f32.e4m3.e5m2", bias=True),
    Case(E4M3, E4M3, BF16, 128, 1, "m64n128k32.f32.e4m3.e4m3", bias=True),
    Case(E5M2, E5M2, FP32, 128, 1, "m64n128k32.f32.e5m2.e5m2"),
    Case(E4M3, E5M2, BF16, 64, 1, "m64n64k32.f32.e4m3.e5m2"),
    Case(BF16, BF16, BF16, 128, 2, "m64n128k16.f32.bf16.bf16", bias=True),
    Case(BF16, BF16, FP32, 128, 2, "m64n128k16.f32.bf16.bf16"),
    Case(BF16, BF16, FP16, 256, 1, "m64n256k16.f32.bf16.bf16"),
    Case(BF16, BF16, FP32, 64, 1, "m64n64k16.f32.bf16.bf16"),
    Case(E5M2, E5M2, BF16, 128, 2, "m64n128k32.f32.e5m2.e5m2", addend=True),
    Case(E4M3, E5M2, FP32, 128, 2, "m64n128k32.f32.e4m3.e5m2", bias=True, addend=True),
    Case(E5M2, E5M2, FP16, 128, 1, "m64n128k32.f32.e5m2.e5m2", addend=True),
    Case(E5M2, E4M3, BF16, 64, 1, "m64n64k32.f32.e5m2.e4m3", bias=True, addend=True),
    Case(FP32, FP32, FP32, 128, 2, "m64n128k8.f32.tf32.tf32"),
    Case(FP32, FP32, FP32, 128, 1, "m64n128k8.f32.tf32.tf32"),
    Case(FP32, FP32, FP32, 64, 1, "m64n64k8.f32.tf32.tf32"),
)


@dataclass(frozen=True)
class Outcome:
    """What the compiler made of a case: bytes spilled a thread, bytes of shared memory, and which of the
    INSTRUCTIONS occur."""

    case: str
    spilled_bytes: int = 0
    shared_bytes: int = 0
    instructions: tuple[str, ...] = ()
    error: str = ""


def outcome(case: Case) -> Outcome:
    launch = case.launch()
    try:
        compiled = compile_launch(launch, "sm_90")
    except Exception as error:
        return Outcome(case.name, error=f"{type(error).__name__}: {error}"[-1000:])
    found = tuple(sorted(set(INSTRUCTIONS.findall(compiled.assembly))))
    return Outcome(case.name, compiled.spilled_bytes, compiled.shared_bytes, found)


if __name__ == "__main__":
    for each in CASES:
        print(json.dumps({**asdict(outcome(each)), "triton": triton.__version__}), flush=True)

"""Compile the native product for GPUs that are not here, and say what came of it: a line of JSON for each case.

    python tests/ahead_of_time_native.py sm_100

It is a process of its own, since that of the tests interprets kernels, and may find another Triton on PYTHONPATH.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections import Counter
from dataclasses import asdict, dataclass

if __name__ == "__main__":  # not where a test imports the list of cases: others need the interpreter
    os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton

from mxkernels import gpu
from mxkernels.formats import FORMATS
from mxkernels.ops.launch import Launch
from mxkernels.ops.matmul_native_kernel import matmul_native_launch, native_config
from mxkernels.ops.native_operand import NativeOperand, native_operand
from mxkernels.spec import MXSpec
from mxkernels.tune.aot import compile_launch

META = torch.device("meta")

# What a program may have of shared memory, by the makers' tables.
SHARED_BYTES = {"sm_100": 232448, "sm_103": 232448, "sm_120": 101376, "gfx950": 163840}

# What loads, multiplies, and moves scales.
INSTRUCTIONS = re.compile(
    r"tcgen05\.mma\.\S+|tcgen05\.cp\.\S+|mma\.sync\.\S+|v_mfma_\w+"
    r"|cp\.async\.bulk\.tensor\.\dd|global_load_(?:lds_)?\w+"
)


@dataclass(frozen=True)
class Case:
    """A product of two elements, [M, K] by [N, K] transposed."""

    a: str
    b: str
    dtype: torch.dtype = torch.bfloat16
    m: int = 8192
    n: int = 8192
    k: int = 8192
    bias: bool = True
    guard: bool = True

    @property
    def name(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.a} {self.b} {dtype} {self.m}x{self.n}x{self.k} bias {self.bias} guard {self.guard}"

    def launch(self, architecture: str) -> Launch:
        capabilities = gpu.capabilities(architecture)
        a = empty_operand(self.a, self.m, self.k, capabilities.ptx)
        b = empty_operand(self.b, self.n, self.k, capabilities.ptx)
        return matmul_native_launch(
            a,
            b,
            torch.empty(self.n, dtype=torch.bfloat16, device=META) if self.bias else None,
            torch.empty(1, dtype=torch.int32, device=META) if self.guard else None,
            torch.empty((self.m, self.n), dtype=self.dtype, device=META),
            native_config(a.element, b.element, capabilities.ptx, SHARED_BYTES[architecture]),
            capabilities,
            processors=128,
        )


def empty_operand(element: str, rows: int, k: int, swizzled: bool) -> NativeOperand:
    spec = MXSpec(FORMATS[element])
    codes = torch.empty((rows, spec.packed_cols(k)), dtype=torch.uint8, device=META)
    scale = torch.empty(spec.scale_shape(rows, k), dtype=torch.uint8, device=META)
    return native_operand(codes, scale, spec, k, swizzled)


CASES = (
    Case("e2m1", "e2m1"),
    Case("e2m1", "e2m1", torch.float32),
    Case("e4m3", "e5m2"),
    Case("e5m2", "e5m2", torch.float32),
    Case("e4m3", "e4m3", torch.float16, bias=False, guard=False),
    Case("e2m1", "e4m3"),
    Case("e5m2", "e2m1", torch.float32),
    # odd sizes: nothing is known to be a multiple of anything, but K of what it is padded to
    Case("e2m1", "e2m1", m=1000, n=777, k=1000),
    Case("e5m2", "e4m3", m=1, n=31, k=40),
)


@dataclass(frozen=True)
class Outcome:
    """What the compiler made of a case: bytes spilled and registers a thread, bytes of shared memory, and how often
    which of the INSTRUCTIONS occur."""

    case: str
    spilled_bytes: int = 0
    registers: int = 0
    shared_bytes: int = 0
    instructions: dict[str, int] | None = None
    error: str = ""


def outcome(case: Case, architecture: str) -> Outcome:
    launch = case.launch(architecture)
    try:
        compiled = compile_launch(launch, architecture)
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        return Outcome(case.name, error=f"{type(cause).__name__}: {cause}"[-1000:])
    found = Counter(INSTRUCTIONS.findall(compiled.assembly))
    return Outcome(case.name, compiled.spilled_bytes, compiled.registers, compiled.shared_bytes, dict(found))


if __name__ == "__main__":
    for each in CASES:
        print(json.dumps({**asdict(outcome(each, sys.argv[1])), "triton": triton.__version__}), flush=True)

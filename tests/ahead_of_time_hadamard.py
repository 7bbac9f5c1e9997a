"""Compile the Hadamard kernel for GPUs that are not here; a line of JSON for each case and architecture.

    python tests/ahead_of_time_hadamard.py

It is a process of its own, since that of the tests interprets kernels, and may find another Triton on PYTHONPATH.
"""

from __future__ import annotations

import json
import os
from typing import NamedTuple

if __name__ == "__main__":  # not where a test imports the list of cases: others need the interpreter
    os.environ.pop("TRITON_INTERPRET", None)

import torch

META = torch.device("meta")
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx950")


class Case(NamedTuple):
    """Of a matrix of 16384 x `cols`, which cut tiles unless they are 16384; or, transposed, of that many rows."""

    size: int
    dtype: torch.dtype = torch.bfloat16
    cols: int = 16384
    signed: bool = False
    transposed: bool = False


CASES = (
    Case(16, signed=True),
    Case(32, torch.float16, cols=16381),
    Case(64, transposed=True, signed=True),
    Case(128, torch.float32, signed=True),
)


def main() -> None:
    from mxkernels import gpu
    from mxkernels.ops.hadamard_kernel import hadamard_launch
    from mxkernels.tune.aot import compile_launch

    for architecture in ARCHITECTURES:
        for case in CASES:
            x = torch.empty((16384, case.cols), dtype=case.dtype, device=META)
            x = x.T if case.transposed else x
            out = torch.empty((x.shape[0], -(-x.shape[1] // case.size) * case.size), dtype=case.dtype, device=META)
            signs = torch.empty(case.size, dtype=torch.int8, device=META) if case.signed else None
            launch = hadamard_launch(x, case.size, signs, out, gpu.capabilities(architecture))
            compiled = compile_launch(launch, architecture)
            outcome = {"size": case.size, "architecture": architecture, "spilled_bytes": compiled.spilled_bytes}
            print(json.dumps(outcome), flush=True)


if __name__ == "__main__":
    main()

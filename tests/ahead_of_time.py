"""Compile every path of the cast kernels for a GPU that is not here, and say what came of it.

    python tests/ahead_of_time.py sm_90            a line of JSON for each case
    python tests/ahead_of_time.py sm_90 --count    machine instructions an element too (NVIDIA; takes twice as long)
    python tests/ahead_of_time.py --record         writes instructions.json: those of sm_90

It is a process of its own, since that of the tests interprets kernels, and may find another Triton on PYTHONPATH.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

if __name__ == "__main__":  # not where a test imports the list of cases: others need the interpreter
    os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton

from mxkernels import gpu
from mxkernels.ops.dequantize_kernel import dequantize_launch
from mxkernels.ops.launch import Launch
from mxkernels.ops.quantize_kernel import quantize_launch
from mxkernels.ops.quantize_pair_kernel import quantize_pair_launch
from mxkernels.spec import MXSpec
from mxkernels.tune import CastConfig, PairConfig
from mxkernels.tune.aot import Compiled, compile_launch

RECORD = Path(__file__).with_name("instructions.json")
RECORDED_ON = "sm_90"
META = torch.device("meta")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

# Instructions that a path is there for; `test_aot` says which cases have them.
INSTRUCTIONS = (
    "cvt.rn.satfinite.e4m3x2.f32",
    "cvt.rn.satfinite.e5m2x2.f32",
    "cvt.rn.satfinite.e2m1x2.f32",
    "cvt.rn.f16x2.f32",
    "cvt.rz.f16x2.f32",
    "cvt.rn.f16x2.e4m3x2",
    "cvt.rn.f16x2.e5m2x2",
    "mul.rz.f32",
    "fma.rn.bf16x2",
    "max.NaN.xorsign.abs.bf16x2",
    "cp.async.cg.shared.global",
    "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16",
    "evict_last",
)


@dataclass(frozen=True)
class Case:
    """A launch on a large matrix: its columns fill tiles (16384), cut them (16416), or give packed rows that are not
    whole words (16381). The config is the library's own, but for some pairs, which have another where there is PTX.
    """

    op: str
    spec: str
    dtype: torch.dtype = BF16
    cols: int = 16384
    transposed: bool = False
    config: CastConfig | PairConfig | None = None

    @property
    def name(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        config = "" if self.config is None else f" {self.config}"
        return f"{self.op} {self.spec} {dtype} {self.cols}{' transposed' if self.transposed else ''}{config}"

    def launch(self, architecture: str) -> Launch:
        spec = MXSpec.parse(self.spec)
        capabilities = gpu.capabilities(architecture)
        matrix = torch.empty((16384, self.cols), dtype=self.dtype, device=META)
        parts = empty_parts(*matrix.shape, spec)
        if self.op == "dequantize":
            offset = None if spec.symmetric else parts[2]
            return dequantize_launch(parts[0], parts[1], offset, spec, matrix, capabilities=capabilities)
        if self.transposed:
            matrix = torch.empty((self.cols, 16384), dtype=self.dtype, device=META).T
        seed = torch.empty(1, dtype=torch.int64, device=META) if spec.stochastic else None
        if self.op == "quantize_pair":
            parts += empty_parts(*matrix.T.shape, spec)
            config = self.config if capabilities.ptx else None
            return quantize_pair_launch(matrix, spec, seed, parts, config, capabilities)
        return quantize_launch(matrix, spec, seed, parts, capabilities=capabilities)


def empty_parts(rows: int, cols: int, spec: MXSpec) -> list[torch.Tensor]:
    blocks = spec.scale_shape(rows, cols)
    parts = [torch.empty((rows, spec.packed_cols(cols)), dtype=torch.uint8, device=META)]
    parts.append(torch.empty(blocks, dtype=torch.uint8, device=META))
    if not spec.symmetric:
        parts.append(torch.empty(blocks, dtype=torch.float16, device=META))
    return parts


CASES = (
    # elements to nearest: 4 bits, 6, 8, integers, each as short, longer or full significands
    Case("quantize", "e2m1 1x32 rtne even symmetric"),
    Case("quantize", "e3m0 1x32 rtne floor asymmetric"),
    Case("quantize", "e2m3 1x32 rtne even symmetric"),
    Case("quantize", "e3m2 1x16 rtne ceil symmetric", FP32),
    Case("quantize", "e4m3 1x32 rtne rceil symmetric"),
    Case("quantize", "e5m2 4x4 rtne rceil asymmetric"),
    Case("quantize", "int4 1x32 rtne ceil asymmetric"),
    Case("quantize", "int8 1x32 rtne floor symmetric"),
    # stochastically: 4 bits, wider, integers
    Case("quantize", "e2m1 1x32 stochastic even symmetric"),
    Case("quantize", "e4m3 4x4 stochastic rceil asymmetric"),
    Case("quantize", "e2m3 1x32 stochastic even symmetric"),
    Case("quantize", "int8 1x32 stochastic floor symmetric"),
    # blocks down the columns
    Case("quantize", "e2m1 32x1 rtne even symmetric", FP16),
    # what registers hold least of
    Case("quantize", "e2m1 32x1 rtne even symmetric", FP32),
    Case("quantize", "e2m1 32x32 stochastic even asymmetric", FP32, cols=16381),
    # memory: columns contiguous, both orientations, tiles cut by the edge, rows of odd bytes
    Case("quantize", "e2m1 1x32 rtne even symmetric", transposed=True),
    Case("quantize_pair", "e2m1 1x32 rtne even symmetric"),
    Case("quantize_pair", "int8 4x4 rtne even asymmetric", cols=16381),
    Case("quantize_pair", "e4m3 1x32 rtne even symmetric", transposed=True),
    Case("quantize_pair", "e4m3 1x32 rtne even asymmetric"),
    Case("quantize_pair", "int4 1x16 stochastic ceil symmetric", FP16),
    Case("quantize_pair", "e2m1 4x4 stochastic even symmetric"),
    Case("quantize_pair", "e2m1 1x32 rtne even symmetric", config=PairConfig(128, 256, 8, 2)),
    Case("quantize_pair", "e4m3 4x4 rtne even symmetric", config=PairConfig(128, 128, 4, 1)),
    Case("quantize_pair", "e2m1 1x32 rtne even symmetric", config=CastConfig(128, 64, 4, square=True, wide=True)),
    Case("quantize", "e2m1 1x32 rtne even asymmetric", cols=16416),
    Case("quantize", "e2m3 4x4 rtne even symmetric", cols=16381),
    # decoding: every width, offsets, every output
    Case("dequantize", "e2m1 1x32 rtne even symmetric"),
    Case("dequantize", "e2m3 1x32 rtne even symmetric", FP16),
    Case("dequantize", "e4m3 4x4 rtne rceil symmetric", FP32),
    Case("dequantize", "e5m2 32x1 rtne rceil asymmetric", FP16),
    Case("dequantize", "int8 1x32 rtne floor asymmetric", cols=16416),
    Case("dequantize", "e3m2 1x32 rtne even symmetric", cols=16381),
)


@dataclass(frozen=True)
class Outcome:
    """What the compiler made of a case: bytes spilled and registers a thread, the INSTRUCTIONS that occur, and
    machine instructions an element, if they were counted."""

    case: str
    spilled_bytes: int = 0
    registers: int = 0
    instructions: tuple[str, ...] = ()
    per_element: float | None = None
    error: str = ""


def outcome(case: Case, architecture: str, count: bool) -> Outcome:
    launch = case.launch(architecture)
    try:
        compiled = compile_launch(launch, architecture)
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        return Outcome(case.name, error=f"{type(cause).__name__}: {cause}"[-1000:])
    return Outcome(
        case.name,
        compiled.spilled_bytes,
        compiled.registers,
        tuple(instruction for instruction in INSTRUCTIONS if instruction in compiled.assembly),
        per_element(launch, compiled) if count else None,
    )


def per_element(launch: Launch, compiled: Compiled) -> float:
    """Machine instructions of a thread over its elements; kernels have no loops, but that over the cells of pairs."""
    config = launch.arguments["CONFIG"]
    tile = config.SIDE**2 if isinstance(config, PairConfig) else config.tile_rows * config.tile_cols
    elements = tile / (32 * launch.options["num_warps"])
    return round(len(compiled.sass) / elements, 2)


def outcomes(architecture: str, count: bool) -> Iterator[Outcome]:
    for case in CASES:
        yield outcome(case, architecture, count)


def record() -> None:
    """Write `instructions.json`."""
    found = list(outcomes(RECORDED_ON, count=True))
    if failed := [each.case for each in found if each.error]:
        sys.exit(f"not recorded, since these do not compile: {', '.join(failed)}")
    table = {
        "architecture": RECORDED_ON,
        "triton": triton.__version__,
        "instructions_per_element": {each.case: each.per_element for each in found},
    }
    RECORD.write_text(json.dumps(table, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    architecture, *options = sys.argv[1:]
    if architecture == "--record":
        record()
    else:
        for each in outcomes(architecture, count=options == ["--count"]):
            print(json.dumps({**asdict(each), "triton": triton.__version__}), flush=True)

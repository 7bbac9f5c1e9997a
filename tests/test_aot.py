"""Every path of the cast kernels, compiled ahead of time for GPUs that are not here: it compiles, spills nothing,
has the instructions that it is there for, and grows no longer unnoticed."""

from __future__ import annotations

import json
import math
import re
from typing import Any

import pytest

pytest.importorskip("triton", reason="kernels need Triton")

import torch
import triton
from ahead_of_time import CASES, RECORD, RECORDED_ON, Case
from tritons import FETCHED, ROOT, compiled, run_with

from mxkernels import gpu
from mxkernels.spec import MXSpec

REGENERATE = "python tests/ahead_of_time.py --record"
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx950")
GROWTH = 1.1
TURNED_LOAD = "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16"


def compile_all(architecture: str, version: str, *options: str) -> dict[str, dict[str, Any]]:
    """The outcome of every case, in a process with that Triton (`"installed"`: the one that is)."""
    lines = compiled(version, "ahead_of_time.py", architecture, *options).splitlines()
    found = {outcome["case"]: outcome for outcome in map(json.loads, lines)}
    assert found.keys() == {case.name for case in CASES}
    if version != "installed":
        assert {outcome["triton"] for outcome in found.values()} == {version}
    return found


def expected_instructions(case: Case, architecture: str) -> set[str]:
    """Of `ahead_of_time.INSTRUCTIONS`, those that a case needs on an architecture."""
    able = gpu.capabilities(architecture)
    if not able.ptx:
        return set()
    spec = MXSpec.parse(case.spec)
    element = spec.element
    expected = set()
    launch = case.launch(architecture)
    if launch.kernel.__name__ == "quantize_pair_kernel":
        expected |= {"cp.async.cg.shared.global", TURNED_LOAD, "evict_last"}
    if case.op == "dequantize":
        if able.cvt_fp8 and element.special != "none":
            expected.add(f"cvt.rn.f16x2.{element.name}x2")
        if case.dtype == torch.float16:
            expected.add("cvt.rn.f16x2.f32")
        return expected
    config = launch.arguments["CONFIG"]
    if min(config.tile_cols, config.tile_rows if case.op == "quantize_pair" else math.inf) < 32 * spec.block.cols:
        expected.add("evict_last")  # fewer scales a row than a sector of 32 bytes has
    if spec.symmetric and case.dtype != torch.float32 and able.xorsign:
        expected.add("max.NaN.xorsign.abs.bf16x2")
    four_bit_float = element.bits == 4 and not element.twos_complement
    pairs = four_bit_float and spec.symmetric and case.dtype == torch.bfloat16
    if spec.stochastic:
        expected |= {"mul.rz.f32", *(["fma.rn.bf16x2"] if pairs else [])}
    elif able.cvt_e2m1 and element.name == "e2m1":
        expected.add("cvt.rn.satfinite.e2m1x2.f32")
    elif four_bit_float:
        expected |= {"fma.rn.bf16x2"} if pairs and element.mantissa_bits else {"cvt.rz.f16x2.f32", "mul.rz.f32"}
    elif able.cvt_fp8 and not element.twos_complement:
        expected.add(f"cvt.rn.satfinite.{'e4m3' if element.mantissa_bits == 3 else 'e5m2'}x2.f32")
    return expected


def check(found: dict[str, dict[str, Any]], architecture: str) -> None:
    assert not [(each["case"], each["error"]) for each in found.values() if each["error"]], architecture
    assert not [(each["case"], each["spilled_bytes"]) for each in found.values() if each["spilled_bytes"]], architecture
    for case in CASES:
        instructions, expected = set(found[case.name]["instructions"]), expected_instructions(case, architecture)
        instructions -= {TURNED_LOAD} - expected  # where Triton turns what it had in registers
        if "asymmetric" in case.spec:  # the compiler may round two offsets to fp16 at a time
            instructions -= {"cvt.rn.f16x2.f32"} - expected
        assert instructions == expected, f"{case.name} on {architecture}"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("version", FETCHED)
def test_every_path_compiles(version: str, architecture: str) -> None:
    check(compile_all(architecture, version), architecture)


def test_the_installed_triton_and_the_number_of_instructions() -> None:
    """No case has grown by more than a tenth since it was recorded with the same Triton."""
    found = compile_all(RECORDED_ON, "installed", "--count")
    check(found, RECORDED_ON)
    assert RECORD.exists(), f"there is no record yet: {REGENERATE}"
    recorded = json.loads(RECORD.read_text("utf-8"))
    if recorded["triton"] != triton.__version__:
        pytest.skip(f"{RECORD.name} is of Triton {recorded['triton']}, installed is {triton.__version__}: {REGENERATE}")
    before = recorded["instructions_per_element"]
    assert before.keys() == found.keys(), f"the cases have changed: {REGENERATE}"
    grown = {
        name: (before[name], outcome["per_element"])
        for name, outcome in found.items()
        if outcome["per_element"] > GROWTH * before[name]
    }
    assert not grown, f"instructions an element, before and now: {grown}; if they earn it: {REGENERATE}"


# Prints Triton's key of every kernel, each as `compile_launch` or `Launch.run` finds it, in the order given.
KEYS = """
import importlib, json, sys
import torch
from mxkernels.ops.launch import Launch
from mxkernels.tune import aot

keys, way, names = {}, sys.argv[1], sys.argv[2:]
for module, name in (each.split(".") for each in names):
    kernel = getattr(importlib.import_module(f"mxkernels.ops.{module}"), name)
    type(kernel).__getitem__ = lambda self, programs: lambda **given: None  # launches nothing
    try:
        launch = Launch(kernel, 1, {}, {}, {})
        launch.run(torch.device("cpu")) if way == "run" else aot.compile_launch(launch, "sm_90")
    except KeyError:  # of arguments, which there are none of
        pass
    keys[f"{module}.{name}"] = kernel.cache_key
print(json.dumps(keys))
"""


def kernels() -> list[str]:
    """`module.name` of every kernel."""
    found = [
        f"{path.stem}.{name}"
        for path in sorted((ROOT / "mxkernels" / "ops").glob("*_kernel.py"))
        for name in re.findall(r"@(?:triton|gluon)\.jit\ndef (\w+_kernel)\(", path.read_text("utf-8"))
    ]
    assert len(found) > 10
    return found


@pytest.mark.parametrize("way", ["compile", "run"])
@pytest.mark.parametrize("version", [*FETCHED, "installed"])
def test_what_one_process_compiled_another_finds(version: str, way: str) -> None:
    """Triton's keys on disk are the same, in whatever order kernels are met."""
    first, second = (run_with(version, "-c", KEYS, way, *order) for order in (kernels(), kernels()[::-1]))
    assert first.returncode == second.returncode == 0, first.stderr[-3000:] + second.stderr[-3000:]
    assert json.loads(first.stdout) == json.loads(second.stdout)

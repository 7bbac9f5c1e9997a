"""The rule's configs can be launched on every GPU, and are on an H200 what was found there."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest

pytest.importorskip("triton", reason="rules of products ask the kernels")

import torch
from tritons import run_with

from mxkernels import gpu
from mxkernels.ops import paths
from mxkernels.spec import MXSpec
from mxkernels.tune import CastConfig, MatmulConfig, Problem, obstacle
from mxkernels.tune.limits import MODELS, Limits
from mxkernels.tune.rule import fitting, quantize_fold_config
from mxkernels.workloads import rule_config

H200 = Limits("sm_90")
SPEC = "{} rtne even symmetric"
STRAIGHT = "straight * straight"
TURNED = "turned * straight"
CARRIERS = ("float8_e5m2", "bfloat16", "float32")
ROWS, SIDES = (1, 16, 64, 128, 1024), (1024, 4096, 8192)


def multiply(carrier: str, layout: str, *shape: int) -> Problem:
    dtype = "float32" if carrier == "float32" else "bfloat16"
    return Problem("multiply", f"{carrier} * {carrier}", dtype, layout, shape)


def quantize_fold(spec: str, dtype: str, rows: int, cols: int) -> Problem:
    return Problem("quantize_fold", SPEC.format(spec), dtype, "rows", (rows, cols))


def quantize(spec: str, side: int) -> Problem:
    return Problem("quantize", SPEC.format(spec), "bfloat16", "rows", (side, side))


def fold(spec: str, side: int) -> Problem:
    return Problem("fold", SPEC.format(spec), "float8_e4m3fn", "straight", (side, side))


def products_of(carriers: tuple[str, ...]) -> list[Problem]:
    plain = f"plain * packed straight {SPEC.format('e2m1 1x32')}"
    found = []
    for shape in itertools.product(ROWS, SIDES, SIDES):
        found += [multiply(carrier, STRAIGHT, *shape) for carrier in carriers]
        found += [multiply("bfloat16", layout, *shape) for layout in (TURNED, "straight * turned", "turned * turned")]
        found += [Problem("decode_multiply", plain, "bfloat16", layout, shape) for layout in ("parts", "exact")]
        if shape[0] <= 64:
            found.append(Problem("stream", SPEC.format("e2m1 1x32"), "bfloat16", "prepared", shape))
    return found


# --- on an H200 --------------------------------------------------------------------------------------------

# What was timed there, and what goes the same way.
FOUND = (
    (multiply("float8_e5m2", STRAIGHT, 16, 4096, 4096), MatmulConfig(64, 32, 256, 4, 8, promote=512)),
    (multiply("float8_e5m2", STRAIGHT, 64, 8192, 4096), MatmulConfig(64, 64, 256, 4, 6, promote=512)),
    (multiply("float8_e5m2", STRAIGHT, 256, 8192, 4096), MatmulConfig(128, 128, 128, 8, 6, promote=512)),
    (multiply("float8_e5m2", TURNED, 1024, 4096, 4096), MatmulConfig(128, 128, 128, 8, 4, promote=512)),
    (multiply("bfloat16", STRAIGHT, 64, 4096, 14336), MatmulConfig(64, 32, 128, 4, 8)),
    (multiply("bfloat16", STRAIGHT, 64, 8192, 8192), MatmulConfig(64, 64, 128, 4, 6)),
    (multiply("bfloat16", TURNED, 128, 4096, 4096), MatmulConfig(128, 128, 64, 4, 4)),
    (multiply("bfloat16", TURNED, 1024, 4096, 4096), MatmulConfig(256, 128, 64, 8, 3)),
    (multiply("float32", TURNED, 64, 4096, 4096), MatmulConfig(64, 32, 64, 4, 8)),
    (multiply("float32", TURNED, 128, 4096, 4096), MatmulConfig(128, 128, 32, 4, 4)),
    (multiply("float32", TURNED, 1024, 4096, 4096), MatmulConfig(256, 128, 32, 8, 3)),
    (quantize_fold("e2m1 1x32", "bfloat16", 1024, 4096), CastConfig(1, 4096, 4, wide=True)),
    (quantize_fold("e2m1 1x32", "bfloat16", 64, 14336), CastConfig(1, 16384, 8, wide=True)),
    (quantize_fold("e2m1 1x32", "bfloat16", 4096, 11008), CastConfig(1, 16384, 8, wide=True)),
    (quantize_fold("e2m1 4x4", "float32", 1024, 8192), CastConfig(4, 8192, 16, wide=True)),
    (quantize_fold("e2m1 16x16", "bfloat16", 1024, 8192), CastConfig(16, 1024, 4, wide=True)),
    (quantize_fold("e2m1 16x16", "float32", 1024, 8192), CastConfig(16, 1024, 8, wide=True)),
    (quantize("e2m1 16x16", 4096), CastConfig(32, 256, 4, square=True, wide=True)),
    (quantize("e2m1 128x128", 4096), CastConfig(128, 128, 8, square=True, wide=True)),
    (quantize("e2m1 64x64", 4096), CastConfig(64, 128, 4, square=True, wide=True)),
    (quantize("e2m1 32x1", 4096), CastConfig(32, 128, 2, square=True, wide=True)),
    (quantize_fold("e2m1 128x128", "bfloat16", 4096, 4096), CastConfig(128, 256, 8, wide=True)),
    (quantize_fold("e2m1 128x128", "float32", 4096, 4096), CastConfig(128, 128, 8, wide=True)),
    (fold("e2m3 1x32", 4096), CastConfig(4, 512, 2, wide=True)),
)


@pytest.mark.parametrize(("problem", "config"), FOUND, ids=str)
def test_on_an_h200_it_is_what_was_found(problem: Problem, config: CastConfig | MatmulConfig) -> None:
    assert rule_config(problem, H200) == config


def test_an_h200_sets_it_no_limit() -> None:
    """More shared memory would change nothing."""
    for problem in products_of(CARRIERS):
        assert rule_config(problem, H200) == rule_config(problem, replace(H200, shared_bytes=1 << 30)), problem


# --- on GPUs with less shared memory -----------------------------------------------------------------------


# Of Hopper there is but one kind.
SIZES = [(name, kib) for name in MODELS for kib in (48, 64, 99, 163, 227) if name != "sm_90" or kib == 227]


@pytest.mark.parametrize(("architecture", "shared_kib"), SIZES)
def test_the_stages_of_products_fit(architecture: str, shared_kib: int) -> None:
    limits = replace(Limits.assumed(architecture), shared_bytes=1024 * shared_kib)
    carriers = CARRIERS if limits.capabilities.fp8_mma else CARRIERS[1:]
    for problem in products_of(carriers):
        if shared_kib >= 99 or problem.op == "multiply":  # the other kernels' have one size
            assert obstacle(problem, rule_config(problem, limits), limits.shared_bytes) is None, problem


def test_stages_are_given_up_before_tiles() -> None:
    config = MatmulConfig(64, 64, 256, 4, 6, promote=512)  # of 32 KiB a stage
    assert fitting(config, 1, 256 * 1024) == config
    assert fitting(config, 1, 99 * 1024) == replace(config, num_stages=3)
    assert fitting(config, 1, 96 * 1024) == replace(config, num_stages=2)  # barriers take some of it
    assert fitting(config, 1, 48 * 1024) == replace(config, block_k=128, num_stages=2)


def test_tiles_that_are_folded_are_whole_blocks() -> None:
    for block, cols in itertools.product(("1x32", "4x4", "64x64", "128x128", "128x4", "4x128"), SIDES):
        spec = MXSpec("e2m1", block)
        config = quantize_fold_config(spec, cols, 4)
        assert config is not None
        assert obstacle(Problem.of("quantize_fold", spec, torch.float32, "rows", 1024, cols), config) is None


def test_launches_ask_what_the_gpu_has(monkeypatch: pytest.MonkeyPatch) -> None:
    small = Limits.assumed("sm_120")
    monkeypatch.setattr(Limits, "of", classmethod(lambda cls, device: small))
    problem = multiply("float8_e5m2", STRAIGHT, 16, 1024, 1024)
    cpu, fp8 = torch.device("cpu"), (torch.float8_e5m2, torch.float8_e5m2)
    choice = paths.carrier_choice(16, 1024, 1024, fp8, torch.bfloat16, cpu, (False, False))
    assert choice.config == rule_config(problem, small) != rule_config(problem, H200)


def test_what_a_gpu_does_not_tell_is_assumed(monkeypatch: pytest.MonkeyPatch) -> None:
    told = SimpleNamespace(multi_processor_count=70)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: told)
    monkeypatch.setattr(gpu, "architecture", lambda device: "gfx950")
    device = torch.device("cuda", 0)
    assert Limits.of(device) == replace(Limits.assumed("gfx950"), processors=70)
    told.shared_memory_per_block_optin = 64 * 1024
    assert Limits.of(device).shared_bytes == 64 * 1024


# --- as compiled -------------------------------------------------------------------------------------------

# Prints, of the rule's config for each pair of an architecture and a problem's key, why it cannot be launched, or
# what it spills; null if nothing is known against it.
COMPILE = """
import json, sys
from mxkernels.tune import Problem
from mxkernels.tune.limits import Limits
from mxkernels.tuner import make_compiler
from mxkernels.workloads import rule_config

for architecture, key in json.loads(sys.argv[1]):
    limits, problem = Limits.assumed(architecture), Problem.of_key(key)
    config = rule_config(problem, limits)
    print(json.dumps(make_compiler(limits)(problem, config).exceeds(config, limits)))
"""

# What took more than there is, or spilled, before the rule knew of limits.
COMPILED = (
    ("sm_120", multiply("float8_e5m2", STRAIGHT, 16, 1024, 1024)),
    ("sm_120", multiply("float8_e5m2", STRAIGHT, 64, 8192, 1024)),
    ("sm_120", multiply("float8_e5m2", STRAIGHT, 128, 1024, 1024)),
    ("sm_120", quantize_fold("e2m1 128x128", "float32", 16, 1024)),
    ("sm_89", multiply("float8_e5m2", STRAIGHT, 64, 1024, 1024)),
    ("sm_89", multiply("float8_e5m2", STRAIGHT, 1024, 1024, 1024)),
    ("sm_89", multiply("bfloat16", STRAIGHT, 128, 1024, 1024)),
    ("sm_86", multiply("float32", STRAIGHT, 16, 1024, 1024)),
    ("sm_86", multiply("bfloat16", STRAIGHT, 1024, 1024, 1024)),
    ("sm_86", quantize_fold("e2m1 128x128", "float32", 1024, 4096)),
    ("sm_90", quantize_fold("e2m1 128x128", "bfloat16", 1024, 4096)),
    ("sm_80", multiply("bfloat16", TURNED, 16, 1024, 1024)),
    ("sm_80", multiply("bfloat16", STRAIGHT, 1024, 1024, 1024)),
    ("gfx950", multiply("float8_e5m2", STRAIGHT, 16, 1024, 1024)),
    ("gfx950", quantize_fold("e2m1 128x128", "float32", 16, 1024)),
)


def test_what_is_compiled_can_be_launched() -> None:
    requests = [(architecture, problem.key) for architecture, problem in COMPILED]
    done = run_with("installed", "-c", COMPILE, json.dumps(requests))
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    against = [f"{name}, {problem}: {why}" for (name, problem), why in zip(COMPILED, found, strict=True) if why]
    assert not against, "\n".join(against)

"""The spaces that are searched, and the model that ranks what is in them."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("triton", reason="rules of products ask the kernels")

from mxkernels import gpu
from mxkernels.tune import CastConfig, Config, HopperConfig, MatmulConfig, Problem, SmallMatmulConfig, obstacle
from mxkernels.tune.limits import MODELS, Footprint, Limits, resident
from mxkernels.tune.model import Work, predicted_us
from mxkernels.tune.space import candidates, steps
from mxkernels.workloads import rule_config, serves

H200 = Limits("sm_90")
A100 = Limits.assumed("sm_80")
SPEC = "{} rtne even symmetric"
BLOCKS = ("1x32", "1x16", "4x4", "16x16", "32x32", "32x1")
LARGE, LAYER = (16384, 16384), (4096, 14336, 4096)


def cast(op: str, formats: str, layout: str = "rows", shape: tuple[int, ...] = LARGE) -> Problem:
    return Problem(op, SPEC.format(formats), "float8_e5m2" if op == "fold" else "bfloat16", layout, shape)


def product(op: str, formats: str, layout: str, shape: tuple[int, ...] = LAYER) -> Problem:
    return Problem(op, formats, "bfloat16", layout, shape)


PROBLEMS = (
    *(cast("quantize", f"{element} 1x32") for element in ("e2m1", "e2m3", "e4m3", "int8")),
    *(cast(op, f"e2m1 {block}") for op in ("quantize", "quantize_pair", "dequantize") for block in BLOCKS),
    *(cast("quantize", f"e2m1 {block}", "columns") for block in BLOCKS),
    *(cast("fold", f"e2m1 {block}", layout) for block in BLOCKS for layout in ("straight", "turned")),
    cast("quantize_fold", "e2m1 1x32", shape=(8192, 4096)),
    cast("quantize_fold", "e2m1 4x4", shape=(8192, 4096)),
    *(
        product("multiply", f"{carrier} * {carrier}", "straight * straight", (m, 8192, 8192))
        for carrier in ("float8_e5m2", "bfloat16", "float32")
        for m in (16, 256, 4096)
    ),
    product("multiply", "bfloat16 * bfloat16", "turned * straight"),
    *(
        product("stream", SPEC.format("e2m1 1x32"), layout, (m, 8192, 8192))
        for m in (1, 64)
        for layout in ("stored", "prepared")
    ),
    product("decode_multiply", f"plain * packed straight {SPEC.format('e2m1 1x32')}", "parts"),
)


def space(problem: Problem, limits: Limits = H200) -> list[Config]:
    return candidates(problem, rule_config(problem, limits), limits, lambda config: serves(problem, config, limits))


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_a_space_is_neither_small_nor_endless(problem: Problem) -> None:
    """What is in it serves, once, the rule's first."""
    found = space(problem)
    least = 50
    assert least <= len(found) <= 200
    assert len(found) == len(set(found))
    assert found[0] == rule_config(problem, H200)
    assert all(obstacle(problem, config, H200.shared_bytes) is None for config in found)
    rule = found[0]
    assert [steps(config, rule) for config in found] == sorted(steps(config, rule) for config in found)


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_all_that_a_rule_says_on_another_gpu_is_in_it(problem: Problem) -> None:
    found = space(problem, A100)
    assert found[0] == rule_config(problem, A100)
    assert not any(isinstance(config, HopperConfig) for config in found)
    assert all(obstacle(problem, config, A100.shared_bytes) is None for config in found)


def test_a_space_of_small_matrices_has_no_huge_tiles() -> None:
    for shape in ((1, 64), (8, 512), (3, 40)):
        for problem in (cast("quantize", "e2m1 1x32", shape=shape), cast("dequantize", "e2m1 4x4", shape=shape)):
            found = space(problem)
            assert found[0] == rule_config(problem, H200)
            assert all(config.tile_cols <= max(2 * shape[1], 128) for config in found[1:])


@pytest.mark.parametrize("m", [16, 256, 4096])
def test_sums_are_promoted_as_often_as_by_the_rule(m: int) -> None:
    """So the order of sums, and with it the bits, do not depend on what was tuned."""
    problem = product("multiply", "float8_e5m2 * float8_e5m2", "straight * straight", (m, 8192, 8192))
    every = {config.promote * (128 if isinstance(config, HopperConfig) else 1) for config in space(problem)}
    assert len(every) == 1
    assert 0 < every.pop() <= 512


def test_the_fp32_units_are_not_tuned() -> None:
    problem = product("decode_multiply", f"plain * packed straight {SPEC.format('e4m3 1x32')}", "exact")
    assert space(problem) == [rule_config(problem, H200)]


def test_steps() -> None:
    tile = CastConfig(4, 1024, 4)
    assert steps(tile, tile) == 0
    assert steps(replace(tile, tile_cols=512), tile) == 1
    assert steps(CastConfig(8, 256, 4, wide=True), tile) == 4
    assert steps(HopperConfig(128, 2, 4, 0), HopperConfig(128, 2, 4, 2)) > 0
    assert steps(MatmulConfig(64, 64, 64, 4, 4), HopperConfig(128, 2, 4)) > 4


# --- the model ---------------------------------------------------------------------------------------------

WORK = Work(read_bytes=2 * 16384**2, written_bytes=16384**2 * 17 // 32)


def test_memory_is_the_least_that_a_cast_takes() -> None:
    """What has enough loads under way takes as long as its bytes do."""
    problem, copied_us = PROBLEMS[0], (WORK.read_bytes + WORK.written_bytes) / H200.gbps / 1e3
    times = [predicted_us(problem, WORK, config, H200) for config in space(problem)]
    assert copied_us <= min(times) <= 1.05 * copied_us


def test_instructions_and_idle_processors_take_longer() -> None:
    problem, config = PROBLEMS[0], CastConfig(1, 2048, 1)
    us = {count: predicted_us(problem, WORK, config, H200, Footprint(0, 59, 64, count)) for count in (721, 3000)}
    assert us[3000] > 2 * us[721]
    half = CastConfig(1, 1024, 1)  # the more registers, the fewer programs at a time, and bytes under way
    few, many = (predicted_us(problem, WORK, half, H200, Footprint(0, count, 64, 401)) for count in (255, 64))
    assert few > many
    small = replace(problem, shape=(64, 2048))
    alone = predicted_us(small, Work(64 * 4096, 64 * 1088), CastConfig(64, 2048, 8), H200)
    assert alone > predicted_us(small, Work(64 * 4096, 64 * 1088), CastConfig(1, 1024, 1), H200)


def test_a_product_prefers_tiles_that_fill_the_gpu() -> None:
    def us(m: int, config: Config) -> float:
        work = Work((m + 8192) * 8192, 2 * m * 8192)
        problem = product("multiply", "float8_e5m2 * float8_e5m2", "straight * straight", (m, 8192, 8192))
        return predicted_us(problem, work, config, H200)

    large, small = HopperConfig(128, 2, 4, 2), HopperConfig(64, 1, 8, 4)
    assert us(8192, large) < us(8192, small)
    assert us(128, small) < us(128, large)


def test_splits_of_k_occupy_the_gpu() -> None:
    problem = product("stream", SPEC.format("e2m1 1x32"), "prepared", (1, 8192, 8192))
    work = Work(8192 * 8192 * 17 // 32, 8192 * 2)
    one, eight, many = (
        predicted_us(problem, work, SmallMatmulConfig(128, 128, splits, 4, 3), H200) for splits in (1, 8, 64)
    )
    assert eight < one
    assert eight < many


def test_limits_are_known_for_every_architecture() -> None:
    """The bytes of shared memory a program are CUDA's, whose table has KiB: 163, 99, 99, 227, 227, 227, 99."""
    assert set(MODELS) == set(gpu.ARCHITECTURES)
    assert {name: Limits.assumed(name).shared_bytes for name in gpu.ARCHITECTURES} == {
        "sm_80": 166912,
        "sm_86": 101376,
        "sm_89": 101376,
        "sm_90": 232448,
        "sm_100": 232448,
        "sm_103": 232448,
        "sm_120": 101376,
        "gfx950": 163840,
    }
    assert all(Limits.assumed(name).architecture == name for name in gpu.ARCHITECTURES)
    assert Limits.assumed("sm_90") == Limits("sm_90")
    assert Limits.assumed("sm_110") == replace(Limits("sm_90"), architecture="sm_110")


@pytest.mark.parametrize(
    ("footprint", "programs"),
    [
        (Footprint(0, 32, 0), 16),  # 64 warps
        (Footprint(0, 255, 0), 2),  # 65536 registers
        (Footprint(0, 32, 100_000), 2),  # 233472 bytes
        (Footprint(0, 255, 232448), 1),
    ],
)
def test_resident(footprint: Footprint, programs: int) -> None:
    assert resident(CastConfig(4, 1024, 4), H200, footprint) == programs

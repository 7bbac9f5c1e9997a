"""Timing, ceilings and the list of shapes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from mxkernels.perf import DEFAULT_SHAPE, SHAPES, Ceilings, Timing, ceilings, time_call, time_host, timing

CPU = torch.device("cpu")


def test_timing_keeps_its_samples_and_takes_ranks_of_them() -> None:
    shuffled = (7.0, 1.0, 11.0, 2.0, 3.0, 4.0, 10.0, 5.0, 6.0, 8.0, 9.0)
    found = Timing(shuffled)
    assert found.samples_us == shuffled
    assert (found.p10_us, found.median_us, found.p90_us) == (2.0, 6.0, 10.0)
    assert Timing((5.0,)).p10_us == Timing((5.0,)).p90_us == 5.0


def test_a_slow_call_gets_the_fewest_samples_and_its_time() -> None:
    found = time_call(lambda: time.sleep(0.01), CPU, seconds=0.0)
    assert len(found.samples_us) == timing.MIN_SAMPLES
    assert min(found.samples_us) >= 10_000


def test_a_fast_call_gets_the_most_samples_and_a_warm_up() -> None:
    calls = []
    found = time_call(lambda: calls.append(0), CPU, seconds=60.0)
    assert len(found.samples_us) == timing.MAX_SAMPLES
    assert len(calls) == timing.MAX_SAMPLES + 1


def test_the_budget_ends_the_sampling(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def call() -> None:
        nonlocal now
        now += 0.002

    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: now))
    found = time_call(call, CPU, seconds=0.1)
    assert len(found.samples_us) in (49, 50, 51)
    assert found.median_us == pytest.approx(2000)


def test_host_time_is_that_of_one_call() -> None:
    found = time_host(lambda: time.sleep(0.001), CPU, samples=2)
    assert len(found.samples_us) == 2
    assert found.median_us >= 1000


def test_a_ceiling_is_measured_once_for_its_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []

    def counted(*arguments: object) -> Timing:
        measured.append(arguments)
        return Timing((2.0,))

    monkeypatch.setattr(ceilings, "time_call", counted)
    here = Ceilings(CPU)
    first = here.copy(3000, 1000)
    assert here.copy(3000, 1000) is first
    assert len(measured) == 1
    assert (first.name, first.traffic_bytes, first.gbps) == ("copy", 4000, 2.0)
    here.copy(1000, 3000)
    assert len(measured) == 2


def test_the_cpu_ceiling_is_a_real_copy() -> None:
    found = Ceilings(CPU, seconds=0.01).copy(1 << 20, 1 << 18)
    assert 0 < found.gbps < 10_000
    assert len(found.timing.samples_us) >= timing.MIN_SAMPLES


def test_shapes_are_matrices_of_whole_packing_groups() -> None:
    for layers in SHAPES.values():
        for rows, cols in layers.values():
            assert rows > 0
            assert cols % 32 == 0
    assert DEFAULT_SHAPE["cuda"] == (16384, 16384)


def copied(source: torch.Tensor, target_words: int, tiles: int) -> torch.Tensor:
    """What `copy_kernel` makes of a source, into poisoned memory."""
    from mxkernels.perf.copy_kernel import copy_launch

    target = torch.full((target_words,), -1, dtype=torch.int64, device=source.device)
    copy_launch(source, target, tiles).run(source.device)
    return target


def words(lines: int, device: torch.device = CPU) -> torch.Tensor:
    generator = torch.Generator(device).manual_seed(lines)
    return torch.randint(0, 2**62, (16 * lines,), device=device, generator=generator)


def expected(source: torch.Tensor, target_words: int, tiles: int) -> torch.Tensor:
    """The same by hand: each program's target is the exclusive or of its source's tiles, over and over."""
    from mxkernels.perf.copy_kernel import copy_launch

    target = torch.empty(target_words, dtype=torch.int64, device=source.device)
    launch = copy_launch(source, target, tiles)
    tile = launch.arguments["TILE"]
    for program in range(launch.programs):
        folded = torch.zeros(tile, dtype=torch.int64, device=source.device)
        for part in share(source, program, launch.arguments["source_share"]).split(tile):
            folded[: part.numel()] ^= part
        for part in share(target, program, launch.arguments["target_share"]).split(tile):
            part.copy_(folded[: part.numel()])
    return target


def share(whole: torch.Tensor, program: int, words: int) -> torch.Tensor:
    return whole[program * words : (program + 1) * words]


LINES = [(1, 1), (64, 64), (200, 53), (53, 200), (129, 128), (1, 300), (300, 1), (300, 40)]


@pytest.mark.interpreter
@pytest.mark.parametrize("lines", LINES)
@pytest.mark.parametrize("tiles", [1, 4])
def test_the_copy_reads_every_word_and_writes_every_word(lines: tuple[int, int], tiles: int) -> None:
    source = words(lines[0])
    assert torch.equal(copied(source, 16 * lines[1], tiles), expected(source, 16 * lines[1], tiles))


@pytest.mark.interpreter
def test_the_copy_of_as_many_words_is_in_order() -> None:
    """One tile a program on both sides: the exclusive or of one thing is that thing."""
    source = words(200)
    assert torch.equal(copied(source, source.numel(), tiles=1), source)


def test_words_are_whole_lines() -> None:
    pytest.importorskip("triton")
    from mxkernels.perf.copy_kernel import words_of

    assert [words_of(size) for size in (0, 1, 128, 129)] == [0, 16, 16, 32]


def test_the_copy_moves_16_bytes_an_instruction() -> None:
    """Compiled as MXFP4 quantise's traffic, and its opposite, for Hopper. (Not here, where kernels may be
    interpreted.)"""
    pytest.importorskip("triton")
    code = """
import torch
from mxkernels.perf.copy_kernel import TILES, copy_launch, words_of
from mxkernels.tune.aot import compile_launch
sizes = [torch.empty(words_of(size), dtype=torch.int64, device="meta") for size in (2 << 28, 17 << 23)]
for source, target in (sizes, sizes[::-1]):
    for tiles in TILES:
        compiled = compile_launch(copy_launch(source, target, tiles), "sm_90")
        print(compiled.assembly, "SPILLED", compiled.spilled_bytes)
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    accesses = re.findall(r"\b(?:ld|st)\.global\S*", done.stdout)
    assert len(accesses) >= 4
    assert all(access.endswith(".v2.b64") for access in accesses), set(accesses)
    assert re.findall(r"SPILLED (\d+)", done.stdout) == ["0"] * 4


@pytest.mark.gpu
@pytest.mark.parametrize("lines", [*LINES, (1 << 14, 17 << 8), (17 << 8, 1 << 14)])
@pytest.mark.parametrize("tiles", [1, 4])
def test_the_copy_on_the_gpu_is_the_same_function(lines: tuple[int, int], tiles: int) -> None:
    source = words(lines[0], torch.device("cuda"))
    assert torch.equal(copied(source, 16 * lines[1], tiles), expected(source, 16 * lines[1], tiles))


@pytest.mark.gpu
def test_the_copy_counts_past_32_bits() -> None:
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GiB of free GPU memory")
    target = copied(words(1, torch.device("cuda")), (1 << 31) + 16, tiles=4)
    assert all((part >= 0).all() for part in target.split(1 << 28))


@pytest.mark.gpu
def test_a_gpu_call_is_timed_with_a_cold_cache() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    x = torch.randn(1 << 22, device=device)  # 16 MB, which any L2 of the last years holds
    y = torch.empty_like(x)
    found = time_call(lambda: y.copy_(x), device, seconds=0.05)
    assert len(found.samples_us) >= timing.MIN_SAMPLES
    assert 2 * x.nbytes / found.median_us / 1e3 < 10_000  # GB/s of memory, not of a cache


@pytest.mark.gpu
def test_a_gpu_ceiling_is_close_to_torchs_own_copy() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    x = torch.randint(256, (1 << 29,), dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    torchs = 2 * x.nbytes / time_call(lambda: y.copy_(x), device, seconds=0.1).median_us / 1e3
    assert Ceilings(device, seconds=0.1).copy(x.nbytes, x.nbytes).gbps > 0.95 * torchs

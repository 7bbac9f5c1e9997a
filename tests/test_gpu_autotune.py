"""The tuner on a GPU: what it finds is stored, serves, and changes no byte."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="kernels need Triton")

import torch
import torch.distributed as dist

import mxkernels as mx
from mxkernels import tune
from mxkernels.tune import Problem
from mxkernels.tune.limits import Limits
from mxkernels.tune.search import Breadth
from mxkernels.tuner import Runner, task, tune_problems

pytestmark = pytest.mark.gpu

E2M1 = "e2m1 1x32 rtne even symmetric"
CUDA = torch.device("cuda", 0)


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    monkeypatch.setenv("MXKERNELS_CACHE", str(tmp_path))
    tune.events.TABLES_CHANGED.happened()
    yield tmp_path
    monkeypatch.undo()
    tune.events.TABLES_CHANGED.happened()


def test_a_callable_is_tuned(cache: Path) -> None:
    """Every problem that it meets; afterwards it gives the same, by configs from the cache."""
    x = torch.randn(512, 1024, dtype=torch.bfloat16, device=CUDA)

    def step() -> list[torch.Tensor]:
        q = mx.quantize(x, mx.mxfp4)
        return [q.codes, q.scale, q.dequantize()]

    before = step()
    results = mx.autotune(step, budget=20)
    assert [result.problem.op for result in results] == ["quantize", "dequantize"]
    assert not [fault for result in results for fault in result.faults]
    for result in results:
        assert result.after_us is not None
        assert (result.config == result.before.config) == (result.after_us == result.before_us)
    with tune.recording() as met:
        after = step()
    assert {choice.origin for choice in met.values()} == {"cache"}
    assert {choice.config for choice in met.values()} == {result.config for result in results}
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


PROBLEMS = (
    Problem("quantize_pair", "e2m3 4x4 stochastic even symmetric", "bfloat16", "rows", (512, 1024)),
    Problem("quantize", "int4 1x32 rtne ceil asymmetric", "float32", "columns", (512, 1000)),
    Problem("fold", E2M1, "float8_e5m2", "straight", (512, 1024)),
    Problem("fold", "e2m1 4x4 rtne even symmetric", "float8_e5m2", "turned", (512, 1024)),
    Problem("quantize_fold", E2M1, "bfloat16", "rows", (512, 1024)),
    Problem("multiply", "float8_e5m2 * float8_e4m3fn", "bfloat16", "straight * straight", (512, 1024, 2048)),
    Problem("multiply", "float8_e5m2 * float8_e5m2", "bfloat16", "straight * straight", (16, 1024, 2048)),
    Problem("multiply", "bfloat16 * bfloat16", "bfloat16", "turned * straight", (512, 1024, 2048)),
    Problem("multiply", "float32 * float32", "float32", "straight * straight", (512, 1024, 256)),
    Problem("stream", E2M1, "bfloat16", "prepared", (16, 1024, 2048)),
    Problem("stream", "int4 1x16 rtne even symmetric", "bfloat16", "stored", (1, 1024, 2048)),
    Problem("decode_multiply", f"plain * packed straight {E2M1}", "bfloat16", "parts", (128, 512, 1024)),
)


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_candidates_run(problem: Problem) -> None:
    """The first ones give what they should, by the runner's check, and take some time."""
    limits = Limits.of(CUDA)
    if "float8" in problem.formats and not limits.capabilities.fp8_mma:
        pytest.skip("the GPU multiplies no FP8")
    runner = Runner(CUDA, limits)
    assert runner("open", problem) > 0
    for config in task(problem, limits, CUDA).candidates[:4]:
        assert runner("check", problem, config) is None
        assert min(runner("time", problem, config, 3)) > 0


def test_what_is_compiled_ahead_is_found(cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The runner compiles nothing that the compilers have compiled: it would take seconds a candidate."""
    compiled = tmp_path / "triton"
    monkeypatch.setenv("TRITON_CACHE_DIR", str(compiled))
    problem = Problem("quantize", "e3m0 4x8 rtne even symmetric", "bfloat16", "rows", (512, 1024))
    (result,) = tune_problems([problem], CUDA, budget=60, breadths=[Breadth(6, 6)])
    assert (result.compiled, result.faults) == (6, ())
    assert len(list(compiled.glob("*/quantize_kernel.cubin"))) == 6


# --- two GPUs ----------------------------------------------------------------------------------------------


def tune_as_rank(rank: int, folder: Path) -> None:
    """Ranks that meet different problems, with a cache each: all are tuned, and all use what the first one found."""
    os.environ["MXKERNELS_CACHE"] = str(folder / str(rank))
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
    try:
        torch.manual_seed(1)
        x = torch.randn(512, 1024, device="cuda", dtype=torch.bfloat16)

        def step() -> list[torch.Tensor]:
            q = mx.quantize(x, mx.mxfp4)
            return [q.codes, q.scale, mx.matmul(q, mx.quantize(x, mx.mxfp6_e2m3).T)]

        before = step()
        results = mx.autotune(step if rank == 0 else lambda: [*step(), mx.quantize(x, mx.mxint8)], budget=3)
        with tune.recording() as met:
            after = step()
            mx.quantize(x, mx.mxint8)
        mine = {problem.key: choice for problem, choice in met.items()}
        assert mine.keys() == {result.problem.key for result in results}
        assert {choice.origin for choice in mine.values()} == {"cache"}
        theirs: list[dict[str, object]] = [{}, {}]
        dist.all_gather_object(theirs, {key: choice.config for key, choice in mine.items()})
        assert theirs[0] == theirs[1]
        first = [each.clone() for each in after]
        for each in first:
            dist.broadcast(each, 0)
        assert all(map(torch.equal, first, after))
        assert all(map(torch.equal, before[:2], after[:2]))  # a product's bits may depend on its config
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_ranks_that_share_what_they_tuned(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(tune_as_rank, (tmp_path,), 2)

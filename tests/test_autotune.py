"""The tuner: problems, what runs and compiles them, and what is stored."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="kernels need Triton")

import torch
import tuning_fakes as fakes
from tuned import DEVICE, H200, install

import mxkernels as mx
from mxkernels import tune, tuner
from mxkernels.problems import CASTS, cast_problems, product_problems
from mxkernels.tune import CastConfig, Choice, HopperConfig, Problem, contest
from mxkernels.tune.limits import Limits
from mxkernels.tune.search import Breadth
from mxkernels.tuner import Runner, autotune, problems_of, task, tune_problems, untuned
from mxkernels.workloads import META, proof, proof_problem, workload
from mxkernels.workloads.products import Product
from mxkernels.workloads.workload import gaussian, signs

CPU = torch.device("cpu")
LIMITS = Limits("sm_90")
E2M1 = "e2m1 1x32 rtne even symmetric"
ASYMMETRIC = mx.MXSpec("e2m1", symmetric=False)
QUANTIZE = Problem("quantize", E2M1, "bfloat16", "rows", (40, 300))


def product(op: str, formats: str, dtype: str, layout: str, *shape: int) -> Problem:
    return Problem(op, formats, dtype, layout, shape)


STRAIGHT = "straight * straight"
PROBLEMS = (
    QUANTIZE,
    Problem("quantize", "e2m1 4x4 stochastic even asymmetric", "float32", "columns", (40, 300)),
    Problem("quantize_pair", "e2m3 4x4 stochastic even symmetric", "bfloat16", "rows", (40, 300)),
    Problem("dequantize", "e4m3 4x4 stochastic even asymmetric", "float16", "rows", (40, 300)),
    Problem("fold", E2M1, "float8_e5m2", "straight", (40, 300)),
    Problem("fold", "e2m3 4x4 rtne even symmetric", "float8_e4m3fn", "turned", (40, 300)),
    Problem("quantize_fold", "e2m1 1x32 stochastic even symmetric", "bfloat16", "rows", (20, 300)),
    product("multiply", "float8_e5m2 * float8_e4m3fn", "bfloat16", STRAIGHT, 20, 40, 300),
    product("multiply", "bfloat16 * bfloat16", "float16", "turned * straight", 24, 40, 300),
    product("multiply", "float32 * float32", "float32", STRAIGHT, 24, 40, 301),
    product("stream", E2M1, "bfloat16", "stored", 20, 40, 300),
    product("stream", "int4 1x16 rtne even symmetric", "bfloat16", "prepared", 20, 40, 300),
    product("decode_multiply", f"plain * packed straight {E2M1}", "bfloat16", "parts", 20, 40, 300),
    product(
        "decode_multiply",
        f"packed turned e4m3 4x4 rtne even asymmetric * packed straight {E2M1}",
        "float32",
        "parts",
        *(20, 40, 300),
    ),
    product(
        "decode_multiply",
        f"folded straight e5m2 1x32 rtne rceil symmetric * packed straight {E2M1}",
        "float16",
        "exact",
        *(20, 40, 300),
    ),
)


# --- workloads -----------------------------------------------------------------------------------------------


@pytest.mark.interpreter
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_candidates_give_what_they_should(problem: Problem) -> None:
    """By the runner's own check, in the interpreter; and what writes something else is found out."""
    limits = Limits("cpu")
    config = task(problem, limits).candidates[1 if problem.layout != "exact" else 0]
    for made in (workload(problem, CPU, limits), proof(problem, CPU, limits)):
        made.poison()
        assert made.difference() is not None  # what was not written
        for launch in made.launches(config):
            launch.run(CPU)
        assert made.difference() is None
        if isinstance(made, Product):
            assert made.out.float().std() > 1
            made.out[7, 11] += 1e4 if made.draw is gaussian else 1
        else:
            made.outputs[0].view(torch.uint8)[7, 11] ^= 1
        assert made.difference() is not None


@pytest.mark.parametrize("k", [64, 4096, 53248])
def test_sums_of_signs_are_exact(k: int) -> None:
    """For tensor cores that truncate too: docs/numerics.md."""
    a, b = (signs((64, k), k, torch.Generator().manual_seed(seed)) for seed in range(2))
    assert {-1, 0, 1} == set(a.unique().tolist())
    assert (a.abs().double() @ b.abs().double().T).max() < 2**13


@pytest.mark.interpreter
def test_the_runner_checks_on_both_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The large outputs are compared with the default config's, the small ones with the reference's."""
    monkeypatch.setattr(Runner, "_limit_us", lambda self, problem: 1.0)
    problem = Problem("quantize", E2M1, "bfloat16", "rows", (64, 512))
    runner, config = Runner(CPU, Limits("cpu")), CastConfig(4, 128, 1)
    assert runner("open", problem) == 1.0
    assert runner("check", problem, config) is None
    assert {each.shape for each in runner._proofs} == {(16, 128)}
    assert len(runner("time", problem, config, 3)) == 3
    runner._open.expected[0][0, 0] ^= 1
    assert "1 bytes of output 0 differ" in runner("check", problem, config)
    runner._open.expected[0][0, 0] ^= 1
    next(iter(runner._proofs.values())).expected[1][3, 1] ^= 1
    assert runner("check", problem, config) == "1 bytes of output 1 differ from the reference's"


@pytest.mark.parametrize("shape", [(16384, 16384), (4096, 300), (1, 64), (300, 4097), (17, 8192)])
@pytest.mark.parametrize("config", [CastConfig(1, 2048, 1), CastConfig(64, 128, 4), CastConfig(4, 512, 2)])
def test_a_proof_problem_is_compiled_alike(shape: tuple[int, int], config: CastConfig) -> None:
    """Divisible by what the large one is, whole tiles where that has them, and quick for the reference."""
    small = proof_problem(Problem("quantize", E2M1, "bfloat16", "rows", shape), config)
    for large_side, side, tile in zip(shape, small.shape, (config.tile_rows, config.tile_cols), strict=True):
        assert side <= large_side
        assert (side % 16 == 0) == (large_side % 16 == 0)
        assert (side % tile == 0) == (large_side % tile == 0)
        assert (side == 1) == (large_side == 1)
    assert small.shape[1] % 128 == shape[1] % 128  # and so the bytes of a row of codes
    assert small.shape[0] * small.shape[1] <= 1 << 18


def test_a_product_is_not_made_small() -> None:
    assert proof_problem(PROBLEMS[7], HopperConfig(128, 2, 4, 2)) == PROBLEMS[7]


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_a_workload_on_the_meta_device(problem: Problem) -> None:
    """It has the same bytes to move as a real one, and launches of the same kernels."""
    made, real = workload(problem, META, LIMITS), workload(problem, CPU, Limits("cpu"))
    assert made.work == real.work
    config = task(problem, LIMITS).candidates[0]
    assert all(launch.programs > 0 for launch in made.launches(config))


# The JIT's own compilation of the launches, after that for a GPU that is not here: it is to find all in the cache.
HITS = """
import os, glob, sys
import torch, triton
from triton.backends.compiler import GPUTarget
from mxkernels import tuner
from mxkernels.tune import Problem
from mxkernels.tune.aot import compile_launch
from mxkernels.tune.limits import Limits
from mxkernels.workloads import META, workload

class Driver:  # as much of a GPU as the JIT asks of before it launches
    def get_current_target(self): return GPUTarget("cuda", 90, 32)
    def get_active_torch_device(self): return torch.device("meta")
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0
    def map_python_to_cpp_type(self, name): return name

triton.runtime.driver.set_active(Driver())
compiled = lambda: len(glob.glob(os.environ["TRITON_CACHE_DIR"] + "/*/*.cubin"))
limits = Limits("sm_90")
for text in sys.argv[1:]:
    problem = Problem.of_key(text)
    config = tuner.task(problem, limits).candidates[0]
    footprint = tuner.make_compiler(limits)(problem, config)
    before = compiled()
    for launch in workload(problem, META, limits).launches(config):
        launch.kernel.warmup(**launch.arguments, **launch.options, enable_fp_fusion=False, grid=(1,))
    print(before, compiled(), footprint.instructions, len(compile_launch(launch, "sm_90").sass))
"""


def test_what_is_compiled_ahead_is_what_the_jit_looks_for(tmp_path: Path) -> None:
    """Whole matrices and others, a plain kernel, one with descriptors, and one for Hopper. The instructions of those
    without loops are counted, the no-ops that pad the code with them."""
    problems = [
        Problem("quantize", E2M1, "bfloat16", "rows", (4096, 4096)),
        Problem("dequantize", "e3m2 1x32 rtne even symmetric", "bfloat16", "rows", (4096, 301)),
        product("multiply", "bfloat16 * bfloat16", "bfloat16", "turned * straight", 256, 512, 512),
        product("multiply", "float8_e5m2 * float8_e5m2", "bfloat16", STRAIGHT, 4096, 4096, 4096),
    ]
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-c", HITS, *(problem.key for problem in problems)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    counts = [tuple(map(int, line.split())) for line in done.stdout.splitlines() if line[:1].isdigit()]
    assert len(counts) == len(problems)
    assert all(before == after for before, after, *_ in counts)
    assert counts[-1][0] == len(problems)
    assert [counted for *_, counted, _ in counts[2:]] == [0, 0]
    assert all(0 <= counted - real < 32 for *_, counted, real in counts[:2])


# --- problems ------------------------------------------------------------------------------------------------


def test_problems_of_a_callable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What its launches ask for, once a key: the largest."""
    install(monkeypatch, tmp_path)

    def step() -> None:
        for rows in (2000, 2048, 1500, 8):
            tune.find_config(
                Problem("quantize", E2M1, "bfloat16", "rows", (rows, 64)), DEVICE, lambda: CastConfig(1, 64, 1)
            )

    assert [problem.shape for problem in problems_of(step)] == [(2048, 64), (8, 64)]
    assert problems_of(lambda: None) == []
    assert problems_of(QUANTIZE) == [QUANTIZE]
    with pytest.raises(TypeError, match="what has a str; allowed: a callable, a Problem, or several of them"):
        problems_of(["quantize"])


def test_problems_of_casts() -> None:
    able = LIMITS.capabilities
    found = {op: cast_problems(op, mx.mxfp4, 64, 128, torch.bfloat16, able) for op in CASTS}
    assert {op: [(each.op, each.layout) for each in problems] for op, problems in found.items()} == {
        "quantize": [("quantize", "rows")],
        "quantize_transposed": [("quantize", "columns")],
        "quantize_pair": [("quantize_pair", "rows")],
        "dequantize": [("dequantize", "rows")],
        "fold": [("fold", "straight"), ("quantize_fold", "rows")],
        "fold_transposed": [("fold", "turned")],
    }
    assert cast_problems("fold", mx.mxfp8_e4m3, 64, 128, torch.bfloat16, able) == []


@pytest.mark.parametrize(
    ("m", "a", "b", "architecture", "ops"),
    [
        (1024, mx.mxfp4, mx.mxfp4, "sm_90", ["quantize", "fold", "quantize_fold", "multiply"]),
        (1024, ASYMMETRIC, ASYMMETRIC, "sm_90", ["quantize", "fold", "multiply"]),
        (16, ASYMMETRIC, ASYMMETRIC, "sm_90", ["quantize", "quantize", "decode_multiply"]),
        (16, torch.bfloat16, mx.mxfp4, "sm_90", ["quantize", "stream", "stream"]),
        (1024, torch.bfloat16, mx.mxfp4, "sm_90", ["quantize", "dequantize", "multiply"]),
        (1024, mx.mxfp8_e4m3, mx.mxfp8_e4m3, "sm_90", ["quantize", "dequantize", "multiply"]),
        (1024, torch.float16, mx.mxfp4, "sm_90", ["quantize", "decode_multiply"]),
        (1024, mx.mxfp4, mx.mxfp4, "sm_80", ["quantize", "dequantize", "multiply"]),
        (1024, mx.mxfp8_e4m3, mx.mxfp8_e4m3, "gfx950", ["quantize", "native"]),
    ],
)
def test_problems_of_products(m: int, a: Any, b: Any, architecture: str, ops: list[str]) -> None:
    found = product_problems(m, 1024, 1024, a, b, Limits(architecture).capabilities)
    assert [each.op for each in problems_of(found)] == ops
    for each in found:
        assert task(each, Limits(architecture)).candidates
        assert each.op != "fold" or each.formats.endswith(" symmetric")


# --- tuning --------------------------------------------------------------------------------------------------


def test_what_is_found_serves_from_then_on(h200: Path) -> None:
    (result,) = autotune(QUANTIZE, jobs=1, budget=3600)
    assert (result.before.origin, result.before_us, result.config.tile_rows) == ("rule", 100, 2)
    choice = tune.find_config(QUANTIZE, DEVICE, lambda: result.before.config)
    assert choice == Choice(result.config, "cache")
    entry = tune.load(h200).entries(H200, "quantize")[0][QUANTIZE.key]
    assert (entry.before_us, entry.after_us) == (result.before_us, result.after_us) == (100, 80)
    (again,) = autotune(QUANTIZE, jobs=1, budget=3600)
    assert (again.before.origin, again.config, again.gain) == ("cache", result.config, 1)


def test_each_result_is_stored_at_once(h200: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that an interrupted run can be resumed."""
    problems = [Problem("quantize", E2M1, "bfloat16", "rows", (64, cols)) for cols in (256, 512)]
    stored: list[int] = []

    def interrupted(stage: str, done: int, total: int, text: str) -> None:
        if stage == "measure" and done == 1:
            stored.append(len(tune.load(h200).entries(H200, "quantize")[0]))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        autotune(problems, jobs=1, progress=interrupted)
    assert stored == [1]
    assert untuned(problems, DEVICE) == problems[1:]


def test_another_table(h200: Path, tmp_path: Path) -> None:
    path = tmp_path / "shipped.json"
    tune_problems([QUANTIZE], DEVICE, budget=60, jobs=1, path=path)
    assert QUANTIZE.key in tune.load(path).entries(H200, "quantize")[0]
    assert not h200.exists()


def test_what_meets_no_problem(h200: Path) -> None:
    with pytest.raises(ValueError, match="what met no problem"):
        autotune(lambda: None)
    assert autotune([]) == []


def test_one_of_many_has_to_join_them_first(h200: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.raises(RuntimeError, match=r"WORLD_SIZE says .* allowed: after torch\.distributed\.init_process_group"):
        autotune(QUANTIZE)


def test_a_table_that_cannot_be_written_is_refused_before_the_measuring(
    h200: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tuner, "search", lambda *arguments, **options: pytest.fail("it was searched"))
    (tmp_path / "file").write_text("")
    with pytest.raises(tune.TableError, match="cannot be read"):
        tune_problems([QUANTIZE], DEVICE, budget=60, path=tmp_path / "file" / "table.json")


def test_without_a_gpu() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(ValueError, match="torch sees no GPU"):
        autotune(QUANTIZE)


@pytest.mark.interpreter
def test_from_the_first_candidate_to_the_stored_config(h200: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real compiler, for a GPU that is not here, and the real runner, in the interpreter."""
    monkeypatch.undo()
    install(monkeypatch, h200.parents[1])
    monkeypatch.setattr(Limits, "of", classmethod(lambda cls, device: LIMITS))
    monkeypatch.setattr(tuner, "make_runner", fakes.interpreter)
    monkeypatch.setattr(contest, "RUN_S", 200.0)  # the interpreter takes most of a second a sample
    problem = Problem("quantize", E2M1, "bfloat16", "rows", (16, 128))
    (result,) = tune_problems([problem], DEVICE, budget=120, jobs=2, breadths=[Breadth(3, 2)])
    assert not result.faults
    assert (result.compiled, result.run) == (3, 2)
    assert result.before_us > 0
    assert result.limit_us > 0
    assert tune.load(h200).entries(H200, "quantize")[0][problem.key].config == result.config


def test_a_config_that_fails_has_no_time(h200: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is stored of the one that takes its place is its own time alone."""
    monkeypatch.setattr(tuner, "make_runner", fakes.runner_of_tall_tiles)
    (result,) = autotune(QUANTIZE, jobs=1, budget=3600)
    assert (result.before_us, result.after_us) == (None, 80.0)
    entry = tune.load(h200).entries(H200, "quantize")[0][QUANTIZE.key]
    assert (entry.before_us, entry.after_us) == (80.0, 80.0)


# --- many ranks ----------------------------------------------------------------------------------------------

RANK = """
import sys
import torch.distributed as distributed
from mxkernels import tuner
from mxkernels.tune import Problem

rank, place = int(sys.argv[1]), sys.argv[2]
distributed.init_process_group("gloo", init_method=f"file://{place}", rank=rank, world_size=2)
shared = []
tuner.same_stamps = lambda group: None
tuner.share = lambda: shared.append(rank)


class Unsendable(Exception):
    def __reduce__(self):
        raise TypeError("it cannot be pickled")


def problem(rows, cols):
    return Problem("quantize", "e2m1 1x32 rtne even symmetric", "bfloat16", "rows", (rows, cols))


def prepare():
    return [problem(64 - rank, 64), problem(64, 128 * (rank + 1))]


def fails():
    raise Unsendable(f"{rank} is out of memory")


def find(problems):
    assert rank == 0
    return [each.shape for each in problems]


def say(prepare, find):
    try:
        print(tuner._with_all_ranks(prepare, find), shared == [rank])
    except (RuntimeError, Unsendable) as error:
        print(f"{type(error).__name__}: {error}")


say(prepare, find)
say(fails if rank == 1 else prepare, find)
say(prepare, lambda problems: fails())


def differ(group):
    raise RuntimeError("rank 1 has another GPU")


tuner.same_stamps = differ
say(prepare, lambda problems: print("it was searched"))
print(shared == [rank])
distributed.destroy_process_group()
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without")
def test_the_first_rank_tunes_for_all(tmp_path: Path) -> None:
    """All that any of them met, each problem once. The others wait, and get its results; or, of what one raised, the
    name of that one. Then all share its table."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), str(tmp_path / "store")],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        first, second = (rank.communicate(timeout=600)[0].splitlines() for rank in ranks)
    finally:
        for rank in ranks:
            rank.kill()
    assert first[0] == second[0] == "[(64, 64), (64, 128), (64, 256)] True"
    assert second[1] == "Unsendable: 1 is out of memory"
    assert first[1] == "RuntimeError: rank 1 raised Unsendable: 1 is out of memory"
    assert first[2] == "Unsendable: 0 is out of memory"
    assert second[2] == "RuntimeError: rank 0 raised Unsendable: 0 is out of memory"
    assert first[3:] == second[3:] == ["RuntimeError: rank 1 has another GPU", "True"]

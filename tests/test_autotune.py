"""The tuner: problems, what runs and compiles them, what is stored; and the `tune` command."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="kernels need Triton")

import torch
import tuning_fakes as fakes
from click.testing import CliRunner
from tuned import DEVICE, H200, install

import mxkernels as mx
from mxkernels import cli_tune, tune, tuner
from mxkernels.cli import cli
from mxkernels.problems import CASTS, cast_problems, product_problems
from mxkernels.tune import CastConfig, Choice, HopperConfig, Problem, contest
from mxkernels.tune.limits import Limits
from mxkernels.tune.search import Breadth
from mxkernels.tune.task import Fault, Result, Task
from mxkernels.tune.worker import Failure
from mxkernels.tuner import Runner, autotune, problems_of, task, tune_problems, untuned
from mxkernels.workloads import META, proof, proof_problem, workload
from mxkernels.workloads.products import Product
from mxkernels.workloads.workload import gaussian, signs

ROOT = Path(__file__).parents[1]
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


@pytest.fixture
def h200(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A machine with a GPU that compiles nothing and runs nothing. Its cache."""
    install(monkeypatch, tmp_path)
    monkeypatch.setattr(Limits, "of", classmethod(lambda cls, device: LIMITS))
    monkeypatch.setattr(tuner, "make_compiler", fakes.counting_compiler)
    monkeypatch.setattr(tuner, "make_runner", fakes.instant_runner)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    yield tune.cache_path(H200)
    monkeypatch.undo()
    tune.events.TABLES_CHANGED.happened()


def test_what_is_found_serves_from_then_on(h200: Path) -> None:
    (result,) = autotune(QUANTIZE, jobs=1)
    assert (result.before.origin, result.before_us, result.config.tile_rows) == ("rule", 100, 2)
    choice = tune.find_config(QUANTIZE, DEVICE, lambda: result.before.config)
    assert choice == Choice(result.config, "cache")
    entry = tune.load(h200).entries(H200, "quantize")[0][QUANTIZE.key]
    assert (entry.before_us, entry.after_us) == (result.before_us, result.after_us) == (100, 80)
    (again,) = autotune(QUANTIZE, jobs=1)
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


def test_as_many_compile_as_may_run(h200: Path, monkeypatch: pytest.MonkeyPatch, measurements: Any) -> None:
    """By default: affinity, as of a job's share of a machine, counts, where the system has it."""
    seen: list[int] = []
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3, 5, 7}, raising=False)
    monkeypatch.setattr(tuner, "search", lambda *arguments, jobs, **options: seen.append(jobs) or [])
    monkeypatch.setattr(cli_tune, "compile_all", lambda *arguments: seen.append(arguments[2]) or {})
    autotune(QUANTIZE)
    autotune(QUANTIZE, jobs=2)
    command("--op", "quantize", "--shape", "64x512", "--dry-run", "--architecture", "sm_90")
    assert seen == [3, 2, 3]
    monkeypatch.setattr(measurements, "Setup", lambda *arguments: seen.append(arguments[3]))
    monkeypatch.setattr(measurements, "PROBLEMS", ())
    monkeypatch.setattr(measurements, "rows", lambda tasks, shipped, setup: [])
    measurements.measure(h200.parent, DEVICE)
    assert seen[3:] == [1]
    monkeypatch.delattr(os, "sched_getaffinity")
    autotune(QUANTIZE)
    assert seen[4:] == [64]


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


def test_the_command_is_not_for_one_of_many(h200: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who would not see what is stored, and replace it by less."""
    monkeypatch.setenv("WORLD_SIZE", "8")
    done = command("--op", "quantize", "--shape", "64x512")
    assert done.exit_code == 2
    assert "WORLD_SIZE says that this process is one of many" in done.stderr


def test_a_file_that_is_no_table_is_not_replaced(h200: Path, tmp_path: Path) -> None:
    notes = tmp_path / "notes.txt"
    notes.write_text("to do")
    done = command("--op", "quantize", "--shape", "64x512", "--jobs", "1", "--export", str(notes))
    assert done.exit_code == 2
    assert f"{notes} is no table of configs" in done.stderr
    assert notes.read_text() == "to do"
    assert [path.name for path in tmp_path.glob("notes*")] == ["notes.txt"]


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


# --- the command -----------------------------------------------------------------------------------------------


def command(*arguments: str) -> Any:
    return CliRunner().invoke(cli, ["tune", *arguments])


def test_the_command(h200: Path) -> None:
    done = command("--op", "quantize,fold", "--shape", "64x512", "--jobs", "1", "--budget", "30")
    assert done.exit_code == 0, done.output
    assert "before µs" in done.stdout
    lines = [line for line in done.stdout.splitlines() if "64x512" in line]
    assert len(lines) == 3
    assert all("rule" in line for line in lines)
    assert f"Stored in {h200}." in done.stderr
    counts = {(stamp, op): count for stamp, op, count in tune.load(h200).parts()}
    assert counts == {(H200.here(op), op): 1 for op in ("quantize", "fold", "quantize_fold")}
    assert len(tune.load(h200).sections) == 2  # of which the folds share one


def test_nothing_measured_is_no_success(h200: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuner, "make_runner", fakes.runner_without_memory)
    done = command("--op", "quantize", "--shape", "64x512,64x1024", "--jobs", "1")
    assert done.exit_code == 1
    assert done.stdout.count("failed: quantize") == 2
    assert "there is no memory for the operands" in done.stdout
    assert "Stored in" not in done.output
    assert done.stderr.splitlines()[-1] == (
        "mxkernels: no problem could be measured, and nothing was stored; the table above says why"
    )


def test_what_was_measured_is_printed_before_a_write_error(h200: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is full when the second result is stored."""
    store, stored = tuner.store, []

    def full(entries: dict[str, tune.Entry], *arguments: Any) -> Path:
        if stored and entries:
            raise tune.TableError(f"{h200} cannot be written: No space left on device")
        stored.extend(entries)
        return store(entries, *arguments)

    monkeypatch.setattr(tuner, "store", full)
    done = command("--op", "quantize", "--shape", "64x512,64x1024,64x2048", "--jobs", "1")
    assert done.exit_code == 1
    assert "64x512" in done.stdout
    assert "64x1024" in done.stdout
    assert "64x2048" not in done.stdout
    assert "Stored in" not in done.output
    assert done.stderr.splitlines()[-1] == (
        f"mxkernels: {h200} cannot be written: No space left on device; what was stored before the last of these "
        "stays, and --resume does the rest"
    )
    assert len(stored) == 1


def test_resume(h200: Path) -> None:
    first = ["--op", "quantize", "--shape", "64x512", "--jobs", "1"]
    assert command(*first).exit_code == 0
    done = command(*first, "--shape", "64x1024", "--resume")
    assert "1 of 2 problems are stored already." in done.stderr
    assert "64x1024" in done.stdout
    assert "64x512" not in done.stdout
    done = command(*first, "--resume")
    assert done.exit_code == 0
    assert "1 of 1 problems are stored already." in done.stderr


def test_resume_with_a_cache_that_is_none(h200: Path) -> None:
    h200.parent.mkdir(parents=True, exist_ok=True)
    h200.write_text('{"sections": [')
    with pytest.warns(UserWarning, match="it is set aside as"):
        done = command("--op", "quantize", "--shape", "64x512", "--jobs", "1", "--resume")
    assert done.exit_code == 0, done.output
    assert "0 of 1 problems are stored already." in done.stderr
    assert len(tune.load(h200).sections) == 1


def test_a_config_that_fails_has_no_time(h200: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is stored of the one that takes its place is its own time alone."""
    monkeypatch.setattr(tuner, "make_runner", fakes.runner_of_tall_tiles)
    (result,) = autotune(QUANTIZE, jobs=1)
    assert (result.before_us, result.after_us) == (None, 80.0)
    entry = tune.load(h200).entries(H200, "quantize")[0][QUANTIZE.key]
    assert (entry.before_us, entry.after_us) == (80.0, 80.0)


def test_export(h200: Path, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for place in (pipe, Path(os.devnull)):
        done = command("--op", "quantize", "--shape", "64x512", "--jobs", "1", "--export", str(place))
        assert done.exit_code == 2
        assert done.stderr.startswith(f"mxkernels: {place} is a ")
    path = tmp_path / "table.json"
    done = command("--op", "quantize", "--shape", "64x512", "--jobs", "1", "--export", str(path))
    assert done.exit_code == 0, done.output
    (section,) = json.loads(path.read_text())["sections"]
    assert (section["gpu"], section["kernels"]) == (H200.gpu, H200.kernels)
    assert list(section["entries"]) == [f"quantize | {E2M1} | bfloat16 | rows | 64x512"]
    assert not h200.exists()


def test_dry_run() -> None:
    """Needs no GPU, and lists what would be searched."""
    done = command("--op", "quantize,matmul", "--shape", "1024x4096x2048", "--block", "4x4", "--dry-run")
    assert done.exit_code == 0, done.output
    ops = [line.split()[0] for line in done.stdout.splitlines()[2:]]
    assert ops == ["quantize", "quantize", "fold", "quantize_fold", "fold", "quantize_fold", "multiply"]
    assert "7 problems, up to 7:00, and what setting them up takes." in done.stderr


def test_a_dry_run_without_a_gpu_does_not_resume() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    done = command("--op", "quantize", "--shape", "64x512", "--dry-run", "--resume")
    assert done.exit_code == 2
    assert done.stderr.startswith("mxkernels: Invalid value for '--resume': ")


def test_a_dry_run_resumes(h200: Path, tmp_path: Path) -> None:
    """What is stored in the cache, or in the table that would be written, is left out."""
    path = tmp_path / "table.json"
    arguments = ["--op", "quantize", "--shape", "64x512", "--jobs", "1"]
    assert command(*arguments, "--export", str(path)).exit_code == 0
    arguments += ["--shape", "64x1024", "--dry-run", "--resume"]
    assert "2 problems, " in command(*arguments).stderr
    done = command(*arguments, "--export", str(path))
    assert "1 of 2 problems are stored already." in done.stderr
    assert "\n1 problem, up to 1:00" in done.stderr


def test_the_largest_shape() -> None:
    done = command(
        "--op", "quantize,dequantize,fold", "--shape", f"1x{1 << 56},{1 << 56}x1,{1 << 28}x{1 << 28}", "--dry-run"
    )
    assert done.exit_code == 0, done.output
    done = command("--op", "matmul", "--shape", f"{1 << 28}x{1 << 28}x{1 << 28}", "--dry-run")
    assert done.exit_code == 0, done.output


def test_the_readmes_two_minutes() -> None:
    """What its commands may take, by their budgets, and the problems that it counts."""
    section = (ROOT / "README.md").read_text("utf-8").split("## A new GPU in two minutes")[1].split("\n## ")[0]
    lines = [line for line in re.findall(r"^mxkernels tune(.*)", section, re.MULTILINE) if "--dry-run" not in line]
    assert len(lines) == 2
    for line in lines:
        arguments, comment = line.split("#")
        done = command(*arguments.split(), "--dry-run")
        problems, minutes, seconds = re.findall(r"(\d+) problems, up to (\d+):(\d+)", done.stderr)[0]
        assert int(minutes) * 60 + int(seconds) <= 130
        assert f" {problems} " in comment


def test_dry_run_for_an_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiles, and says how many would run."""
    monkeypatch.setattr(cli_tune, "make_compiler", fakes.counting_compiler)
    arguments = ["--op", "quantize", "--shape", "64x512", "--dry-run", "--architecture", "sm_90", "--jobs", "1"]
    done = command(*arguments)
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines()[0].split()[-4:] == ["compile", "compiled", "to", "run"]
    assert done.stdout.splitlines()[2].split()[-3:] == ["8", "8", "4"]  # of the first search


def test_a_dry_run_says_what_does_not_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    failure = Failure("it raised ValueError: there is no such instruction")
    monkeypatch.setattr(cli_tune, "compile_all", lambda requests, *rest: dict.fromkeys(requests, failure))
    done = command("--op", "quantize", "--shape", "64x512", "--dry-run", "--architecture", "sm_90")
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines()[2].split()[-3:] == ["8", "0", "0"]
    assert done.stdout.count("it raised ValueError: there is no such instruction") == 8


def test_a_dry_run_says_what_it_assumes() -> None:
    """Of another architecture another GPU: what does not fit there is no candidate."""
    candidates = {}
    for architecture, model, processors, shared_bytes, gbps in (
        ("sm_90", "NVIDIA H200", 132, 232448, 4200),
        ("sm_89", "NVIDIA L40S", 142, 101376, 756),
    ):
        limits = Limits.assumed(architecture)
        problem = product("multiply", "bfloat16 * bfloat16", "bfloat16", "turned * straight", 4096, 4096, 4096)
        candidates[architecture] = len(task(problem, limits).candidates)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cli_tune, "make_compiler", fakes.counting_compiler)
            done = command("--op", "quantize", "--shape", "64x512", "--dry-run", "--architecture", architecture)
        assert (
            f"Assumed: a GPU like {model}, of {processors} multiprocessors, {shared_bytes} bytes of shared memory "
            f"a program and {gbps} GB/s."
        ) in done.stderr
    assert candidates["sm_89"] < candidates["sm_90"]


def test_few_rows_are_multiplied_plain_too() -> None:
    done = command("--op", "matmul", "--shape", "16x4096x2048", "--dry-run")
    assert sum(line.startswith("stream") for line in done.stdout.splitlines()) == 2
    done = command("--op", "matmul", "--shape", "16x4096x2048", "--activations", "mxfp4", "--dry-run")
    assert "stream" not in done.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--op", "multiply"], "'multiply' is no op; allowed: quantize, quantize_transposed"),
        (["--budget", "soon"], "'soon' is no time; allowed: seconds such as 60 or 60s, or 2m, 1h"),
        (["--budget", "-1"], "'-1' is no time"),
        (["--architecture", "sm_90"], "allowed: --dry-run"),
        (["--architecture", "h200", "--dry-run"], "'h200' is no architecture; allowed: sm_80"),
        (["--shape", "8x8x8x8", "--dry-run"], "Invalid value for '--shape'"),
        (["--op", "quantize", "--shape", "8x8x8", "--dry-run"], "Invalid value for '--shape'"),
        (
            ["--op", "quantize,fold", "--activations", "bfloat16"],
            "'--activations': quantize, fold have none; allowed: ",
        ),
        (["--export", "/no/such/folder/table.json"], "there is no folder /no/such/folder"),
        (["--export", "table.json", "--dry-run"], "Invalid value for '--export': a dry run stores nothing; allowed: "),
        (["--resume", "--dry-run", "--architecture", "sm_90"], "Invalid value for '--resume': what is stored is"),
        (["--shape", "1000000000000x1000000000000", "--dry-run"], "'--shape': 1000000000000x1000000000000; allowed: "),
        (["--shape", "1000000000000x16x1000000000000", "--op", "matmul", "--dry-run"], "elements a matrix"),
        (["--shape", f"{1 << 56}x1", "--op", "matmul", "--dry-run"], "elements a matrix"),  # of the product
    ],
)
def test_mistakes(arguments: list[str], says: str) -> None:
    done = command(*arguments)
    assert done.exit_code == 2
    assert says in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_no_gpu() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    done = command()
    assert done.exit_code == 2
    assert done.stderr == (
        "mxkernels: torch sees no GPU, and configs are found by measuring; `mxkernels tune --dry-run` needs none\n"
    )


@pytest.mark.parametrize(("text", "seconds"), [("90", 90), ("90s", 90), ("1.5m", 90), ("1h", 3600), ("0.5", 0.5)])
def test_budgets(text: str, seconds: float) -> None:
    assert cli_tune.seconds_named(text) == seconds


def test_the_table_at_the_end() -> None:
    slow, fast = CastConfig(1, 512, 1), CastConfig(2, 512, 1)
    found = Result(QUANTIZE, Choice(slow, "shipped"), fast, 100.0, 80.0, 60.0, 50, 32, 12, 1.0)
    failed = Result(QUANTIZE, Choice(slow, "rule"), slow, None, None, None, 50, 0, 0, 1.0, (Fault(fast, "it hung"),))
    lines = cli_tune.results_table([found, failed]).splitlines()
    assert "100.0" in lines[2]
    assert "1.25" in lines[2]
    assert "0.75" in lines[2]
    assert "shipped" in lines[2]
    assert lines[3].count("–") == 4
    assert lines[4] == f"failed: {QUANTIZE}, {fast}: it hung"


def test_the_progress_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """It takes no more columns than there are; and what the budget ends, it knows."""
    monkeypatch.setenv("COLUMNS", "70")
    clock = iter((0.0, 0.0, 10.0, 20.0, 100.0, 150.0, 155.0))
    monkeypatch.setattr(cli_tune.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    line = cli_tune.ProgressLine(160.0)
    line("compile", 0, 40, "quantize")
    line("compile", 10, 40, "quantize")
    line("compile", 20, 40, "quantize e2m1 1x32 rtne")
    line("measure", 0, 4, "quantize")
    line("measure", 1, 4, "quantize")
    line("compile", 1, 1, "quantize")
    line.clear()
    shown = [each.removeprefix("\x1b[K") for each in capsys.readouterr().err.split("\r") if each]
    assert shown == [
        "[                    ] compiling 0/40  quantize",
        "[#####               ] compiling 10/40, 0:30 left  quantize",
        "[##########          ] compiling 20/40, 0:20 left  quantize e2m1 1x32",
        "[                    ] measuring 0/4  quantize",
        "[#####               ] measuring 1/4, 0:10 left  quantize",
        "[####################] compiling 1/1, 0:00 left  quantize",
        "",
    ]


def test_progress_off_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A line at each stage's start, and then at most one every 15 seconds."""
    clock = iter((100.0, 102.0, 110.0, 117.0, 131.9, 140.0, 141.0, 155.0))
    monkeypatch.setattr(cli_tune.time, "monotonic", lambda: next(clock))
    line = cli_tune.ProgressLine(600.0)
    for done in (0, 10, 20, 30):
        line("compile", done, 40, "quantize")
    for done in (0, 1, 2):
        line("measure", done, 4, "dequantize")
    line.clear()
    assert capsys.readouterr().err.splitlines() == [
        "   2 s  compiling 0/40  quantize",
        "  17 s  compiling 20/40, 0:15 left  quantize",
        "  40 s  measuring 0/4  dequantize",
        "  55 s  measuring 2/4, 0:15 left  dequantize",
    ]


def test_the_command_says_that_it_began(h200: Path) -> None:
    done = command("--op", "quantize", "--shape", "64x512", "--jobs", "1")
    said = [line.split(" s  ")[1].split("  ")[0] for line in done.stderr.splitlines()[:2]]
    assert said == ["compiling 0/8", "measuring 0/1"]


# --- the recorded measurements -----------------------------------------------------------------------------


@pytest.fixture
def measurements(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`bench/tuning.py`."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import tuning

    return tuning


def searched(measurements: Any, number: int, *candidates: CastConfig) -> Task:
    problem = fakes.problem(number)
    work = measurements.task(problem, LIMITS).work
    return Task(problem, work, Choice(candidates[0], "rule"), candidates)


def test_the_measurements_of_the_tuner(measurements: Any) -> None:
    """The exhaustive search finds the fastest; the others are compared with it. A row is there before the next problem
    is run."""
    assert len(set(measurements.PROBLEMS)) == 12
    assert {problem.op for problem in measurements.PROBLEMS} == set(tune.OPS) - {"native"}  # which an H200 has not
    tasks = [searched(measurements, number, *map(fakes.config, range(350, 150, -5))) for number in range(2)]
    shipped = [Choice(fakes.config(200), "shipped")] * 2
    seen: list[tuple[Any, ...]] = []
    setup = measurements.Setup(LIMITS, fakes.compiler, fakes.runner, 2, lambda *progress: seen.append(progress))
    found = measurements.rows(tasks, shipped, setup)
    row = next(found)
    assert {text for *_, text in seen} == {str(fakes.problem())}
    assert list(dict.fromkeys(stage for stage, *_ in seen)) == ["search", "compare", "time", "final"]
    assert (row["best_us"], row["shipped_us"], row["rule_us"]) == (155, 200, 350)
    assert (row["best_config"], row["shipped_over_best"]) == (str(fakes.config(155)), 200 / 155)
    assert 1 <= row["pruned_over_best"] < 350 / 155
    assert (row["candidates"], row["run"]) == (40, 40)
    assert 32 <= row["pruned_compiled"] <= 32 + 8  # of the wider search, since the rule's is far from right
    assert row["pruned_run"] == 12
    assert not row["faults"]
    for name in ("pruned", "exhaustive"):
        assert row[f"{name}_s"] == row[f"{name}_core_s_to_compile"] / 2 + row[f"{name}_s_to_run"]
    assert row["share_of_exhaustive_s"] == row["pruned_s"] / row["exhaustive_s"]
    assert sorted(row["each_us"]) == list(range(155, 355, 5))
    assert row["each_us"][0] == 350  # the rule's, which is always among those that are run
    assert sorted(row["each_place"]) == list(range(40))
    assert sum(row["each_core_s_to_compile"]) == pytest.approx(row["exhaustive_core_s_to_compile"])
    both = [row, *found]
    assert [each["key"] for each in both] == [each.problem.key for each in tasks]
    json.dumps(both)


def test_bad_candidates_cost_the_measurements_nothing_else(measurements: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even what is shipped."""
    monkeypatch.setattr(contest, "RUN_S", 2.0)
    bad = [fakes.config(10 + does, does) for does in (fakes.CRASHES, fakes.HANGS, fakes.WRONG, fakes.FAILS_LATER)]
    uncompiled = fakes.config(5, fakes.RAISES)
    task = searched(measurements, 0, fakes.config(100), *bad, uncompiled, fakes.config(80))
    setup = measurements.Setup(LIMITS, partial(fakes.compiler, (fakes.RAISES,)), fakes.runner, 1)
    (row,) = measurements.rows([task], [Choice(bad[2], "shipped")], setup)
    assert (row["best_us"], row["pruned_us"], row["rule_us"], row["run"]) == (80, 80, 100, 2)
    assert row["shipped_us"] is row["shipped_over_best"] is row["shipped_over_pruned"] is None
    assert {fault.split(":")[0] for fault in row["faults"]} == {str(each) for each in (*bad, uncompiled)}
    assert sorted(us for us in row["each_us"] if us is not None) == [80, 100]
    assert row["each_place"].count(None) == 1  # what does not compile
    assert "pruned_over_best 1.000, shipped_over_best –, rule_over_best 1.250" in measurements.line(row)


def test_a_problem_that_cannot_be_measured_has_a_row(measurements: Any) -> None:
    setup = measurements.Setup(LIMITS, fakes.compiler, partial(fakes.runner, opens=False), 1)
    tasks = [searched(measurements, 0, fakes.config(100), fakes.config(80))]
    (row,) = measurements.rows(tasks, [Choice(fakes.config(100), "rule")], setup)
    assert "best_us" not in row
    assert row["exhaustive_s"] is row["pruned_over_best"] is None
    assert row["faults"] == row["pruned_faults"]
    assert "no memory for the operands" in row["faults"][0]
    assert measurements.reached([row])[0] == "0 of 1 picks of the tuner within 3 % of the best"


def test_what_the_tuner_has_reached(measurements: Any) -> None:
    row = {
        **{"pruned_over_best": 1.03, "share_of_exhaustive_s": 0.11, "pruned_s": 9.0, "rule_over_best": 1.1},
        **{"shipped_origin": "shipped", "shipped_over_pruned": 0.99},
    }
    unshipped = {**row, "pruned_over_best": 1.04, "shipped_origin": "rule", "rule_over_best": None}
    assert [sentence[:6] for sentence in measurements.reached([row, unshipped])] == [
        "1 of 2", "0 of 2", "2 of 2", "1 of 1", "1 of 2",
    ]  # fmt: skip


def test_measurements_use_no_caches(measurements: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", "/mine")
    monkeypatch.delenv(measurements.VARIABLE, raising=False)
    with measurements.empty_caches():
        assert tune.cache_directory() != Path(os.environ["TRITON_CACHE_DIR"]) != Path("/mine")
        assert not tune.cache_directory().exists()
    assert os.environ["TRITON_CACHE_DIR"] == "/mine"
    assert measurements.VARIABLE not in os.environ


def test_the_progress_of_the_measurements(
    measurements: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter((0.0, 1.0, 2.0, 9.0, 12.0, 13.0))
    monkeypatch.setattr(measurements.time, "monotonic", lambda: next(clock))
    lines = measurements.Lines()
    for done in range(4):
        lines("compile", done, 9, "a")
    lines("compare", 0, 9, "a")
    assert [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()] == [
        "1 s compile 0/9 a",
        "12 s compile 3/9 a",
        "13 s compare 0/9 a",
    ]


def test_measurements_go_on_where_they_were_ended(
    measurements: Any, monkeypatch: pytest.MonkeyPatch, h200: Path, tmp_path: Path
) -> None:
    """Each row is written at once; what has one is left out, unless sources or what is shipped have changed."""
    problems = [Problem("quantize", E2M1, "bfloat16", "rows", (64, cols)) for cols in (256, 512, 1024)]
    monkeypatch.setattr(measurements, "PROBLEMS", tuple(problems))
    written = tmp_path / "rows.json"
    monkeypatch.setattr(measurements, "place", lambda *names: written)
    monkeypatch.setattr(measurements, "write", lambda rows, *names: written.write_text(json.dumps({"rows": rows})))
    monkeypatch.setattr(measurements, "line", lambda row: "")
    asked: list[tuple[int, ...]] = []
    ends_at = 2

    def rows(tasks: list[Task], shipped: list[Choice[Any]], setup: Any) -> Iterator[dict[str, Any]]:
        for number, (each, choice) in enumerate(zip(tasks, shipped, strict=True)):
            if number == ends_at:
                raise KeyboardInterrupt
            asked.append(each.problem.shape)
            yield {"key": each.problem.key, "shipped_config": str(choice.config)}

    monkeypatch.setattr(measurements, "rows", rows)
    with pytest.raises(KeyboardInterrupt):
        measurements.measure(tmp_path, DEVICE)
    assert len(measurements.measure(tmp_path, DEVICE)) == 3
    assert asked == [problem.shape for problem in problems]
    tune.store({problems[1].key: tune.Entry(CastConfig(4, 256, 4), 2.0, 1.0, "2026-11-22")}, H200)
    assert len(measurements.measure(tmp_path, DEVICE)) == 3
    assert asked[3:] == [problems[1].shape]
    monkeypatch.setattr(measurements, "digest", lambda *folders: "other")
    ends_at = 3
    measurements.measure(tmp_path, DEVICE)
    assert asked[4:] == [problem.shape for problem in problems]


def test_a_record_is_replaced_as_a_whole(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import recording

    for count in (2, 1):
        recording.write([{"op": "quantize"}] * count, "tuning", tmp_path, CPU)
        assert len(json.loads(recording.place("tuning", tmp_path, CPU).read_text())["rows"]) == count
    assert [path.name for path in tmp_path.iterdir()] == ["cpu-tuning.json"]


def test_the_commands_that_make_the_shipped_table_parse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import gpu as pieces

    seen: list[list[Problem]] = []
    monkeypatch.setattr(cli_tune, "_dry_run", lambda problems, *rest: seen.append(problems))
    for arguments in pieces.TUNED.values():
        done = command(*arguments.split(), "--dry-run")
        assert done.exit_code == 0, done.output
    keys = [problem.key for problems in seen for problem in problems]
    assert 100 < len(set(keys)) < 250


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
    first, second = (rank.communicate(timeout=120)[0].splitlines() for rank in ranks)
    assert first[0] == second[0] == "[(64, 64), (64, 128), (64, 256)] True"
    assert second[1] == "Unsendable: 1 is out of memory"
    assert first[1] == "RuntimeError: rank 1 raised Unsendable: 1 is out of memory"
    assert first[2] == "Unsendable: 0 is out of memory"
    assert second[2] == "RuntimeError: rank 0 raised Unsendable: 0 is out of memory"
    assert first[3:] == second[3:] == ["RuntimeError: rank 1 has another GPU", "True"]

"""`bench/tuning.py`: the recorded measurements of the tuner, and the commands that make the shipped table."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("triton", reason="kernels need Triton")

import torch
import tuning_fakes as fakes
from click.testing import CliRunner
from tuned import DEVICE, H200, cast, entry, install

from mxkernels import cli_tune, tune, tuner
from mxkernels.cli import cli
from mxkernels.tune import CastConfig, Choice, Problem, contest, location
from mxkernels.tune.limits import Limits
from mxkernels.tune.task import Task
from mxkernels.tuner import autotune

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
LIMITS = Limits("sm_90")
E2M1 = "e2m1 1x32 rtne even symmetric"
QUANTIZE = Problem("quantize", E2M1, "bfloat16", "rows", (40, 300))


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
    monkeypatch.setattr(contest, "RUN_S", 8.0)
    monkeypatch.setattr(measurements, "BUDGET_S", 600.0)
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
    monkeypatch.delenv(location.VARIABLE, raising=False)
    with measurements.empty_caches():
        assert tune.cache_directory() != Path(os.environ["TRITON_CACHE_DIR"]) != Path("/mine")
        assert not tune.cache_directory().exists()
    assert os.environ["TRITON_CACHE_DIR"] == "/mine"
    assert location.VARIABLE not in os.environ


def test_the_measurement_of_a_new_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each command is a process that knows no shipped table; its row says what it stored, and in how long."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import new_gpu

    install(monkeypatch, tmp_path)
    called = []

    def run(command: list[str]) -> Any:
        called.append(command[-3:])
        listed = subprocess.run([*command[:-3], "cache", "list"], check=True, capture_output=True, text=True)
        assert listed.stdout == "Nothing is stored.\n"  # nor shipped
        if command[-1] == "0s":
            return SimpleNamespace(returncode=2)
        found = {1: 2.0, 2: 1.0, 3: 1.02}
        store = {fakes.problem(each).key: replace(entry(cast(0)), before_us=gain) for each, gain in found.items()}
        tune.store(store, H200.here("quantize"))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(new_gpu, "subprocess", SimpleNamespace(run=run))
    row = new_gpu.row("tune --budget 3s", DEVICE)
    assert called == [["tune", "--budget", "3s"]]
    assert row.pop("seconds") > 0
    assert row == {
        "command": "mxkernels tune --budget 3s",
        "exit_status": 0,
        "problems": 3,
        "median_gain": 1.02,
        "largest_gain": 2.0,
        "gained_3_percent": 1,
    }
    with pytest.raises(SystemExit, match="tune --budget 0s stored nothing: it ended with 2"):
        new_gpu.row("tune --budget 0s", DEVICE)


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
        done = CliRunner().invoke(cli, ["tune", *arguments.split(), "--dry-run"])
        assert done.exit_code == 0, done.output
    keys = [problem.key for problems in seen for problem in problems]
    assert 100 < len(set(keys)) < 250


def test_as_many_compile_as_may_run(h200: Path, monkeypatch: pytest.MonkeyPatch, measurements: Any) -> None:
    """By default: affinity, as of a job's share of a machine, counts, where the system has it."""
    seen: list[int] = []
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3, 5, 7}, raising=False)
    monkeypatch.setattr(tuner, "search", lambda *arguments, jobs, **options: seen.append(jobs) or [])
    monkeypatch.setattr(cli_tune, "compile_all", lambda *arguments: seen.append(arguments[2]) or {})
    autotune(QUANTIZE)
    autotune(QUANTIZE, jobs=2)
    CliRunner().invoke(cli, "tune --op quantize --shape 64x512 --dry-run --architecture sm_90".split())
    assert seen == [3, 2, 3]
    monkeypatch.setattr(measurements, "Setup", lambda *arguments: seen.append(arguments[3]))
    monkeypatch.setattr(measurements, "PROBLEMS", ())
    monkeypatch.setattr(measurements, "rows", lambda tasks, shipped, setup: [])
    measurements.measure(h200.parent, DEVICE)
    assert seen[3:] == [1]
    monkeypatch.delattr(os, "sched_getaffinity")
    autotune(QUANTIZE)
    assert seen[4:] == [64]

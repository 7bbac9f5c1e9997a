"""`mxkernels tune`: what it tunes, says, and stores, on a GPU that is not there."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="kernels need Triton")

import torch
import tuning_fakes as fakes
from click.testing import CliRunner
from tuned import H200

from mxkernels import cli_tune, tune, tuner
from mxkernels.cli import cli
from mxkernels.tune import CastConfig, Choice, Problem
from mxkernels.tune.limits import Limits
from mxkernels.tune.task import Fault, Result
from mxkernels.tune.worker import Failure
from mxkernels.tuner import task

ROOT = Path(__file__).parents[1]
E2M1 = "e2m1 1x32 rtne even symmetric"
QUANTIZE = Problem("quantize", E2M1, "bfloat16", "rows", (40, 300))


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


def test_what_could_not_be_measured_is_counted(h200: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rest is stored."""
    monkeypatch.setattr(tuner, "make_runner", fakes.runner_with_little_memory)
    done = command("--op", "quantize", "--shape", "64x512,64x1024,64x2048", "--jobs", "1")
    assert done.exit_code == 1
    assert done.stderr.splitlines()[-2:] == [
        f"Stored in {h200}.",
        "mxkernels: 2 of 3 problems could not be measured; the table above says why",
    ]
    assert [key.split(" | ")[-1] for key in tune.load(h200).entries(H200.here("quantize"), "quantize")[0]] == ["64x512"]


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
        problem = Problem("multiply", "bfloat16 * bfloat16", "bfloat16", "turned * straight", (4096, 4096, 4096))
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
    """It takes no more columns than there are; and no more time is left than of the budget."""
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
        "[#####               ] measuring 1/4, 0:20 left  quantize",
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


def test_the_command_says_that_it_began(h200: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli_tune.ProgressLine, "SECONDS", 1e9)  # between other lines
    done = command("--op", "quantize", "--shape", "64x512", "--jobs", "1")
    said = [line.split(" s  ")[1].split("  ")[0] for line in done.stderr.splitlines()[:2]]
    assert said == ["compiling 0/8", "measuring 0/1"]


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

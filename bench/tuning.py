"""The recorded measurements of the tuner: how near its search, the shipped table and the rule come to the best config.

    python bench/tuning.py GROUP --results DIR      adds a group's problems to DIR/<gpu>-tuning.json

For each problem every candidate that compiles is run, compared and timed for as long as the benchmark's quick look
(`EACH_S`): the exhaustive search. The tuner's own search runs before it, each from empty caches. The picks of both,
what the shipped table has and what the rule says are then timed against each other, in rounds.

A group has 256 to 428 candidates, reckoned at 1.5 s of a core to compile, 0.15 s to compare and `EACH_S` to time: with
16 cores some four minutes for the largest group, `tuning-casts`, and two and a half for the smallest.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from recording import write

sys.path.insert(0, str(Path(__file__).parents[1]))

from mxkernels.environment import device_name
from mxkernels.tune import Choice, Config, Problem
from mxkernels.tune.contest import Contest
from mxkernels.tune.limits import Footprint, Limits
from mxkernels.tune.search import Progress, compile_all, search
from mxkernels.tune.task import Result, Task
from mxkernels.tune.worker import Failure, Handler, Worker
from mxkernels.tuner import make_compiler, make_runner, task

EACH_S = 0.1  # that the exhaustive search times each candidate, in `ROUNDS` rounds
ROUNDS = 3
BUDGET_S = 60.0  # the tuner's, a problem
FINAL_ROUNDS, FINAL_SAMPLES = 12, 16  # of the picks against each other
CHECKING_S = 3600.0  # nothing is cut off

E2M1 = "e2m1 1x32 rtne even symmetric"
LARGE = (16384, 16384)


def _multiply(a: str, b: str, *shape: int, turned: str = "straight * straight") -> Problem:
    return Problem("multiply", f"{a} * {b}", "bfloat16", turned, shape)


GROUPS: dict[str, tuple[Problem, ...]] = {
    "tuning-casts": (
        Problem("quantize", E2M1, "bfloat16", "rows", LARGE),
        Problem("quantize_pair", E2M1, "bfloat16", "rows", LARGE),
        Problem("dequantize", "e3m2 1x32 rtne even symmetric", "bfloat16", "rows", LARGE),
    ),
    "tuning-folds": (
        Problem("fold", E2M1, "float8_e5m2", "straight", (8192, 8192)),
        Problem("fold", "e2m1 4x4 rtne even symmetric", "float8_e5m2", "turned", (8192, 8192)),
        Problem("quantize_fold", E2M1, "bfloat16", "rows", (8192, 4096)),
    ),
    "tuning-products": (
        _multiply("float8_e5m2", "float8_e5m2", 8192, 8192, 8192),
        _multiply("float8_e5m2", "float8_e5m2", 256, 8192, 8192),
        _multiply("bfloat16", "bfloat16", 4096, 14336, 4096),
    ),
    "tuning-decoding": (
        Problem("stream", E2M1, "bfloat16", "prepared", (16, 8192, 8192)),
        Problem("decode_multiply", f"plain * packed straight {E2M1}", "bfloat16", "parts", (128, 4096, 4096)),
        Problem("quantize", "e2m1 1x32 stochastic even symmetric", "bfloat16", "rows", (4096, 4096)),
    ),
}

Make = Callable[[], Handler]


def rows(
    tasks: Sequence[Task],
    shipped: Sequence[Choice[Any]],
    limits: Limits,
    compiler: Make,
    runner: Make,
    jobs: int,
    progress: Progress = lambda stage, done, total, text: None,
) -> list[dict[str, Any]]:
    """A row for each problem. `shipped`: what a user has without tuning. Seconds are those of a problem on average, of
    all that are searched together."""
    with empty_cache():
        start = time.monotonic()
        results = search(tasks, limits, compiler, runner, budget_s=BUDGET_S, jobs=jobs, progress=progress)
        pruned_s = (time.monotonic() - start) / len(tasks)
    with empty_cache(), Worker(runner) as worker:
        start = time.monotonic()
        found = [
            exhaustive(each, compiled, worker, progress)
            for each, compiled in zip(tasks, compile_everything(tasks, compiler, jobs, progress), strict=True)
        ]
        exhaustive_s = (time.monotonic() - start) / len(tasks)
        return [
            row(each, result, choice, best, worker, exhaustive_s, pruned_s)
            for each, result, choice, best in zip(tasks, results, shipped, found, strict=True)
        ]


@contextmanager
def empty_cache() -> Iterator[None]:
    """Inside, processes compile into a directory of their own."""
    before = os.environ.get("TRITON_CACHE_DIR")
    with tempfile.TemporaryDirectory() as directory:
        os.environ["TRITON_CACHE_DIR"] = directory
        try:
            yield
        finally:
            del os.environ["TRITON_CACHE_DIR"]
            if before is not None:
                os.environ["TRITON_CACHE_DIR"] = before


def compile_everything(
    tasks: Sequence[Task], compiler: Make, jobs: int, progress: Progress
) -> list[dict[Config, Footprint | Failure]]:
    """What the compiler says of all candidates of each problem."""
    requests = [(each.problem, config) for each in tasks for config in each.candidates]
    outcomes = compile_all(requests, compiler, jobs, CHECKING_S, progress)
    return [{config: outcomes[each.problem, config] for config in each.candidates} for each in tasks]


def exhaustive(
    each: Task, compiled: dict[Config, Footprint | Failure], worker: Worker, progress: Progress
) -> tuple[Config, int]:
    """The fastest of all candidates that compile, and how many these are. Each is compared and timed, in rounds."""
    configs = [config for config, outcome in compiled.items() if isinstance(outcome, Footprint)]
    contest = Contest(each.problem, worker, [])
    for number, config in enumerate(configs):
        progress("compare", number, len(configs), str(each.problem))
        contest.admit([config], time.monotonic() + CHECKING_S)
    for rival in list(contest.rivals):
        contest.time(rival, 2)
    total = ROUNDS * len(contest.rivals)
    for number in range(ROUNDS):
        for place, rival in enumerate(list(contest.rivals)):
            progress("time", number * len(contest.rivals) + place, total, str(each.problem))
            contest.time(rival, max(int(EACH_S / ROUNDS * 1e6 / (rival.median_us + FLUSH_US)), 1))
    return min(contest.rivals, key=lambda rival: rival.median_us).config, len(configs)


FLUSH_US = 150.0  # that emptying the L2 cache takes before each call, about


def row(
    each: Task, result: Result, shipped: Choice[Any], best: tuple[Config, int], worker: Worker,
    exhaustive_s: float, pruned_s: float,
) -> dict[str, Any]:  # fmt: skip
    """The picks against each other, timed now, and what it took to find them."""
    picks = {"best": best[0], "pruned": result.config, "shipped": shipped.config, "rule": each.candidates[0]}
    medians = head_to_head(each.problem, list(dict.fromkeys(picks.values())), worker)
    times = {name: medians.get(config) for name, config in picks.items()}
    fastest = min(us for us in medians.values())
    return {
        "problem": str(each.problem),
        "key": each.problem.key,
        "candidates": len(each.candidates),
        "compile": best[1],
        "run_by_the_pruned_search": result.run,
        "exhaustive_seconds": exhaustive_s,
        "pruned_seconds": pruned_s,
        "share_of_exhaustive_seconds": pruned_s / exhaustive_s,
        "shipped_origin": shipped.origin,
        **{f"{name}_config": str(config) for name, config in picks.items()},
        **{f"{name}_us": us for name, us in times.items()},
        **{f"{name}_over_fastest": us and us / fastest for name, us in times.items()},
        "limit_us": result.limit_us,
        "faults": [str(fault) for fault in result.faults],
    }


def head_to_head(problem: Problem, configs: Sequence[Config], worker: Worker) -> dict[Config, float]:
    """Median microseconds, of samples taken in turns."""
    contest = Contest(problem, worker, [])
    contest.admit(configs, time.monotonic() + CHECKING_S)
    for number in range(FINAL_ROUNDS):
        at = number % len(contest.rivals)
        for rival in [*contest.rivals[at:], *contest.rivals[:at]]:
            contest.time(rival, FINAL_SAMPLES)
    return {rival.config: statistics.median(rival.samples) for rival in contest.rivals}


class Lines:
    """Progress as lines, at most one every few seconds and one at the start of each stage."""

    SECONDS = 10.0

    def __init__(self) -> None:
        self._start = time.monotonic()
        self._next = 0.0
        self._stage = ""

    def __call__(self, stage: str, done: int, total: int, text: str) -> None:
        now = time.monotonic()
        if stage == self._stage and now < self._next:
            return
        self._stage, self._next = stage, now + self.SECONDS
        print(f"{now - self._start:6.0f} s  {stage} {done}/{total}  {text}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("group", choices=GROUPS)
    parser.add_argument("--results", type=Path, required=True, metavar="DIR")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("torch sees no GPU, and these are a GPU's measurements")
    device = torch.device("cuda", torch.cuda.current_device())
    limits = Limits.of(device)
    known = [task(problem, limits, device) for problem in GROUPS[arguments.group]]
    # the search is to find by itself what is shipped
    tasks = [task(each.problem, limits) for each in known]
    shipped = [each.before for each in known]
    for searched in tasks:
        print(f"{searched.problem}: {len(searched.candidates)} candidates", flush=True)
    found = rows(
        tasks,
        shipped,
        limits,
        partial(make_compiler, limits),
        partial(make_runner, device, limits),
        os.cpu_count() or 1,
        Lines(),
    )
    for each in found:
        print(
            f"{each['problem']}: pruned {each['pruned_over_fastest']:.3f}, shipped {each['shipped_over_fastest']:.3f}, "
            f"rule {each['rule_over_fastest']:.3f} of the fastest; {each['pruned_seconds']:.1f} s a problem, "
            f"{each['share_of_exhaustive_seconds']:.3f} of the exhaustive search's",
            flush=True,
        )
    path = arguments.results / f"{device_name(device).lower().replace(' ', '-')}-tuning.json"
    write(together(path, found), "tuning", arguments.results, device)


def together(path: Path, found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The recorded rows of other problems, and those that were found."""
    before = json.loads(path.read_text("utf-8"))["rows"] if path.exists() else []
    new = {each["key"] for each in found}
    return [*(each for each in before if each["key"] not in new), *found]


if __name__ == "__main__":
    main()

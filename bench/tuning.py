"""The recorded measurements of the tuner: how near its search, the shipped table and the rule come to the best config.

    python bench/tuning.py tuning --results DIR      writes DIR/<gpu>-tuning.json, a row as soon as it is known

For each problem the tuner's own search is run, and after it the exhaustive one: every candidate that compiles is
compared as by the tuner, and timed for `EACH_S`. The fastest few of that, the tuner's pick, what the shipped table has
and what the rule says are then timed against each other, in rounds.

All candidates of all problems are compiled once, in processes side by side, while the GPU works on what is compiled
already. A search's seconds are those of a core that its own candidates took to compile, divided by the processes, and
those that its own process on the GPU took; each search has one, and waits for the compilers are in neither.

It goes on where it was ended: a problem that has a row of the same sources and shipped config is left out. Reckoned at
0.03 to 0.1 s of the GPU to compare a candidate, `EACH_S` to time it and 6 s a problem besides, 1500 candidates take
five to six minutes, in which 14 processes compile them all.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
from recording import empty_caches, place, write

sys.path.insert(0, str(Path(__file__).parents[1]))

from mxkernels.environment import digest
from mxkernels.tune import Choice, Config, Problem
from mxkernels.tune.contest import Contest, NoOperands
from mxkernels.tune.limits import Footprint, Limits
from mxkernels.tune.search import (
    BREADTHS,
    COMPILE_S,
    COMPILING,
    Progress,
    better,
    fastest,
    shortlist,
    survivors,
    usable_cpus,
    wider,
)
from mxkernels.tune.task import Fault, Result, Task
from mxkernels.tune.worker import Failure, Handler, Worker
from mxkernels.tuner import make_compiler, make_runner, task

ROOT = Path(__file__).resolve().parents[1]
EACH_S = 0.06  # that the exhaustive search times each candidate, in `ROUNDS` rounds
ROUNDS = 3
FLUSH_US = 150.0  # that emptying the L2 cache takes before each call, about
BUDGET_S = 60.0  # the tuner's, a problem
FINALISTS = 4  # of the exhaustive search, since the one with the least median is the luckiest too
FINAL_ROUNDS, FINAL_SAMPLES = 48, 4  # short turns: under a product's load clocks come and go within tenths of a second
FREE_CORES = 2  # for this process and the one that times

E2M1 = "e2m1 1x32 rtne even symmetric"
LARGE = (16384, 16384)


def _multiply(a: str, b: str, *shape: int) -> Problem:
    return Problem("multiply", f"{a} * {b}", "bfloat16", "straight * straight", shape)


PROBLEMS = (
    Problem("quantize", E2M1, "bfloat16", "rows", LARGE),
    Problem("quantize_pair", E2M1, "bfloat16", "rows", LARGE),
    Problem("dequantize", "e3m2 1x32 rtne even symmetric", "bfloat16", "rows", LARGE),
    Problem("fold", E2M1, "float8_e5m2", "straight", (8192, 8192)),
    Problem("fold", "e2m1 4x4 rtne even symmetric", "float8_e5m2", "turned", (8192, 8192)),
    Problem("quantize_fold", E2M1, "bfloat16", "rows", (8192, 4096)),
    _multiply("float8_e5m2", "float8_e5m2", 8192, 8192, 8192),
    _multiply("float8_e5m2", "float8_e5m2", 256, 8192, 8192),
    _multiply("bfloat16", "bfloat16", 4096, 14336, 4096),
    Problem("stream", E2M1, "bfloat16", "prepared", (16, 8192, 8192)),
    Problem("decode_multiply", f"plain * packed straight {E2M1}", "bfloat16", "parts", (128, 4096, 4096)),
    Problem("quantize", "e2m1 1x32 stochastic even symmetric", "bfloat16", "rows", (4096, 4096)),
)

Make = Callable[[], Handler]
Row = dict[str, Any]


@dataclass(frozen=True)
class Setup:
    """What is searched with; as `search` takes it."""

    limits: Limits
    compiler: Make
    runner: Make
    jobs: int
    progress: Progress = lambda stage, done, total, text: None


@dataclass(frozen=True)
class Outcome:
    """What the compiler says of a candidate, after so many seconds."""

    said: Footprint | Failure
    seconds: float


@dataclass(frozen=True)
class Case:
    """A problem; what a user has for it without tuning; and what will become of all its candidates."""

    task: Task
    shipped: Choice[Any]
    outcomes: Mapping[Config, Future[Outcome]]

    def said(self, configs: Iterable[Config]) -> dict[Config, Footprint | Failure]:
        return {config: self.outcomes[config].result().said for config in configs}

    def compile_seconds(self, configs: Iterable[Config]) -> float:
        """Of a core."""
        return sum(self.outcomes[config].result().seconds for config in configs)


def rows(tasks: Sequence[Task], shipped: Sequence[Choice[Any]], setup: Setup) -> Iterator[Row]:
    """A row for each problem, as soon as it is known."""
    chosen = [shortlist(each, setup.limits, BREADTHS[0].compiled) for each in tasks]
    requests = [
        (each.problem, config)
        for each, first in zip(tasks, chosen, strict=True)
        for config in dict.fromkeys((*first, *each.candidates))
    ]
    with (
        compiling(requests, setup) as compiled,
        Worker(setup.runner) as pruning,
        Worker(setup.runner) as exhausting,
    ):
        start = time.monotonic()
        for worker in (pruning, exhausting):
            worker.start()
        for worker in (pruning, exhausting):
            worker.wait()
        start_s = time.monotonic() - start
        for each, choice in zip(tasks, shipped, strict=True):
            outcomes = {config: compiled[each.problem, config] for config in each.candidates}
            case = Case(each, choice, outcomes)
            found = pruned(case, setup, pruning)
            yield {
                **row(case, found, exhaustive(case, found.result.config, setup, exhausting), setup),
                "start_s": start_s,
            }


@contextmanager
def compiling(
    requests: Iterable[tuple[Problem, Config]], setup: Setup
) -> Iterator[Mapping[tuple[Problem, Config], Future[Outcome]]]:
    """Inside, processes compile, in this order. What is not compiled at the end is left out."""
    idle: SimpleQueue[Worker] = SimpleQueue()

    def ask(request: tuple[Problem, Config]) -> Outcome:
        worker = idle.get()
        start = time.monotonic()
        try:
            worker.wait()
            start = time.monotonic()
            return Outcome(worker.ask(*request, seconds=COMPILE_S), time.monotonic() - start)
        except Failure as failure:
            return Outcome(failure, time.monotonic() - start)
        finally:
            idle.put(worker)

    with ExitStack() as stack:
        for _ in range(setup.jobs):
            idle.put(stack.enter_context(Worker(setup.compiler, COMPILING)))
        threads = ThreadPoolExecutor(setup.jobs)
        stack.callback(threads.shutdown, cancel_futures=True)
        yield {request: threads.submit(ask, request) for request in requests}


@dataclass(frozen=True)
class Pruned:
    """What the tuner finds, and what that takes: seconds of the GPU, and what is compiled."""

    result: Result
    seconds: float
    compiled: Sequence[Config]


def pruned(case: Case, setup: Setup, worker: Worker) -> Pruned:
    """The tuner's search, and its wider one, if it makes that."""
    setup.progress("search", 0, 1, str(case.task.problem))
    left: Task | None = case.task
    best: Result | None = None
    compiled: dict[Config, None] = {}
    seconds = 0.0
    for breadth in BREADTHS:
        if left is None:
            break
        chosen = shortlist(left, setup.limits, breadth.compiled)
        compiled |= dict.fromkeys(chosen)
        found = fastest(left, case.said(chosen), setup.limits, breadth.run, worker, BUDGET_S / 2)
        seconds += found.seconds
        best = better(best, found)
        left = wider(left, best)
    assert best is not None
    return Pruned(best, seconds, list(compiled))


@dataclass(frozen=True)
class Exhausted:
    """The median microseconds of each candidate that was timed, and in how many seconds, comparing included; and
    those of the fastest and of what is compared with them, timed anew. None, if the problem could not be set up."""

    each_us: dict[Config, float]
    seconds: float | None
    medians: dict[Config, float]
    faults: Sequence[Fault]


def exhaustive(case: Case, found: Config, setup: Setup, worker: Worker) -> Exhausted:
    """The exhaustive search, and its fastest against what was `found`, shipped, and the rule's."""
    contest = Contest(case.task.problem, worker, [])
    try:
        seconds = run_all(case, contest, setup.progress)
        each_us = {rival.config: rival.median_us for rival in contest.rivals}
        setup.progress("final", 0, 1, str(case.task.problem))
        fastest_few = sorted(each_us, key=lambda config: each_us[config])[:FINALISTS]
        picks = (*fastest_few, found, case.shipped.config, case.task.candidates[0])
        return Exhausted(each_us, seconds, head_to_head(contest, dict.fromkeys(picks)), contest.faults)
    except NoOperands as error:
        return Exhausted({}, None, {}, [*contest.faults, Fault(None, str(error))])


def run_all(case: Case, contest: Contest, progress: Progress) -> float:
    """Compare every candidate that compiles, and time it in rounds. The seconds that it takes."""
    seconds, candidates, text = 0.0, case.task.candidates, str(case.task.problem)
    for number, config in enumerate(candidates):
        progress("compare", number, len(candidates), text)
        said = case.outcomes[config].result().said
        if isinstance(said, Failure):
            contest.faults.append(Fault(config, str(said)))
            continue
        start = time.monotonic()
        contest.admit([config], math.inf)
        seconds += time.monotonic() - start
    start = time.monotonic()
    for rival in list(contest.rivals):
        contest.time(rival, 2)  # to know how many samples fill the time
    for number in range(ROUNDS):
        progress("time", number, ROUNDS, text)
        for rival in list(contest.rivals):
            contest.time(rival, max(int(EACH_S / ROUNDS * 1e6 / (rival.median_us + FLUSH_US)), 1))
    return seconds + time.monotonic() - start


def head_to_head(contest: Contest, configs: Iterable[Config]) -> dict[Config, float]:
    """Median microseconds, of samples taken in turns."""
    contest.rivals.clear()
    contest.admit(list(configs), math.inf)
    for number in range(FINAL_ROUNDS):
        at = number % max(len(contest.rivals), 1)
        for rival in [*contest.rivals[at:], *contest.rivals[:at]]:
            contest.time(rival, FINAL_SAMPLES)
    return {rival.config: rival.median_us for rival in contest.rivals}


def row(case: Case, found: Pruned, all_run: Exhausted, setup: Setup) -> Row:
    """The picks, how long they take, and what it took to find them.

    The lists that begin with `each_` are in the order in which the model prefers the candidates before any is
    compiled: what one took, the seconds that it took to compile, and its place in the model's order after that, which
    has none that spills or fails. They say what a narrower search would have found, and when.
    """
    candidates, medians, jobs = case.task.candidates, all_run.medians, setup.jobs
    picks = {"pruned": found.result.config, "shipped": case.shipped.config, "rule": candidates[0]}
    if medians:
        picks = {"best": min(medians, key=lambda config: medians[config]), **picks}
    times = {name: medians.get(config) for name, config in picks.items()}
    pruned_compile_s, all_compile_s = case.compile_seconds(found.compiled), case.compile_seconds(candidates)
    pruned_s = pruned_compile_s / jobs + found.seconds
    first = shortlist(case.task, setup.limits, None)
    last, _ = survivors(case.task, case.said(first), setup.limits, None)
    places = {config: number for number, config in enumerate(last)}
    all_s = None if all_run.seconds is None else all_compile_s / jobs + all_run.seconds
    return {
        "problem": str(case.task.problem),
        "key": case.task.problem.key,
        "candidates": len(candidates),
        "run": len(all_run.each_us),
        "pruned_compiled": len(found.compiled),
        "pruned_run": found.result.run,
        "shipped_origin": case.shipped.origin,
        **{f"{name}_config": str(config) for name, config in picks.items()},
        **{f"{name}_us": us for name, us in times.items()},
        **{f"{name}_over_best": us and us / min(medians.values()) for name, us in times.items() if name != "best"},
        "shipped_over_pruned": ratio(times["shipped"], times["pruned"]),
        "jobs": jobs,
        "pruned_core_s_to_compile": pruned_compile_s,
        "pruned_s_to_run": found.seconds,
        "pruned_s": pruned_s,
        "exhaustive_core_s_to_compile": all_compile_s,
        "exhaustive_s_to_run": all_run.seconds,
        "exhaustive_s": all_s,
        "share_of_exhaustive_s": ratio(pruned_s, all_s),
        "limit_us": found.result.limit_us,
        "each_us": [all_run.each_us.get(config) for config in first],
        "each_core_s_to_compile": [case.compile_seconds([config]) for config in first],
        "each_place": [places.get(config) for config in first],
        "faults": [str(fault) for fault in all_run.faults],
        "pruned_faults": [str(fault) for fault in found.result.faults],
    }


def ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a and b else None


# --- the record ----------------------------------------------------------------------------------------------


def reached(recorded: Sequence[Row]) -> list[str]:
    """A sentence for each of the figures that the tuner is to reach."""
    shipped = [each for each in recorded if each["shipped_origin"] == "shipped"]

    def count(name: str, most: float, its: Sequence[Row] = recorded) -> str:
        values = [each.get(name) for each in its]
        return f"{sum(value is not None and value <= most for value in values)} of {len(values)}"

    return [
        f"{count('pruned_over_best', 1.03)} picks of the tuner within 3 % of the best",
        f"{count('share_of_exhaustive_s', 0.1)} in at most a tenth of the exhaustive search's time",
        f"{count('pruned_s', 60)} in at most 60 s",
        f"{count('shipped_over_pruned', 1.03, shipped)} shipped configs within 3 % of a fresh one",
        f"{count('rule_over_best', 1.15)} of the rule's within 15 % of the best",
    ]


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
    parser.add_argument("group", choices=["tuning"])
    parser.add_argument("--results", type=Path, required=True, metavar="DIR")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("torch sees no GPU, and these are a GPU's measurements")
    device = torch.device("cuda", torch.cuda.current_device())
    with empty_caches():
        found = measure(arguments.results, device)
    print("\n".join(reached(found)))


def measure(results: Path, device: torch.device) -> list[Row]:
    """Measure what has no row yet, and write each as soon as it is known. All rows."""
    limits = Limits.of(device)
    jobs = max(usable_cpus() - FREE_CORES, 1)
    setup = Setup(limits, partial(make_compiler, limits), partial(make_runner, device, limits), jobs, Lines())
    shipped = {problem: task(problem, limits, device).before for problem in PROBLEMS}
    sources = digest(ROOT / "mxkernels", ROOT / "bench")
    found = rows_before(place("tuning", results, device), shipped, sources)
    left = [problem for problem in PROBLEMS if problem.key not in {each["key"] for each in found}]
    # of tasks that know nothing of the table: the search is to find by itself what is shipped
    for each in rows([task(problem, limits) for problem in left], [shipped[problem] for problem in left], setup):
        print(line(each), flush=True)
        found.append({**each, "sources": sources})
        write(found, "tuning", results, device)
    return found


def rows_before(path: Path, shipped: Mapping[Problem, Choice[Any]], sources: str) -> list[Row]:
    """Those of an earlier run that hold still."""
    if not path.exists():
        return []
    configs = {problem.key: str(choice.config) for problem, choice in shipped.items()}
    return [
        each
        for each in json.loads(path.read_text("utf-8"))["rows"]
        if each["sources"] == sources and each["shipped_config"] == configs.get(each["key"])
    ]


def line(each: Row) -> str:
    names = ("pruned_over_best", "shipped_over_best", "rule_over_best", "pruned_s", "share_of_exhaustive_s")
    values = (f"{name} {'–' if each.get(name) is None else format(each[name], '.3f')}" for name in names)
    return f"{each['problem']}: {', '.join(values)}"


if __name__ == "__main__":
    main()

"""Search: from all configs of a problem to the one that is measurably the fastest.

The model (`model`) ranks the candidates; the best of them are compiled, in processes side by side, and what the
compiler says of them ranks them again; the best of those are run against each other (`contest`).
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

from .config import Config
from .contest import measure
from .limits import Footprint, Limits
from .model import predicted_us
from .problem import Problem
from .space import steps
from .task import Fault, Result, Task
from .worker import Failure, Handler, Worker

_ALIKE = 0.05  # the model knows no smaller difference
COMPILE_S = 120.0  # after which a compilation hangs
# Of processes that compile. There are many, and the interpreter, if this process has it on, compiles nothing.
COMPILING: dict[str, str | None] = {"TRITON_INTERPRET": None, "OMP_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Breadth:
    """How many candidates of a problem are compiled, and how many of these are run; None: all."""

    compiled: int | None = 32
    run: int | None = 12


# Stage ("compile" or "measure"), how much of it is done, of how much, and what is next.
Progress = Callable[[str, int, int, str], None]


def search(
    tasks: Sequence[Task],
    limits: Limits,
    compiler: Callable[[], Handler],
    runner: Callable[[], Handler],
    *,
    budget_s: float,
    jobs: int,
    breadth: Breadth | None = None,
    progress: Progress = lambda stage, done, total, text: None,
    found: Callable[[Result], None] = lambda result: None,
) -> list[Result]:
    """The fastest config of each problem.

    Args:
        compiler: makes, in other processes, what compiles: `(problem, config)` to a Footprint.
        runner: makes, in another process, what runs: `("open", problem)` to the limit in microseconds, `("check",
            problem, config)` to what is wrong with what its launches write, or None, and `("time", problem, config,
            samples)` to microseconds, as many.
        budget_s: for each problem, on average, from when processes are there. Up to half of it all goes to compiling;
            what is not compiled then is out.
        jobs: processes that compile.
        found: called with each result as soon as there is one.
    """
    breadth = breadth or Breadth()
    whole_s = budget_s * len(tasks)
    start = time.monotonic()
    chosen = [shortlist(task, limits, breadth.compiled) for task in tasks]
    results = []
    with Worker(runner) as worker:
        worker.start()
        compiled = compile_all(_by_rank(tasks, chosen), compiler, jobs, whole_s / 2, progress)
        end = max(start + whole_s, time.monotonic() + whole_s / 2)
        for done, (task, configs) in enumerate(zip(tasks, chosen, strict=True)):
            progress("measure", done, len(tasks), str(task.problem))
            outcomes = {config: compiled.get((task.problem, config)) for config in configs}
            seconds = (end - time.monotonic()) / (len(tasks) - done)
            results.append(fastest(task, outcomes, limits, breadth.run, worker, seconds))
            found(results[-1])
    progress("measure", len(tasks), len(tasks), "")
    return results


def fastest(
    task: Task,
    outcomes: Mapping[Config, Footprint | Failure | None],
    limits: Limits,
    most: int | None,
    worker: Worker,
    seconds: float,
) -> Result:
    """Of the candidates that were to be compiled, of which `outcomes` has what became of them (None: there was no
    time), the fastest: at most so many of them are run, for about so many seconds."""
    configs, faults = survivors(task, outcomes, limits, most)
    counts = (len(task.candidates), sum(each is not None for each in outcomes.values()))
    return measure(task, configs, worker, seconds, counts, faults)


def shortlist(task: Task, limits: Limits, most: int | None) -> list[Config]:
    """The candidates that the model prefers, uncompiled."""
    return _best(task, dict.fromkeys(task.candidates), limits, most)


def survivors(
    task: Task, outcomes: Mapping[Config, Footprint | Failure | None], limits: Limits, most: int | None
) -> tuple[list[Config], tuple[Fault, ...]]:
    """The candidates that are worth running, for what the compiler says of them, and those that do not compile.

    What spills or does not fit is left out without a word, save what serves at present and the rule's.
    """
    faults = tuple(Fault(config, str(each)) for config, each in outcomes.items() if isinstance(each, Failure))
    kept: dict[Config, Footprint | None] = {}
    for config, each in outcomes.items():
        fits = isinstance(each, Footprint) and each.exceeds(config, limits) is None
        if fits or (not isinstance(each, Failure) and config in _kept_always(task)):
            kept[config] = each if isinstance(each, Footprint) else None
    return _best(task, kept, limits, most), faults


def _best(task: Task, footprints: dict[Config, Footprint | None], limits: Limits, most: int | None) -> list[Config]:
    """The configs that the model predicts to be the fastest, with what serves at present and the rule's. Of those that
    it takes for alike the ones nearer to the rule's come first."""
    rule = task.candidates[0]
    times = {
        config: predicted_us(task.problem, task.work, config, limits, footprint)
        for config, footprint in footprints.items()
    }
    least = min(times.values(), default=0.0)

    def rank(config: Config) -> tuple[bool, int, float]:
        slower = (times[config] / least - 1) / _ALIKE
        return config not in _kept_always(task), int(slower), steps(config, rule)

    return sorted(footprints, key=rank)[:most]


def _kept_always(task: Task) -> tuple[Config, Config]:
    return task.before.config, task.candidates[0]


def _by_rank(tasks: Sequence[Task], chosen: Sequence[Sequence[Config]]) -> Iterable[tuple[Problem, Config]]:
    """Each problem's first candidate, then each one's second …: should time run out, all have had their best."""
    for rank in range(max(map(len, chosen), default=0)):
        for task, configs in zip(tasks, chosen, strict=True):
            if rank < len(configs):
                yield task.problem, configs[rank]


# --- compiling ---------------------------------------------------------------------------------------------

Request = tuple[Problem, Config]


def usable_cpus() -> int:
    """The CPUs that this process may use, of which affinity can leave it fewer than there are: as many compile."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def compile_all(
    requests: Iterable[Request], make: Callable[[], Handler], jobs: int, seconds: float, progress: Progress
) -> dict[Request, Footprint | Failure]:
    """What the compiler says of each, in `jobs` processes. After so many `seconds`, which begin when the first process
    is there, the rest is left out."""
    waiting = deque(dict.fromkeys(requests))
    total = len(waiting)
    outcomes: dict[Request, Footprint | Failure] = {}
    ends: list[float] = []

    def work() -> None:
        with Worker(make, COMPILING) as worker:
            with suppress(Failure):  # which the first request meets again
                worker.wait()
            ends.append(time.monotonic() + seconds)
            while True:
                try:
                    request = waiting.popleft()
                except IndexError:  # another thread took the last
                    return
                left = ends[0] - time.monotonic()
                if left <= 0:
                    return
                try:
                    outcomes[request] = worker.ask(*request, seconds=min(left, COMPILE_S))
                except Failure as failure:
                    if time.monotonic() < ends[0]:
                        outcomes[request] = failure
                progress("compile", len(outcomes), total, str(request[0]))

    progress("compile", 0, total, "")
    with ThreadPoolExecutor(max(min(jobs, total), 1)) as threads:
        try:
            for each in [threads.submit(work) for _ in range(min(jobs, total))]:
                each.result()
        finally:
            waiting.clear()
    return outcomes

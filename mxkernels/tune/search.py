"""Search: from all configs of a problem to the one that is measurably the fastest.

The model (`model`) ranks the candidates; the best of them are compiled, in processes side by side, and what the
compiler says of them ranks them again; the best of those are run against each other (`contest`). They are few at
first. Only where one of these gains much, so that rule or model are off, more are tried, those around it before others.
"""

from __future__ import annotations

import os
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace

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

    compiled: int | None
    run: int | None


BREADTHS = (Breadth(8, 4), Breadth(32, 12))  # of the first search, and of the wider one
_MUCH = 1.03  # the gain from which on a wider search is worth its time

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
    breadths: Sequence[Breadth] = BREADTHS,
    progress: Progress = lambda stage, done, total, text: None,
    found: Callable[[Result], None] = lambda result: None,
) -> list[Result]:
    """The fastest config of each problem.

    Args:
        compiler: makes, in other processes, what compiles: `(problem, config)` to a Footprint.
        runner: makes, in another process, what runs: `("open", problem)` to the limit in microseconds, `("check",
            problem, config)` to what is wrong with what its launches write, or None, and `("time", problem, config,
            samples)` to microseconds, as many.
        budget_s: for each problem, on average, from when processes are there. Of what is left of it all, up to half
            goes to compiling, and again before the wider searches; what is not compiled then is out.
        jobs: processes that compile.
        breadths: of the search of every problem, and of the wider ones after it, of those that are worth it and for
            which there is time.
        found: called with each result as soon as there is one, and again with that of a wider search.
    """
    results: dict[Problem, Result] = {}
    compiled: dict[Request, Footprint | Failure] = {}
    end = time.monotonic() + budget_s * len(tasks)
    with Worker(runner) as worker:
        worker.start()
        for breadth in breadths:
            left_s = end - time.monotonic()
            if not tasks or left_s <= 0:
                break
            chosen = [shortlist(task, limits, breadth.compiled) for task in tasks]
            requests = [request for request in by_rank(tasks, chosen) if request not in compiled]
            if requests:
                compiled |= compile_all(requests, compiler, jobs, left_s / 2, progress)
            end = max(end, time.monotonic() + left_s / 2)
            for done, (task, configs) in enumerate(zip(tasks, chosen, strict=True)):
                progress("measure", done, len(tasks), str(task.problem))
                outcomes = {config: compiled.get((task.problem, config)) for config in configs}
                seconds = (end - time.monotonic()) / (len(tasks) - done)
                result = fastest(task, outcomes, limits, breadth.run, worker, seconds)
                results[task.problem] = better(results.get(task.problem), result)
                found(results[task.problem])
            progress("measure", len(tasks), len(tasks), "")
            tasks = [wide for wide in (wider(task, results[task.problem]) for task in tasks) if wide is not None]
    return list(results.values())


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
    return measure(task, configs, worker, seconds, counts, (*task.faults, *faults))


def wider(task: Task, result: Result) -> Task | None:
    """What to search next: around the fastest so far, without what has failed. None, if all of that has been run; or if
    what served before is right, or nearly: so are rule and model then."""
    failed = {fault.config for fault in result.faults}
    left = [config for config in dict.fromkeys((result.config, *task.candidates)) if config not in failed]
    serves = task.before.config not in failed
    if result.run >= len(left) or (serves and (result.gain is None or result.gain <= _MUCH)):
        return None
    return replace(task, candidates=tuple(left), faults=result.faults)


def better(earlier: Result | None, later: Result) -> Result:
    """What counts of two searches of a problem: the later one, unless it gained less, or could not be run, and what the
    earlier one found has not failed since. Gains are of one comparison each, so that they can be compared."""
    if earlier is None or earlier.config in {fault.config for fault in later.faults}:
        return later
    if later.after_us is None or (later.gain or 0.0) < (earlier.gain or 0.0):
        return replace(earlier, faults=later.faults)
    return later


def shortlist(task: Task, limits: Limits, most: int | None) -> list[Config]:
    """The candidates that the model prefers, uncompiled."""
    return _best(task, dict.fromkeys(task.candidates), limits, most)


def survivors(
    task: Task, outcomes: Mapping[Config, Footprint | Failure | None], limits: Limits, most: int | None
) -> tuple[list[Config], tuple[Fault, ...]]:
    """The candidates that are worth running, for what the compiler says of them, and those that do not compile.

    What spills or does not fit is left out without a word, save what serves at present and the middle.
    """
    faults = tuple(Fault(config, str(each)) for config, each in outcomes.items() if isinstance(each, Failure))
    kept: dict[Config, Footprint | None] = {}
    for config, each in outcomes.items():
        fits = isinstance(each, Footprint) and each.exceeds(config, limits) is None
        if fits or (not isinstance(each, Failure) and config in _kept_always(task)):
            kept[config] = each if isinstance(each, Footprint) else None
    return _best(task, kept, limits, most), faults


def _best(task: Task, footprints: dict[Config, Footprint | None], limits: Limits, most: int | None) -> list[Config]:
    """What serves at present and the middle; the first of every kernel, since the model may be wrong about one; then
    what the model predicts to be the fastest. Of configs that it takes for alike, one of each kernel comes in turn, the
    nearer to the middle the earlier."""
    times = {
        config: predicted_us(task.problem, task.work, config, limits, footprint)
        for config, footprint in footprints.items()
    }
    least = min(times.values(), default=0.0)
    kept = [config for config in dict.fromkeys(_kept_always(task)) if config in footprints]
    others = [config for config in footprints if config not in kept]
    turns: Counter[tuple[int, type[Config]]] = Counter()
    places = {}
    for config in sorted(others, key=lambda config: steps(config, task.candidates[0])):
        alike = int((times[config] / least - 1) / _ALIKE)
        turns[alike, type(config)] += 1
        places[config] = alike, turns[alike, type(config)]
    ranked = [*kept, *sorted(places, key=places.__getitem__)]
    first: dict[type[Config], Config] = {}
    for config in ranked:
        first.setdefault(type(config), config)
    return list(dict.fromkeys([*kept, *first.values(), *ranked]))[:most]


def _kept_always(task: Task) -> tuple[Config, Config]:
    return task.before.config, task.candidates[0]


def by_rank(tasks: Sequence[Task], chosen: Sequence[Sequence[Config]]) -> Iterable[tuple[Problem, Config]]:
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

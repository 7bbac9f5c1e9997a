"""Search: from all configs of a problem to the one that is measurably the fastest.

The model (`model`) ranks the candidates; the best of them are compiled, in processes side by side, and what the
compiler says of them ranks them again; the best of those are run. Whatever runs, runs in a process of its own: what
crashes it, hangs, or writes something else than it should is out, and is reported. The others are timed in rounds,
each of them a few times in each, and the slower half is dropped again and again, until one is left beside what serves
at present. These two are timed anew, in turns: the time that chose the one does not count, since the luckiest is
chosen too.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from .config import Config
from .limits import Footprint, Limits
from .lookup import Choice
from .model import Work, predicted_us
from .problem import Problem
from .space import steps
from .worker import Failure, Handler, Worker

ROUNDS = 3  # between two halvings
DUEL_ROUNDS = 8
DUEL_SAMPLES = 16
FIRST_SAMPLES = 4  # of a candidate in a round; twice as many after each halving
LEAST_GAIN = 0.005  # below, clocks that drift decide
_ASK_S = 0.25  # that one candidate is timed at a stretch at the most, so that clocks drift for all alike
_ALIKE = 0.05  # the model knows no smaller difference

COMPILE_S = 120.0  # after which something hangs: a compilation,
SETUP_S = 180.0  # a problem's operands and what they must give,
RUN_S = 20.0  # a candidate's launches


@dataclass(frozen=True)
class Task:
    """A problem to find a config for.

    Attributes:
        before: what serves it at present.
        candidates: `before`'s and the rule's among them; the rule's is the first.
    """

    problem: Problem
    work: Work
    before: Choice[Any]
    candidates: tuple[Config, ...]


@dataclass(frozen=True)
class Breadth:
    """How many candidates of a problem are compiled, and how many of these are run; None: all."""

    compiled: int | None = 32
    run: int | None = 12


EXHAUSTIVE = Breadth(None, None)


@dataclass(frozen=True)
class Fault:
    """A candidate that is out for another reason than its time: None stands for all, the problem itself."""

    config: Config | None
    reason: str

    def __str__(self) -> str:
        return f"{self.config or 'the problem'}: {self.reason}"


@dataclass(frozen=True)
class Result:
    """What was found for a problem.

    Attributes:
        config: the fastest, or `before`'s where none is by more than the noise.
        before_us, after_us: medians with a cold L2 cache; None where nothing could be measured.
        limit_us: what nothing that does the work can beat; None likewise.
        candidates, compiled, run: how many there were.
        seconds: that it took to run them.
    """

    problem: Problem
    before: Choice[Any]
    config: Config
    before_us: float | None
    after_us: float | None
    limit_us: float | None
    candidates: int
    compiled: int
    run: int
    seconds: float
    faults: tuple[Fault, ...] = ()

    @property
    def gain(self) -> float | None:
        """How many times faster than before."""
        return self.before_us / self.after_us if self.before_us and self.after_us else None

    @property
    def share_of_limit(self) -> float | None:
        return self.limit_us / self.after_us if self.limit_us and self.after_us else None


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
            configs, faults = survivors(task, outcomes, limits, breadth.run)
            seconds = (end - time.monotonic()) / (len(tasks) - done)
            counts = (len(task.candidates), sum(each is not None for each in outcomes.values()))
            results.append(measure(task, configs, worker, seconds, counts, faults))
            found(results[-1])
    progress("measure", len(tasks), len(tasks), "")
    return results


def shortlist(task: Task, limits: Limits, most: int | None) -> list[Config]:
    """The candidates that the model prefers, uncompiled."""
    return _best(task, dict.fromkeys(task.candidates), limits, most)


def survivors(
    task: Task, outcomes: dict[Config, Footprint | Failure | None], limits: Limits, most: int | None
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
        # One thread a process: there are jobs of them. The interpreter, if this process has it on, compiles nothing.
        with Worker(make, {"TRITON_INTERPRET": None, "OMP_NUM_THREADS": "1"}) as worker:
            with suppress(Failure):  # which the first request meets again
                worker.wait()
            ends.append(time.monotonic() + seconds)
            while waiting:
                request = waiting.popleft()
                left = ends[0] - time.monotonic()
                if left <= 0:
                    return
                try:
                    outcomes[request] = worker.ask(*request, seconds=min(left, COMPILE_S))
                except Failure as failure:
                    if time.monotonic() < ends[0]:
                        outcomes[request] = failure
                progress("compile", len(outcomes), total, str(request[0]))

    with ThreadPoolExecutor(max(min(jobs, total), 1)) as threads:
        try:
            for each in [threads.submit(_until_empty(work)) for _ in range(min(jobs, total))]:
                each.result()
        finally:
            waiting.clear()
    return outcomes


def _until_empty(work: Callable[[], None]) -> Callable[[], None]:
    """Another thread may take the last request between a look and a grasp."""

    def run() -> None:
        try:
            work()
        except IndexError:
            return

    return run


# --- measuring ---------------------------------------------------------------------------------------------


@dataclass
class Rival:
    """A candidate that gives what it should, and what it was timed at."""

    config: Config
    samples: list[float] = field(default_factory=list)

    @property
    def median_us(self) -> float:
        return statistics.median(self.samples)


class _NoOperands(Exception):
    """The problem could not be set up."""


def measure(
    task: Task,
    configs: Sequence[Config],
    worker: Worker,
    seconds: float,
    counts: tuple[int, int],
    faults: tuple[Fault, ...] = (),
) -> Result:
    """Run `configs`, of which the first is what serves at present, in about so many `seconds` (the first two in any
    case), and find the fastest."""
    start = time.monotonic()
    contest = Contest(task.problem, worker, list(faults))
    before_us = after_us = None
    config = task.before.config
    rivals: list[Rival] = []
    try:
        rivals = contest.admit(configs, start + seconds / 2)
        contest.halve(rivals, config, start + seconds)
        best = contest.duel(config)
        if best is not None:
            config, before_us, after_us = best
    except _NoOperands as error:
        contest.faults.append(Fault(None, str(error)))
    return Result(
        task.problem,
        task.before,
        config,
        before_us,
        after_us,
        contest.limit_us,
        *counts,
        run=len(rivals),
        seconds=time.monotonic() - start,
        faults=tuple(contest.faults),
    )


class Contest:
    """Candidates of one problem against each other, in a worker's process."""

    def __init__(self, problem: Problem, worker: Worker, faults: list[Fault]) -> None:
        self.problem = problem
        self.worker = worker
        self.faults = faults
        self.limit_us: float | None = None
        self.rivals: list[Rival] = []
        self._opened: int | None = None

    def admit(self, configs: Sequence[Config], end: float) -> list[Rival]:
        """Those that give what they should; at least two are looked at, if there are two, and others until `end`."""
        for number, config in enumerate(configs):
            if number >= 2 and time.monotonic() > end:
                break
            try:
                wrong = self._ask("check", config)
            except Failure as failure:
                wrong = str(failure)
            if wrong is None:
                self.rivals.append(Rival(config))
            else:
                self.faults.append(Fault(config, wrong))
        return list(self.rivals)

    def halve(self, rivals: Sequence[Rival], kept: Config, end: float) -> None:
        """Drop the slower half again and again, until one is left beside `kept`, or it is `end`."""
        samples = FIRST_SAMPLES
        while len(self._without(kept)) > 1 and time.monotonic() < end:
            for number in range(ROUNDS):
                for rival in _rotated(self.rivals, number):
                    self.time(rival, samples)
            ranked = sorted(self._without(kept), key=lambda rival: rival.median_us)
            ahead = ranked[: (len(ranked) + 1) // 2]
            self.rivals = [rival for rival in self.rivals if rival.config == kept or rival in ahead]
            samples *= 2
        if len(self._without(kept)) > 1:  # it is late
            timed = [rival for rival in self._without(kept) if rival.samples]
            fastest = [min(timed, key=lambda rival: rival.median_us)] if timed else []
            self.rivals = [rival for rival in self.rivals if rival.config == kept or rival in fastest]

    def duel(self, kept: Config) -> tuple[Config, float, float] | None:
        """The winner, and the times of `kept` and of it, of new samples; None if there is nobody.

        Both are timed in every round, in turns first and second. The difference of a round's medians is a sample; the
        noise is three standard errors of these, by their median absolute deviation. Only by more does one beat what
        is kept.
        """
        pair = sorted(self.rivals, key=lambda rival: rival.config != kept)
        for rival in pair:
            rival.samples.clear()
        differences = []
        for number in range(DUEL_ROUNDS):
            medians = {}
            for rival in _rotated(pair, number):
                taken = self.time(rival, DUEL_SAMPLES)
                if taken:
                    medians[rival.config] = statistics.median(taken)
            pair = [rival for rival in pair if rival in self.rivals]  # without what failed now
            if len(pair) == len(medians) == 2:
                differences.append(medians[pair[0].config] - medians[pair[1].config])
        if not pair:
            return None
        first, last = pair[0], pair[-1]
        if first.config != kept:  # which failed, so that any is better
            return first.config, first.median_us, first.median_us
        if len(pair) == 2 and statistics.median(differences) > max(noise(differences), LEAST_GAIN * first.median_us):
            return last.config, first.median_us, last.median_us
        return kept, first.median_us, first.median_us

    def _without(self, kept: Config) -> list[Rival]:
        return [rival for rival in self.rivals if rival.config != kept]

    def time(self, rival: Rival, samples: int) -> list[float]:
        """Take samples; one that fails is out."""
        if rival not in self.rivals:
            return []
        if rival.samples:
            samples = max(min(samples, int(_ASK_S * 1e6 / max(rival.median_us, 1e-3))), 1)
        try:
            taken: list[float] = list(self._ask("time", rival.config, samples))
        except Failure as failure:
            self.faults.append(Fault(rival.config, str(failure)))
            self.rivals.remove(rival)
            return []
        rival.samples += taken
        return taken

    def _ask(self, request: str, config: Config, *more: Any) -> Any:
        """Ask of the open problem, opening it in a process that is new."""
        if self.worker.process_id is None or self.worker.generation != self._opened:
            try:
                self.limit_us = self.worker.ask("open", self.problem, seconds=SETUP_S)
            except Failure as failure:
                raise _NoOperands(str(failure)) from None
            self._opened = self.worker.generation
        return self.worker.ask(request, self.problem, config, *more, seconds=RUN_S)


def noise(differences: Sequence[float]) -> float:
    """Three standard errors of the median difference, as robustly estimated: 1.4826 median absolute deviations are a
    normal distribution's standard deviation, and a median's error is 1.2533 times a mean's."""
    middle = statistics.median(differences)
    deviation = 1.4826 * statistics.median(abs(each - middle) for each in differences)
    return 3 * 1.2533 * deviation / len(differences) ** 0.5


def _rotated(rivals: Sequence[Rival], by: int) -> list[Rival]:
    """Beginning with another one each time."""
    at = by % max(len(rivals), 1)
    return [*rivals[at:], *rivals[:at]]

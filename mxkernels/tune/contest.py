"""Contest: candidates of one problem, run and timed against each other.

Whatever runs, runs in a process of its own: what crashes it, hangs, or writes something else than it should is out,
and is reported. The others are timed in rounds, each of them a few times in each, and the slower half is dropped again
and again, until one is left beside what serves at present. These two are timed anew, in turns: the times that chose
the one do not count, since the luckiest is chosen too.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from .config import Config
from .problem import Problem
from .task import Fault, Result, Task
from .worker import Failure, Worker

ROUNDS = 3  # between two halvings
FIRST_SAMPLES = 4  # of a candidate in a round; twice as many after each halving
DUEL_ROUNDS = 8
DUEL_SAMPLES = 16
LEAST_GAIN = 0.005  # below, clocks that drift decide
_ASK_S = 0.25  # that one candidate is timed at a stretch at the most, so that clocks drift for all alike

SETUP_S = 180.0  # after which something hangs: a problem's operands and what they must give,
RUN_S = 20.0  # or a candidate's launches


@dataclass
class Rival:
    """A candidate that gives what it should, and what it was timed at."""

    config: Config
    samples: list[float] = field(default_factory=list)

    @property
    def median_us(self) -> float:
        return statistics.median(self.samples)


class NoOperands(Exception):
    """The problem could not be set up."""


def measure(
    task: Task,
    configs: Sequence[Config],
    worker: Worker,
    seconds: float,
    counts: tuple[int, int],
    faults: tuple[Fault, ...] = (),
) -> Result:
    """Run `configs`, of which the first two are what serves at present and the middle of the search, if these are two
    and have not failed, in about so many `seconds` (the first two in any case), and find the fastest."""
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
    except NoOperands as error:
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
        while len(self._without(kept)) > 1:
            for number in range(ROUNDS):
                for rival in _rotated(self.rivals, number):
                    self.time(rival, samples)
            ranked = sorted(self._without(kept), key=lambda rival: rival.median_us)
            ahead = ranked[: (len(ranked) + 1) // 2]
            self.rivals = [rival for rival in self.rivals if rival.config == kept or rival in ahead]
            samples *= 2
            if time.monotonic() > end:
                self.rivals = [rival for rival in self.rivals if rival.config == kept or rival in ahead[:1]]

    def duel(self, kept: Config) -> tuple[Config, float | None, float] | None:
        """The winner, and the times of `kept`, if it has one, and of it, of new samples; None if there is nobody.

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
            return first.config, None, first.median_us
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
                raise NoOperands(str(failure)) from None
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

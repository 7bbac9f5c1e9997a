"""What is searched for, and what is found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .config import Config
from .lookup import Choice
from .model import Work
from .problem import Problem


@dataclass(frozen=True)
class Fault:
    """A candidate that is out for another reason than its time: None stands for all, the problem itself."""

    config: Config | None
    reason: str

    def __str__(self) -> str:
        return f"{self.config or 'the problem'}: {self.reason}"


@dataclass(frozen=True)
class Task:
    """A problem to find a config for.

    Attributes:
        before: what serves it at present.
        candidates: the first is the middle of the search: the rule's, or the fastest so far. `before`'s is among
            them, unless it has failed.
        faults: what has failed so far.
    """

    problem: Problem
    work: Work
    before: Choice[Any]
    candidates: tuple[Config, ...]
    faults: tuple[Fault, ...] = ()


@dataclass(frozen=True)
class Result:
    """What was found for a problem.

    Attributes:
        config: the fastest, or `before`'s where none is by more than the noise.
        before_us, after_us: medians with a cold L2 cache; None where nothing could be measured, and of what served
            before, where that has failed.
        limit_us: what nothing that does the work can beat; None likewise.
        candidates, compiled, run: how many there were, in the last search.
        seconds: that it took to run these.
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

"""Which config serves a problem, and where it comes from."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Generic, TypeVar

import torch

from .config import Config
from .constraints import obstacle
from .events import CONFIGS_CHANGED, TABLES_CHANGED
from .limits import Limits
from .pin import pin_of
from .problem import Problem
from .ranks import follow_ranks
from .source import sources
from .stamp import Stamp

C = TypeVar("C", bound=Config)
R = TypeVar("R")


@dataclass(frozen=True)
class Choice(Generic[C]):
    """A config, and its origin: "pinned", "cache", "shipped", "nearest (GPU)" or "rule"."""

    config: C
    origin: str


def find_config(
    problem: Problem, device: torch.device, rule: Callable[[], C], serves: Callable[[C], bool] | None = None
) -> Choice[C]:
    """The config for a problem on a device.

    It is looked for among those that were pinned, then in the user's cache, the table shipped for the GPU and those
    of other GPUs of its architecture; `rule` makes one where they have none. Without a GPU nothing is looked up.

    Args:
        rule, serves: the same for the same problem and device. `serves` says whether a config does, where that
            takes more than `obstacle` knows.

    Raises:
        ValueError: one that cannot serve was pinned.
    """
    choice = _look_up(problem, device, rule, serves)
    for seen in _recordings:
        seen[problem] = choice
    for seen in _first.met:
        seen.pop(problem, None)  # the last one that was met stands last
        seen[problem] = choice
    return choice


def _look_up(
    problem: Problem, device: torch.device, rule: Callable[[], Any], serves: Callable[[Any], bool] | None
) -> Choice[Any]:
    pinned = pin_of(problem)
    if pinned is not None:
        if serves is not None and not serves(pinned):
            raise ValueError(f"the config pinned for {problem} is {pinned!r}, which cannot serve it")
        return Choice(pinned, "pinned")
    follow_ranks()
    known = _known.get((problem, device))
    if known is not None:
        return known
    if device.type != "cuda":
        return Choice(rule(), "rule")
    candidates = (each for each in _candidates(problem, device) if serves is None or serves(each.config))
    choice = next(candidates, None) or Choice(rule(), "rule")
    if len(_known) >= _MOST_KNOWN:
        _known.clear()
    _known[problem, device] = choice
    return choice


def _candidates(problem: Problem, device: torch.device) -> Iterator[Choice[Any]]:
    """What tables have for a problem, the first choice first."""
    key, shared_bytes = problem.key, _shared_bytes(device)
    for source in sources(Stamp.of(device, problem.op), problem.op):
        entry = source.entries.get(key)
        if entry is None or (key, entry.config) in _struck:
            continue
        if obstacle(problem, entry.config, shared_bytes) is None:
            yield Choice(entry.config, source.origin)


@lru_cache
def _shared_bytes(device: torch.device) -> int:
    """Of a program."""
    return Limits.of(device).shared_bytes


# What serves a problem on a GPU, whatever is pinned; `rule` and `serves` follow from problem and device.
_known: dict[tuple[Problem, torch.device], Choice[Any]] = {}
_MOST_KNOWN = 4096
TABLES_CHANGED.call(_known.clear)

# --- configs that turn out not to serve --------------------------------------------------------------------

# Of tables, by a problem's key: what does not compile, for as long as the process runs.
_struck: set[tuple[str, Config]] = set()


def first_launch(make: Callable[[], R]) -> R:
    """What `make` returns, which looks configs up, each before its launch, and launches what was not launched before.

    A config of a table that does not compile, or takes more than the GPU has, is left out from then on, with a
    warning, and `make` is called anew.

    Raises:
        Exception: what `make` raises: of configs that were pinned, or are the rule's, that too.
    """
    while True:
        met: dict[Problem, Choice[Any]] = {}
        _first.met.append(met)
        try:
            return make()
        except Exception as error:
            if not _strike(met, error):
                raise
        finally:
            _first.met.pop()


def _strike(met: dict[Problem, Choice[Any]], error: Exception) -> bool:
    """Leave the last config that was met out, if an error of the compiler may be its fault."""
    if not met or not _of_compiler(error):
        return False
    problem, choice = list(met.items())[-1]
    if choice.origin in ("pinned", "rule"):
        return False
    _struck.add((problem.key, choice.config))
    _known.clear()
    CONFIGS_CHANGED.happened()
    reason = next((line for line in str(error).splitlines() if line.strip()), "")[:200]
    warnings.warn(
        f"the config for {problem} is left out: {choice.config} (origin: {choice.origin}); "
        f"{type(error).__name__}: {reason}",
        stacklevel=2,
    )
    return True


def _of_compiler(error: Exception) -> bool:
    from triton.errors import TritonError

    # which one of its stages fails with
    return isinstance(error, TritonError) or "PassManager::run failed" in str(error)


class _First(threading.local):
    """What a thread's first launches meet, one within the other."""

    def __init__(self) -> None:
        self.met: list[dict[Problem, Choice[Any]]] = []


_first = _First()

# Of all threads, since autograd has its own for backward; replaced as a whole, for those that look.
_recordings: tuple[dict[Problem, Choice[Any]], ...] = ()
_changing = threading.Lock()


@contextmanager
def recording() -> Iterator[dict[Problem, Choice[Any]]]:
    """Inside, every problem that is met, with its choice. Launches that were remembered ask anew."""
    global _recordings
    seen: dict[Problem, Choice[Any]] = {}
    with _changing:
        _recordings = (*_recordings, seen)
    CONFIGS_CHANGED.happened()
    try:
        yield seen
    finally:
        with _changing:
            _recordings = tuple(each for each in _recordings if each is not seen)  # others may be equal

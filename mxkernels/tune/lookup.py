"""Which config serves a problem, and where it comes from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Generic, TypeVar

import torch
from torch import distributed

from .config import Config
from .constraints import LARGEST_SHARED_BYTES, obstacle
from .events import CONFIGS_CHANGED, TABLES_CHANGED
from .pin import pin_of
from .problem import Problem
from .source import sources
from .stamp import Stamp

C = TypeVar("C", bound=Config)


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
    return choice


def _look_up(
    problem: Problem, device: torch.device, rule: Callable[[], Any], serves: Callable[[Any], bool] | None
) -> Choice[Any]:
    pinned = pin_of(problem)
    if pinned is not None:
        if serves is not None and not serves(pinned):
            raise ValueError(f"the config pinned for {problem} is {pinned!r}, which cannot serve it")
        return Choice(pinned, "pinned")
    _follow_ranks()
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
    for source in sources(Stamp.of(device)):
        entry = source.entries.get(key)
        if entry is not None and obstacle(problem, entry.config, shared_bytes) is None:
            yield Choice(entry.config, source.origin)


@lru_cache
def _shared_bytes(device: torch.device) -> int:
    """Of a program; ROCm does not say."""
    properties = torch.cuda.get_device_properties(device)
    return getattr(properties, "shared_memory_per_block_optin", LARGEST_SHARED_BYTES)


# What serves a problem on a GPU, whatever is pinned; `rule` and `serves` follow from problem and device.
_known: dict[tuple[Problem, torch.device], Choice[Any]] = {}
_MOST_KNOWN = 4096
TABLES_CHANGED.call(_known.clear)

_GROUPS = distributed.is_available()
_in_group = False


def _follow_ranks() -> None:
    """Forget what was found before this process joined others, who may have found something else."""
    global _in_group
    in_group = _GROUPS and distributed.is_initialized()
    if in_group != _in_group:
        _in_group = in_group
        TABLES_CHANGED.happened()


_recordings: list[dict[Problem, Choice[Any]]] = []


@contextmanager
def recording() -> Iterator[dict[Problem, Choice[Any]]]:
    """Inside, every problem that is met, with its choice. Launches that were remembered ask anew."""
    seen: dict[Problem, Choice[Any]] = {}
    _recordings.append(seen)
    CONFIGS_CHANGED.happened()
    try:
        yield seen
    finally:
        del _recordings[next(index for index, each in enumerate(_recordings) if each is seen)]

"""Configs that the caller pins."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from .config import Config
from .constraints import CONFIG_TYPES, obstacle
from .events import CONFIGS_CHANGED
from .problem import OPS, Problem

_pins: dict[str | Problem, Config] = {}


@contextmanager
def pinned(where: str | Problem, config: Config) -> Iterator[None]:
    """Inside, every problem of an op gets `config`; or one problem alone, which goes before its op.

    It holds for the whole process, not for the thread. A problem that the config cannot serve raises
    ValueError when it is met.

    Args:
        where: a name in `OPS`, or a `Problem`.
        config: of a type that the op takes.

    Raises:
        TypeError, ValueError: names the argument and what is allowed.
    """
    op = where.op if isinstance(where, Problem) else where
    if op not in OPS:
        raise ValueError(f"where is {where!r}; allowed: a Problem, or an op: {', '.join(OPS)}")
    if not isinstance(config, CONFIG_TYPES[op]):
        allowed = " or ".join(each.__name__ for each in CONFIG_TYPES[op])
        raise TypeError(f"config is a {type(config).__name__}; allowed for {op}: {allowed}")
    before = _pins.get(where)
    _pins[where] = config
    CONFIGS_CHANGED.happened()
    try:
        yield
    finally:
        del _pins[where]
        if before is not None:
            _pins[where] = before
        CONFIGS_CHANGED.happened()


def pin_of(problem: Problem) -> Config | None:
    """The config that is pinned for a problem.

    Raises:
        ValueError: it cannot serve the problem.
    """
    config = _pins.get(problem, _pins.get(problem.op)) if _pins else None
    if config is not None:
        reason = obstacle(problem, config)
        if reason is not None:
            raise ValueError(f"the config pinned for {problem} is {config!r}, which cannot serve: {reason}")
    return config

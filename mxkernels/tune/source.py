"""Where configs are looked up: the user's cache, the shipped tables, those of other GPUs; and what is left out."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from . import location, ranks
from .events import TABLES_CHANGED
from .problem import OPS
from .stamp import Stamp
from .table import Entry, Table, TableError, cache_path, load, printable


@dataclass(frozen=True)
class Source:
    """Configs from one place. `origin` is what a `Choice` says of them."""

    origin: str
    path: Path
    entries: dict[str, Entry]


def sources(stamp: Stamp, op: str) -> tuple[Source, ...]:
    """For an op, of which the stamp is, those that serve first first: the user's cache, the table shipped for the GPU,
    those of other GPUs of its architecture, of which the ones with the most similar number of multiprocessors come
    first.

    A cache, and what is in it, that cannot serve is left out with a warning, once a process.
    """
    return _sources(stamp, op, ranks.one_of_many())


@lru_cache
def _sources(stamp: Stamp, op: str, one_of_many: bool) -> tuple[Source, ...]:
    found = _cache(stamp, op, one_of_many)
    tables = shipped()
    found += [Source("shipped", path, entries) for path, entries in _for_stamp(tables, stamp, op)]
    relatives = {
        other
        for table in tables.values()
        for other in table.sections
        if other != stamp and other.architecture == stamp.architecture and other == other.here(op)
    }
    for other in sorted(relatives, key=lambda other: (abs(other.sm_count - stamp.sm_count), other.gpu)):
        found += [Source(f"nearest ({other.gpu})", path, entries) for path, entries in _for_stamp(tables, other, op)]
    return tuple(found)


def _cache(stamp: Stamp, op: str, one_of_many: bool) -> list[Source]:
    """The user's cache as it may be used: among ranks, what rank 0 shared of its own."""
    shared = ranks.shared_entries(stamp, op)
    if shared is not None:
        return [Source("cache", Path("rank 0"), shared)]
    try:
        path = cache_path(stamp)
    except TableError:
        return []  # there is no place for one
    try:
        table = _read(path)
    except TableError as error:
        _warn(path, f"{error}; it is left out, and `mxkernels tune` makes another")
        return []
    entries, faults = table.entries(stamp, op)
    if one_of_many:
        if entries:
            _warn(path, f"{path} is left out: ranks' caches may differ; mxkernels.tune.share() shares that of rank 0")
        return []
    if faults:
        more = f" and {len(faults) - 1} more" if len(faults) > 1 else ""
        _warn(path, f"{path} has an entry that is left out{more}: {faults[0]}")
    measured = [other for other, its, _ in table.parts() if its == op]
    if measured and stamp not in measured:
        other = max(measured, key=lambda each: (each.triton == stamp.triton, each.kernels == stamp.kernels))
        _warn(
            path,
            f"{path} is left out for {op}: measured with {other.differences(stamp)}; `mxkernels tune` does it again",
        )
    return [Source("cache", path, entries)]


@lru_cache
def _read(path: Path) -> Table:
    return load(path)


@lru_cache
def shipped() -> dict[Path, Table]:
    """The tables that are part of the package."""
    found = {}
    for path in location.tables_in(location.SHIPPED):
        try:
            found[path] = load(path)
        except TableError as error:
            _warn(path, f"{error}; it came with mxkernels, and is left out")
    return found


def serving(device: torch.device) -> list[Source]:
    """What serves a GPU, all ops together, a source for each place and file that has something."""
    found: dict[tuple[str, Path], dict[str, Entry]] = {}
    for op in OPS:
        for each in sources(Stamp.of(device, op), op):
            found.setdefault((each.origin, each.path), {}).update(each.entries)
    return [Source(*place, entries) for place, entries in found.items() if entries]


def left_out(device: torch.device) -> list[str]:
    """A sentence for each part of the tables of a GPU's architecture that was measured with something else than what
    is here."""
    here = Stamp.of(device, next(iter(OPS)))
    return [
        f"{count} of {op} in {path}: measured with {differences}"
        for path, table in {**_table_of_cache(here), **shipped()}.items()
        for stamp, op, count in table.parts()
        if op in OPS and stamp.architecture == here.architecture and (differences := stamp.differences(stamp.here(op)))
    ]


def _table_of_cache(stamp: Stamp) -> dict[Path, Table]:
    try:
        return {cache_path(stamp): _read(cache_path(stamp))}
    except TableError:
        return {}


def _for_stamp(tables: dict[Path, Table], stamp: Stamp, op: str) -> list[tuple[Path, dict[str, Entry]]]:
    return [(path, table.entries(stamp, op)[0]) for path, table in tables.items() if stamp in table.sections]


_warned: set[Path] = set()


def _warn(path: Path, sentence: str) -> None:
    if path not in _warned:
        _warned.add(path)
        warnings.warn(printable(sentence), stacklevel=2)


TABLES_CHANGED.call(_sources.cache_clear)
TABLES_CHANGED.call(shipped.cache_clear)
TABLES_CHANGED.call(_read.cache_clear)

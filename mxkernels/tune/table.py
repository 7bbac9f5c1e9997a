"""Tables of configs that were found by measuring: JSON files, one a GPU.

A table has a section for each stamp, so that environments share a file, and an op's kernels can change without the
others; a section maps `Problem.key` to an entry. What was stored is replaced by whoever has the same stamp, and by
nobody else.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, astuple, dataclass, field
from datetime import date as Date
from pathlib import Path
from typing import Any

from .config import CastConfig, Config, HopperConfig, MatmulConfig, PairConfig, SmallMatmulConfig
from .constraints import obstacle
from .events import TABLES_CHANGED
from .location import VARIABLE, cache_directory, table_name
from .problem import Problem, impossibility, op_of
from .stamp import Stamp

_CONFIGS: dict[str, type[Config]] = {
    each.__name__: each for each in (CastConfig, PairConfig, MatmulConfig, HopperConfig, SmallMatmulConfig)
}
_LARGEST_BYTES = 1 << 26  # of a file; a thousand times what all shapes of a model take
_LOCK_SECONDS = 60


class TableError(Exception):
    """A table that cannot be read or written; one sentence."""


class BrokenTable(TableError):
    """A file that can be read and is no table."""


class NoFile(TableError):
    """A folder, pipe or device in a table's place."""


@dataclass(frozen=True)
class Entry:
    """A config, and what it gained.

    Attributes:
        before_us: the time of what served the problem without it; a median, with a cold L2 cache. Its own, where that
            failed.
        after_us: its own.
        date: of the measurement, `2026-11-22`.
    """

    config: Config
    before_us: float
    after_us: float
    date: str

    def as_json(self) -> dict[str, Any]:
        config = {"type": type(self.config).__name__, **asdict(self.config)}
        return {"config": config, "before_us": self.before_us, "after_us": self.after_us, "date": self.date}

    @classmethod
    def of_json(cls, key: str, value: dict[str, Any]) -> Entry:
        """The entry of a key.

        Raises:
            ValueError: it cannot serve, and why.
        """
        problem = Problem.of_key(key)
        try:
            return cls._of_problem(problem, value)
        except ValueError as error:
            raise ValueError(printable(f"{key[:200]}: {str(error)[:400]}")) from None

    @classmethod
    def _of_problem(cls, problem: Problem, value: dict[str, Any]) -> Entry:
        reason = impossibility(problem)
        if reason is not None:
            raise ValueError(reason)
        if set(value) != {"config", "before_us", "after_us", "date"}:
            raise ValueError(f"it has {', '.join(value)}; allowed: config, before_us, after_us, date")
        values = value["config"]
        kind = values.get("type") if isinstance(values, dict) else None
        if not isinstance(kind, str) or kind not in _CONFIGS:
            raise ValueError(f"its config has type {kind!r}; allowed: {', '.join(_CONFIGS)}")
        try:
            config = _CONFIGS[kind](**{name: each for name, each in values.items() if name != "type"})
        except TypeError as error:
            raise ValueError(str(error)) from None
        reason = obstacle(problem, config)
        if reason is not None:
            raise ValueError(reason)
        for name in ("before_us", "after_us"):
            if type(value[name]) not in (int, float) or not 0 <= value[name] < 1e12:
                raise ValueError(f"{name} is {value[name]!r:.40}; allowed: microseconds")
        if not _is_date(value["date"]):
            raise ValueError(f"date is {value['date']!r:.40}; allowed: a day as YYYY-MM-DD, such as 2026-11-22")
        return cls(config, value["before_us"], value["after_us"], value["date"])


@dataclass(frozen=True)
class Table:
    """A file's sections, by stamp and by key, as JSON values: what other versions wrote may mean nothing here."""

    sections: dict[Stamp, dict[str, dict[str, Any]]] = field(default_factory=dict)

    def parts(self) -> Iterator[tuple[Stamp, str, int]]:
        """Each section's ops, and how many entries they have."""
        for stamp, section in self.sections.items():
            for op, count in Counter(map(op_of, section)).items():
                yield stamp, op, count

    def entries(self, stamp: Stamp, op: str) -> tuple[dict[str, Entry], list[str]]:
        """The entries of an op under a stamp that can serve, and a sentence for each that cannot."""
        found, faults = {}, []
        for key, value in self.sections.get(stamp, {}).items():
            if op_of(key) != op:
                continue
            try:
                found[key] = Entry.of_json(key, value)
            except ValueError as error:
                faults.append(str(error))
        return found, faults

    def text(self) -> str:
        """Sorted, and a line for each entry, so that a change is easy to review."""
        lines = ['{"sections": [']
        for number, (stamp, section) in enumerate(sorted(self.sections.items(), key=lambda each: astuple(each[0]))):
            head = ", ".join(f"{json.dumps(name)}: {json.dumps(value)}" for name, value in asdict(stamp).items())
            entries = [f"  {json.dumps(key)}: {json.dumps(section[key], sort_keys=True)}" for key in sorted(section)]
            lines.append((", {" if number else "{") + head + ', "entries": {')
            lines.append(",\n".join(entries))
            lines.append("}}")
        return "\n".join([*lines, "]}"]) + "\n"


def cache_path(stamp: Stamp) -> Path:
    """The file of the user's cache for a GPU.

    Raises:
        TableError: there is no place for it.
    """
    directory = cache_directory()
    if directory is None:
        raise TableError(
            f"there is no place for a cache: install platformdirs, or set {VARIABLE} to the name of a directory"
        )
    return directory / table_name(stamp.gpu)


def load(path: Path) -> Table:
    """The table in a file; an empty one if there is none.

    Raises:
        TableError: it cannot be read; BrokenTable: it is none.
    """
    try:
        size = _file_size(path)
        if size > _LARGEST_BYTES:
            raise ValueError(f"it has {size} bytes; allowed: {_LARGEST_BYTES}")
        # What is not finite or has thousands of digits is refused, since it could not be written again.
        value = json.loads(path.read_bytes().decode(), parse_float=_finite, parse_constant=_finite)
        return Table(_sections(value))
    except FileNotFoundError:
        return Table()
    except OSError as error:
        raise TableError(f"{path} cannot be read: {_why(error)}") from None
    except (ValueError, RecursionError) as error:
        raise BrokenTable(f"{path} is no table of configs: {_why(error)}") from None


def store(entries: dict[str, Entry], stamp: Stamp, path: Path | None = None) -> Path:
    """Merge entries, by `Problem.key`, into a file: those of the same stamp and key are replaced, others stay.

    The file is replaced as a whole, under a lock, so that whoever reads it or dies meanwhile leaves a valid one. One
    that is no table is set aside as `.broken`, with a warning; what is no regular file, a folder, pipe or device, is
    left alone.

    Args:
        entries: of ops whose stamp it is.
        path: None is the user's cache for the stamp's GPU.

    Returns:
        The path.

    Raises:
        TableError: nothing could be written; what was there still is.
        ValueError: an entry cannot serve.
    """
    values = {key: entry.as_json() for key, entry in entries.items()}
    for key, value in values.items():
        Entry.of_json(key, value)
    path = cache_path(stamp) if path is None else path
    with suppress(OSError):
        _file_size(path)  # refuses others before a lock is made beside them
    warning = None
    with _locked(path):
        try:
            table = load(path)
        except BrokenTable as error:
            warning = f"{error}; it is set aside as {_set_aside(path)}"
            table = Table()
        if values:
            table.sections.setdefault(stamp, {}).update(values)
        _replace(path, table.text())
    TABLES_CHANGED.happened()
    if warning is not None:
        warnings.warn(warning, stacklevel=2)
    return path


def remove(path: Path) -> None:
    """Delete a table, and what `store` set aside in its place: all of it that can be.

    Raises:
        TableError: something cannot be deleted.
    """
    with suppress(OSError):
        _file_size(path)  # refuses others before a lock is made beside them
    failures = []
    # The lock's file stays. A process that had opened it, and not locked it yet, would then hold a file that is gone,
    # while the next one made and held another; only late versions of filelock look for that.
    with _locked(path):
        for each in (path, *set_aside(path)):
            try:
                each.unlink(missing_ok=True)
            except OSError as error:
                failures.append(f"{each} cannot be deleted: {_why(error)}")
    TABLES_CHANGED.happened()
    if failures:
        raise TableError("; ".join(failures))


def set_aside(path: Path) -> list[Path]:
    """What `store` found in a table's place, and renamed since it was none."""
    aside = re.compile(re.escape(path.name) + r"\.broken(-\d+)?")
    return sorted(each for each in path.parent.glob("*.broken*") if aside.fullmatch(each.name) and each.is_file())


def printable(text: str) -> str:
    """Text of a file or a name, with what a terminal would obey or cannot show as Python escapes it."""
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in text)


def _sections(value: Any) -> dict[Stamp, dict[str, dict[str, Any]]]:
    """The structure that every version of a table has: raises ValueError for another."""
    if not isinstance(value, dict) or set(value) != {"sections"} or not isinstance(value["sections"], list):
        raise ValueError('it has not the form {"sections": [...]}')
    found = {}
    for section in value["sections"]:
        if not isinstance(section, dict) or set(section) != {*Stamp.__dataclass_fields__, "entries"}:
            raise ValueError(f"a section has not the fields {', '.join(Stamp.__dataclass_fields__)} and entries")
        entries = section.pop("entries")
        for name, declared in Stamp.__dataclass_fields__.items():
            if type(section[name]).__name__ != declared.type:
                raise ValueError(f"{name} of a section is {section[name]!r:.40}; allowed: {declared.type}")
        if not isinstance(entries, dict):
            raise ValueError("the entries of a section are no object")
        for key, entry in entries.items():
            if not isinstance(entry, dict) or not all(_is_flat(each) for each in entry.values()):
                raise ValueError(f"the entry {key[:200]!r} is no object of values and objects of values")
        stamp = Stamp(**section)
        if stamp in found:
            raise ValueError(f"two sections have the stamp {stamp}")
        found[stamp] = entries
    return found


def _is_flat(value: Any) -> bool:
    within = value.values() if isinstance(value, dict) else [value]
    return not any(isinstance(each, (dict, list)) for each in within)


def _is_date(value: Any) -> bool:
    try:
        return Date.fromisoformat(value).isoformat() == value
    except (TypeError, ValueError):
        return False


def _file_size(path: Path) -> int:
    """The bytes of a regular file; raises NoFile for what is there and is none."""
    status = os.stat(path)
    if stat.S_ISREG(status.st_mode):
        return status.st_size
    kinds = ((stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a pipe"))
    kind = next((kind for is_one, kind in kinds if is_one(status.st_mode)), "a device or socket")
    raise NoFile(f"{path} is {kind}; allowed: a file")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"it has the number {text[:40]}")
    return number


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock of a file, in whose directory it lies; what cannot be done there becomes one sentence."""
    from filelock import FileLock

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock", timeout=_LOCK_SECONDS):
            yield
    except (OSError, NotImplementedError) as error:  # Timeout is an OSError
        raise TableError(f"{path} cannot be written: {_why(error)}") from None


def _replace(path: Path, text: str) -> None:
    """Write a file as a whole or not at all. Under the lock, so that nobody else has the temporary one."""
    path = Path(os.path.realpath(path))  # a link stays one
    temporary = path.with_name(path.name + ".tmp")
    temporary.unlink(missing_ok=True)
    try:
        with open(temporary, "xb") as file:
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _set_aside(path: Path) -> Path:
    """Rename what is no table, to a name that is free, which is returned."""
    number, aside = 1, path.with_name(path.name + ".broken")
    while os.path.lexists(aside):
        number += 1
        aside = path.with_name(f"{path.name}.broken-{number}")
    os.rename(path, aside)
    return aside


def _why(error: Exception) -> str:
    """One sentence of an exception."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    text = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
    return printable(text.splitlines()[0][:300])

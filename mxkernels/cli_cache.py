"""The `mxkernels cache` commands: tables of tuned configs, those of the user and those that are shipped."""

from __future__ import annotations

import os
from pathlib import Path

import click
from tabulate import tabulate

from .arguments import Failed, Mistake, Program
from .tune import OPS, BrokenTable, Stamp, Table, TableError, cache_directory, load, remove, tables_in
from .tune.location import SHIPPED, VARIABLE, table_name
from .tune.table import NoFile, printable, set_aside


@click.group(cls=Program, short_help="The tuned configs that are stored.")
def cache() -> None:
    """The configs that `mxkernels tune` found and stored, and those that are shipped.

    They decide speed, never a byte of a cast. A file holds what was measured on one GPU, in a section for each version
    of Triton and of an op's kernels: a section serves only with the same ones.

    \b
    mxkernels cache path                        where the files lie
    mxkernels cache list                        what is in them, and what of it is used
    mxkernels cache verify                      whether all of it can be used
    mxkernels cache clear --gpu "NVIDIA H200"   forget what was tuned on a GPU
    """


@cache.command(short_help="Where the files lie.")
def path() -> None:
    """The directory of the user's files: what MXKERNELS_CACHE names, or the platform's place for caches."""
    click.echo(_directory())


@cache.command("list", short_help="What is stored, and what of it is used.")
@click.option("--entries", is_flag=True, help="A line for each config, rather than for each op.")
def list_tables(entries: bool) -> None:
    """What is stored: a line for each op in each section of a file, the user's first, then those that are shipped.

    "used" is what was measured with this Triton and the op's kernels as they are, on its own GPU; what is shipped also
    on GPUs of the same architecture that have none. Of these configs those that cannot serve are not counted but said.
    """
    rows: list[list[object]] = []
    stored = 0
    for file in [*_tables(cache_directory()), *tables_in(SHIPPED)]:
        try:
            table = load(file)
        except TableError as error:
            rows.append([_place(file), *[""] * (4 if entries else 5), f"no: {error}"])
            continue
        rows += _entry_rows(file, table) if entries else _part_rows(file, table)
        stored += sum(count for _, _, count in table.parts())
    if not rows:
        none = f"None of the {stored} that are stored can be used here: `mxkernels cache list` says why."
        click.echo(none if stored else "Nothing is stored.")
        return
    parts = ["GPU", "SMs", "Triton", "op", "configs", "used"]
    headers = ["from", *(["problem", "config", "before µs", "after µs", "date"] if entries else parts)]
    cells = [[printable(cell) if isinstance(cell, str) else cell for cell in row] for row in rows]
    click.echo(tabulate(cells, headers, tablefmt="simple", floatfmt=".1f"))


@cache.command(short_help="Whether all that is stored can be used.")
@click.argument("files", nargs=-1, type=click.Path(path_type=Path))
def verify(files: tuple[Path, ...]) -> None:
    """Check FILES, or all of the user's: that they are tables, that their configs can serve their problems, and that
    of each op there are some that were measured with this Triton and its kernels as they are. Exit code 1 if not, and
    a line for each fault."""
    faults: list[str] = []
    usable = elsewhere = 0
    for file in files or _tables(cache_directory()):
        if _is_absent(file):
            raise Mistake(printable(f"Invalid value for 'FILES': there is no file {file}"))
        try:
            table = load(file)
        except TableError as error:
            faults.append(str(error))
            continue
        serving, waiting, wrong = _verified(table)
        usable += serving
        elsewhere += waiting
        faults += [f"{file}: {fault}" for fault in wrong]
    for fault in faults:
        click.echo(printable(fault), err=True)
    if faults:
        raise SystemExit(1)
    click.echo(f"Configs: {usable}, all of which can be used.")
    if elsewhere:
        click.echo(f"Not used here: {elsewhere}, of other versions of Triton or of the kernels.")


@cache.command(short_help="Delete what was stored.")
@click.option("--gpu", metavar="NAME", help='Only of this GPU, such as "NVIDIA H200" or nvidia-h200.')
@click.option("--yes", is_flag=True, help="Do not ask.")
def clear(gpu: str | None, yes: bool) -> None:
    """Delete the user's files, of all GPUs or of one, and what was set aside since it was no table. What is no table
    stays, unless --gpu names it; so do those that are shipped."""
    stored = _tables(_directory())
    if gpu is not None:
        stored = _of_gpu(stored, gpu)
    if not stored:
        click.echo("Nothing is stored.")
    files, failures = _sorted_out(stored, named=gpu is not None)
    doomed = [each for file in files for each in (file, *set_aside(file))]
    for each in doomed:
        click.echo(printable(str(each)))
    if doomed and not yes:
        click.confirm(f"Delete {len(doomed)} file{'s' if len(doomed) > 1 else ''}?", abort=True)
    for file in files:
        try:
            remove(file)
        except TableError as error:
            failures.append(str(error))
    if failures:
        raise Failed(printable("; ".join(failures)))


def _of_gpu(files: list[Path], gpu: str) -> list[Path]:
    found = [file for file in files if file.name == table_name(gpu)]
    if not found:
        names = ", ".join(file.stem for file in files) or "none"
        raise Mistake(printable(f"Invalid value for '--gpu': nothing of {gpu} is stored; allowed: {names}"))
    return found


def _sorted_out(files: list[Path], named: bool) -> tuple[list[Path], list[str]]:
    """The files to delete, and a sentence for each that should be and cannot. What is no table may be somebody else's:
    unless it was named it stays, and a sentence says so."""
    found, failures = [], []
    for file in files:
        if _is_absent(file):
            continue  # a link to nothing
        fault = _fault(file)
        if fault is None or (named and isinstance(fault, BrokenTable)):
            found.append(file)
        elif named or not isinstance(fault, (BrokenTable, NoFile)):
            failures.append(str(fault))
        else:
            click.echo(printable(f"{fault}; it stays"), err=True)
    return found, failures


def _fault(file: Path) -> TableError | None:
    try:
        load(file)
    except TableError as error:
        return error
    return None


def _directory() -> Path:
    directory = cache_directory()
    if directory is None:
        raise Mistake(f"there is no place for a cache: install platformdirs, or set {VARIABLE} to a directory")
    return directory


def _tables(directory: Path | None) -> list[Path]:
    """The user's files; raises Mistake for a directory that cannot be read, which to `tables_in` is an empty one."""
    try:
        if directory is not None:
            os.scandir(directory).close()
    except FileNotFoundError:
        return []
    except OSError as error:
        why = f"{directory} cannot be read: {error.strerror}; allowed for {VARIABLE}: a directory that can"
        raise Mistake(printable(why)) from None
    return tables_in(directory)


def _is_absent(file: Path) -> bool:
    try:
        file.stat()
    except OSError as error:
        return isinstance(error, FileNotFoundError)  # of others `load` says why they cannot be read
    return False


def _place(file: Path) -> str:
    return f"shipped {file.name}" if file.parent == SHIPPED else f"cache {file.name}"


def _part_rows(file: Path, table: Table) -> list[list[object]]:
    return [
        [_place(file), stamp.gpu, stamp.sm_count, stamp.triton, op, *_use(table, stamp, op, count)]
        for stamp, op, count in table.parts()
    ]


def _use(table: Table, stamp: Stamp, op: str, count: int) -> tuple[int, str]:
    """Of an op's configs, how many count, and whether they are used."""
    differences = _differences(stamp, op)
    if differences:
        return count, f"no: {differences}"
    entries, faults = table.entries(stamp, op)
    return len(entries), ("yes" if entries else "no") + (f", {len(faults)} cannot serve" if faults else "")


def _differences(stamp: Stamp, op: str) -> str:
    """How what configs of an op were measured with differs from what is here; nothing if it does not."""
    return stamp.differences(stamp.here(op)) if op in OPS else f"another mxkernels, which knows {op}"


def _entry_rows(file: Path, table: Table) -> list[list[object]]:
    """Of what is used: what the rest means is not known here."""
    return [
        [_place(file), key, str(entry.config), entry.before_us, entry.after_us, entry.date]
        for stamp, op, _ in table.parts()
        if not _differences(stamp, op)
        for key, entry in table.entries(stamp, op)[0].items()
    ]


def _verified(table: Table) -> tuple[int, int, list[str]]:
    """How many entries can serve here, and how many could elsewhere; and what is wrong: entries that cannot serve
    anywhere, and, of an op that has entries for other Tritons and kernels alone, how these differ."""
    usable = elsewhere = 0
    faults, stale = [], []
    current: set[str] = set()
    for stamp, op, count in table.parts():
        differences = _differences(stamp, op)
        if differences:
            elsewhere += count
            stale.append((op, f"{count} of {op} measured with {differences}"))
        else:
            entries, wrong = table.entries(stamp, op)
            usable += len(entries)
            faults += wrong
            current.add(op)
    return usable, elsewhere, faults + [sentence for op, sentence in stale if op not in current]

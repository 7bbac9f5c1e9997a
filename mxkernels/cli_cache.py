"""The `mxkernels cache` commands: tables of tuned configs, those of the user and those that are shipped."""

from __future__ import annotations

from pathlib import Path

import click
from tabulate import tabulate

from .arguments import Mistake, Program
from .tune import Stamp, Table, TableError, cache_directory, load, remove, tables_in
from .tune.location import SHIPPED, VARIABLE, table_name


@click.group(cls=Program, short_help="The tuned configs that are stored.")
def cache() -> None:
    """The configs that `mxkernels tune` found and stored, and those that are shipped.

    They decide speed, never a byte of a cast. A file holds what was measured on one GPU, in a section for each version
    of Triton and of the kernels: a section serves only with the same ones.

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
@click.option("--entries", is_flag=True, help="A line for each config, rather than for each section.")
def list_tables(entries: bool) -> None:
    """What is stored: a line for each section of each file, the user's first, then those that are shipped.

    "used" are sections for this Triton and these kernels, on their own GPU; shipped ones also on GPUs of the same
    architecture that have none.
    """
    rows: list[list[object]] = []
    for file in [*tables_in(cache_directory()), *tables_in(SHIPPED)]:
        try:
            table = load(file)
        except TableError as error:
            rows.append([_place(file), "", "", "", "", f"no: {error}"])
            continue
        rows += _entry_rows(file, table) if entries else _section_rows(file, table)
    if not rows:
        click.echo("Nothing is stored.")
        return
    sections = ["GPU", "SMs", "Triton", "configs", "used"]
    headers = ["from", *(["problem", "config", "before µs", "after µs", "date"] if entries else sections)]
    click.echo(tabulate(rows, headers, tablefmt="simple", floatfmt=".1f"))


@cache.command(short_help="Whether all that is stored can be used.")
@click.argument("files", nargs=-1, type=click.Path(path_type=Path))
def verify(files: tuple[Path, ...]) -> None:
    """Check FILES, or all of the user's: that they are tables, that their configs can serve their problems, and that
    they were measured with this Triton and these kernels. Exit code 1 if not, and a line for each fault."""
    faults, count = [], 0
    for file in files or tables_in(cache_directory()):
        if not file.exists():
            raise Mistake(f"Invalid value for 'FILES': there is no file {file}")
        try:
            table = load(file)
        except TableError as error:
            faults.append(str(error))
            continue
        count += sum(map(len, table.sections.values()))
        faults += [f"{file}: {fault}" for fault in _faults(table)]
    for fault in faults:
        click.echo(fault, err=True)
    if faults:
        raise SystemExit(1)
    click.echo(f"Configs: {count}, all of which can be used.")


@cache.command(short_help="Delete what was stored.")
@click.option("--gpu", metavar="NAME", help='Only of this GPU, such as "NVIDIA H200" or nvidia-h200.')
@click.option("--yes", is_flag=True, help="Do not ask.")
def clear(gpu: str | None, yes: bool) -> None:
    """Delete the user's files, of all GPUs or of one. Those that are shipped stay."""
    files = tables_in(_directory())
    if gpu is not None:
        names = [file.stem for file in files]
        files = [file for file in files if file.name == table_name(gpu)]
        if not files:
            raise Mistake(
                f"Invalid value for '--gpu': nothing of {gpu} is stored; allowed: {', '.join(names) or 'none'}"
            )
    if not files:
        click.echo("Nothing is stored.")
        return
    for file in files:
        click.echo(file)
    if not yes:
        click.confirm(f"Delete {len(files)} file{'s' if len(files) > 1 else ''}?", abort=True)
    for file in files:
        try:
            remove(file)
        except TableError as error:
            raise Mistake(str(error)) from None


def _directory() -> Path:
    directory = cache_directory()
    if directory is None:
        raise Mistake(f"there is no place for a cache: install platformdirs, or set {VARIABLE} to a directory")
    return directory


def _place(file: Path) -> str:
    return f"shipped {file.name}" if file.parent == SHIPPED else f"cache {file.name}"


def _section_rows(file: Path, table: Table) -> list[list[object]]:
    return [
        [_place(file), stamp.gpu, stamp.sm_count, stamp.triton, len(section), _use(stamp)]
        for stamp, section in table.sections.items()
    ]


def _use(stamp: Stamp) -> str:
    differences = stamp.differences(stamp.here())
    return f"no: {differences}" if differences else "yes"


def _entry_rows(file: Path, table: Table) -> list[list[object]]:
    """Of the sections that are used: what others mean is not known here."""
    return [
        [_place(file), key, str(entry.config), entry.before_us, entry.after_us, entry.date]
        for stamp in table.sections
        if stamp == stamp.here()
        for key, entry in table.entries(stamp)[0].items()
    ]


def _faults(table: Table) -> list[str]:
    """Entries that cannot serve; and, if no section is for what is here, how the sections differ."""
    found = [fault for stamp in table.sections if stamp == stamp.here() for fault in table.entries(stamp)[1]]
    differences = [stamp.differences(stamp.here()) for stamp in table.sections]
    if all(differences):
        found += [f"measured with {each}" for each in differences]
    return found

"""Rows of measurements as text, as a picture, and beside those of an earlier run."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from .formats import FORMATS
from .gpu import Capabilities
from .support import support_matrix

Row = dict[str, Any]

# What says that two rows measure the same thing; the device does not, so that machines can be compared.
_KEY = ("op", "fmt", "block", "rounding", "scale_rounding", "symmetric", "shape", "dtype", "transposed")
_SMALL_FORMAT_BITS = 6  # up to here a format's values are listed in full


def render(form: str, environment: Row, rows: Sequence[Row]) -> str:
    """The results as `table`, `markdown`, `csv` or `json`, ending in a newline."""
    return _RENDERERS[form](environment, rows)


def read_results(path: Path) -> list[Row]:
    """The rows of an earlier `--format json`. Raises ValueError with one sentence if it is none."""
    if not path.is_file():
        raise ValueError(f"there is no file {path}; allowed: a result of `mxkernels bench --format json`")
    try:
        rows = json.loads(path.read_text())["rows"]
        if all({*_KEY[:7], "median_us"} <= row.keys() for row in rows):
            return list(rows)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        pass
    raise ValueError(f"{path} is not a result of `mxkernels bench --format json`")


def compare(rows: Sequence[Row], old_rows: Sequence[Row]) -> list[Row]:
    """The rows with `old_median_us`, None for what the earlier run did not measure."""
    old = {_key(row): row["median_us"] for row in old_rows}
    return [{**row, "old_median_us": old.get(_key(row))} for row in rows]


def formats_table() -> str:
    """The element formats with their values; of the 8-bit ones a summary."""
    table = []
    for element in FORMATS.values():
        magnitudes = [f"{value:g}" for value in element.magnitudes]
        if element.bits > _SMALL_FORMAT_BITS:
            magnitudes = [*magnitudes[:4], "…", *magnitudes[-2:]]
        special = {"none": "", "nan": "; NaN", "ieee": "; Inf, NaN"}[element.special]
        values = f"±{{{' '.join(magnitudes)}}}{special}"
        table.append([element.name, element.bits, element.emax, element.max, element.smallest, values])
    headers = ["format", "bits", "emax", "max", "smallest", "values"]
    return tabulate(table, headers, tablefmt="simple", maxcolwidths=[None] * 5 + [88], disable_numparse=[5])


def support_table(capabilities: Capabilities | None) -> str:
    """Op x format: how it is served on a GPU with these capabilities (None: on the CPU), and by what."""
    table = []
    for op, by_format in support_matrix(capabilities).items():
        formats: dict[str, list[str]] = {}  # by instruction
        for name, support in by_format.items():
            formats.setdefault(support.instruction, []).append(name)
        if len(formats) > 1:
            instructions = "\n".join(f"{instruction} ({', '.join(names)})" for instruction, names in formats.items())
        else:
            (instructions,) = formats
        table.append([op, *(support.kind for support in by_format.values()), instructions])
    return tabulate(table, ["op", *FORMATS, "instruction"], tablefmt="simple")


def plot(path: Path, rows: Sequence[Row]) -> None:
    """Draw the rows' GB/s beside their limit, and their error. Needs matplotlib; the ending is the file type."""
    from matplotlib.figure import Figure

    labels = [f"{row['op']} {row['fmt']} {row['block']} {row['scale_rounding']}" for row in rows]
    places = range(len(rows))
    figure = Figure(figsize=(12, 1.5 + 0.35 * len(rows)), layout="constrained")
    speed, rmse = figure.subplots(1, 2, sharey=True)
    speed.barh(places, [row["gbps"] for row in rows], color="tab:blue")
    speed.plot([row["limit_gbps"] for row in rows], places, "k|", markersize=14, label="a copy of the same bytes")
    speed.set_yticks(places, labels)
    speed.invert_yaxis()
    speed.set_xlabel(f"GB/s, read and written, on {rows[0]['device']}")
    speed.legend()
    rmse.barh(places, [row["rmse"] or 0.0 for row in rows], color="tab:orange")
    rmse.set_xlabel("root mean square error")
    figure.savefig(path)


def plot_endings() -> list[str]:
    """The file endings that `plot` can write. Raises ImportError without matplotlib."""
    from matplotlib.backend_bases import FigureCanvasBase

    return sorted(FigureCanvasBase.get_supported_filetypes())


def _key(row: Row) -> tuple[str, ...]:
    return tuple(json.dumps(row.get(field)) for field in _KEY)


def _columns(rows: Sequence[Row]) -> dict[str, Callable[[Row], str]]:
    """What people read, by heading."""
    columns: dict[str, Callable[[Row], str]] = {
        "op": lambda row: row["op"],
        "format": lambda row: row["fmt"],
        "block": lambda row: row["block"],
        "rounding": lambda row: row["rounding"],
        "scale": lambda row: row["scale_rounding"] + ("" if row["symmetric"] else ", asym"),
        "shape": lambda row: _shape(row["shape"]) + (" (transposed)" if row["transposed"] else ""),
        "µs": lambda row: f"{row['median_us']:.1f}",
        "p10–p90": lambda row: f"{row['p10_us']:.1f}–{row['p90_us']:.1f}",
        "GB/s": lambda row: f"{row['gbps']:.3g}" if row["gbps"] < 100 else f"{row['gbps']:.0f}",
        "of limit": lambda row: f"{100 * row['fraction_of_limit']:.3g} % of {row['limit']}",
        "bytes": lambda row: f"{row['bytes']:,}",
        "bf16/": lambda row: f"{row['vs_bf16_bytes']:.3f}",
        "FP8/": lambda row: f"{row['vs_fp8_bytes']:.3f}",
        "R-MSE": lambda row: _number(row["rmse"], ".4g"),
        "SQNR dB": lambda row: _number(row["sqnr_db"], ".1f"),
        "path": lambda row: row["path"],
        "config": lambda row: row["config_source"],
    }
    if any(row["name"] for row in rows):
        columns["from"] = lambda row: row["name"]
    if "old_median_us" in rows[0]:
        columns["old µs"] = lambda row: _number(row["old_median_us"], ".1f")
        columns["new/old"] = lambda row: (
            f"{row['median_us'] / row['old_median_us']:.3f}" if row["old_median_us"] else "–"
        )
    return columns


def _tabulated(environment: Row, rows: Sequence[Row], style: str) -> str:
    columns = _columns(rows)
    cells = [[show(row) for show in columns.values()] for row in rows]
    words = ("op", "format", "block", "rounding", "scale", "shape", "path", "config", "from")
    align = ["left" if heading in words else "right" for heading in columns]
    table = tabulate(cells, list(columns), tablefmt=style, colalign=align, disable_numparse=True)
    commit = "" if environment["commit"] is None else f" ({environment['commit'][:10]})"
    triton = f"Triton {environment['triton']}" if environment["triton"] else "no Triton"
    heading = (
        f"{environment['device']}, {rows[0]['dtype']}, mxkernels {environment['mxkernels']}{commit}, "
        f"torch {environment['torch']}, {triton}"
    )
    return f"{heading}\n\n{table}\n"


def _csv(environment: Row, rows: Sequence[Row]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({**row, "shape": _shape(row["shape"])} for row in rows)
    return out.getvalue()


def _json(environment: Row, rows: Sequence[Row]) -> str:
    return json.dumps({"environment": environment, "rows": rows}, indent=1, allow_nan=False) + "\n"


_RENDERERS: dict[str, Callable[[Row, Sequence[Row]], str]] = {
    "table": lambda environment, rows: _tabulated(environment, rows, "simple"),
    "markdown": lambda environment, rows: _tabulated(environment, rows, "pipe"),
    "csv": _csv,
    "json": _json,
}


def _shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)

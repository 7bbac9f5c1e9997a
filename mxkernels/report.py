"""Rows of measurements as text, as a picture, and beside those of an earlier run."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from .formats import FORMATS
from .gpu import Capabilities
from .support import support_matrix
from .tune import left_out, serving

Row = dict[str, Any]

# What says that two rows measure the same thing; the device does not, so that machines can be compared.
_KEY = (
    "op", "fmt", "block", "rounding", "scale_rounding", "symmetric", "shape", "dtype", "transposed", "activations",
    "timed_from", "a_turned", "b_turned",
)  # fmt: skip
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


def configs_text(device: torch.device) -> str:
    """Where the configs of a GPU come from, and which are left out: a line each."""
    lines = [f"{source.origin}: {len(source.entries)} in {source.path}" for source in serving(device)]
    lines += [f"not used: {sentence}" for sentence in left_out(device)]
    return "\n".join(f"configs    {line}" for line in [*lines, "rule: for all other problems"])


def plot(path: Path, rows: Sequence[Row]) -> None:
    """Draw the rows' GB/s beside their limit (of products TFLOP/s beside bf16), and their error. Needs matplotlib;
    the ending is the file type."""
    from matplotlib.figure import Figure

    if _are_products(rows):
        labels = [f"{_shape(row['shape'])} {_activations(row)} x {row['fmt']} {row['timed_from']}" for row in rows]
        speeds = [row["tflops"] for row in rows]
        marks, mark = [row["tflops"] / row["vs_bf16"] for row in rows], "bf16, by torch.mm"
        unit = "TFLOP/s"
    else:
        labels = [f"{row['op']} {row['fmt']} {row['block']} {row['scale_rounding']}" for row in rows]
        speeds = [row["gbps"] for row in rows]
        marks, mark = [row["limit_gbps"] for row in rows], "a copy of the same bytes"
        unit = "GB/s, read and written,"
    places = range(len(rows))
    figure = Figure(figsize=(12, 1.5 + 0.35 * len(rows)), layout="constrained")
    speed, rmse = figure.subplots(1, 2, sharey=True)
    speed.barh(places, speeds, color="tab:blue")
    speed.plot(marks, places, "k|", markersize=14, label=mark)
    speed.set_yticks(places, labels)
    speed.invert_yaxis()
    speed.set_xlabel(f"{unit} on {rows[0]['device']}")
    speed.legend()
    rmse.barh(places, [row["rmse"] or 0.0 for row in rows], color="tab:orange")
    rmse.set_xlabel("root mean square error")
    figure.savefig(path)


def plot_endings() -> list[str]:
    """The file endings that `plot` can write. Raises ImportError without matplotlib."""
    from matplotlib.backend_bases import FigureCanvasBase

    return sorted(FigureCanvasBase.get_supported_filetypes())


def pays_from(rows: Sequence[Row]) -> list[str]:
    """From which M on products of MX operands are faster than in bf16: a sentence for each pair of operands and
    shape of the weights, of the rows that include most (the quantisation of both, if that was timed)."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        operands = (row["activations"], row["fmt"], row["block"], row["scale_rounding"])
        groups.setdefault((*operands, *row["shape"][1:]), []).append(row)
    return [_verdict(members) for members in groups.values()]


def _verdict(rows: Sequence[Row]) -> str:
    """Of rows that differ in M and in what they are timed from."""
    quantised = any(row["timed_from"] == "plain" for row in rows)
    included = [row for row in rows if row["timed_from"] == ("plain" if quantised else "codes")]
    ratios = dict(sorted((row["shape"][0], row["vs_bf16"]) for row in included))
    slower = max((m for m, ratio in ratios.items() if ratio <= 1), default=0)
    onwards = [m for m in ratios if m > slower]
    below = [str(m) for m, ratio in ratios.items() if m < slower and ratio > 1]
    where = [f"from M = {onwards[0]} on ({ratios[onwards[0]]:.2f} times bf16)"] if onwards else []
    where += [f"at M = {', '.join(below)}"] if below else []
    _, n, k = rows[0]["shape"]
    return (
        f"{_activations(rows[0])} x {rows[0]['fmt']} {rows[0]['block']}, N = {n}, K = {k}, "
        f"{'quantisation included' if quantised else 'from stored codes'}: "
        f"pays {' and '.join(where) or 'nowhere'}, of M = {', '.join(map(str, ratios))}."
    )


def _key(row: Row) -> tuple[str, ...]:
    return tuple(json.dumps(row.get(field)) for field in _KEY)


def _are_products(rows: Sequence[Row]) -> bool:
    return bool(rows[0]["op"] == "matmul")


def _activations(row: Row) -> str:
    """Format and block, or the dtype of plain ones."""
    return " ".join(row["activations"].split()[:2])


def _columns(rows: Sequence[Row]) -> dict[str, Callable[[Row], str]]:
    """What people read, by heading."""
    columns = _product_columns() if _are_products(rows) else _cast_columns()
    if any(row["name"] for row in rows):
        columns["from"] = lambda row: row["name"]
    if "old_median_us" in rows[0]:
        columns["old µs"] = lambda row: _number(row["old_median_us"], ".1f")
        columns["new/old"] = lambda row: (
            f"{row['median_us'] / row['old_median_us']:.3f}" if row["old_median_us"] else "–"
        )
    return columns


def _cast_columns() -> dict[str, Callable[[Row], str]]:
    return {
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


def _product_columns() -> dict[str, Callable[[Row], str]]:
    casts = _cast_columns()
    shared = ("bytes", "bf16/", "FP8/", "R-MSE", "SQNR dB")
    return {
        "op": casts["op"],
        "activations": _activations,
        **{heading: casts[heading] for heading in ("format", "block", "rounding", "scale")},
        "M x N x K": lambda row: _shape(row["shape"]),
        "timed from": lambda row: row["timed_from"],
        "µs": casts["µs"],
        "p10–p90": casts["p10–p90"],
        "TFLOP/s": lambda row: f"{row['tflops']:.3g}" if row["tflops"] < 100 else f"{row['tflops']:.0f}",
        "of limit": casts["of limit"],
        "vs bf16": lambda row: _number(row["vs_bf16"], ".2f"),
        "vs FP8": lambda row: _number(row["vs_fp8"], ".2f"),
        "vs dot_scaled": lambda row: _number(row["vs_dot_scaled"], ".2f"),
        **{heading: casts[heading] for heading in shared},
        "of bound": lambda row: f"{row['share_of_bound']:.2g}",
        "path": casts["path"],
        "config": casts["config"],
    }


def _tabulated(environment: Row, rows: Sequence[Row], style: str) -> str:
    columns = _columns(rows)
    cells = [[show(row) for show in columns.values()] for row in rows]
    words = (
        "op", "activations", "format", "block", "rounding", "scale", "shape", "M x N x K", "timed from", "path",
        "config", "from",
    )  # fmt: skip
    align = ["left" if heading in words else "right" for heading in columns]
    table = tabulate(cells, list(columns), tablefmt=style, colalign=align, disable_numparse=True)
    commit = "" if environment["commit"] is None else f" ({environment['commit'][:10]})"
    triton = f"Triton {environment['triton']}" if environment["triton"] else "no Triton"
    heading = (
        f"{environment['device']}, {rows[0]['dtype']}, mxkernels {environment['mxkernels']}{commit}, "
        f"torch {environment['torch']}, {triton}"
    )
    # On the CPU the reference says nothing of speed.
    verdicts = pays_from(rows) if _are_products(rows) and rows[0]["path"] != "reference" else []
    return "\n\n".join([heading, table, *verdicts]) + "\n"


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

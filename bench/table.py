"""The README's table of results, made from the recorded ones.

python bench/table.py          rewrites it between its two markers
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from tabulate import tabulate

ROOT = Path(__file__).resolve().parents[1]
RECORDED = ROOT / "bench/results/nvidia-h200-casts.json"
START, END = "<!-- results: python bench/table.py -->\n", "<!-- end of results -->"

Row = dict[str, Any]


def cast(row: Row) -> str:
    """What was done, in words."""
    words = [row["op"], row["fmt"], row["block"]]
    words += ["stochastic"] if row["rounding"] == "stochastic" else []
    words += [] if row["scale_rounding"] == "even" else [row["scale_rounding"]]
    words += [] if row["symmetric"] else ["asymmetric"]
    words += ["of x.T"] if row.get("transposed") else []
    return " ".join(words)


def shown(row: Row) -> bool:
    """The large bfloat16 matrix; of the dequantised tiles, e2m1 alone."""
    large = tuple(row["shape"]) == (16384, 16384) and row["dtype"] == "bf16"
    return large and not (row["op"] == "dequantize" and row["block"] == "4x4" and row["fmt"] != "e2m1")


COLUMNS: dict[str, Callable[[Row], str]] = {
    "cast": cast,
    "µs": lambda row: f"{row['median_us']:.0f}",
    "GB/s": lambda row: f"{row['gbps']:.0f}",
    "share of a copy": lambda row: f"{row['fraction_of_limit']:.2f}",
}


def table(recorded: dict[str, Any]) -> str:
    environment = recorded["environment"]
    rows = [[column(row) for column in COLUMNS.values()] for row in recorded["rows"] if shown(row)]
    title = (
        f"{environment['device']}, PyTorch {environment['torch']}, Triton {environment['triton']}; "
        "16384x16384, bfloat16, cold L2, median:"
    )
    return f"{title}\n\n{tabulate(rows, list(COLUMNS), 'github', disable_numparse=True)}\n\n"


def main() -> None:
    readme = ROOT / "README.md"
    before, _, rest = readme.read_text("utf-8").partition(START)
    _, _, after = rest.partition(END)
    readme.write_text(before + START + table(json.loads(RECORDED.read_text("utf-8"))) + END + after, "utf-8")


if __name__ == "__main__":
    main()

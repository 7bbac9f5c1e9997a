"""The README's tables of results, made from the recorded ones.

python bench/table.py          rewrites each between its two markers
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from tabulate import tabulate

ROOT = Path(__file__).resolve().parents[1]

Row = dict[str, Any]


@dataclass(frozen=True)
class Table:
    """One table: its recorded results, what is said over it, which rows and columns it shows.

    Attributes:
        name: in its markers.
    """

    name: str
    recorded: Path
    title: str
    shown: Callable[[Row], bool]
    columns: dict[str, Callable[[Row], str]]

    @property
    def start(self) -> str:
        return f"<!-- {self.name}: python bench/table.py -->\n"

    @property
    def end(self) -> str:
        return f"<!-- end of {self.name} -->"

    def text(self) -> str:
        """What stands between the markers."""
        if not self.recorded.exists():
            return "Not recorded yet.\n\n"
        recorded = json.loads(self.recorded.read_text("utf-8"))
        environment = recorded["environment"]
        rows = [[column(row) for column in self.columns.values()] for row in recorded["rows"] if self.shown(row)]
        title = (
            f"{environment['device']}, PyTorch {environment['torch']}, Triton {environment['triton']}; {self.title}:"
        )
        return f"{title}\n\n{tabulate(rows, list(self.columns), 'github', disable_numparse=True)}\n\n"


def cast(row: Row) -> str:
    """What was done, in words."""
    words = [row["op"], row["fmt"], row["block"]]
    words += ["stochastic"] if row["rounding"] == "stochastic" else []
    words += [] if row["scale_rounding"] == "even" else [row["scale_rounding"]]
    words += [] if row["symmetric"] else ["asymmetric"]
    words += ["of x.T"] if row.get("transposed") else []
    return " ".join(words)


def cast_shown(row: Row) -> bool:
    """The large bfloat16 matrix; of the dequantised tiles, e2m1 alone."""
    large = tuple(row["shape"]) == (16384, 16384) and row["dtype"] == "bf16"
    return large and not (row["op"] == "dequantize" and row["block"] == "4x4" and row["fmt"] != "e2m1")


def product(row: Row) -> str:
    """The operands and what the product is for."""
    activations = " ".join(row["activations"].split()[:2])
    purpose = f", {row['name']}" if row["name"] else ""
    return f"{activations} × {row['fmt']} {row['block']}{purpose}"


CASTS = Table(
    "results",
    ROOT / "bench/results/nvidia-h200-casts.json",
    "16384x16384, bfloat16, cold L2, median",
    cast_shown,
    {
        "cast": cast,
        "µs": lambda row: f"{row['median_us']:.0f}",
        "GB/s": lambda row: f"{row['gbps']:.0f}",
        "share of a copy": lambda row: f"{row['fraction_of_limit']:.2f}",
    },
)
PRODUCTS = Table(
    "products",
    ROOT / "bench/results/nvidia-h200-products.json",
    "bfloat16 out, cold L2, median; bf16 by `torch.mm`, FP8 by `torch._scaled_mm` with a scale a tensor",
    lambda row: True,
    {
        "product": product,
        "M x N x K": lambda row: "x".join(map(str, row["shape"])),
        "from": lambda row: row["timed_from"],
        "µs": lambda row: f"{row['median_us']:.0f}" if row["median_us"] >= 100 else f"{row['median_us']:.1f}",
        "TFLOP/s": lambda row: f"{row['tflops']:.0f}",
        "times bf16": lambda row: f"{row['vs_bf16']:.2f}",
        "times FP8": lambda row: "–" if row["vs_fp8"] is None else f"{row['vs_fp8']:.2f}",
    },
)
TABLES = (CASTS, PRODUCTS)


def main() -> None:
    readme = ROOT / "README.md"
    page = readme.read_text("utf-8")
    for table in TABLES:
        before, _, rest = page.partition(table.start)
        _, _, after = rest.partition(table.end)
        page = before + table.start + table.text() + table.end + after
    readme.write_text(page, "utf-8")


if __name__ == "__main__":
    main()

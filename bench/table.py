"""The documents' tables of results, made from the recorded ones.

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

README = ROOT / "README.md"
TRAINING_PAGE = ROOT / "docs/training.md"

Row = dict[str, Any]


@dataclass(frozen=True)
class Table:
    """One table: its recorded results, what is said over it, which rows and columns it shows.

    Attributes:
        name: in its markers.
        page: the document that it stands in.
    """

    name: str
    recorded: Path
    title: str
    shown: Callable[[Row], bool]
    columns: dict[str, Callable[[Row], str]]
    page: Path = README

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


def loss(row: Row, name: str) -> str:
    """A loss and its gap to bf16; a run without one has diverged."""
    return "diverged" if row[name] is None else f"{row[name]:.4f} ({row[name + '_gap']:+.4f})"


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
TRAINING = Table(
    "training",
    ROOT / "bench/results/nvidia-h200-training.json",
    "the losses in nats a byte, the gap to bf16 behind each",
    lambda row: True,
    {
        "run": lambda row: row["label"],
        "training loss": lambda row: loss(row, "loss"),
        "validation loss": lambda row: loss(row, "validation"),
        "ms a step": lambda row: f"{row['step_ms']:.1f}",
        "GB at most": lambda row: f"{row['peak_memory_bytes'] / 1e9:.1f}",
    },
    TRAINING_PAGE,
)
LAYERS = Table(
    "layers",
    ROOT / "bench/results/nvidia-h200-layers.json",
    "forward and backward, weights in bfloat16, cold L2, median; `torch` is `nn.Linear`",
    lambda row: True,
    {
        "layer": lambda row: row["label"],
        "tokens, in → out": lambda row: f"{row['tokens']}, {row['in_features']} → {row['out_features']}",
        "µs": lambda row: f"{row['median_us']:.0f}",
        "times torch": lambda row: f"{row['vs_torch']:.2f}",
        "saved for backward": lambda row: f"{row['saved_vs_torch']:.3f}",
        "host, forward, µs": lambda row: f"{row['forward_host_us']:.0f}",
    },
    TRAINING_PAGE,
)
SERVING = Table(
    "serving",
    ROOT / "bench/results/nvidia-h200-serving.json",
    "cold L2, median; `torch` is `nn.Linear` in bfloat16",
    lambda row: True,
    {
        "layer": lambda row: row["label"],
        "tokens, in → out": lambda row: f"{row['tokens']}, {row['in_features']} → {row['out_features']}",
        "µs": lambda row: f"{row['call_median_us']:.1f}",
        "times torch": lambda row: f"{row['call_vs_torch']:.2f}",
        "as a CUDA graph, µs": lambda row: f"{row['graph_median_us']:.1f}",
        "times torch, both as graphs": lambda row: f"{row['graph_vs_torch']:.2f}",
        "weight, MB": lambda row: f"{row['weight_bytes'] / 1e6:.1f}",
    },
    TRAINING_PAGE,
)
STEP = Table(
    "step",
    ROOT / "bench/results/nvidia-h200-step.json",
    "a whole step, median",
    lambda row: True,
    {
        "recipe": lambda row: row["label"] + (", compiled" if row["compiled"] else ""),
        "parameters": lambda row: f"{row['parameters']:,}",
        "batch": lambda row: f"{row['batch']} x {row['context']}",
        "ms": lambda row: f"{row['median_ms']:.0f}",
        "times bf16, compiled": lambda row: f"{row['vs_bf16_compiled']:.2f}",
        "GB at most": lambda row: f"{row['peak_memory_bytes'] / 1e9:.1f}",
    },
    TRAINING_PAGE,
)
TABLES = (CASTS, PRODUCTS, TRAINING, LAYERS, STEP, SERVING)


def main() -> None:
    for table in TABLES:
        before, _, rest = table.page.read_text("utf-8").partition(table.start)
        _, _, after = rest.partition(table.end)
        table.page.write_text(before + table.start + table.text() + table.end + after, "utf-8")


if __name__ == "__main__":
    main()

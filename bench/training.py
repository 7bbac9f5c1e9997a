"""What training in MX costs and gives, recorded in four groups.

    python bench/training.py training --results DIR     one GPT in each recipe: losses, time and memory of a step
    python bench/training.py layers --results DIR       forward and backward of a layer in each recipe
    python bench/training.py serving --results DIR      a packed layer at few tokens, beside one in bfloat16
    python bench/training.py step --results DIR         a whole step of a GPT of a billion parameters

Each writes DIR/<gpu>-<GROUP>.json. `training` stops when its minutes are over and goes on when it is called again,
from checkpoints that belong to these very sources; runs that are not finished have no row.
"""

from __future__ import annotations

import argparse
import gc
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from recording import write
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from corpus import Text, read_text
from gpt import SIZES, Size
from train_gpt import Progress, Record, Run, Trainer, plot, train

import mxkernels as mx
from mxkernels.environment import digest
from mxkernels.nn import MXLinear
from mxkernels.perf.timing import Timing, time_call, time_host
from mxkernels.recipes import RECIPES, Recipe

ROOT = Path(__file__).resolve().parents[1]

Row = dict[str, Any]

# By what the tables call it, how a run differs from one in BF16.
RUNS: dict[str, dict[str, Any]] = {
    "bf16": {},
    "fp8": {"recipe": "fp8"},
    "mxfp8": {"recipe": "mxfp8"},
    "mxfp4": {"recipe": "mxfp4"},
    "mxfp4_e3m0": {"recipe": "mxfp4_e3m0"},
    "mxfp6_mxfp4": {"recipe": "mxfp6_mxfp4"},
    "mxfp4, floor, rtne": {"recipe": "mxfp4", "scale_rounding": "floor", "gradient_rounding": "rtne"},
}
AVERAGED = 0.05  # of the steps, at the end, over which a training loss is averaged
POINTS = 100  # of a recorded curve

LAYERS = ((8192, 8192, 8192), (8192, 4096, 14336))  # tokens, in, out
SMALL_LAYER = (64, 256, 256)  # so that the host's work is what a call costs
RECIPES_OF_LAYERS: dict[str, Recipe] = {
    **RECIPES,
    "mxfp4, weights 16x16": RECIPES["mxfp4"].replace(weight_block="16x16"),
    "mxfp4, weights kept": RECIPES["mxfp4"].replace(keep_weights=True),
}
ROUNDS = 5  # in which all layers take turns

SERVED = ((8192, 8192), (4096, 14336), (14336, 4096))  # in, out
SERVED_TOKENS = (1, 4, 16, 64)

# By what the tables call it, how a run differs from one in BF16.
STEPS: dict[str, dict[str, Any]] = {
    **{name: {"recipe": name} for name in RECIPES},
    "mxfp4, weights kept": {"recipe": "mxfp4", "keep_weights": True},
}
VARIANTS = (("bf16", False), ("bf16", True), ("mxfp4", True), ("mxfp4", False))  # of STEPS; compiled
WARM_STEPS, TIMED_STEPS = 3, 7
SCHEDULED_STEPS = 2000  # of the run that the timed steps begin, since a shorter one's warm-up makes it diverge


def training(
    size: Size, steps: int, minutes: float, scratch: Path, compiled: bool, device: torch.device, labels: list[str]
) -> list[Row]:
    """Train those runs of RUNS, until the time is up. A row for each that is finished, if BF16's is."""
    stop = time.monotonic() + 60 * minutes
    scratch.mkdir(parents=True, exist_ok=True)
    text = Text(read_text(), device)
    records: dict[str, Record] = {}
    for label in labels:
        run = Run(size, steps, **RUNS[label])
        trainer = Trainer(run, text, device, compiled)
        print(f"{label}:", flush=True)
        left = (stop - time.monotonic()) / 60
        progress = Progress(run)
        record = train(trainer, scratch / f"{label.replace(', ', '-')}.pt", left, progress)
        progress.close()
        del trainer
        release(device)
        if not record["finished"]:
            print(f"{label}: step {len(record['losses'])} of {steps}; run this again to go on", flush=True)
            break
        records[label] = record
    if "bf16" not in records:
        return []
    draw(records, scratch / "losses.png")
    return [run_row(label, record, records["bf16"]) for label, record in records.items()]


def run_row(label: str, record: Record, baseline: Record) -> Row:
    """What is recorded of a run: averages, gaps to BF16 (positive is worse), and its curve thinned by averaging.

    A loss that is no number, after a run has diverged, is None.
    """
    losses = record["losses"]
    steps = len(losses)
    every = max(1, steps // POINTS)
    size = record["arguments"]["size"]
    return {
        "label": label,
        **{name: record[name] for name in ("arguments", "data", "compiled", "parameters")},
        "tokens": steps * size["batch"] * size["context"],
        "loss": finite(final_loss(record)),
        "loss_gap": finite(final_loss(record) - final_loss(baseline)),
        "validation": finite(record["validation"][-1][1]),
        "validation_gap": finite(record["validation"][-1][1] - baseline["validation"][-1][1]),
        "step_ms": record["step_ms"],
        "peak_memory_bytes": record["peak_memory_bytes"],
        "curve": [[end, finite(statistics.fmean(losses[end - every : end]))] for end in range(every, steps + 1, every)],
        "validation_curve": [[step, finite(loss)] for step, loss in record["validation"]],
    }


def final_loss(record: Record) -> float:
    losses = record["losses"]
    return statistics.fmean(losses[-max(1, round(AVERAGED * len(losses))) :])


def finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def draw(records: dict[str, Record], path: Path) -> None:
    """The curves as a picture, where there is something to draw with."""
    try:
        plot(records, path)
    except ImportError:
        return
    print(f"wrote {path}", flush=True)


def layers(shapes: tuple[tuple[int, int, int], ...], device: torch.device, seconds: float) -> list[Row]:
    """Forward and backward of a layer with weights in bfloat16, everything included, with a cold L2.

    The recipes take turns, `ROUNDS` times, for `seconds` each.
    """
    rows = []
    for tokens, inputs, outputs in shapes:
        x = torch.randn(tokens, inputs, dtype=torch.bfloat16, device=device, requires_grad=True)
        dy = torch.randn(tokens, outputs, dtype=torch.bfloat16, device=device)
        made = {"torch": nn.Linear(inputs, outputs, bias=False, dtype=torch.bfloat16, device=device)}
        for label, recipe in RECIPES_OF_LAYERS.items():
            made[label] = MXLinear.from_linear(made["torch"], recipe)
        times = in_turns({label: both_ways(layer, x, dy) for label, layer in made.items()}, device, seconds)
        saved = {label: saved_bytes(layer, x) for label, layer in made.items()}
        for label, timing in times.items():
            row = {
                "label": label,
                "tokens": tokens,
                "in_features": inputs,
                "out_features": outputs,
                "median_us": timing.median_us,
                "p10_us": timing.p10_us,
                "p90_us": timing.p90_us,
                "samples": len(timing.samples_us),
                "vs_torch": times["torch"].median_us / timing.median_us,
                "saved_bytes": saved[label],
                "saved_vs_torch": saved[label] / saved["torch"],
                "forward_host_us": host_us(RECIPES_OF_LAYERS.get(label), device),
            }
            rows.append(row)
            print(
                f"{tokens}, {inputs} to {outputs}, {label}: {row['median_us']:.0f} us, "
                f"{row['vs_torch']:.2f} times torch, saves {row['saved_vs_torch']:.3f}, "
                f"host {row['forward_host_us']:.0f} us",
                flush=True,
            )
        del made, x, dy
        release(device)
    return rows


def both_ways(layer: nn.Linear, x: Tensor, dy: Tensor) -> Callable[[], None]:
    """A call of forward and backward, with gradients of input and weight that nothing is added to."""

    def call() -> None:
        x.grad = layer.weight.grad = None
        layer(x).backward(dy)

    return call


def saved_bytes(layer: nn.Linear, x: Tensor) -> int:
    """What autograd holds for backward, besides the layer's own parameters."""
    found: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        layer(x)
    own = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
    return sum(size for pointer, size in found.items() if pointer not in own)


def host_us(recipe: Recipe | None, device: torch.device) -> float:
    """How long the host is busy with the forward pass of a small layer that will have a backward one."""
    tokens, inputs, outputs = SMALL_LAYER
    layer = nn.Linear(inputs, outputs, bias=False, dtype=torch.bfloat16, device=device)
    x = torch.randn(tokens, inputs, dtype=torch.bfloat16, device=device, requires_grad=True)
    chosen = layer if recipe is None else MXLinear.from_linear(layer, recipe)
    return time_host(lambda: chosen(x), device, samples=20 if device.type == "cuda" else 1).median_us


@torch.no_grad()
def serving(shapes: tuple[tuple[int, int], ...], device: torch.device, seconds: float) -> list[Row]:
    """A packed layer beside nn.Linear in bfloat16 with a cold L2: each call by itself, and replayed as a CUDA graph,
    where the host has no part.

    All take turns, `ROUNDS` times, for `seconds` each.
    """
    rows = []
    for inputs, outputs in shapes:
        linear = nn.Linear(inputs, outputs, bias=False, dtype=torch.bfloat16, device=device)
        made = {"torch": linear, "mxfp4": mx.pack(linear, "mxfp4")}
        for tokens in SERVED_TOKENS:
            x = torch.randn(tokens, inputs, dtype=torch.bfloat16, device=device)
            calls: dict[tuple[str, str], Callable[[], object]] = {}
            for label, layer in made.items():
                calls[label, "call"] = partial(layer, x)
                if device.type == "cuda":
                    calls[label, "graph"] = captured(partial(layer, x))
            times = in_turns(calls, device, seconds)
            for label, layer in made.items():
                rows.append(served_row(label, layer, tokens, times))
        del linear, made, calls
        release(device)
    return rows


def served_row(label: str, layer: nn.Module, tokens: int, times: dict[tuple[str, str], Timing]) -> Row:
    """Of both kinds of calls; where there are no graphs, None."""
    row: Row = {
        "label": label,
        "tokens": tokens,
        "in_features": layer.in_features,
        "out_features": layer.out_features,
        "weight_bytes": sum(each.nbytes for each in (*layer.parameters(), *layer.buffers())),
    }
    for kind in ("call", "graph"):
        timing, baseline = times.get((label, kind)), times.get(("torch", kind))
        row |= {
            f"{kind}_median_us": timing and timing.median_us,
            f"{kind}_p10_us": timing and timing.p10_us,
            f"{kind}_p90_us": timing and timing.p90_us,
            f"{kind}_samples": timing and len(timing.samples_us),
            f"{kind}_vs_torch": timing and baseline and baseline.median_us / timing.median_us,
        }
    graph = "" if row["graph_median_us"] is None else f", {row['graph_median_us']:.1f} us as a graph"
    print(
        f"{tokens}, {row['in_features']} to {row['out_features']}, {label}: {row['call_median_us']:.1f} us{graph}, "
        f"{row['weight_bytes']:,} bytes",
        flush=True,
    )
    return row


def in_turns(calls: dict[Any, Callable[[], object]], device: torch.device, seconds: float) -> dict[Any, Timing]:
    """The time of each call, in `ROUNDS` of `seconds` each, so that a clock that drifts meets all of them."""
    samples: dict[Any, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            samples[name] += time_call(call, device, seconds).samples_us
    return {name: Timing(tuple(found)) for name, found in samples.items()}


def captured(call: Callable[[], object]) -> Callable[[], None]:
    """What replays a call as a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()  # what compiles and allocates cannot be captured
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def step(size: Size, device: torch.device, variants: Sequence[tuple[str, bool]]) -> list[Row]:
    """A whole step (forward, backward, clipping, AdamW) of each variant, with the largest batch that all can hold."""
    text = Text(read_text(), device)
    for batch in range(size.batch, 0, -4):
        rows = []
        try:
            for label, compiled in variants:
                rows.append(step_row(replace(size, batch=batch), label, compiled, text, device))
        except torch.OutOfMemoryError:
            print(f"a batch of {batch} does not fit", flush=True)
        release(device)  # here, where no exception holds on to the model
        if len(rows) == len(variants):
            baseline = next(row for row in rows if row["label"] == "bf16" and row["compiled"])
            return [{**row, "vs_bf16_compiled": baseline["median_ms"] / row["median_ms"]} for row in rows]
    raise RuntimeError("no batch fits into this device's memory")


def step_row(size: Size, label: str, compiled: bool, text: Text, device: torch.device) -> Row:
    trainer = Trainer(Run(size, SCHEDULED_STEPS, **STEPS[label]), text, device, compiled)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    times_ms = []
    for _ in range(WARM_STEPS + TIMED_STEPS):
        start = time.perf_counter()
        trainer.step()
        trainer.fetch()  # which waits for the device
        times_ms.append((time.perf_counter() - start) * 1e3)
    row = {
        "label": label,
        "compiled": compiled,
        "parameters": trainer.record["parameters"],
        "batch": size.batch,
        "context": size.context,
        "first_ms": times_ms[0],
        "median_ms": statistics.median(times_ms[WARM_STEPS:]),
        "samples_ms": times_ms[WARM_STEPS:],
        "losses": trainer.record["losses"],
        "peak_memory_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    }
    print(f"{label}{', compiled' if compiled else ''}, batch {size.batch}: {row['median_ms']:.1f} ms", flush=True)
    del trainer
    release(device)
    return row


def release(device: torch.device) -> None:
    """Give memory back, and forget what was compiled, before the next model."""
    gc.collect()
    torch._dynamo.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("group", choices=["training", "layers", "serving", "step"])
    parser.add_argument("--results", type=Path, required=True, metavar="DIR")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="the CPU is for trying it out")
    parser.add_argument("--size", choices=SIZES, help="of the GPT; 55m for training, 1b for step")
    parser.add_argument("--batch", type=int, help="sequences in a step; for step, the largest that is tried")
    parser.add_argument("--steps", type=int, default=600, help="of each run in training")
    parser.add_argument("--minutes", type=float, default=8.0, help="after which training stops, to be resumed")
    parser.add_argument(
        "--run", action="append", choices=RUNS, help="train this one only and record nothing: a later call finds it"
    )
    parser.add_argument(
        "--recipe",
        action="append",
        choices=STEPS,
        help="step of this one, compiled, beside bf16, compiled; else of bf16 and mxfp4, compiled and not",
    )
    parser.add_argument("--compile", action="store_true", dest="compiled", help="compile the blocks in training")
    parser.add_argument("--scratch", type=Path, metavar="DIR", help="for the checkpoints of training")
    parser.add_argument("--layer", type=int, nargs=3, action="append", metavar=("TOKENS", "IN", "OUT"))
    parser.add_argument("--seconds", type=float, default=0.1, help="a layer is timed for, in each round")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no GPU; allowed here: --device cpu")
    device = torch.device("cuda", torch.cuda.current_device()) if arguments.device == "cuda" else torch.device("cpu")
    size = SIZES[arguments.size or {"step": "1b"}.get(arguments.group, "55m")]
    size = replace(size, batch=arguments.batch or (32 if arguments.group == "step" else size.batch))
    done = True
    if arguments.group == "training":
        compiled, steps = arguments.compiled, arguments.steps
        runs = f"{digest(ROOT / 'mxkernels', ROOT / 'examples')}-{size.layers}x{size.width}-{size.batch}-{steps}"
        runs += "-compiled" if compiled else ""
        scratch = (arguments.scratch or Path(tempfile.gettempdir()) / "mxkernels-training") / runs
        rows = training(size, steps, arguments.minutes, scratch, compiled, device, arguments.run or list(RUNS))
        if arguments.run:
            return
        done = len(rows) == len(RUNS)
    elif arguments.group == "layers":
        rows = layers(tuple(arguments.layer or LAYERS), device, arguments.seconds)
    elif arguments.group == "serving":
        rows = serving(SERVED, device, arguments.seconds)
    else:
        chosen = dict.fromkeys(("bf16", *(arguments.recipe or ())))
        rows = step(size, device, [(label, True) for label in chosen] if arguments.recipe else VARIANTS)
    write(rows, arguments.group, arguments.results, device)
    sys.exit(0 if done else 1)


if __name__ == "__main__":
    main()

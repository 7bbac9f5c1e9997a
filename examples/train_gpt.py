"""Train a small GPT on bytes, with its linear layers in any recipe of mxkernels.

\b
    python examples/train_gpt.py                       1 M parameters in BF16: a minute on a CPU
    python examples/train_gpt.py --recipe mxfp4        the same in four bits; without a GPU by the
                                                       reference, ten times slower
    python examples/train_gpt.py --size 55m --recipe mxfp4 --compile --steps 600 --log run.json

The text is the source and documentation of the Python that runs this and of its PyTorch, or FILE. Weights are kept in
fp32; embedding, norms, attention and the last layer compute in BF16 under every recipe. The same arguments give the
same batches, also when a run is stopped (--minutes) and resumed (--checkpoint).
"""

from __future__ import annotations

import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click
import torch
from corpus import Text, read_text, windows
from gpt import GPT, SIZES, Size
from torch import Tensor
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).parents[1]))

import mxkernels as mx
from mxkernels.environment import environment
from mxkernels.recipes import RECIPES, OperandSpec, Product, Recipe
from mxkernels.report import plot_endings

Record = dict[str, Any]

VALIDATIONS = 10  # in a run
WARM_UP = 0.05  # of the steps
LAST_LR = 0.1  # of the highest
CLIP = 1.0  # the gradient's norm
SAVE_S = 300  # between two checkpoints


@dataclass(frozen=True)
class Run:
    """All that decides the numbers of a run, besides the text.

    Attributes:
        recipe: one of RECIPES. bf16 leaves torch's own layers in place. The other attributes change what it says:
        scale_rounding: of every operand's blocks.
        gradient_rounding: of the elements of dy, in both products of backward.
        weight_block: such as "16x16": 2D blocks for the weights.
        hadamard, random_signs: the transform of both products of backward.
        keep_weights: quantise each weight once a step, rather than once more in backward.
        emulate: one quantised copy of each tensor, multiplied in BF16.
    """

    size: Size
    steps: int = 100
    seed: int = 0
    recipe: str = "bf16"
    scale_rounding: str | None = None
    gradient_rounding: str | None = None
    weight_block: str | None = None
    hadamard: int = 0
    random_signs: bool = False
    keep_weights: bool = False
    emulate: bool = False

    def __post_init__(self) -> None:
        self.derived()  # which raises ValueError where a recipe has nothing that could be changed so

    def derived(self) -> Recipe:
        """The recipe with its changes."""
        recipe = RECIPES[self.recipe]
        x, w, dy = recipe.forward.left, recipe.forward.right, recipe.data_gradient.left
        recipe = Recipe.of(
            activations=self._changed(x, scale_rounding=self.scale_rounding),
            weights=self._changed(w, scale_rounding=self.scale_rounding, block=self.weight_block),
            gradients=self._changed(dy, scale_rounding=self.scale_rounding, rounding=self.gradient_rounding),
            keep_weights=self.keep_weights,
            emulate=self.emulate,
        )
        return recipe.replace(
            data_gradient=self._transformed(recipe.data_gradient),
            weight_gradient=self._transformed(recipe.weight_gradient),
        )

    def _transformed(self, product: Product) -> Product:
        return replace(product, hadamard=self.hadamard, random_signs=self.random_signs)

    def _changed(self, spec: OperandSpec, **changes: str | None) -> OperandSpec:
        """The spec with those changes that are not None."""
        changes = {name: value for name, value in changes.items() if value is not None}
        if not changes:
            return spec
        if not isinstance(spec, mx.MXSpec):
            raise ValueError(f"{min(changes)} is given, but {self.recipe} has no MX formats; allowed there: none")
        return replace(spec, **changes)  # type: ignore[arg-type]  # a spec reads its block from text

    def lr(self, step: int) -> float:
        """A linear warm-up, then half a cosine."""
        warm_up = max(1, round(WARM_UP * self.steps))
        if step < warm_up:
            return self.size.lr * (step + 1) / warm_up
        done = (step - warm_up) / max(1, self.steps - warm_up)
        return self.size.lr * (LAST_LR + (1 - LAST_LR) * (1 + math.cos(math.pi * done)) / 2)


class Trainer:
    """A run's model, optimiser and record, and how they move on by a step.

    Args:
        compiled: with torch.compile, block by block, since all blocks share what is compiled for one.
    """

    def __init__(self, run: Run, text: Text, device: torch.device, compiled: bool = False) -> None:
        self.run, self.text, self.device = run, text, device
        torch.manual_seed(run.seed)
        with device:
            self.model = GPT(run.size)
        if (recipe := run.derived()) != RECIPES["bf16"]:  # which is what torch's own layers do
            mx.convert(self.model, recipe, skip=("lm_head",))
        if compiled:
            for block in self.model.blocks:
                block.compile(fullgraph=True, dynamic=False)
        parameters = list(self.model.parameters())
        matrices = [each for each in parameters if each.dim() == 2]
        vectors = [each for each in parameters if each.dim() == 1]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
        self.batches = text.batches(run.size.batch, run.size.context, run.steps, run.seed)
        self.pending: list[Tensor] = []  # losses that the host has not asked for
        self.record: Record = {
            "arguments": asdict(run),
            "data": text.facts,
            "compiled": compiled,
            "parameters": sum(each.numel() for each in parameters),
            "losses": [],
            "validation": [],
            "step_ms": None,
            "peak_memory_bytes": None,
            "finished": False,
        }

    @property
    def steps_done(self) -> int:
        return len(self.record["losses"]) + len(self.pending)

    def loss(self, text: Tensor, starts: Tensor) -> Tensor:
        inputs, targets = windows(text, starts, self.run.size.context)
        with torch.autocast(self.device.type, torch.bfloat16):
            logits = self.model(inputs)
            return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def step(self) -> None:
        """Queue one step. Nothing here waits for the device."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.run.lr(self.steps_done)
        loss = self.loss(self.text.train, self.batches[self.steps_done])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.pending.append(loss.detach())

    def fetch(self) -> None:
        """Wait for the device, and take over its losses."""
        self.record["losses"] += torch.stack(self.pending).tolist()
        self.pending.clear()

    @torch.no_grad()
    def validate(self) -> None:
        batches = self.text.validation(self.run.size.batch, self.run.size.context)
        losses = [self.loss(self.text.held_out, starts) for starts in batches]
        self.record["validation"].append([self.steps_done, float(torch.stack(losses).mean())])

    def save(self, path: Path) -> None:
        """Write a checkpoint; whatever happens meanwhile, `path` holds a whole one."""
        state = {
            "record": self.record,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
        }
        unfinished = path.with_name(f"{path.name}.tmp")
        torch.save(state, unfinished)
        os.replace(unfinished, path)

    def load(self, path: Path) -> None:
        """Go on where a checkpoint ends. Raises ValueError if it is another run's."""
        state = torch.load(path, map_location=self.device, weights_only=True)
        for part in ("arguments", "data"):
            there, here = state["record"][part], self.record[part]
            for name in here:
                if there.get(name) != here[name]:
                    said = f"{part} has {name} {there.get(name)} there, and {here[name]} here"
                    raise ValueError(f"{path} is of another run: {said}")
        self.record = state["record"]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"].cpu())
        if self.device.type == "cuda" and state["random_cuda"] is not None:
            torch.cuda.set_rng_state(state["random_cuda"].cpu(), self.device)


def train(
    trainer: Trainer,
    checkpoint: Path | None = None,
    minutes: float = math.inf,
    show: Callable[[Record], None] = lambda record: None,
) -> Record:
    """Run to the end, or until the time is up, from where the checkpoint is. Returns the record so far.

    Args:
        show: gets the record whenever the host has looked at the losses.
    """
    start = saved = time.monotonic()
    if checkpoint and checkpoint.exists():
        trainer.load(checkpoint)
    run, record = trainer.run, trainer.record
    on_gpu = trainer.device.type == "cuda"
    look_every = 10 if on_gpu else 1  # each look makes the host wait for the GPU
    validate_every = max(1, run.steps // VALIDATIONS)
    times_ms: list[float] = []
    mark = time.perf_counter()
    looked = trainer.steps_done
    while trainer.steps_done < run.steps and time.monotonic() - start < 60 * minutes:
        trainer.step()
        step = trainer.steps_done
        validation_due = step % validate_every == 0 or step == run.steps
        if step % look_every and not validation_due:
            continue
        trainer.fetch()
        times_ms.append((time.perf_counter() - mark) * 1e3 / (step - looked))
        record["step_ms"] = statistics.median(times_ms[1:] or times_ms)  # the first one compiles
        if on_gpu:
            peak = torch.cuda.max_memory_allocated(trainer.device)
            record["peak_memory_bytes"] = max(peak, record["peak_memory_bytes"] or 0)
        if validation_due:
            trainer.validate()
        show(record)
        if checkpoint and time.monotonic() - saved > SAVE_S:
            trainer.save(checkpoint)
            saved = time.monotonic()
        mark, looked = time.perf_counter(), step
    if trainer.pending:
        trainer.fetch()
    record["finished"] = trainer.steps_done == run.steps
    if checkpoint:
        trainer.save(checkpoint)
    return record


class Progress:
    """A line on a terminal that is written over; elsewhere a line for each validation."""

    def __init__(self, run: Run) -> None:
        self.run, self.terminal = run, sys.stdout.isatty()
        self.validations = 0

    def __call__(self, record: Record) -> None:
        step, run = len(record["losses"]), self.run
        tokens = run.size.batch * run.size.context * 1e3 / record["step_ms"]
        left = round((run.steps - step) * record["step_ms"] / 1e3)
        parts = [f"step {step:>{len(str(run.steps))}}/{run.steps}", f"loss {record['losses'][-1]:.3f}"]
        parts += [f"validation {record['validation'][-1][1]:.3f}"] if record["validation"] else []
        parts += [f"{tokens:,.0f} tokens/s", f"{left // 60}:{left % 60:02} left"]
        line = "  ".join(parts)
        if self.terminal:
            done = 20 * step // run.steps
            click.echo(f"\r\x1b[K{'█' * done}{'░' * (20 - done)}  {line}", nl=False)
        elif len(record["validation"]) > self.validations:
            click.echo(line)
        self.validations = len(record["validation"])

    def close(self) -> None:
        if self.terminal:
            click.echo()


def plot(records: dict[str, Record], path: Path) -> None:
    """Loss curves, by label: training thin, validation as points."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot(
        xlabel="step",
        ylabel="loss, nats a byte",
    )
    for label, record in records.items():
        (curve,) = axes.plot(range(1, len(record["losses"]) + 1), record["losses"], linewidth=0.6)
        axes.plot(*zip(*record["validation"], strict=True), "o-", color=curve.get_color(), markersize=3, label=label)
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def check_picture(path: Path) -> None:
    """Raises click.UsageError, before anything is trained, if it could not be drawn."""
    try:
        endings = plot_endings()
    except ImportError:
        raise click.UsageError("--plot needs matplotlib, which is not installed: pip install matplotlib") from None
    if path.suffix[1:] not in endings:
        raise click.UsageError(f"--plot {path}: allowed endings: {', '.join(endings)}")


def usable_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise click.UsageError("--device cuda: torch sees no GPU; allowed here: cpu")
    return torch.device(name, torch.cuda.current_device()) if name == "cuda" else torch.device(name)


POSITIVE = click.IntRange(min=1)
FILE = click.Path(dir_okay=False, path_type=Path)


@click.command(help=__doc__, context_settings={"show_default": True, "max_content_width": 100})
@click.option("--size", type=click.Choice(list(SIZES)), default="1m", help="Parameters; sets the next six options.")
@click.option("--layers", type=POSITIVE, help="Blocks of the model.")
@click.option("--width", type=POSITIVE, help="Of the residual stream.")
@click.option("--heads", type=POSITIVE, help="Of attention.")
@click.option("--context", type=POSITIVE, help="Bytes in a sequence.")
@click.option("--batch", type=POSITIVE, help="Sequences in a step.")
@click.option("--lr", type=click.FloatRange(min=0, min_open=True), help="The highest: warm-up, then half a cosine.")
@click.option("--steps", type=POSITIVE, default=100, help="Of the whole run, whose schedule depends on it.")
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Of weights, batches and stochastic rounding.")
@click.option("--recipe", type=click.Choice(list(RECIPES)), default="bf16", help="How the linear layers compute.")
@click.option(
    "--scale-rounding", type=click.Choice(["floor", "ceil", "even", "rceil"]), help="In place of the recipe's."
)
@click.option(
    "--gradient-rounding",
    type=click.Choice(["rtne", "stochastic"]),
    help="In place of the recipe's. `--recipe mxfp4 --scale-rounding floor --gradient-rounding rtne` is OCP's default "
    "for everything, known to train badly.",
)
@click.option("--weight-block", metavar="RxC", help="2D blocks for weights, such as 16x16.")
@click.option(
    "--hadamard",
    type=click.Choice([0, 16, 32, 64, 128]),
    default=0,
    help="Size of the Hadamard transform in both products of backward.",
)
@click.option("--random-signs", is_flag=True, help="Begin that transform with random signs.")
@click.option("--keep-weights", is_flag=True, help="Keep packed weights for backward, which costs memory.")
@click.option("--emulate", is_flag=True, help="Quantise each tensor once, and multiply in BF16.")
@click.option("--data", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Text to train on.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto")
@click.option("--compile", "compiled", is_flag=True, help="Compile the blocks with torch.compile.")
@click.option("--checkpoint", type=FILE, help="Written every five minutes and at the end; where it exists, go on.")
@click.option("--minutes", type=float, default=math.inf, help="Stop after so many, at a checkpoint if there is one.")
@click.option("--log", type=FILE, help="Write arguments, versions, all losses, time and memory as JSON.")
@click.option("--plot", "picture", type=FILE, help="Draw the losses (needs matplotlib).")
def main(
    size: str,
    data: Path | None,
    device: str,
    compiled: bool,
    checkpoint: Path | None,
    minutes: float,
    log: Path | None,
    picture: Path | None,
    **options: Any,
) -> None:
    if picture:
        check_picture(picture)
    for path in filter(None, (checkpoint, log, picture)):
        path.parent.mkdir(parents=True, exist_ok=True)
    shape = {name: options.pop(name) for name in ("layers", "width", "heads", "context", "batch", "lr")}
    try:
        run = Run(replace(SIZES[size], **{name: each for name, each in shape.items() if each is not None}), **options)
        text = Text(read_text(data), where := usable_device(device))
        trainer = Trainer(run, text, where, compiled)
        progress = Progress(run)
        click.echo(f"{trainer.record['parameters']:,} parameters, {text.facts['bytes']:,} bytes of text, {where}")
        record = train(trainer, checkpoint, minutes, progress)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    progress.close()
    step, steps = len(record["losses"]), run.steps
    if not record["finished"]:
        click.echo(f"stopped after step {step} of {steps}" + ("; run it again to go on" if checkpoint else ""))
    if log:
        log.write_text(json.dumps({"environment": environment(where), **record}, indent=1) + "\n", "utf-8")
    if picture:
        plot({run.recipe: record}, picture)


if __name__ == "__main__":
    main()

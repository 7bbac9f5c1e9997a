"""The example that trains a GPT, and the benchmark that records how the recipes compare in it."""

from __future__ import annotations

import json
import math
import re
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from mxkernels import MXSpec
from mxkernels.recipes import RECIPES

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

import table
import training
from corpus import HELD_OUT, Text, windows
from gpt import GPT, SIZES, Size, rotate, rotations
from train_gpt import LAST_LR, Run, Trainer, main, train

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
TINY = Size(layers=1, width=32, heads=2, context=16, batch=2, lr=1e-2)
TINY_OPTIONS = "--layers 1 --width 32 --heads 2 --context 16 --batch 2 --device cpu".split()
CONTENT = b"To be, or not to be, that is the question. " * 60


def trainer(**options: Any) -> Trainer:
    return Trainer(Run(TINY, **options), Text(CONTENT, CPU), CPU)


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text"
    path.write_bytes(CONTENT)
    return path


def run_main(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(main, [*TINY_OPTIONS, *map(str, arguments)])
    return result.exit_code, result.output


# The model and its text


def test_a_byte_is_predicted_from_those_before_it() -> None:
    model = GPT(TINY)
    tokens = torch.randint(256, (2, 16), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[:, 9:] += 1
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        before, after = model(tokens), model(changed % 256)
    assert torch.equal(before[:, :9], after[:, :9])
    assert not torch.equal(before[:, 9], after[:, 9])


def test_rotary_positions_are_relative() -> None:
    """The product of a query and a key depends on how far apart they are, and on nothing else of where they are."""
    q, k = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    turns = rotations(16, 32)
    products = rotate(q.expand(16, 32), turns) @ rotate(k.expand(16, 32), turns).T
    # cosines and sines in bfloat16 are off by 2^-9: each side's vector by sqrt(2) of that, in both products compared
    error = 4 * 2**0.5 * 2**-9 * 1.01 * q.norm() * k.norm()
    for distance in range(16):
        along = products.diagonal(-distance)
        assert (along - along[0]).abs().max() <= error
    assert (products[0, 0] - products[1:, 0]).abs().max() > 4 * error


@pytest.mark.parametrize("name", SIZES)
def test_sizes_are_what_they_are_called(name: str) -> None:
    with torch.device("meta"):
        parameters = sum(each.numel() for each in GPT(SIZES[name]).parameters())
    called = float(name[:-1]) * {"m": 1e6, "b": 1e9}[name[-1]]
    assert 0.95 * called < parameters < 1.15 * called
    assert name != "1b" or parameters >= 1e9


def test_targets_are_the_next_bytes_and_the_end_is_held_out() -> None:
    content = bytes(range(200)) * 2
    text = Text(content, CPU)
    assert len(text.held_out) == HELD_OUT * 400
    assert bytes(torch.cat([text.train, text.held_out]).tolist()) == content
    inputs, targets = windows(text.train, torch.tensor([0, 5]), 3)
    assert inputs.tolist() == [[0, 1, 2], [5, 6, 7]]
    assert targets.tolist() == [[1, 2, 3], [6, 7, 8]]
    last = text.validation(2, 16).max()
    assert last + 16 + 1 == len(text.held_out)


# Recipes as runs derive them


def specs(recipe: Any) -> list[Any]:
    return [each for name in PRODUCTS for each in (getattr(recipe, name).left, getattr(recipe, name).right)]


PRODUCTS = ("forward", "data_gradient", "weight_gradient")


@pytest.mark.parametrize("name", RECIPES)
def test_a_run_without_changes_has_the_named_recipe(name: str) -> None:
    assert Run(TINY, recipe=name).derived() == RECIPES[name]


def test_the_known_bad_recipe() -> None:
    recipe = Run(TINY, **training.RUNS["mxfp4, floor, rtne"]).derived()
    assert specs(recipe) == [MXSpec("e2m1", scale_rounding="floor", rounding="rtne")] * 6


def test_other_changes() -> None:
    recipe = Run(TINY, recipe="mxfp4", weight_block="16x16", hadamard=32, random_signs=True, emulate=False).derived()
    assert recipe.forward == replace(RECIPES["mxfp4"].forward, right=MXSpec("e2m1", "16x16"))
    assert recipe.data_gradient == replace(
        RECIPES["mxfp4"].data_gradient, right=MXSpec("e2m1", "16x16"), hadamard=32, random_signs=True
    )
    assert recipe.weight_gradient == replace(RECIPES["mxfp4"].weight_gradient, hadamard=32, random_signs=True)
    assert Run(TINY, recipe="mxfp4", keep_weights=True).derived() == RECIPES["mxfp4"].replace(keep_weights=True)
    assert Run(TINY, recipe="mxfp8", emulate=True).derived() == RECIPES["mxfp8"].replace(emulate=True)


@pytest.mark.parametrize(
    "options", [{"recipe": "bf16", "gradient_rounding": "rtne"}, {"recipe": "fp8", "weight_block": "4x4"}]
)
def test_changes_without_meaning(options: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=f"{list(options)[1].split('_')[-1]} is given, but {options['recipe']} has no"):
        Run(TINY, **options)


def test_the_last_layer_is_not_converted() -> None:
    assert {name for name, module in trainer(recipe="mxfp4").model.named_modules() if hasattr(module, "recipe")} == {
        f"blocks.0.{linear}" for linear in ("attention.qkv", "attention.out", "mlp.up", "mlp.down")
    }


# Training


def test_bf16_learns() -> None:
    record = train(trainer(steps=40))
    assert record["finished"]
    assert len(record["losses"]) == 40
    assert [step for step, _ in record["validation"]] == list(range(4, 41, 4))
    assert record["losses"][0] == pytest.approx(math.log(256), rel=0.05)
    assert record["validation"][-1][1] < 2.5


@pytest.mark.parametrize("name", ["fp8", "mxfp4", "mxfp4_e3m0", "mxfp6_mxfp4", "mxfp8"])
def test_every_recipe_trains(name: str) -> None:
    losses = train(trainer(steps=3, recipe=name))["losses"]
    assert losses[-1] < losses[0]
    assert losses[1:] != train(trainer(steps=3))["losses"][1:]


def test_schedule() -> None:
    run = Run(TINY, steps=100)
    rates = [run.lr(step) for step in range(100)]
    assert rates[:5] == pytest.approx([TINY.lr * part / 5 for part in (1, 2, 3, 4, 5)])
    assert rates[5] == TINY.lr
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert LAST_LR * TINY.lr < rates[-1] < 1.01 * LAST_LR * TINY.lr


@pytest.mark.parametrize("recipe", ["bf16", "mxfp4"])
def test_a_resumed_run_is_the_same_run(recipe: str, tmp_path: Path) -> None:
    """Stochastic rounding included."""
    whole = train(trainer(steps=4, recipe=recipe))
    begun = trainer(steps=4, recipe=recipe)
    begun.step()
    begun.step()
    begun.fetch()
    begun.save(tmp_path / "checkpoint")
    torch.manual_seed(1)
    resumed = train(trainer(steps=4, recipe=recipe), tmp_path / "checkpoint")
    assert resumed["losses"] == whole["losses"]
    assert resumed["validation"] == whole["validation"][-2:]
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_another_runs_checkpoint(tmp_path: Path) -> None:
    train(trainer(steps=1), tmp_path / "checkpoint")
    with pytest.raises(ValueError, match="of another run: arguments has steps 1 there, and 2 here"):
        train(trainer(steps=2), tmp_path / "checkpoint")


# The command


def test_command(text_file: Path, tmp_path: Path) -> None:
    files = {name: tmp_path / f"{name}.{ending}" for name, ending in (("log", "json"), ("checkpoint", "pt"))}
    options = ["--data", text_file, "--steps", 2, "--checkpoint", files["checkpoint"], "--log", files["log"]]
    status, output = run_main(*options, "--minutes", 0)
    assert status == 0
    assert "stopped after step 0 of 2; run it again to go on" in output
    assert json.loads(files["log"].read_text())["finished"] is False
    status, output = run_main(*options)
    assert status == 0
    assert output.splitlines()[-1].startswith("step 2/2  loss ")
    log = json.loads(files["log"].read_text())
    assert log["environment"]["torch"] == torch.__version__
    assert log["arguments"]["recipe"] == "bf16"
    assert log["data"]["bytes"] == len(CONTENT)
    assert len(log["losses"]) == 2
    assert log["finished"] is True


def test_command_draws(text_file: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    status, _ = run_main("--data", text_file, "--steps", 2, "--plot", tmp_path / "losses.svg")
    assert status == 0
    assert (tmp_path / "losses.svg").read_text("utf-8").count("loss, nats a byte") == 1


def test_drawing_without_matplotlib_fails_at_the_start(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("matplotlib", "matplotlib.figure", "matplotlib.backend_bases"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr("train_gpt.train", None)  # an error if it comes so far
    status, output = run_main("--data", text_file, "--plot", tmp_path / "losses.png")
    assert status == 2
    assert "--plot needs matplotlib, which is not installed: pip install matplotlib" in output


def test_a_picture_of_no_known_kind(text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    status, output = run_main("--data", text_file, "--plot", tmp_path / "losses.xyz")
    assert status == 2
    assert "allowed endings: " in output


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--heads", 3], "width is 32; allowed for 3 heads: multiples of 6"),
        (["--scale-rounding", "floor"], "scale_rounding is given, but bf16 has no MX formats"),
        (["--context", 4000], "the text has 2580 bytes; allowed for a context of 4000"),
        (["--random-signs"], "random_signs is True, but hadamard is 0"),
        (["--recipe", "mxfp4", "--weight-block", "3x3"], "block"),
    ],
)
def test_mistakes(options: list[object], said: str, text_file: Path) -> None:
    status, output = run_main("--data", text_file, "--steps", 2, *options)
    assert status == 2
    assert said in output


def test_documented_commands_parse() -> None:
    (block,) = re.findall(
        r"^```sh\n(.*?)^```$", (ROOT / "docs/training.md").read_text("utf-8"), re.MULTILINE | re.DOTALL
    )
    lines = [shlex.split(line) for line in block.splitlines()]
    assert lines
    for python, script, *arguments in lines:
        assert (python, script) == ("python", "examples/train_gpt.py")
        main.make_context(script, arguments)


# The benchmark


def test_recorded_training(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(training, "read_text", lambda: CONTENT)
    few = {label: training.RUNS[label] for label in ("bf16", "mxfp4")}
    monkeypatch.setattr(training, "RUNS", few)
    assert training.training(TINY, 2, 0.0, tmp_path, False, CPU, list(training.RUNS)) == []
    rows = training.training(TINY, 2, 5.0, tmp_path, False, CPU, list(training.RUNS))
    assert [row["label"] for row in rows] == list(few)
    assert rows[0]["loss_gap"] == rows[0]["validation_gap"] == 0
    assert rows[1]["validation_gap"] == rows[1]["validation"] - rows[0]["validation"] != 0
    assert rows[1]["tokens"] == 2 * 2 * 16
    assert rows[1]["curve"][-1] == [2, rows[1]["loss"]]


def test_a_diverged_run_is_recorded_without_numbers() -> None:
    good = {**trainer(steps=2).record, "losses": [2.0, 1.0], "validation": [[2, 1.5]], "step_ms": 1.0}
    row = training.run_row("bad", {**good, "losses": [2.0, math.nan], "validation": [[2, math.inf]]}, good)
    json.dumps(row, allow_nan=False)
    assert row["loss"] is row["validation_gap"] is row["validation_curve"][0][1] is None
    assert row["curve"] == [[1, 2.0], [2, None]]
    assert table.loss(row, "loss") == "diverged"
    assert table.loss(training.run_row("good", good, good), "validation") == "1.5000 (+0.0000)"


def test_recorded_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "RECIPES_OF_LAYERS", {"mxfp4": RECIPES["mxfp4"]})
    monkeypatch.setattr(training, "SMALL_LAYER", (2, 32, 32))
    torch_row, mx_row = training.layers(((32, 64, 32),), CPU, 0.001)
    assert torch_row["saved_bytes"] == 32 * 64 * 2
    assert mx_row["saved_bytes"] == 32 * 64 * 17 // 32  # 4.25 bits an element
    assert mx_row["vs_torch"] == torch_row["median_us"] / mx_row["median_us"]


def test_recorded_serving(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "SERVED_TOKENS", (1, 4))
    rows = training.serving(((64, 32),), CPU, 0.001)
    assert [(row["label"], row["tokens"]) for row in rows] == [
        (label, tokens) for tokens in (1, 4) for label in ("torch", "mxfp4")
    ]
    assert [row["weight_bytes"] for row in rows[:2]] == [32 * 64 * 2, 32 * 64 * 17 // 32]  # 4.25 bits an element
    assert rows[0]["call_vs_torch"] == 1
    assert rows[1]["call_vs_torch"] == rows[0]["call_median_us"] / rows[1]["call_median_us"]
    assert {row["graph_median_us"] for row in rows} == {row["graph_vs_torch"] for row in rows} == {None}
    json.dumps(rows, allow_nan=False)


def test_recorded_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "read_text", lambda: CONTENT)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: None)
    monkeypatch.setattr(training, "TIMED_STEPS", 1)
    rows = training.step(TINY, CPU, (("bf16", True), ("mxfp4", False), ("mxfp4, weights kept", True)))
    assert [row["label"] for row in rows] == ["bf16", "mxfp4", "mxfp4, weights kept"]
    assert [row["vs_bf16_compiled"] for row in rows] == [rows[0]["median_ms"] / row["median_ms"] for row in rows]
    assert len(rows[0]["losses"]) == training.WARM_STEPS + 1


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], training.VARIANTS),
        (["--recipe", "mxfp8", "--recipe", "mxfp4, weights kept"], ("bf16", "mxfp8", "mxfp4, weights kept")),
        (["--recipe", "bf16"], ("bf16",)),
    ],
)
def test_chosen_steps(options: list[str], expected: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In few rows by default; others, compiled, beside what they are compared with."""
    seen: list[Any] = []
    monkeypatch.setattr(training, "step", lambda size, device, variants: seen.extend(variants) or [])
    arguments = ["training.py", "step", "--device", "cpu", "--results", str(tmp_path), *options]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit):
        training.main()
    assert seen == list(expected if not options else [(label, True) for label in expected])


def test_timed_steps_are_those_of_a_normal_run() -> None:
    """In the warm-up of its learning rate."""
    last = training.WARM_STEPS + training.TIMED_STEPS - 1
    assert Run(TINY, training.SCHEDULED_STEPS).lr(last) == TINY.lr * (last + 1) / 100


@pytest.mark.parametrize("name", ["TRAINING", "LAYERS", "STEP", "SERVING"])
def test_the_results_in_the_document_are_the_recorded_ones(name: str) -> None:
    shown = getattr(table, name)
    assert shown.start + shown.text() + shown.end in (ROOT / "docs/training.md").read_text("utf-8")
    if shown.recorded.exists():
        assert json.loads(shown.recorded.read_text("utf-8"))["environment"]["commit"]

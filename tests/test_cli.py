"""The command line: every option, every mistake, and the recorded schema."""

from __future__ import annotations

import csv
import dataclasses
import functools
import io
import json
import math
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import click.testing
import numpy
import pytest
import torch
from safetensors.torch import save_file

import mxkernels as mx
from mxkernels import cli, report, support
from mxkernels.bench import Bench, Case, error
from mxkernels.bench_products import ProductBench
from mxkernels.formats import FORMATS
from mxkernels.gpu import ARCHITECTURES, Capabilities
from mxkernels.ops import paths
from mxkernels.ops.operand import Operand
from mxkernels.perf import SHAPES, time_host

ROOT = Path(__file__).parents[1]
SCHEMA = {
    "op": str, "fmt": str, "block": str, "rounding": str, "scale_rounding": str, "symmetric": bool, "shape": list,
    "device": str, "median_us": float, "gbps": float, "fraction_of_limit": float, "limit": str, "bytes": int,
    "bytes_bf16": int, "bytes_fp8": int, "vs_bf16_bytes": float, "rmse": float, "sqnr_db": float, "path": str,
    "config_source": str,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _short_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "Bench", functools.partial(Bench, seconds=0.0))
    monkeypatch.setattr(cli, "ProductBench", functools.partial(ProductBench, seconds=0.0))


def invoke(*arguments: object) -> click.testing.Result:
    return click.testing.CliRunner().invoke(cli.cli, [str(argument) for argument in arguments], prog_name="mxkernels")


def bench(*arguments: object) -> list[dict[str, Any]]:
    """The rows of a `bench` on the CPU; 8x64 where no input or shape is given."""
    named = {"--shape", "--input"} & set(arguments)
    result = invoke("bench", "--device", "cpu", "--format", "json", *arguments, *([] if named else ["--shape", "8x64"]))
    assert result.exit_code == 0, result.output
    return list(json.loads(result.stdout)["rows"])


def mistake(*arguments: object) -> str:
    """The sentence of a mistake: exit code 2, one line on stderr, nothing on stdout."""
    result = invoke(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    sentence = result.stderr.removesuffix("\n")
    assert "\n" not in sentence
    assert sentence.startswith("mxkernels: ")
    return sentence


# --- results -----------------------------------------------------------------------------------------------


def test_the_command_in_a_checkout() -> None:
    command = [sys.executable, "cli.py", "bench", "--fmt", "e2m1", "--block", "4x4", "--device", "cpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "reference" in done.stderr
    assert done.stderr.count("\n") == 1
    assert [line.split()[:3] for line in done.stdout.splitlines() if "e2m1" in line] == [
        ["quantize", "e2m1", "4x4"],
        ["dequantize", "e2m1", "4x4"],
    ]


def test_json_has_the_recorded_schema() -> None:
    result = invoke("bench", "--device", "cpu", "--shape", "8x64", "--format", "json")
    content = json.loads(result.stdout)
    assert set(content) == {"environment", "rows"}
    environment = content["environment"]
    assert environment["mxkernels"] == mx.__version__
    assert environment["torch"] == torch.__version__
    assert environment["device"] == "cpu"
    assert {"python", "triton", "driver", "sm_count", "commit", "dirty", "command", "date"} <= set(environment)
    for row in content["rows"]:
        assert {name: type(row[name]) for name in SCHEMA} == SCHEMA
    quantize, dequantize = content["rows"]
    assert (quantize["op"], dequantize["op"]) == ("quantize", "dequantize")
    for row in (quantize, dequantize):
        assert row["block"] == "1x32"
        assert row["rounding"] == "rtne"
        assert row["scale_rounding"] == "even"
        assert row["symmetric"] is True
        assert row["shape"] == [8, 64]
        assert (row["device"], row["path"], row["config_source"]) == ("cpu", "reference", "reference")
        assert row["limit"] == "copy"
        assert row["p10_us"] <= row["median_us"] <= row["p90_us"]
        assert row["traffic_bytes"] == 8 * 64 * 2 + row["bytes"]
        assert row["gbps"] == pytest.approx(row["traffic_bytes"] / row["median_us"] / 1e3)
        assert row["fraction_of_limit"] == pytest.approx(row["gbps"] / row["limit_gbps"])


@pytest.mark.parametrize(
    ("arguments", "stored"),
    [
        (["--fmt", "e2m1"], 8 * (64 / 2 + 2)),
        (["--fmt", "e3m2"], 8 * (64 * 3 / 4 + 2)),
        (["--fmt", "int8"], 8 * (64 + 2)),
        (["--fmt", "e2m1", "--block", "4x4"], 8 * 32 + 2 * 16),
        (["--fmt", "e2m1", "--block", "32x1"], 8 * 32 + 64),
        (["--fmt", "e2m1", "--asymmetric"], 8 * (32 + 2 * 3)),
    ],
)
def test_bytes(arguments: list[str], stored: float) -> None:
    for row in bench(*arguments):
        assert row["bytes"] == stored
        assert row["bytes_bf16"] == 8 * 64 * 2
        assert row["bytes_fp8"] == 8 * 64 + 8 * 4  # an fp32 scale a row
        assert row["vs_bf16_bytes"] == row["bytes_bf16"] / stored
        assert row["vs_fp8_bytes"] == row["bytes_fp8"] / stored


def test_mxfp4_is_3_76_times_smaller_than_bf16() -> None:
    assert {round(row["vs_bf16_bytes"], 4) for row in bench("--fmt", "mxfp4")} == {3.7647}


def test_the_pair_counts_both_orientations() -> None:
    (single,) = bench("--op", "quantize", "--shape", "64x64")
    (pair,) = bench("--op", "quantize_pair", "--shape", "64x64")
    assert pair["bytes"] == 2 * single["bytes"]
    assert pair["traffic_bytes"] == 64 * 64 * 2 + pair["bytes"]
    assert pair["vs_bf16_bytes"] == single["vs_bf16_bytes"]


def test_the_error_is_that_of_the_round_trip() -> None:
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(3)).bfloat16()
    q = mx.quantize(x, mx.mxfp4)
    noise = (q.dequantize(torch.float32).double() - x.double()).square().sum()
    for row in bench("--seed", "3"):
        assert row["rmse"] == pytest.approx(math.sqrt(noise / x.numel()))
        assert row["sqnr_db"] == pytest.approx(10 * math.log10(x.double().square().sum() / noise))
        assert row["nonfinite"] == 0


def test_the_error_is_summed_over_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(7, 33)
    q = mx.quantize(x, mx.mxint4)
    whole = error(x, q)
    monkeypatch.setattr("mxkernels.bench._ERROR_CHUNK", 10)
    assert error(x, q) == pytest.approx(whole)


def test_what_is_not_finite_is_left_out_and_counted(tmp_path: Path) -> None:
    x = numpy.ones((2, 64), dtype=numpy.float32)
    x[0, 0] = numpy.nan
    numpy.save(tmp_path / "x.npy", x)
    result = invoke("bench", "--device", "cpu", "--input", tmp_path / "x.npy", "--format", "json")
    for row in json.loads(result.stdout)["rows"]:
        assert row["nonfinite"] == 32  # the whole block
        assert row["rmse"] == 0.0  # ones are exact
        assert row["sqnr_db"] is None
    assert "32 elements" in result.stderr
    numpy.save(tmp_path / "x.npy", numpy.full((2, 64), numpy.nan, dtype=numpy.float32))
    (row, _) = bench("--input", tmp_path / "x.npy")
    assert row["rmse"] is None


# --- options -----------------------------------------------------------------------------------------------


def specs(rows: list[dict[str, Any]]) -> list[str]:
    return [
        f"{row['fmt']} {row['block']} {row['rounding']} {row['scale_rounding']} {row['symmetric']}"
        for row in rows
        if row["op"] == "quantize"
    ]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--fmt", "mxfp8_e4m3"], ["e4m3 1x32 rtne rceil True"]),
        (["--fmt", "mxfp8_e4m3", "--scale-rounding", "floor"], ["e4m3 1x32 rtne floor True"]),
        (["--fmt", "mxfp8_e4m3", "--block", "4x4", "--asymmetric"], ["e4m3 4x4 rtne rceil False"]),
        (["--fmt", "e4m3"], ["e4m3 1x32 rtne even True"]),
        (["--rounding", "sr"], ["e2m1 1x32 stochastic even True"]),
        (["--rounding", "stochastic", "--scale", "ceil"], ["e2m1 1x32 stochastic ceil True"]),
        (
            ["--fmt", "e2m1,int4", "--block", "1x16", "--block", "2x2"],
            [f"{element} {block} rtne even True" for element in ("e2m1", "int4") for block in ("1x16", "2x2")],
        ),
        (["--fmt", "e2m1", "--fmt", "e3m0"], ["e2m1 1x32 rtne even True", "e3m0 1x32 rtne even True"]),
    ],
)
def test_specs(arguments: list[str], expected: list[str]) -> None:
    assert specs(bench(*arguments)) == expected


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [([], ["quantize", "dequantize"]), (["--op", "dequantize"], ["dequantize"]),
     (["--op", "quantize,quantize_pair"], ["quantize", "quantize_pair"])],
)  # fmt: skip
def test_ops(arguments: list[str], expected: list[str]) -> None:
    assert [row["op"] for row in bench(*arguments)] == expected


def test_shapes() -> None:
    rows = bench("--op", "quantize", "--shape", "4x64,64", "--shape", "2x3x32")
    assert [row["shape"] for row in rows] == [[4, 64], [64], [2, 3, 32]]


def test_shape_presets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "tiny", {"up": (8, 32), "down": (32, 8)})
    rows = bench("--op", "quantize", "--shape", "tiny")
    assert [(row["name"], row["shape"]) for row in rows] == [("tiny up", [8, 32]), ("tiny down", [32, 8])]


@pytest.mark.parametrize(("dtype", "itemsize"), [("bf16", 2), ("fp16", 2), ("fp32", 4)])
def test_dtypes(dtype: str, itemsize: int) -> None:
    for row in bench("--dtype", dtype):
        assert row["dtype"] == dtype
        assert row["traffic_bytes"] == 8 * 64 * itemsize + row["bytes"]


def test_the_seed_decides_the_data_and_the_random_bits() -> None:
    arguments = ["--rounding", "sr", "--op", "quantize", "--seed"]
    first, again, other = (bench(*arguments, seed)[0]["rmse"] for seed in (7, 7, 8))
    assert first == again != other


def test_without_a_gpu_auto_is_the_cpu_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = invoke("bench", "--shape", "8x64")
    assert result.exit_code == 0
    assert result.stderr.count("\n") == 1
    assert "reference" in result.stderr


@pytest.mark.gpu
def test_on_a_gpu_the_kernels_run() -> None:
    result = invoke(
        "bench", "--shape", "256x256", "--format", "json", "--rounding", "sr", "--op", "quantize,dequantize"
    )
    assert result.exit_code == 0, result.output
    for row in json.loads(result.stdout)["rows"]:
        assert (row["path"], row["config_source"]) == ("triton", "rule")
        assert row["device"] == torch.cuda.get_device_name()


@pytest.mark.parametrize(("form", "first"), [("table", "op"), ("markdown", "| op")])
def test_tables(form: str, first: str) -> None:
    result = invoke("bench", "--device", "cpu", "--shape", "8x64", "--format", form)
    lines = result.stdout.splitlines()
    assert lines[2].startswith(first)
    for heading in ("µs", "GB/s", "of limit", "bytes", "bf16/", "FP8/", "R-MSE", "SQNR dB", "path", "config"):
        assert heading in lines[2]
    assert len(lines) == 6


def test_csv_holds_everything() -> None:
    result = invoke("bench", "--device", "cpu", "--shape", "8x64", "--format", "csv")
    rows = list(csv.DictReader(io.StringIO(result.stdout)))
    assert [row["op"] for row in rows] == ["quantize", "dequantize"]
    assert set(rows[0]) >= set(SCHEMA)
    assert rows[0]["shape"] == "8x64"


@pytest.mark.parametrize(
    ("name", "arguments", "start"),
    [
        ("r.json", [], "{"),
        ("r.csv", [], "op,"),
        ("r.md", [], "cpu"),
        ("r", [], "cpu"),
        ("r.txt", ["--format", "json"], "{"),
    ],
)
def test_output(tmp_path: Path, name: str, arguments: list[str], start: str) -> None:
    result = invoke("bench", "--device", "cpu", "--shape", "8x64", "--output", tmp_path / name, *arguments)
    assert result.exit_code == 0, result.output
    assert result.stdout == ""
    assert (tmp_path / name).read_text(encoding="utf-8").startswith(start)


def test_compare(tmp_path: Path) -> None:
    rows = bench("--op", "quantize", "--fmt", "e2m1")
    rows[0] |= {"median_us": 123.0, "device": "another"}
    old = tmp_path / "old.json"
    old.write_text(report.render("json", {}, rows))
    new = bench("--op", "quantize", "--fmt", "e2m1,int4", "--compare", old)
    assert [row["old_median_us"] for row in new] == [123.0, None]
    result = invoke("bench", "--device", "cpu", "--shape", "8x64", "--op", "quantize", "--compare", old)
    assert "old µs" in result.stdout
    assert "123.0" in result.stdout
    assert "another" in result.stderr


@pytest.mark.parametrize("arguments", [["--shape", "8x64"], ["--op", "matmul", "--shape", "4x8x64"]])
def test_plot(tmp_path: Path, arguments: list[str]) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra: pip install 'mxkernels[plot]'")
    result = invoke("bench", "--device", "cpu", *arguments, "--plot", tmp_path / "plot.svg")
    assert result.exit_code == 0, result.output
    drawn = (tmp_path / "plot.svg").read_text()
    assert drawn.startswith("<?xml")
    assert drawn.count("<path") > 10
    assert "e2m1" in result.stdout  # the table is printed all the same


# --- products ----------------------------------------------------------------------------------------------


def test_products() -> None:
    rows = bench("--op", "matmul", "--shape", "4x8x64", "--fmt", "mxfp4,e4m3", "--block", "1x32")
    assert [(row["fmt"], row["activations"].split()[0], row["timed_from"]) for row in rows] == [
        *(("e2m1", "e2m1", start) for start in ("folded", "codes", "plain")),
        *(("e4m3", "e4m3", start) for start in ("codes", "plain")),
    ]
    for row in rows:
        assert (row["op"], row["shape"], row["path"], row["config_source"]) == (
            "matmul", [4, 8, 64], "reference", "reference",
        )  # fmt: skip


@pytest.mark.parametrize(
    ("activations", "expected"),
    [
        ("bfloat16", "bfloat16"),
        ("float16", "float16"),
        ("e4m3", "e4m3 4x4 rtne ceil symmetric"),
        ("mxint8", "int8 4x4 rtne ceil symmetric"),
    ],
)
def test_activations(activations: str, expected: str) -> None:
    options = ["--block", "4x4", "--scale", "ceil", "--activations", activations]
    rows = bench("--op", "matmul", "--shape", "4x8x64", *options)
    assert {row["activations"] for row in rows} == {expected}
    assert {(row["fmt"], row["block"], row["scale_rounding"]) for row in rows} == {("e2m1", "4x4", "ceil")}
    assert [row["timed_from"] for row in rows] == (["codes"] if "float" in activations else ["codes", "plain"])


def test_the_weights_of_a_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """N x K, met by several M; 256x256 where no shape is given."""
    monkeypatch.setitem(SHAPES, "tiny", {"up": (8, 32)})
    options = ["--device", "cpu", "--format", "json", "--op", "matmul", "--activations", "bfloat16"]
    for shape, name, n, k in ((["--shape", "tiny"], "tiny up", 8, 32), ([], "", 256, 256)):
        rows = json.loads(invoke("bench", *options, *shape).stdout)["rows"]
        starts = [(m, start) for m in (16, 64) for start in ("codes", "prepared")]
        assert [(row["shape"][0], row["timed_from"]) for row in rows] == starts
        assert {(row["name"], *row["shape"][1:]) for row in rows} == {(name, n, k)}


def test_a_product_takes_no_input(tmp_path: Path) -> None:
    numpy.save(tmp_path / "x.npy", numpy.ones((4, 4), dtype=numpy.float32))
    assert "'--input'" in mistake("bench", "--op", "matmul", "--input", tmp_path / "x.npy")


@pytest.mark.parametrize(("form", "first"), [("table", "op"), ("markdown", "| op")])
def test_tables_of_products(form: str, first: str) -> None:
    """On the CPU, where times are the reference's, nothing is said of what pays."""
    result = invoke("bench", "--device", "cpu", "--op", "matmul", "--shape", "4x8x64", "--format", form)
    lines = result.stdout.splitlines()
    assert lines[2].startswith(first)
    for heading in (
        "activations", "M x N x K", "timed from", "µs", "TFLOP/s", "of limit", "vs bf16", "vs FP8", "vs dot_scaled",
        "bytes", "bf16/", "FP8/", "R-MSE", "SQNR dB", "of bound", "path", "config",
    ):  # fmt: skip
        assert heading in lines[2]
    assert len(lines) == 7
    assert "reference" in result.stderr


def test_compare_products(tmp_path: Path) -> None:
    rows = bench("--op", "matmul", "--shape", "4x8x64")
    for number, row in enumerate(rows):
        row["median_us"] = 100.0 + number
    (tmp_path / "old.json").write_text(report.render("json", {}, rows))
    new = bench("--op", "matmul", "--shape", "4x8x64", "--compare", tmp_path / "old.json")
    assert [row["old_median_us"] for row in new] == [100.0, 101.0, 102.0]
    other = bench("--op", "matmul", "--shape", "4x8x64", "--activations", "int4", "--compare", tmp_path / "old.json")
    assert {row["old_median_us"] for row in other} == {None}


@pytest.mark.gpu
def test_products_on_a_gpu() -> None:
    result = invoke("bench", "--op", "matmul", "--shape", "256x256x256", "--format", "json")
    assert result.exit_code == 0, result.output
    for row in json.loads(result.stdout)["rows"]:
        assert row["path"] in ("native", "fp8", "wide")
        assert row["dot_scaled_us"] > 0
        assert 0 <= row["share_of_bound"] < 1
    assert "pays" in invoke("bench", "--op", "matmul", "--shape", "256x256x256").stdout


# --- real tensors ------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Files of every kind; x is in all of them."""
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    save_file({"x": x}, tmp_path / "one.safetensors")
    save_file({"a.x": x.bfloat16(), "b": x[:1], "ids": torch.arange(4)}, tmp_path / "two.safetensors")
    save_file({}, tmp_path / "none.safetensors")
    numpy.save(tmp_path / "x.npy", x.numpy())
    numpy.save(tmp_path / "half:x.npy", x.half().numpy())
    numpy.save(tmp_path / "double.npy", x.double().numpy())
    numpy.save(tmp_path / "whole.npy", numpy.arange(64))
    numpy.save(tmp_path / "scalar.npy", numpy.float32(1))
    numpy.save(tmp_path / "empty.npy", numpy.zeros((0, 4), dtype=numpy.float32))
    torch.save(torch.nn.Parameter(x), tmp_path / "x.pt")
    torch.save({"model": {"w": x, "step": 3}, "x": x.half()}, tmp_path / "nested.pt")
    torch.save(x.to_sparse(), tmp_path / "sparse.pt")
    (tmp_path / "code.pt").write_bytes(pickle.dumps(print, protocol=2))
    for name in ("bad.safetensors", "bad.npy", "bad.pt", "x.txt"):
        (tmp_path / name).write_bytes(b"not what the name says")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("one.safetensors", "fp32"), ("one.safetensors:x", "fp32"), ("two.safetensors:a.x", "bf16"),
        ("x.npy", "fp32"), ("half:x.npy", "fp16"), ("x.pt", "fp32"), ("nested.pt:model.w", "fp32"),
        ("nested.pt:x", "fp16"),
    ],
)  # fmt: skip
def test_inputs(files: Path, name: str, dtype: str) -> None:
    for row in bench("--input", files / name):
        assert row["shape"] == [8, 64]
        assert row["dtype"] == dtype
        assert 0.05 < row["rmse"] < 0.2


def test_an_input_is_converted(files: Path) -> None:
    (row,) = bench("--input", files / "double.npy", "--dtype", "fp32", "--op", "quantize")
    assert row["dtype"] == "fp32"
    assert row["rmse"] == bench("--input", files / "x.npy", "--op", "quantize")[0]["rmse"]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("missing.npy", "no file"),
        ("missing.npy:x", "no file"),
        ("", "no file"),
        ("x.txt", ".safetensors, .npy, .pt"),
        ("two.safetensors", "a.x, b, ids"),
        ("two.safetensors:c", "'c'; allowed: a.x, b, ids"),
        ("two.safetensors:ids", "torch.int64"),
        ("none.safetensors", "no tensors"),
        ("x.npy:x", "no name"),
        ("whole.npy", "torch.int64"),
        ("scalar.npy", "shape []"),
        ("empty.npy", "shape [0, 4]"),
        ("double.npy", "torch.float64; allowed: bf16, fp16, fp32"),
        ("nested.pt", "model.w, x"),
        ("nested.pt:model", "model.w, x"),
        ("sparse.pt", "dense"),
        ("bad.safetensors", "cannot be read"),
        ("bad.npy", "cannot be read"),
        ("bad.pt", "cannot be read"),
        ("code.pt", "cannot be read"),
    ],
)
def test_mistakes_in_inputs(files: Path, name: str, says: str) -> None:
    sentence = mistake("bench", "--input", f"{files}/{name}")
    assert "'--input'" in sentence
    assert says in sentence


# --- mistakes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--fmt", "e9m9"], ["'--fmt'", "'e9m9'", "e2m1", "mxfp4"]),
        (["--fmt", "mxfp8-e4m3"], ["'--fmt'", "mxfp8_e4m3"]),
        (["--fmt", ""], ["'--fmt'"]),
        (["--block", "3x5"], ["'--block'", "3x5", "power of two from 1 to 128"]),
        (["--block", "4"], ["'--block'", "'4'", "1x32"]),
        (["--block", "1x1"], ["'--block'", "two elements"]),
        (["--block", "4x4,256x1"], ["'--block'", "256x1"]),
        (["--rounding", "up"], ["'--rounding'", "'rtne'", "'stochastic'"]),
        (["--scale-rounding", "up"], ["'--scale-rounding'", "'even'"]),
        (["--op", "matmul,quantize"], ["'--op'", "matmul alone"]),
        (["--op", "matmul", "--shape", "64"], ["'--shape'", "64", "MxNxK"]),
        (["--op", "matmul", "--shape", "2x3x4x5"], ["'--shape'", "2x3x4x5", "MxNxK"]),
        (["--op", "matmul", "--activations", "e9m9"], ["'--activations'", "'e9m9'", "e2m1", "bfloat16, float16"]),
        (["--activations", "bfloat16"], ["'--activations'", "--op matmul"]),
        (["--op", "linear"], ["'--op'", "not there yet"]),
        (["--op", "cast"], ["'--op'", "is no op", "quantize, dequantize"]),
        (["--shape", "4096by4096"], ["'--shape'", "4096x4096", "llama3-8b"]),
        (["--shape", "0x4"], ["'--shape'"]),
        (["--shape", "llama9"], ["'--shape'", "llama3-70b"]),
        (["--dtype", "int8"], ["'--dtype'", "'bf16'"]),
        (["--device", "tpu"], ["'--device'", "'cpu'"]),
        (["--seed", "-1"], ["'--seed'", "0<="]),
        (["--format", "xml"], ["'--format'", "'json'"]),
        (["--output", "no/folder/r.json"], ["'--output'", "no/folder"]),
        (["--output", "."], ["'--output'", "folder"]),
        (["--compare", "missing.json"], ["'--compare'", "no file"]),
        (["--compare", __file__], ["'--compare'", "not a result"]),
        (["--colour"], ["--colour"]),
    ],
)
def test_mistakes(arguments: list[str], says: list[str]) -> None:
    sentence = mistake("bench", *arguments)
    for words in says:
        assert words in sentence


def test_mistakes_outside_of_bench() -> None:
    assert "'nonsense'" in mistake("nonsense")
    assert "--nonsense" in mistake("--nonsense")


def test_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no GPU; allowed here: auto, cpu" in mistake("bench", "--device", "cuda")


def test_no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("mxkernels.arguments.triton_version", lambda: None)
    assert "Triton is not installed" in mistake("bench", "--device", "cuda")


def test_no_matplotlib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("matplotlib", "matplotlib.figure", "matplotlib.backend_bases"):
        monkeypatch.setitem(sys.modules, name, None)
    assert "mxkernels[plot]" in mistake("bench", "--plot", tmp_path / "plot.png")


def test_no_such_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra: pip install 'mxkernels[plot]'")
    assert "png" in mistake("bench", "--plot", tmp_path / "plot.xyz")
    assert "no folder" in mistake("bench", "--plot", tmp_path / "no" / "plot.png")


def test_outputs_are_refused_before_the_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(*arguments: object) -> None:
        raise AssertionError("measured")

    monkeypatch.setattr(Bench, "row", measured)
    mistake("bench", "--output", "no/folder/r.json")


def test_a_shape_and_an_input_exclude_each_other(tmp_path: Path) -> None:
    numpy.save(tmp_path / "x.npy", numpy.ones((4, 4), dtype=numpy.float32))
    assert "'--shape'" in mistake("bench", "--input", tmp_path / "x.npy", "--shape", "4x4")


@pytest.mark.parametrize("shape", ["1000000x1000000", "99999999999x99999999999"])
def test_a_shape_beyond_the_memory(shape: str) -> None:
    result = invoke("bench", "--device", "cpu", "--shape", shape)
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1].startswith(f"mxkernels: Invalid value for '--shape': {shape} does not fit")


def test_an_op_without_a_case_is_named() -> None:
    with pytest.raises(ValueError, match=r"matmul.*allowed: quantize"):
        Bench(torch.device("cpu")).row(Case("matmul", mx.mxfp4, (4, 4)))


# --- the other commands ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments", [["--help"], [], ["bench", "--help"], ["formats", "--help"], ["doctor", "--help"]]
)
def test_help(arguments: list[str]) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 0
    assert result.stdout.startswith("Usage: mxkernels")


def test_version() -> None:
    assert invoke("--version").stdout == f"mxkernels, version {mx.__version__}\n"


def test_formats() -> None:
    text = invoke("formats").stdout
    for element in FORMATS.values():
        assert element.name in text
    assert "±{0 0.5 1 1.5 2 3 4 6}" in text
    words = text[text.index("e3m2") : text.index("e4m3")].replace("}", " ").split()
    assert {f"{value:g}" for value in FORMATS["e3m2"].magnitudes[1:]} <= set(words)


def test_doctor() -> None:
    result = invoke("doctor")
    assert result.exit_code == 0
    assert torch.__version__ in result.stdout
    for op in support.OPS:
        (line,) = (line for line in result.stdout.splitlines() if line.startswith(f"{op} "))
        assert line.count("decoded") == len(FORMATS), op


@pytest.mark.parametrize("capabilities", [None, *set(ARCHITECTURES.values())])
def test_support_is_said_of_every_op_and_format(capabilities: Capabilities | None) -> None:
    matrix = support.support_matrix(capabilities)
    for op, by_format in matrix.items():
        assert set(by_format) == set(FORMATS)
        assert hasattr(mx, op.partition(",")[0]) or hasattr(mx.ops, op)
    assert {"quantize", "dequantize"} <= {op.partition(",")[0] for op in matrix}
    assert capabilities is None or report.support_table(capabilities).count("decoded") >= len(FORMATS)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_support_of_products_is_the_path_that_is_chosen(architecture: str) -> None:
    capabilities = ARCHITECTURES[architecture]
    for element in FORMATS.values():
        side = Operand([], 4096, mx.MXSpec(element))
        path = paths.choose(side, side, capabilities)
        folded = path == "fp8" or (path == "native" and all(paths.native_folds(side, side, capabilities)))
        expected = "folded" if folded else {"native": "native", "wide": "decoded"}[path]
        assert support.support("matmul", element, capabilities).kind == expected, element.name


def test_the_instructions_said_are_those_compiled() -> None:
    """Of the formats' kernels for Hopper and Ampere. (Compiled in a process of its own: here they may be
    interpreted.)"""
    pytest.importorskip("triton")
    code = """
import torch
import mxkernels as mx
from mxkernels import gpu, support
from mxkernels.ops.quantize_kernel import quantize_launch
from mxkernels.tune.aot import compile_launch

def empty(dtype, *shape):
    return torch.empty(shape, dtype=dtype, device="meta")

def assembly(spec, architecture):
    parts = [empty(torch.uint8, 64, spec.packed_cols(64)), empty(torch.uint8, *spec.scale_shape(64, 64))]
    seed = empty(torch.int64, 1) if spec.stochastic else None
    capabilities = gpu.capabilities(architecture)
    launch = quantize_launch(empty(torch.bfloat16, 64, 64), spec, seed, parts, capabilities=capabilities)
    return compile_launch(launch, architecture).assembly

for architecture in ("sm_80", "sm_90"):
    for name in ("e2m1", "int4", "e3m2", "e4m3", "e5m2") if architecture == "sm_90" else ("e4m3",):
        for rounding in ("rtne", "stochastic") if name == "e2m1" else ("rtne",):
            spec = mx.MXSpec(name, rounding=rounding)
            said = support.support(f"quantize, {rounding}", spec.element, gpu.capabilities(architecture))
            text = assembly(spec, architecture)
            assert said.instruction in text or "arithmetic" in said.instruction, (architecture, spec, said)
            assert ("cvt.rn.satfinite" in text) == (said.kind in ("native", "folded")), (architecture, spec, said)
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


# --- the recorded measurements -----------------------------------------------------------------------------


def test_the_recorded_cases_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kind of case that `make gpu` measures, at a small size on the CPU."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    monkeypatch.setattr("mxkernels.bench.time_host", functools.partial(time_host, samples=1))
    import casts

    runner = Bench(torch.device("cpu"), seconds=0.0)
    for name, group in casts.GROUPS.items():
        kinds = list(dict.fromkeys(dataclasses.replace(case, shape=(8, 64)) for case in group()))
        rows = casts.measure(name, runner, kinds[:3] if name == "overhead" else kinds)
        assert json.loads(report.render("json", {}, rows))["rows"] == rows
        assert all(set(SCHEMA) <= set(row) for row in rows)
        assert all(("host_us" in row) == (name == "overhead") for row in rows)
        assert all(row["bytes_bf16"] == 1024 * (1 + (row["op"] == "quantize_pair")) for row in rows)


def test_what_the_hosts_time_is_compared_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import casts

    rows = casts.host_parts(torch.device("cpu"))
    assert [row["op"] for row in rows] == ["find_config", "torch.frexp"]
    assert all(row["host_us"] > 0 for row in rows)
    json.dumps(rows, allow_nan=False)


def test_pieces_are_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import gpu

    piece = gpu.Piece("three", ("-c", "print('out')"))
    bad = gpu.Piece("bad", ("-c", "raise SystemExit(3)"))
    assert list(gpu.run_all(tmp_path, [piece, bad], again=False)) == [True, False]
    recorded = json.loads((tmp_path / "three.json").read_text())
    assert (recorded["status"], recorded["output_tail"]) == ("passed", "out\n")
    assert recorded["command"] == ["python", *piece.arguments]
    assert list(gpu.run_all(tmp_path, [piece, bad], again=False)) == [False]  # what has passed is not run again
    assert list(gpu.run_all(tmp_path, [piece], again=True)) == [True]
    monkeypatch.setattr(gpu, "sources", lambda: "other")
    assert list(gpu.run_all(tmp_path, [piece], again=False)) == [True]  # other sources: run again


def test_a_record_names_the_repositorys_files_from_its_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import gpu

    piece = gpu.Piece("names", ("-c", "import sys; print(sys.argv[1])", f"{ROOT}/mxkernels/spec.py"))
    recorded = gpu.run(piece)
    assert (recorded["command"][-1], recorded["output_tail"]) == ("mxkernels/spec.py", "mxkernels/spec.py\n")


def test_a_pieces_lines_are_printed_as_they_come(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each before the next: the piece waits until its first is seen."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import gpu

    seen: list[str] = []
    monkeypatch.setattr(gpu, "LIMIT_S", 120)
    sign = tmp_path / "seen"
    waits = "import sys, time, pathlib; print('first', flush=True)\n"
    waits += f"while not pathlib.Path({str(sign)!r}).exists(): time.sleep(0.01)\nprint('second')"

    def show(line: str, **options: object) -> None:
        seen.append(line)
        sign.touch()

    monkeypatch.setattr(gpu, "print", show, raising=False)
    recorded = gpu.run(gpu.Piece("waits", ("-c", waits)))
    assert seen == ["first\n", "second\n"]
    assert (recorded["status"], recorded["output_tail"]) == ("passed", "first\nsecond\n")


def test_a_piece_ends_at_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import gpu

    monkeypatch.setattr(gpu, "LIMIT_S", 1)
    assert gpu.run(gpu.Piece("slow", ("-c", "import time; time.sleep(60)")))["status"] == "timed out"

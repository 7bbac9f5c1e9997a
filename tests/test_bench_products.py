"""The measurements of matrix products: the runner's rows, what products are compared with, the recorded cases, and
the README's tables."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from operands import magnitude

import mxkernels as mx
from mxkernels import bench_products, perf, report
from mxkernels.bench_products import ProductBench, ProductCase, timings
from mxkernels.perf import Timing, time_host
from mxkernels.spec import MXSpec

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[1]
E2M1, E4M3 = MXSpec("e2m1"), MXSpec("e4m3")
SCHEMA = {
    "op": str, "fmt": str, "block": str, "rounding": str, "scale_rounding": str, "symmetric": bool,
    "activations": str, "shape": list, "dtype": str, "timed_from": str, "device": str, "median_us": float,
    "tflops": float, "fraction_of_limit": float, "limit": str, "bf16_before_us": float, "bf16_after_us": float,
    "vs_bf16": float, "bytes": int, "bytes_bf16": int, "bytes_fp8": int, "vs_bf16_bytes": float, "rmse": float,
    "sqnr_db": float, "share_of_bound": float, "path": str, "instruction": str, "config_source": str,
}  # fmt: skip


def row(case: ProductCase) -> dict[str, Any]:
    return ProductBench(CPU, seconds=0.0).row(case)


def product(a: MXSpec | torch.dtype = E2M1, b: MXSpec = E2M1, timed_from: str = "codes", **options: Any) -> ProductCase:
    return ProductCase((6, 40, 96), a, b, timed_from, **options)


# --- rows --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("timed_from", ["folded", "codes", "plain"])
def test_the_schema(timed_from: str) -> None:
    found = row(product(timed_from=timed_from))
    assert json.loads(report.render("json", {}, [found]))["rows"] == [found]
    assert {name: type(found[name]) for name in SCHEMA} == SCHEMA
    assert found["tflops"] == pytest.approx(2 * 6 * 40 * 96 / found["median_us"] / 1e6)
    assert found["vs_bf16"] == pytest.approx(
        (found["bf16_before_us"] + found["bf16_after_us"]) / 2 / found["median_us"]
    )
    assert found["fraction_of_limit"] == pytest.approx(found["limit_us"] / found["median_us"])
    assert found["fp8_us"] is found["vs_fp8"] is found["dot_scaled_us"] is found["vs_dot_scaled"] is None


def test_bf16_is_timed_on_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean of the two is what counts; and the peers that exist are named."""
    order: list[str] = []
    times = iter((100.0, 50.0, 300.0, 75.0, 400.0))

    def timed(call: Any, *_: object) -> Timing:
        order.append(getattr(call, "name", "ours"))
        return Timing((next(times),))

    def peer(name: str) -> Any:
        class Peer:
            def __call__(self) -> None: ...

        Peer.name = name
        return lambda *_: Peer()

    monkeypatch.setattr(bench_products, "time_call", timed)
    for name in ("bf16", "fp8", "dot_scaled"):
        monkeypatch.setattr(bench_products, f"{name}_product", peer(name))
    monkeypatch.setattr(ProductBench, "_limit", lambda *_: ("copy", 1.0))
    found = row(product())
    assert order == ["bf16", "ours", "bf16", "fp8", "dot_scaled"]
    assert (found["vs_bf16"], found["vs_fp8"], found["vs_dot_scaled"]) == (4.0, 1.5, 8.0)


def test_bytes() -> None:
    elements, blocks = (6 + 40) * 96, (6 + 40) * 3
    codes, plain, folded = (row(product(timed_from=start)) for start in ("codes", "plain", "folded"))
    assert codes["bytes"] == plain["bytes"] == elements // 2 + blocks
    assert folded["bytes"] == elements + blocks + 2 * (6 + 40) + 2 * 4  # references and flags
    assert {found["bytes_bf16"] for found in (codes, plain, folded)} == {2 * elements}
    assert codes["bytes_fp8"] == elements + 4 * (6 + 40)
    weights_only = row(product(torch.bfloat16))
    assert weights_only["bytes"] == 2 * 6 * 96 + 40 * (96 // 2 + 3)


def test_the_errors() -> None:
    """Against the plain product what rounding to four bits costs; against the decoded one almost nothing."""
    case = product(timed_from="plain")
    runner = ProductBench(CPU, seconds=0.0)
    (x, w), (a, b) = (runner._prepare(case).plain, runner._prepare(case).codes)
    noise = mx.matmul(a, b, out_dtype=torch.float32).double() - x.double() @ w.double()
    found = runner.row(case)
    assert found["rmse"] == pytest.approx(noise.square().mean().sqrt().item())
    assert 10 < found["sqnr_db"] < 20
    assert 0 <= found["share_of_bound"] < 1 / 96  # one rounding of 96


@pytest.mark.parametrize(("path", "factor"), [("fp8", 33 * 16 / 2**13), ("wide", 96 / 2**24), ("native", 96 / 2**24)])
def test_the_bound_is_that_of_the_path(monkeypatch: pytest.MonkeyPatch, path: str, factor: float) -> None:
    """A product that is off by a tenth of Σ|a||b| everywhere; in chunks of rows."""
    runner = ProductBench(CPU, seconds=0.0)
    case = product()
    work = runner._prepare(case)
    a, b = (operand.dequantize(torch.float32).double() for operand in work.operands)
    wrong = a @ b + a.abs() @ b.abs() / 10
    monkeypatch.setattr(bench_products, "matmul", lambda *_, **__: wrong)
    monkeypatch.setattr(bench_products, "_CHUNK", 100)
    assert runner._errors(case, work, path)[2] == pytest.approx(0.1 / factor)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("spec", [E2M1, MXSpec("int4", "4x4", symmetric=False)])
def test_the_magnitude_of_the_bound(spec: MXSpec, turned: bool) -> None:
    q = mx.quantize(torch.randn(6, 64, generator=torch.Generator().manual_seed(0)), spec)
    q = q.T if turned else q
    assert torch.equal(bench_products._magnitude(q), magnitude(q))


def test_turned_operands() -> None:
    """Square blocks are quantised as the operand lies; others through its transpose. The product is the same one."""
    for spec, transposed in ((MXSpec("e2m1", "4x4"), True), (E2M1, False)):
        case = product(spec, spec, a_turned=True, b_turned=True)
        work = ProductBench(CPU)._prepare(case)
        (a, b), (x, w) = work.codes, work.plain
        assert (x.shape, w.shape) == ((6, 96), (96, 40))
        assert (x.stride(), w.stride()) == ((1, 6), (40, 1))
        assert (a.transposed, b.transposed) == (transposed, not transposed)
        assert torch.equal(a.dequantize(), mx.quantize(x, spec).dequantize())
        assert torch.equal(b.dequantize(), mx.quantize(w.T, spec).dequantize().T)
        assert row(case)["sqnr_db"] > 10


def test_which_starts_make_sense() -> None:
    assert timings(E2M1, E2M1, 1) == ("folded", "codes", "plain")
    assert timings(E2M1, E4M3, 1) == timings(E2M1, MXSpec("e2m1", symmetric=False), 1) == ("codes", "plain")
    assert timings(torch.bfloat16, E2M1, 64) == ("codes", "prepared")
    assert timings(torch.bfloat16, E2M1, 65) == timings(torch.float16, E2M1, 1) == ("codes",)
    assert timings(torch.bfloat16, E4M3, 1) == ("codes",)
    with pytest.raises(ValueError, match="does not fold"):
        row(product(torch.bfloat16, timed_from="folded"))


def test_stochastic_rounding_repeats() -> None:
    spec = MXSpec("e2m1", rounding="stochastic")
    assert len({row(product(spec, spec, "plain"))["rmse"] for _ in range(2)}) == 1
    assert row(product(spec, spec))["rmse"] != ProductBench(CPU, seed=1, seconds=0.0).row(product(spec, spec))["rmse"]


# --- the verdict -------------------------------------------------------------------------------------------


def measured(m: int, vs_bf16: float, timed_from: str = "plain", activations: str = "e2m1 1x32") -> dict[str, Any]:
    return {
        "op": "matmul", "fmt": "e2m1", "block": "1x32", "scale_rounding": "even", "activations": activations,
        "shape": [m, 8, 16], "timed_from": timed_from, "vs_bf16": vs_bf16,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("ratios", "says"),
    [
        ({1: 0.5, 16: 0.9, 64: 1.25, 256: 1.5}, "pays from M = 64 on (1.25 times bf16), of M = 1, 16, 64, 256."),
        ({1: 1.5, 16: 0.9, 64: 1.25}, "pays from M = 64 on (1.25 times bf16) and at M = 1, of M = 1, 16, 64."),
        ({64: 1.5, 1: 1.1}, "pays from M = 1 on (1.10 times bf16), of M = 1, 64."),
        ({1: 1.5, 16: 1.1, 64: 1.0}, "pays at M = 1, 16, of M = 1, 16, 64."),
        ({1: 0.5, 64: 1.0}, "pays nowhere, of M = 1, 64."),
    ],
)
def test_from_which_size_on_it_pays(ratios: dict[int, float], says: str) -> None:
    rows = [measured(m, ratio) for m, ratio in ratios.items()] + [measured(1, 3.0, "folded")]
    assert report.pays_from(rows) == [f"e2m1 1x32 x e2m1 1x32, N = 8, K = 16, quantisation included: {says}"]


def test_each_pair_has_its_verdict() -> None:
    """Weights beside plain activations are not quantised in the call."""
    rows = [measured(1, 2.0), measured(1, 3.0, "codes"), measured(1, 1.5, "codes", "bfloat16")]
    first, second = report.pays_from(rows)
    assert "quantisation included: pays from M = 1 on (2.00" in first
    assert second.startswith("bfloat16 x e2m1 1x32, N = 8, K = 16, from stored codes: pays from M = 1 on (1.50")


# --- what products are compared with ------------------------------------------------------------------------


def test_peers_that_the_cpu_lacks() -> None:
    x, w = torch.randn(16, 128).bfloat16(), mx.quantize(torch.randn(16, 128), E2M1)
    assert perf.fp8_product(x, x.T) is None
    assert perf.dot_scaled_product(x, w.T) is None
    assert torch.equal(perf.bf16_product(x.float(), x.T.float())(), x @ x.T)


def test_the_rate_of_a_large_product_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mxkernels.perf.ceilings._LARGE", {"cpu": 64})
    ceilings = perf.Ceilings(CPU, seconds=0.0)
    assert ceilings.product_tflops("bf16") == ceilings.product_tflops("bf16") > 0
    with pytest.raises(ValueError, match="no FP8 products; allowed: bf16"):
        ceilings.product_tflops("FP8")


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(5, 136, 128), (300, 144, 256)])
def test_peers_multiply(shape: tuple[int, int, int]) -> None:
    """The three are products of their operands, so that their times mean something."""
    m, n, k = shape
    x, y = (torch.randint(-3, 4, (rows, k), device="cuda").bfloat16() for rows in (m, n))
    a, b = (mx.quantize(each, MXSpec("e2m1", scale_rounding="ceil")) for each in (x, y))
    expected = a.dequantize(torch.float32) @ b.dequantize(torch.float32).T
    assert torch.equal(perf.bf16_product(x, y.T)(), x @ y.T)
    fp8 = perf.fp8_product(a.dequantize(), b.dequantize().T)
    assert fp8 is None or torch.allclose(fp8().float(), expected, rtol=2**-7, atol=0.5)
    for left in (a, a.dequantize()):
        call = perf.dot_scaled_product(left, b.T)
        out = call.func.__self__.tensors["out_ptr"]
        out.fill_(torch.nan)
        call()
        assert torch.allclose(out.float(), expected, rtol=2**-7, atol=0.5)
    assert perf.dot_scaled_product(mx.quantize(x, E4M3), b.T) is None
    assert perf.dot_scaled_product(x[:, :64], mx.quantize(y[:, :64], E2M1).T) is None


def test_the_dot_scaled_kernel_compiles() -> None:
    """For every architecture; natively where there is that. (In a process of its own: here it may be interpreted.)"""
    pytest.importorskip("triton", reason="kernels need Triton")
    code = """
import torch
from mxkernels.perf.dot_scaled_kernel import dot_scaled_launch
from mxkernels.tune.aot import compile_launch

def empty(dtype, *shape):
    return torch.empty(shape, dtype=dtype, device="meta")

for m, architecture in ((1, "sm_90"), (64, "sm_90"), (512, "sm_90"), (512, "sm_100")):
    for a in (
        (empty(torch.bfloat16, m, 512), None),
        (empty(torch.uint8, m, 256), empty(torch.uint8, m, 16)),
    ):
        w = empty(torch.uint8, 512, 256), empty(torch.uint8, 512, 16)
        compiled = compile_launch(dot_scaled_launch(*a, *w, empty(torch.bfloat16, m, 512)), architecture)
        assert compiled.spilled_bytes == 0, (m, architecture)
        native = architecture == "sm_100" and a[1] is not None
        assert ("block_scale" in compiled.assembly) == native, (m, architecture)
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


# --- the recorded cases and the tables ----------------------------------------------------------------------


def test_the_recorded_cases_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kind of case that `make gpu` measures, at a small size on the CPU."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    monkeypatch.setattr("mxkernels.bench_products.time_host", functools.partial(time_host, samples=1))
    import products

    runner = ProductBench(CPU, seconds=0.0)
    for name, group in products.GROUPS.items():
        small = (dataclasses.replace(case, shape=(4, 8, 32), path="auto") for case in group())
        kinds = list(dict.fromkeys(small))
        rows = products.measure(name, runner, kinds[:2] if name == "products-overhead" else kinds)
        assert json.loads(report.render("json", {}, rows))["rows"] == rows
        assert all(set(SCHEMA) <= set(found) for found in rows)
        assert all(("host_us" in found) == (name == "products-overhead") for found in rows)


def test_the_recorded_cases_are_those_of_the_goals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import products

    cases = products.products()
    assert len(set(cases)) == len(cases)
    for shape in ((8192, 8192, 8192), (4096, 14336, 4096)):
        for element in ("e2m1", "e2m3"):
            starts = {case.timed_from for case in cases if case.shape == shape and case.b == MXSpec(element)}
            assert starts == {"folded", "codes", "plain"}
        blocks = {str(case.b.block) for case in cases if case.shape == shape and case.timed_from == "codes"}
        assert blocks == {"1x32", "4x4", "16x16"}
        m, n, k = shape
        for spec in (E2M1, MXSpec("e2m1", "4x4")):
            backward = {
                (case.shape, case.a_turned, case.b_turned) for case in cases if case.b == spec and case.b_turned
            }
            assert backward >= {((m, k, n), False, True), ((n, k, m), True, True)}
    for n, k in ((8192, 8192), (4096, 14336)):
        weights_only = {case.shape for case in cases if case.a == torch.bfloat16}
        assert {(m, n, k) for m in (1, 4, 16, 64, 256, 1024)} <= weights_only
    assert {case.b.element.name for case in cases if case.path == "wide"} == {"e2m1", "e4m3", "int8"}


def test_the_table_of_products(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Once recorded, a line a product; before, no figures."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import table

    recorded = tmp_path / "products.json"
    shown = dataclasses.replace(table.PRODUCTS, recorded=recorded)
    assert shown.text() == "Not recorded yet.\n\n"
    case = dataclasses.replace(product(), name="forward, x wᵀ")
    cases = (case, dataclasses.replace(case, name="dgrad, dy w"), product(torch.bfloat16))
    rows = [row(case) | {"median_us": 12.34, "tflops": 987.6, "vs_bf16": 1.5, "vs_fp8": None} for case in cases]
    environment = {"device": "a GPU", "torch": "2", "triton": "3"}
    recorded.write_text(json.dumps({"environment": environment, "rows": rows}))
    lines = shown.text().splitlines()
    assert lines[0].startswith("a GPU, PyTorch 2, Triton 3;")
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert cells[0] == ["product", "M x N x K", "from", "µs", "TFLOP/s", "times bf16", "times FP8"]
    assert cells[2:] == [
        ["e2m1 1x32 × e2m1 1x32, forward, x wᵀ", "6x40x96", "codes", "12.3", "988", "1.50", "–"],
        ["e2m1 1x32 × e2m1 1x32, dgrad, dy w", "6x40x96", "codes", "12.3", "988", "1.50", "–"],
        ["bfloat16 × e2m1 1x32", "6x40x96", "codes", "12.3", "988", "1.50", "–"],
    ]

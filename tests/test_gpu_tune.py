"""Configs on a GPU: they decide speed and never a byte; and what is looked up, in every situation that ops run in."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="kernels need Triton")

import torch
from invariance import CASTS, Case, check_bytes, check_order, gaussian, products_of, signs, streams_of
from tuned import entry, forget

import mxkernels as mx
from mxkernels import tune
from mxkernels.bench import Bench
from mxkernels.bench import Case as Measured
from mxkernels.tune import location

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda", 0)
EXACT, REAL = products_of(signs), products_of(gaussian)
FEW_EXACT, FEW_REAL = streams_of(signs), streams_of(gaussian)


# --- invariance --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASTS.values(), ids=CASTS)
def test_casts(case: Case) -> None:
    check_bytes(case, CUDA, (500, 0, 1050), count=10)
    check_bytes(case, CUDA, (304, 0, 1056), count=10)  # whose rows can be loaded in runs
    check_bytes(case, CUDA, (512, 0, 1024), count=20)  # which tiles in shared memory fill


@pytest.mark.parametrize("case", EXACT.values(), ids=EXACT)
def test_products_that_are_exact(case: Case) -> None:
    """The same bits under all configs."""
    check_bytes(case, CUDA, (520, 776, 2064), count=8)


@pytest.mark.parametrize("case", REAL.values(), ids=REAL)
def test_products(case: Case) -> None:
    """The same bits, where the sums are taken in the same order."""
    check_order(case, CUDA, (520, 776, 2064), count=8)


@pytest.mark.parametrize("case", FEW_EXACT.values(), ids=FEW_EXACT)
def test_products_of_few_rows_that_are_exact(case: Case) -> None:
    check_bytes(case, CUDA, (16, 776, 4224), count=8)


@pytest.mark.parametrize("case", FEW_REAL.values(), ids=FEW_REAL)
def test_products_of_few_rows(case: Case) -> None:
    check_order(case, CUDA, (16, 776, 4224), count=16)


# --- lookup ------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """An empty one, and no shipped tables."""
    monkeypatch.setenv(location.VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(location, "SHIPPED", tmp_path / "shipped")
    forget()
    yield tmp_path
    monkeypatch.undo()
    forget()


X = (300, 4096)
CONFIG = tune.CastConfig(2, 512, 1)  # which the rule does not choose


def tuned_quantize(x: torch.Tensor) -> None:
    """Store a config for quantising x."""
    with tune.recording() as seen:
        mx.quantize(x, mx.mxfp4)
    ((problem, choice),) = seen.items()
    assert choice.origin == "rule"
    assert choice.config != CONFIG
    tune.store({problem.key: entry(CONFIG)}, tune.Stamp.of(CUDA, problem.op))


def choices(call: object) -> set[tuple[str, tune.Config]]:
    with tune.recording() as seen:
        call()
    return {(choice.origin, choice.config) for choice in seen.values()}


def test_the_stamp() -> None:
    stamp = tune.Stamp.of(CUDA, "quantize")
    assert stamp.gpu == torch.cuda.get_device_name(CUDA)
    assert stamp.sm_count > 0
    assert stamp.triton[0].isdigit()


def test_what_was_stored_is_launched(cache: Path) -> None:
    """Also where the call has been made before, and its launch is remembered."""
    x = torch.randn(X, device=CUDA, dtype=torch.bfloat16)
    before = mx.quantize(x, mx.mxfp4)
    tuned_quantize(x)
    assert choices(lambda: mx.quantize(x, mx.mxfp4)) == {("cache", CONFIG)}
    with tune.pinned("quantize", tune.CastConfig(4, 1024, 4)):
        assert choices(lambda: mx.quantize(x, mx.mxfp4)) == {("pinned", tune.CastConfig(4, 1024, 4))}
    after = mx.quantize(x, mx.mxfp4)
    assert torch.equal(before.codes, after.codes)
    assert torch.equal(before.scale, after.scale)


def test_a_warm_call_asks_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mxkernels.ops import quantize_kernel

    x = torch.randn(X, device=CUDA, dtype=torch.bfloat16)
    mx.quantize(x, mx.mxfp4)
    monkeypatch.setattr(quantize_kernel, "find_config", None)
    mx.quantize(x, mx.mxfp4)


def test_within_a_graph_and_compiled(cache: Path) -> None:
    """A first lookup, which reads the table, while a graph is captured; and below torch.compile."""
    x = torch.randn(X, device=CUDA, dtype=torch.bfloat16)
    expected = mx.quantize(x, mx.mxfp4)
    tuned_quantize(x)
    mx.quantize(x, mx.mxfp4)  # compiles the kernel, which a capture may not
    forget()
    graph = torch.cuda.CUDAGraph()
    with tune.recording() as seen, torch.cuda.graph(graph):
        q = mx.quantize(x, mx.mxfp4)
    graph.replay()
    assert {choice.origin for choice in seen.values()} == {"cache"}
    assert torch.equal(q.codes, expected.codes)
    forget()
    compiled = torch.compile(lambda x: mx.quantize(x, mx.mxfp4).codes, fullgraph=True)
    with tune.recording() as seen:
        codes = compiled(x)
    assert {choice.origin for choice in seen.values()} == {"cache"}
    assert torch.equal(codes, expected.codes)


def test_explain_and_the_benchmark_name_the_origin(cache: Path) -> None:
    a = mx.quantize(torch.randn(512, 1024, device=CUDA, dtype=torch.bfloat16), mx.mxfp4)
    b = mx.quantize(torch.randn(768, 1024, device=CUDA, dtype=torch.bfloat16), mx.mxfp4)
    with tune.recording() as seen:
        mx.matmul(a, b.T)
    for problem, choice in seen.items():
        tune.store({problem.key: entry(choice.config)}, tune.Stamp.of(CUDA, problem.op))
    explained = mx.explain(a, b.T)
    assert explained.origin == "cache"
    assert "(origin: cache)" in str(explained)
    assert {origin for origin, _ in choices(lambda: mx.matmul(a, b.T))} == {"cache"}
    x = torch.randn(X, device=CUDA, dtype=torch.bfloat16)
    row = Bench(CUDA, seconds=0.01).row(Measured("quantize", mx.mxfp4, X))
    assert row["config_source"] == "rule"
    tuned_quantize(x)
    row = Bench(CUDA, seconds=0.01).row(Measured("quantize", mx.mxfp4, X))
    assert row["config_source"] == "cache"

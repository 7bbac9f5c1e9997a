"""Hopper's product: compiled ahead of time by every Triton that there is, and on the GPU within its bounds."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("triton", reason="kernels need Triton")

import torch
from ahead_of_time_hopper import BF16, CASES, E4M3, E5M2, FP16, FP32, Case
from tritons import FETCHED, compiled

from mxkernels import gpu
from mxkernels.ops.matmul_hopper_kernel import hopper_matmul_launch, hopper_serves
from mxkernels.ops.matmul_kernel import addend_shape
from mxkernels.ops.plan import Plan
from mxkernels.tune import HopperConfig, hopper_config, hopper_tile_config

CUDA = torch.device("cuda")
SHARED_BYTES = 232448  # what a program may have, by NVIDIA's table


# --- compiled ahead of time --------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["installed", *FETCHED])
def test_it_compiles_to_what_it_is_for(version: str) -> None:
    lines = compiled(version, "ahead_of_time_hopper.py").splitlines()
    found = {outcome["case"]: outcome for outcome in map(json.loads, lines)}
    assert found.keys() == {case.name for case in CASES}
    for case in CASES:
        outcome = found[case.name]
        assert outcome["triton"] == version or version == "installed"
        assert not outcome["error"], case.name
        assert outcome["spilled_bytes"] == 0, case.name
        assert outcome["shared_bytes"] <= SHARED_BYTES, case.name
        assert set(outcome["instructions"]) == {
            f"wgmma.mma_async.sync.aligned.{case.instruction}",
            "setmaxnreg.inc",
            "setmaxnreg.dec",
            "cp.async.bulk.tensor.2d.shared",
            "cp.async.bulk.tensor.2d.global",
        }, case.name


# --- what it serves, and how -------------------------------------------------------------------------------


def test_only_hopper_has_wgmma() -> None:
    assert [name for name, able in gpu.ARCHITECTURES.items() if able.wgmma] == ["sm_90"]


def test_rows_of_the_output_are_whole_16_bytes() -> None:
    assert hopper_serves(1, 8, 1, BF16)
    assert not hopper_serves(1, 4, 1, BF16)
    assert hopper_serves(1, 4, 1, FP32)
    assert not any(hopper_serves(*shape, BF16) for shape in ((0, 8, 8), (8, 0, 8), (8, 8, 0)))


@pytest.mark.parametrize(
    ("m", "n", "width"),
    [(8192, 8192, 256), (1024, 8192, 256), (512, 8192, 256), (256, 8192, 128), (128, 8192, 64), (1, 8, 64)],
)
def test_tiles_leave_little_of_the_gpu_idle(m: int, n: int, width: int) -> None:
    config = hopper_config(m, n, E5M2, BF16, processors=132)
    assert config.cols * config.pieces == width


@pytest.mark.parametrize("carrier", [E5M2, BF16], ids=str)
@pytest.mark.parametrize("out_dtype", [BF16, FP32], ids=str)
def test_a_promotion_group_fits_the_stages(carrier: torch.dtype, out_dtype: torch.dtype) -> None:
    for cols, pieces in ((128, 2), (128, 1), (64, 1)):
        config = hopper_tile_config(cols, pieces, carrier, out_dtype)
        assert 2 <= max(config.promote, 2) <= config.stages
        assert config.promote * 128 <= 512


# --- on the GPU --------------------------------------------------------------------------------------------

on_hopper = pytest.mark.skipif(
    not (torch.cuda.is_available() and gpu.device_capabilities(CUDA).wgmma), reason="the GPU is no Hopper"
)
SHAPES = ((200, 328, 1040), (128, 256, 128), (1, 8, 16), (3000, 5000, 2063), (257, 1000, 8192))


def carrier(rows: int, k: int, dtype: torch.dtype, binades: int = 4) -> torch.Tensor:
    """Random E2M1 values times powers of two over some binades, in rows of whole 16 bytes, NaN beyond K."""
    levels = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], device=CUDA)
    x = levels[torch.randint(8, (rows, k), device=CUDA)] * (1 - 2 * torch.randint(2, (rows, k), device=CUDA))
    padded = torch.full((rows, (k + 15) // 16 * 16), torch.nan, device=CUDA).to(dtype)
    padded[:, :k] = (x * 2.0 ** -torch.randint(binades, (rows, k), device=CUDA)).to(dtype)
    return padded


def reference(size: int, low: int, high: int) -> torch.Tensor:
    return torch.randint(low, high + 1, (size,), dtype=torch.uint8, device=CUDA)


def multiply(
    a: torch.Tensor, b: torch.Tensor, k: int, references: tuple[torch.Tensor, torch.Tensor] | None, rows: int,
    bias: torch.Tensor | None, out: torch.Tensor, config: HopperConfig, addend: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    hopper_matmul_launch(a, b, k, references, (rows, rows), bias, out, config, addend=addend).run(CUDA)
    return out


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_products(case: Case) -> None:
    torch.manual_seed(0)
    config = hopper_tile_config(case.cols, case.pieces, case.a, case.out)
    for m, n, k in SHAPES:
        rows = 4 if case.bias else 1
        a, b = carrier(m, k, case.a), carrier(n, k, case.b)
        x, y = a[:, :k].double(), b[:, :k].double()
        references = None
        if case.a.itemsize == 1:
            references = reference(-(-m // rows), 120, 128), reference(-(-n // rows), 120, 128)
            x *= 2.0 ** (references[0].double().repeat_interleave(rows)[:m, None] - 127)
            y *= 2.0 ** (references[1].double().repeat_interleave(rows)[:n, None] - 127)
        bias = torch.randn(n, device=CUDA).to(case.out) if case.bias else None
        expected, magnitude = x @ y.T, x.abs() @ y.abs().T
        if bias is not None:
            expected, magnitude = expected + bias.double(), magnitude + bias.double().abs()
        addend = None
        if case.addend:
            addend = torch.full(addend_shape(m, n), torch.nan, device=CUDA)
            addend[:m, :n] = torch.randn(m, n, device=CUDA)
            expected, magnitude = expected + addend[:m, :n].double(), magnitude + addend[:m, :n].double().abs()

        wider = torch.full((m, n + 8), 7, dtype=case.out, device=CUDA)
        out = multiply(a, b, k, references, rows, bias, wider[:, :n], config, addend)
        assert bool((wider[:, n:] == 7).all()), "written beyond the output"
        # Of FP8 the contract allows more; this is what signed data lose.
        allowed = magnitude * (1e-4 if references else k * 2.0**-24)
        allowed += expected.abs() * torch.finfo(case.out).eps / 2 + 2.0**-24
        assert bool(((out.double() - expected).abs() <= allowed).all()), (m, n, k)
        for _ in range(5):
            again = multiply(a, b, k, references, rows, bias, torch.empty_like(wider)[:, :n], config, addend)
            assert torch.equal(again, out), "two runs differ"


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("tile", [(128, 2), (128, 1), (64, 1)], ids=str)
def test_small_integers_are_exact_and_exponents_are_added_before_they_are_applied(tile: tuple[int, int]) -> None:
    torch.manual_seed(0)
    m, n, k = 300, 520, 512
    a, b = carrier(m, k, E5M2, binades=1), carrier(n, k, E5M2, binades=1)
    a.view(torch.uint8)[:, 64:] = 0
    expected = (a.double() @ b.double().T).to(BF16).double()
    for low, high in ((254, 0), (0, 254), (127, 127), (254, 1)):
        references = reference(m, low, low), reference(n, high, high)
        out = torch.empty((m, n), dtype=BF16, device=CUDA)
        multiply(a, b, k, references, 1, None, out, hopper_tile_config(*tile, E5M2, BF16))
        assert torch.equal(out.double(), expected * 2.0 ** (low + high - 254))


@pytest.mark.gpu
@on_hopper
def test_a_recorded_launch_moves_to_other_buffers() -> None:
    torch.manual_seed(0)
    m, n, k = 256, 512, 384
    plan = None
    outs = []
    for _ in range(2):
        a, b = carrier(m, k, E5M2), carrier(n, k, E4M3)
        references = reference(m, 120, 128), reference(n, 120, 128)
        out = torch.empty((m, n), dtype=FP16, device=CUDA)
        inputs = [a, b, *references, out]
        if plan is None:
            plan = Plan(a.device, inputs)
            plan.launch(hopper_matmul_launch(a, b, k, references, (1, 1), None, out))
            plan.finish([])
        else:
            plan.replay(inputs, [each.data_ptr() for each in inputs])
        fresh = torch.empty_like(out)
        hopper_matmul_launch(a, b, k, references, (1, 1), None, fresh).run(CUDA)
        assert torch.equal(out, fresh)
        outs.append(out)
    assert not torch.equal(*outs)

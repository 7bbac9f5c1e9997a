"""Prepared weights put back in order: the kernel against the reference, and as torch's machinery sees the op."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="kernels need Triton")

import torch
from poisoned import assert_guards_hold, poisoned
from tritons import run_with

import mxkernels as mx
from mxkernels.ops.restore_kernel import restore_launch
from mxkernels.prepared import prepare

CPU = torch.device("cpu")
SHAPES = [(128, 512), (130, 256), (7, 322), (1, 1)]  # tiles of 4, 2 and 1 groups; whole and not


def prepared(n: int, k: int, spec: mx.MXSpec, largest: float) -> tuple[mx.MXTensor, mx.PreparedTensor]:
    """Any codes, with scales that are joined to the elements' or, where they are large, not; and a block of NaN."""
    x = torch.randn(n, k, generator=torch.Generator().manual_seed(n + k)) * largest
    x[-1, :129] = torch.nan
    x[0, :] = largest
    q = mx.quantize(x, spec)
    return q, prepare(q)


@pytest.mark.interpreter
@pytest.mark.parametrize("largest", [1.0, 1e6])
@pytest.mark.parametrize("block", ["1x16", "1x32", "1x128"])
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_the_kernel(n: int, k: int, block: str, largest: float) -> None:
    q, w = prepared(n, k, mx.MXSpec("e2m1", block), largest)
    bands, groups, rows, blocks = w.scale.shape
    codes = poisoned((bands * rows, groups * 64), torch.uint8, CPU)
    scale = poisoned((bands * rows, groups * blocks), torch.uint8, CPU)
    restore_launch(w.codes, w.scale, w.added, codes, scale).run(CPU)
    for out, expected in ((codes, q.codes), (scale, q.scale)):
        assert_guards_hold(out)
        assert torch.equal(out[:n, : expected.shape[1]], expected)


@pytest.mark.parametrize("largest", [1.0, 1e6])
@pytest.mark.parametrize("name", ["e2m1", "e3m0", "int4"])
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_the_op(n: int, k: int, name: str, largest: float) -> None:
    q, w = prepared(n, k, mx.MXSpec(name), largest)
    joined = {"e2m1": 126, "e3m0": 124, "int4": 0}[name]
    assert w.added == (joined if largest == 1.0 else 0)
    for found in (w.restore(), w.T.restore().T):
        assert found.spec == q.spec
        assert torch.equal(found.codes, q.codes)
        assert torch.equal(found.scale, q.scale)


def test_opcheck() -> None:
    for n, k in SHAPES:
        w = prepared(n, k, mx.mxfp4, 1.0)[1]
        torch.library.opcheck(torch.ops.mxkernels.restore, (w.codes, w.scale, w.added, n, k))


COMPILE = """
import re, sys, torch, triton
from mxkernels.ops.restore_kernel import restore_launch
from mxkernels.tune.aot import compile_launch

for architecture in ("sm_90", "gfx950"):
    for groups, blocks in ((64, 4), (7, 1)):
        held = [torch.empty(64, groups, 128, width, dtype=torch.uint8, device="meta") for width in (64, blocks)]
        out = [torch.empty(8192, groups * width, dtype=torch.uint8, device="meta") for width in (64, blocks)]
        found = compile_launch(restore_launch(*held, 126, *out), architecture)
        assert found.spilled_bytes == 0, architecture
        if architecture == "sm_90" and groups == 64:  # 16 bytes at a time, read and written
            for access in ("ld", "st"):
                assert len(re.findall(access + r"\\.global\\.v4\\.b32", found.assembly)) == 4, architecture
print(triton.__version__)
"""


@pytest.mark.parametrize("version", ["installed", "3.6.0"])
def test_compiles_ahead_of_time(version: str) -> None:
    done = run_with(version, "-c", COMPILE)
    assert done.returncode == 0, done.stderr[-3000:]
    assert version in ("installed", done.stdout.strip())

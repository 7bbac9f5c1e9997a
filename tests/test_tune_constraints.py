"""What configs must fulfil, the rule fulfils for every problem."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys

import pytest
import torch

from mxkernels import gpu, tune
from mxkernels.formats import FORMATS
from mxkernels.spec import MXSpec
from mxkernels.tune.constraints import stream_bytes
from mxkernels.tune.limits import Limits

BLOCKS = ("1x2", "2x1", "1x16", "1x32", "1x128", "32x1", "128x1", "4x4", "16x16", "128x128")
MATRICES = ((1, 1), (3, 5), (100, 7), (7, 4096), (4096, 33), (256, 384), (16384, 16384), (1, 100000))


def assert_serves(problem: tune.Problem, config: tune.Config) -> None:
    assert tune.obstacle(problem, config) is None, (problem, config)
    assert tune.Problem.of_key(problem.key).key == problem.key


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("name", FORMATS)
def test_casts(name: str, block: str) -> None:
    for (rows, cols), rounding, symmetric in itertools.product(MATRICES, ("rtne", "stochastic"), (True, False)):
        spec = MXSpec(name, block, rounding, "even", symmetric)
        for dtype, contiguous, pair in itertools.product((torch.bfloat16, torch.float32), (True, False), (True, False)):
            op, layout = "quantize_pair" if pair else "quantize", "rows" if contiguous else "columns"
            problem = tune.Problem.of(op, spec, dtype, layout, rows, cols)
            assert_serves(problem, tune.quantize_config(spec, rows, cols, dtype.itemsize, contiguous, pair))
            if pair:
                for architecture in ("sm_80", "sm_90", "gfx950"):
                    able = gpu.capabilities(architecture)
                    config = tune.quantize_pair_config(spec, rows, cols, dtype.itemsize, contiguous, able)
                    assert_serves(problem, config)
                    if isinstance(config, tune.PairConfig):
                        assert able.ptx
                        assert rows % config.tile_rows == cols % config.tile_cols == 0
        problem = tune.Problem.of("dequantize", spec, torch.bfloat16, "rows", rows, cols)
        assert_serves(problem, tune.dequantize_config(spec, rows, cols))
        for layout in ("straight", "turned"):
            problem = tune.Problem.of("fold", spec, torch.float8_e5m2, layout, rows, cols)
            assert_serves(problem, tune.fold_config(spec, rows, cols, layout == "turned"))
        for dtype in (torch.bfloat16, torch.float32):
            config = tune.quantize_fold_config(spec, cols, dtype.itemsize)
            if config is not None:
                assert_serves(tune.Problem.of("quantize_fold", spec, dtype, "rows", rows, cols), config)


PRODUCTS = list(
    itertools.product((1, 16, 64, 65, 256, 300, 4096), (1, 16, 100, 8192, 28672), (16, 100, 512, 8192, 65536))
)


@pytest.mark.parametrize("shape", PRODUCTS, ids=str)
def test_products(shape: tuple[int, int, int]) -> None:
    m, n, k = shape
    for out, carrier, processors in itertools.product(
        (torch.bfloat16, torch.float32), (torch.float8_e5m2, torch.bfloat16, torch.float32), (None, 16, 132)
    ):
        kinds = f"{tune.dtype_name(carrier)} * {tune.dtype_name(carrier)}"
        problem = tune.Problem.of("multiply", kinds, out, "straight * straight", m, n, k)
        limits = Limits("sm_90", processors or 132)
        assert_serves(problem, tune.carrier_config(m, n, k, carrier, out, processors is not None, limits))
    decoding = tune.Problem("decode_multiply", "plain * plain", "bfloat16", "parts", shape)
    for exact in (True, False):
        assert_serves(decoding, tune.wide_matmul_config(m, n, k, exact))
    if m <= 64:
        stream = tune.Problem("stream", "e2m1 1x32 rtne even symmetric", "bfloat16", "stored", shape)
        assert_serves(stream, tune.small_matmul_config(m, n, k))


def test_block_scaled_products() -> None:
    pytest.importorskip("triton", reason="the rule stands beside its kernel")
    from mxkernels.ops.matmul_native_kernel import native_config

    for a, b, swizzled, shared_bytes in itertools.product(
        ("e2m1", "e4m3", "e5m2"), ("e2m1", "e4m3"), (True, False), (101376, 232448)
    ):
        config = native_config(FORMATS[a], FORMATS[b], swizzled, shared_bytes)
        layout = "swizzled" if swizzled else "plain"
        problem = tune.Problem("native", f"{a} * {b}", "bfloat16", layout, (8192, 8192, 8192))
        assert_serves(problem, config)
        if swizzled and shared_bytes == 232448:
            assert tune.obstacle(problem, config, shared_bytes) is None


# The shared memory of the kernel for few rows, as compiled: the values of a config on an architecture.
SHARED = """
import json, sys
from mxkernels.tune import Problem, SmallMatmulConfig
from mxkernels.tune.aot import compile_launch
from mxkernels.tune.limits import Limits
from mxkernels.workloads import META, workload

for architecture, key, values in json.loads(sys.argv[1]):
    launch = workload(Problem.of_key(key), META, Limits(architecture)).launches(SmallMatmulConfig(*values))[0]
    print(compile_launch(launch, architecture).shared_bytes)
"""


def stream(m: int, spec: str = "e2m1 1x32", layout: str = "prepared") -> tune.Problem:
    return tune.Problem("stream", f"{spec} rtne even symmetric", "bfloat16", layout, (m, 1024, 2048))


def test_the_shared_memory_of_products_of_few_rows() -> None:
    """On Hopper exactly what is reckoned; on others no less."""
    pytest.importorskip("triton", reason="kernels need Triton")
    cases = [
        ("sm_90", stream(16), tune.SmallMatmulConfig(128, 128, 2, 4, 3)),
        ("sm_90", stream(64), tune.SmallMatmulConfig(128, 128, 2, 4, 4)),
        (
            "sm_90",
            stream(16, "e2m1 1x128", "stored"),
            tune.SmallMatmulConfig(64, 128, 2, 4, 3),
        ),  # too few scale bytes to stage
        ("sm_90", stream(32, "int4 1x16", "stored"), tune.SmallMatmulConfig(128, 256, 2, 8, 2)),
        ("sm_90", stream(64), tune.SmallMatmulConfig(256, 256, 2, 8, 5)),  # more than there is
        ("sm_80", stream(16), tune.SmallMatmulConfig(128, 128, 2, 4, 3)),
        ("sm_120", stream(64, "int4 1x16", "stored"), tune.SmallMatmulConfig(64, 128, 2, 4, 2)),
    ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    environment.pop("TRITON_INTERPRET", None)
    requests = [(architecture, problem.key, list(vars(config).values())) for architecture, problem, config in cases]
    done = subprocess.run(
        [sys.executable, "-c", SHARED, json.dumps(requests)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = map(int, done.stdout.split())
    for (architecture, problem, config), compiled in zip(cases, found, strict=True):
        least = stream_bytes(problem, config)
        assert compiled == least if architecture == "sm_90" else compiled >= least, (architecture, problem, config)
        assert (tune.obstacle(problem, config, 232448) is None) == (least <= 232448)
    assert "its stages take 303104 bytes; allowed: 232448" in (tune.obstacle(*cases[4][1:], 232448) or "")

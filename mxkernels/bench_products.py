"""The runner of `bench` for matrix products: a case in, a row of measurements out. It prints nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import log10, sqrt
from typing import Any

import torch

from .bench import DTYPE_NAMES, config_source
from .environment import device_name
from .folded import FoldedTensor, folded_spec
from .ops import explain, fold, matmul, quantize
from .perf import Ceilings, Timing, bf16_product, dot_scaled_product, fp8_product, time_call, time_host
from .prepared import MAX_ROWS, PreparedTensor, preparable, prepare
from .spec import MXSpec
from .tensor import MXTensor

Source = MXSpec | torch.dtype
Codes = torch.Tensor | MXTensor
Operand = Codes | FoldedTensor
Weights = Operand | PreparedTensor

TIMED_FROM = ("folded", "codes", "plain", "prepared")
PROMOTION = 512  # G in the contract's bound of the FP8 path
_CHUNK = 1 << 24  # elements of the output whose errors are found at once, in float64


@dataclass(frozen=True)
class ProductCase:
    """A product `[M, K] x [K, N]` to measure, of activations a and weights b.

    Attributes:
        shape: M, N, K.
        a: the spec that the activations are quantised to; or bfloat16 or float16, and they stay plain.
        b: the spec of the weights. The blocks of both are those of matrices `[M, K]` and `[N, K]`.
        timed_from: `"folded"`, operands that are folded; `"codes"`, stored codes; `"plain"`, plain operands, which
            are both quantised in the call; `"prepared"`, plain activations and weights prepared for few rows.
        dtype: of the plain operands.
        a_turned, b_turned: the plain operand lies as `[K, M]` (`[K, N]`). If its block is square it is quantised
            as it lies, since that copy serves other products too; else it is quantised through its transpose.
        path: that `matmul` is to take.
        name: what the product is for.
    """

    shape: tuple[int, int, int]
    a: Source
    b: MXSpec
    timed_from: str
    dtype: torch.dtype = torch.bfloat16
    a_turned: bool = False
    b_turned: bool = False
    path: str = "auto"
    name: str = ""

    def __str__(self) -> str:
        return f"matmul {source_name(self.a)} x {self.b} {'x'.join(map(str, self.shape))} {self.timed_from}"


def timings(a: Source, b: MXSpec, m: int) -> tuple[str, ...]:
    """Which of `TIMED_FROM` a product with m rows of activations has. Weights beside plain activations are quantised
    once, not in the call."""
    if isinstance(a, torch.dtype):
        few = m <= MAX_ROWS and a == torch.bfloat16 and preparable(b)
        return ("codes", "prepared") if few else ("codes",)
    return ("folded", "codes", "plain") if folded_spec(a) and folded_spec(b) else ("codes", "plain")


def source_name(source: Source) -> str:
    """`"bfloat16"`, or a spec's text."""
    return str(source).removeprefix("torch.")


@dataclass(frozen=True)
class _Work:
    """A case made ready. Operands are `[M, K]` and `[K, N]`: plain, quantised, and as the product gets them."""

    plain: tuple[torch.Tensor, torch.Tensor]
    codes: tuple[Codes, Codes]
    operands: tuple[Operand, Weights]
    call: Callable[[], object]


class ProductBench:
    """Measures products on one device.

    Args:
        device: the CPU (through the reference) or a GPU (through Triton).
        seed: of the Gaussian data and of stochastic rounding.
        seconds: about how long each call is timed.
    """

    def __init__(self, device: torch.device, seed: int = 0, seconds: float = 0.3) -> None:
        self.device = device
        self.seed = seed
        self.seconds = seconds
        self.ceilings = Ceilings(device, seconds)

    def row(self, case: ProductCase) -> dict[str, Any]:
        """Measure one case: a row of the recorded schema, JSON values only.

        The product in bfloat16 is timed just before and just after, since clocks drift; `vs_bf16` takes their mean,
        and 2 means twice as fast. `vs_fp8` and `vs_dot_scaled` are None where there is no such product. The
        limit is a copy that reads the operands and writes the output, or the rate of a large product by torch
        (FP8, or bf16 for the path that multiplies in it), whichever takes longer. The errors are those of the
        output in fp32: `rmse` and `sqnr_db` against the product of the plain operands, `share_of_bound` the
        largest against that of the decoded ones, as a share of the contract's bound.
        """
        m, n, k = case.shape
        work = self._prepare(case)
        explained = explain(*work.operands, path=case.path)
        rmse, sqnr_db, share_of_bound = self._errors(case, work, explained.path)

        bf16 = bf16_product(*work.plain)
        bf16_before = self._time(bf16).median_us
        timing = self._time(work.call)
        bf16_after = self._time(bf16).median_us
        bf16_us = (bf16_before + bf16_after) / 2
        peers_us = {
            name: call and self._time(call).median_us
            for name, call in (
                ("fp8", fp8_product(*work.plain)),
                ("dot_scaled", dot_scaled_product(*work.codes)),
            )
        }
        read = work.plain if case.timed_from == "plain" else work.operands
        limit, limit_us = self._limit(case, explained.path, _bytes(read))
        stored_bytes = _bytes(work.codes if case.timed_from == "plain" else work.operands)
        bytes_bf16, bytes_fp8 = 2 * (m + n) * k, (m + n) * (k + 4)
        return {
            "op": "matmul",
            "fmt": case.b.element.name,
            "block": str(case.b.block),
            "rounding": case.b.rounding,
            "scale_rounding": case.b.scale_rounding,
            "symmetric": case.b.symmetric,
            "activations": source_name(case.a),
            "shape": list(case.shape),
            "dtype": DTYPE_NAMES[case.dtype],
            "a_turned": case.a_turned,
            "b_turned": case.b_turned,
            "timed_from": case.timed_from,
            "name": case.name,
            "device": device_name(self.device),
            "median_us": timing.median_us,
            "p10_us": timing.p10_us,
            "p90_us": timing.p90_us,
            "samples": len(timing.samples_us),
            "tflops": 2 * m * n * k / timing.median_us / 1e6,
            "fraction_of_limit": limit_us / timing.median_us,
            "limit": limit,
            "limit_us": limit_us,
            "bf16_before_us": bf16_before,
            "bf16_after_us": bf16_after,
            "vs_bf16": bf16_us / timing.median_us,
            **{f"{name}_us": us for name, us in peers_us.items()},
            **{f"vs_{name}": us and us / timing.median_us for name, us in peers_us.items()},
            "bytes": stored_bytes,
            "bytes_bf16": bytes_bf16,
            "bytes_fp8": bytes_fp8,
            "vs_bf16_bytes": bytes_bf16 / stored_bytes,
            "vs_fp8_bytes": bytes_fp8 / stored_bytes,
            "rmse": rmse,
            "sqnr_db": sqnr_db,
            "share_of_bound": share_of_bound,
            "path": explained.path,
            "instruction": explained.instruction,
            "config": explained.config and str(explained.config),
            "config_source": config_source(work.call),
        }

    def host(self, case: ProductCase) -> Timing:
        """How long the host is busy with one call, the device not waited for."""
        return time_host(self._prepare(case).call, self.device)

    def _time(self, call: Callable[[], object]) -> Timing:
        return time_call(call, self.device, self.seconds)

    def _prepare(self, case: ProductCase) -> _Work:
        m, n, k = case.shape
        x, w = self._data(m, k, case.a_turned, case.dtype, 0), self._data(n, k, case.b_turned, case.dtype, 1)
        seeds = [torch.tensor([self.seed + side], device=self.device) for side in range(2)]

        def quantised() -> tuple[Codes, Codes]:
            return _quantised(x, case.a, case.a_turned, seeds[0]), _quantised(w, case.b, case.b_turned, seeds[1]).T

        plain, codes = (x, w.T), quantised()
        if case.timed_from == "plain":
            if explain(*codes, path=case.path).path != "fp8":
                return _Work(plain, codes, codes, lambda: matmul(*quantised(), path=case.path))

            def folded() -> tuple[Operand, Operand]:
                a = _from_plain(x, case.a, case.a_turned, seeds[0])
                return a, _from_plain(w, case.b, case.b_turned, seeds[1]).T

            return _Work(plain, codes, codes, lambda: matmul(*folded(), path=case.path))
        operands: tuple[Operand, Weights] = codes
        if case.timed_from == "folded":
            operands = (_folded(codes[0]), _folded(codes[1].T).T)
        elif case.timed_from == "prepared":
            operands = (codes[0], _prepared(codes[1].T).T)
        return _Work(plain, codes, operands, lambda: matmul(*operands, path=case.path))

    def _data(self, rows: int, k: int, turned: bool, dtype: torch.dtype, side: int) -> torch.Tensor:
        """Gaussian values `[rows, K]`; the same for the same seed."""
        generator = torch.Generator(self.device).manual_seed(2 * self.seed + side)
        shape = (k, rows) if turned else (rows, k)
        x = torch.randn(shape, dtype=dtype, device=self.device, generator=generator)
        return x.T if turned else x

    def _limit(self, case: ProductCase, path: str, read_bytes: int) -> tuple[str, float]:
        """What limits a product, and the microseconds that it needs at least."""
        m, n, k = case.shape
        copy_us = self.ceilings.copy(read_bytes, 2 * m * n).timing.median_us
        kind = "FP8" if path in ("fp8", "native") else "bf16"
        product_us = 2 * m * n * k / self.ceilings.product_tflops(kind) / 1e6
        return max(("copy", copy_us), (f"{kind} product", product_us), key=lambda limit: limit[1])

    def _errors(self, case: ProductCase, work: _Work, path: str) -> tuple[float, float | None, float]:
        out = matmul(*work.operands, out_dtype=torch.float32, path=case.path)
        k = case.shape[2]
        factor = 33 * PROMOTION / 32 * 2.0**-13 if path == "fp8" else k * 2.0**-24
        x, w = work.plain
        a, b = (_decoded(operand) for operand in work.operands)
        a_size, b_size = (_magnitude(operand) for operand in work.operands)
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)  # noise, signal
        worst = sums.new_zeros(())
        w64, rows = w.double(), max(_CHUNK // case.shape[1], 1)
        for part in (slice(start, start + rows) for start in range(0, case.shape[0], rows)):
            original, found = x[part].double() @ w64, out[part].double()
            sums += torch.stack([(found - original).square().sum(), original.square().sum()])
            bound = factor * (a_size[part] @ b_size) + k * 2.0**-149
            worst = torch.maximum(worst, ((found - a[part] @ b).abs() / bound).max())
        noise, signal = sums.tolist()
        sqnr_db = 10 * log10(signal / noise) if noise and signal else None
        return sqrt(noise / out.numel()), sqnr_db, worst.item()


def _quantised(x: torch.Tensor, source: Source, turned: bool, seed: torch.Tensor) -> Codes:
    """The operand `[rows, K]` made of a plain one."""
    if isinstance(source, torch.dtype):
        return x.to(source)
    random = seed if source.stochastic else None
    if turned and source == source.T:
        return quantize(x.T, source, random).T
    return quantize(x, source, random)


def _from_plain(x: torch.Tensor, source: Source, turned: bool, seed: torch.Tensor) -> Operand:
    """The operand `[rows, K]` for the FP8 path: folded as it is quantised, if it folds and its copy serves no other
    product."""
    if isinstance(source, torch.dtype) or folded_spec(source) is None or (turned and source == source.T):
        return _quantised(x, source, turned, seed)
    return fold(x, source, seed if source.stochastic else None)


def _folded(operand: Codes) -> FoldedTensor:
    if not isinstance(operand, MXTensor):
        raise ValueError("a is plain, which does not fold; allowed: timed_from='codes'")
    return fold(operand)


def _prepared(weights: Codes) -> PreparedTensor:
    if not isinstance(weights, MXTensor):
        raise ValueError("b is plain; allowed with timed_from='prepared': an MXSpec")
    return prepare(weights)


def _bytes(operands: tuple[Operand, Weights]) -> int:
    return sum(operand.nbytes for operand in operands)


def _decoded(operand: Weights) -> torch.Tensor:
    return operand.double() if isinstance(operand, torch.Tensor) else operand.dequantize(torch.float32).double()


def _magnitude(operand: Weights) -> torch.Tensor:
    """|a| of the contract's bound: for an asymmetric operand, |S q| + |O|."""
    if not isinstance(operand, MXTensor) or operand.spec.symmetric:
        return _decoded(operand).abs()
    if operand.transposed:
        return _magnitude(operand.T).T
    codes, scale, offset, spec, shape = operand.codes, operand.scale, operand.offset, operand.spec, operand.shape
    elements = MXTensor(codes, scale, None, replace(spec, symmetric=True), shape)
    offsets = MXTensor(torch.zeros_like(codes), scale, offset, spec, shape)
    return _decoded(elements).abs() + _decoded(offsets).abs()

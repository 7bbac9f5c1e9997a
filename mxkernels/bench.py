"""The benchmark's runner: a case in, a row of measurements out. It prints nothing and parses nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import log10, prod, sqrt
from typing import Any

import torch

from .environment import device_name
from .ops import dequantize, quantize, quantize_pair
from .perf import Ceilings, Timing, time_call, time_host
from .spec import MXSpec
from .tensor import MXTensor
from .tune import recording

OPS = ("quantize", "dequantize", "quantize_pair")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ERROR_CHUNK = 1 << 24  # elements that the error is summed over at once, in float64

_PATHS = {"cuda": "triton", "cpu": "reference"}  # what serves each device type


@dataclass(frozen=True)
class Case:
    """What to measure.

    Attributes:
        op: one of `OPS`. `quantize_pair` writes both orientations, and its bytes are those of both.
        spec: element format, block, roundings, symmetry.
        shape: of the tensor that is quantised, or comes out of dequantising.
        dtype: of that tensor.
        transposed: the tensor is the transpose of a row-major matrix (two dimensions only).
        name: where the shape is from, such as `llama3-8b qkv`.
    """

    op: str
    spec: MXSpec
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.bfloat16
    transposed: bool = False
    name: str = ""

    def __str__(self) -> str:
        return f"{self.op} {self.spec} {'x'.join(map(str, self.shape))}"


@dataclass(frozen=True)
class _Work:
    """A case made ready: the call that is timed, and what it moves and stores."""

    call: Callable[[], object]
    read_bytes: int
    written_bytes: int
    stored_bytes: int
    copies: int


class Bench:
    """Measures cases on one device.

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

    def row(self, case: Case, x: torch.Tensor | None = None) -> dict[str, Any]:
        """Measure one case: a row of the recorded schema, JSON values only.

        Args:
            case: what.
            x: the tensor, on `device`, of the case's shape and dtype; None draws Gaussian values.

        The traffic (`gbps`) is what the op must read and write; the stored bytes are codes, scales and offsets;
        against them stand bf16 at 2 bytes an element and FP8 at 1 with an fp32 scale a row. The error is that of
        decoding to fp32, summed in float64, over the elements that are finite before and after (`nonfinite`
        counts the others); `sqnr_db` is None where there is no error, or no signal.
        """
        x = self.data(case) if x is None else x
        seed = torch.tensor([self.seed], device=self.device) if case.spec.stochastic else None
        q = quantize(x, case.spec, seed)
        work = _prepare(case, x, q, seed)
        rmse, sqnr_db, nonfinite = error(x, q)
        timing = time_call(work.call, self.device, self.seconds)
        ceiling = self.ceilings.copy(work.read_bytes, work.written_bytes)
        traffic = work.read_bytes + work.written_bytes
        gbps = traffic / timing.median_us / 1e3
        bytes_bf16 = 2 * x.numel() * work.copies
        bytes_fp8 = (x.numel() + 4 * prod(x.shape[:-1])) * work.copies
        return {
            "op": case.op,
            "fmt": case.spec.element.name,
            "block": str(case.spec.block),
            "rounding": case.spec.rounding,
            "scale_rounding": case.spec.scale_rounding,
            "symmetric": case.spec.symmetric,
            "shape": list(case.shape),
            "dtype": DTYPE_NAMES[case.dtype],
            "transposed": case.transposed,
            "name": case.name,
            "device": device_name(self.device),
            "median_us": timing.median_us,
            "p10_us": timing.p10_us,
            "p90_us": timing.p90_us,
            "samples": len(timing.samples_us),
            "gbps": gbps,
            "fraction_of_limit": gbps / ceiling.gbps,
            "limit": ceiling.name,
            "limit_gbps": ceiling.gbps,
            "traffic_bytes": traffic,
            "bytes": work.stored_bytes,
            "bytes_bf16": bytes_bf16,
            "bytes_fp8": bytes_fp8,
            "vs_bf16_bytes": bytes_bf16 / work.stored_bytes,
            "vs_fp8_bytes": bytes_fp8 / work.stored_bytes,
            "rmse": rmse,
            "sqnr_db": sqnr_db,
            "nonfinite": nonfinite,
            "path": _PATHS[self.device.type],
            "config_source": config_source(work.call),
        }

    def host(self, case: Case) -> Timing:
        """How long the host is busy with one call of the op, the device not waited for."""
        x = self.data(case)
        seed = torch.tensor([self.seed], device=self.device) if case.spec.stochastic else None
        return time_host(_prepare(case, x, quantize(x, case.spec, seed), seed).call, self.device)

    def data(self, case: Case) -> torch.Tensor:
        """Gaussian values of the case's shape, dtype and layout; the same for the same seed."""
        shape = case.shape[::-1] if case.transposed else case.shape
        generator = torch.Generator(self.device).manual_seed(self.seed)
        x = torch.randn(shape, dtype=case.dtype, device=self.device, generator=generator)
        return x.T if case.transposed else x


def _prepare(case: Case, x: torch.Tensor, q: MXTensor, seed: torch.Tensor | None) -> _Work:
    if case.op == "quantize":
        return _Work(lambda: quantize(x, case.spec, seed), x.nbytes, q.nbytes, q.nbytes, 1)
    if case.op == "dequantize":
        return _Work(lambda: dequantize(q, case.dtype), q.nbytes, x.nbytes, q.nbytes, 1)
    if case.op == "quantize_pair":
        stored = sum(copy.nbytes for copy in quantize_pair(x, case.spec, seed))
        return _Work(lambda: quantize_pair(x, case.spec, seed), x.nbytes, stored, stored, 2)
    raise ValueError(f"op is {case.op!r}; allowed: {', '.join(OPS)}")


def config_source(call: Callable[[], object]) -> str:
    """Where the configs of a call's launches come from, as `tune.Choice` says it, those of the first launches first:
    `cache`, or `shipped + rule`. Of a call that launches nothing it is the reference."""
    with recording() as seen:
        call()
    return " + ".join(dict.fromkeys(choice.origin for choice in seen.values())) or "reference"


def error(x: torch.Tensor, q: MXTensor) -> tuple[float | None, float | None, int]:
    """Root mean square error and signal to noise in dB of `q` against `x`, and how many elements are left out
    because they are not finite in one of them. None where there is nothing to say it of."""
    before = x.reshape(-1).split(_ERROR_CHUNK)
    after = dequantize(q, torch.float32).reshape(-1).split(_ERROR_CHUNK)
    sums = torch.zeros(3, dtype=torch.float64, device=x.device)  # noise, signal, elements
    for original, decoded in zip(before, after, strict=True):
        finite = original.isfinite() & decoded.isfinite()
        signal = original.double().masked_fill(~finite, 0.0)
        noise = decoded.double().masked_fill(~finite, 0.0) - signal
        sums += torch.stack([noise.square().sum(), signal.square().sum(), finite.sum().double()])
    noise_sum, signal_sum, counted = sums.tolist()
    rmse = sqrt(noise_sum / counted) if counted else None
    sqnr_db = 10 * log10(signal_sum / noise_sum) if noise_sum and signal_sum else None
    return rmse, sqnr_db, x.numel() - int(counted)

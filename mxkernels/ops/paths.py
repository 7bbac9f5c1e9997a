"""Which path serves a matrix product, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import torch

from .. import gpu
from ..folded import window
from ..prepared import MAX_ROWS, preparable
from ..tune import (
    FEW_ROWS,
    MatmulConfig,
    SmallMatmulConfig,
    bf16_matmul_config,
    folded_matmul_config,
    small_matmul_config,
    wide_matmul_config,
)
from .native_operand import native_obstacle, pair_obstacle
from .operand import Operand

if TYPE_CHECKING:
    from .matmul_hopper_kernel import HopperConfig

Path = Literal["native", "fp8", "wide"]
PATHS: tuple[str, ...] = get_args(Path)
_LEAST_FP8_ROWS = 128  # of the smaller side: below, folding the larger one takes longer than it saves


def refusal(path: str, a: Operand, b: Operand, capabilities: gpu.Capabilities) -> str | None:
    """Why a path cannot serve two operands, from what is known without looking at their data; None if it can."""
    if path == "native":
        if not capabilities.block_scaled_mma:
            return "this GPU multiplies no block-scaled operands"
        for side, operand in (("a", a), ("b", b)):
            if operand.spec is None:
                return f"{side} is {operand.name}, which has no scales"
            if not operand.spec.symmetric:
                return f"{side} is asymmetric: the tensor cores know no offsets"
            obstacle = _native_obstacle(operand)
            if obstacle and not operand.folded and window(operand.spec.element) is None:
                return f"{side} is {operand.name}: {obstacle}"
    if path == "fp8":
        if not capabilities.fp8_mma:
            return "this GPU multiplies no FP8 operands"
        for side, operand in (("a", a), ("b", b)):
            if operand.spec is None:
                return f"{side} is {operand.name}, which FP8 does not hold"
            if not operand.spec.symmetric:
                return f"{side} is asymmetric: its elements are sums that FP8 does not hold"
            if not operand.folded and window(operand.spec.element) is None:
                return f"{side} is {operand.name}: block-scaled elements of 8 bits fit FP8 at one power of two only"
    return None


def _native_obstacle(operand: Operand) -> str | None:
    """Why block-scaled tensor cores do not take a packed operand as it is."""
    assert operand.spec is not None
    if operand.turned and operand.spec.element.bits < 8:
        return "its codes are packed across the reduction"
    return native_obstacle(operand.spec.T if operand.turned else operand.spec)


def _carrier(operand: Operand) -> str:
    """The FP8 format of an operand that is folded, or can be."""
    assert operand.spec is not None
    found = None if operand.folded else window(operand.spec.element)
    return (found.carrier if found else operand.spec.element).name


def choose(a: Operand, b: Operand, capabilities: gpu.Capabilities) -> str:
    """The path for two operands."""
    if refusal("native", a, b, capabilities) is None:
        return "native"
    if refusal("fp8", a, b, capabilities) is None:
        ready = a.folded and b.folded
        if ready or min(a.rows, b.rows) >= _LEAST_FP8_ROWS:
            return "fp8"
    return "wide"


def native_folds(a: Operand, b: Operand, capabilities: gpu.Capabilities) -> tuple[bool, bool]:
    """Which sides block-scaled tensor cores take as FP8 elements, folded, rather than as they are."""
    folds = [not operand.folded and _native_obstacle(operand) is not None for operand in (a, b)]
    elements = []
    for operand, fold in zip((a, b), folds, strict=True):
        assert operand.spec is not None
        found = window(operand.spec.element) if fold else None
        elements.append(found.carrier if found else operand.spec.element)
    if pair_obstacle(elements[0], elements[1], capabilities.mixed_block_scaled_mma):
        folds = [fold or element.bits == 4 for fold, element in zip(folds, elements, strict=True)]
    return folds[0], folds[1]


def streams_weights(a: Operand, b: Operand) -> bool:
    """Whether a product is one of few bf16 rows and 4-bit weights whose blocks lie along the reduction."""
    if not streams(a):
        return False
    if b.added is not None:
        return True
    return b.spec is not None and not b.folded and not b.turned and preparable(b.spec)


def streams(a: Operand) -> bool:
    """Whether the left side of a product is one of few bf16 rows."""
    x = a.parts[0]
    return a.spec is None and x.dtype == torch.bfloat16 and a.rows <= MAX_ROWS and x.stride(-1) == 1


def decodes_apart(operand: Operand, k: int) -> bool:
    """Whether a side is bf16, or can be decoded to it whole, in rows of whole 16 bytes."""
    if operand.parts[0].data_ptr() % 16:
        return False
    if operand.spec is None:
        x = operand.parts[0]
        return x.dtype == torch.bfloat16 and x.stride(1) == 1 and x.stride(0) % 8 == 0 and x.stride(0) >= k
    if operand.folded and operand.parts[0].stride(0) != k:
        return False  # its rows are padded
    return operand.spec.symmetric and (operand.rows if operand.turned else k) % 8 == 0


def carrier_config(
    m: int, n: int, k: int, carrier: torch.dtype, out_dtype: torch.dtype, device: torch.device, turned: bool
) -> MatmulConfig | HopperConfig:
    """How a product of FP8 or bf16 carriers is launched. `turned`: one of them is stored `[K, rows]`."""
    if gpu.device_capabilities(device).wgmma and not turned:
        from .matmul_hopper_kernel import hopper_config, hopper_serves

        processors = torch.cuda.get_device_properties(device).multi_processor_count
        # large tiles leave most of a GPU idle, and the kernel for them loads less far ahead with small ones
        few = m <= 64 or (m <= FEW_ROWS and -(-m // 128) * -(-n // 128) > 3 * processors // 4)
        if hopper_serves(m, n, k, out_dtype) and not (few and carrier.itemsize == 1):
            return hopper_config(m, n, carrier, out_dtype, processors)
    return bf16_matmul_config(m, n, k) if carrier == torch.bfloat16 else folded_matmul_config(m, n, k)


def _not_chosen(path: str, a: Operand, b: Operand, capabilities: gpu.Capabilities) -> str:
    """Why not a path that could serve."""
    if path == choose(a, b, capabilities):
        return 'path="auto" would take it'
    if path == "fp8" and min(a.rows, b.rows) < _LEAST_FP8_ROWS:
        return f"fewer than {_LEAST_FP8_ROWS} rows: folding takes longer than it saves"
    return "another is faster"


@dataclass(frozen=True)
class Explanation:
    """What a product will run; `str()` of it reads well.

    Attributes:
        path: native, fp8 or wide.
        reason: why that one.
        instruction: what multiplies.
        config: how it is launched; None on the CPU and on the native path.
        refused: the other paths that were considered, with the reason against each.
    """

    operands: str
    path: str
    reason: str
    instruction: str
    config: MatmulConfig | SmallMatmulConfig | HopperConfig | None
    refused: dict[str, str]

    def __str__(self) -> str:
        lines = [
            self.operands,
            f"  path         {self.path}: {self.reason}",
            f"  instruction  {self.instruction}",
        ]
        if self.config is not None:
            lines.append(f"  config       {self.config} (origin: rule)")
        lines += [f"  not {path:<8} {reason}" for path, reason in self.refused.items()]
        return "\n".join(lines)


def explanation(a: Operand, b: Operand, k: int, device: torch.device, path: str) -> Explanation:
    """Why `matmul` takes which path. Reads from the device whether folded operands' exponents fit."""
    operands = f"[{a.rows}, {k}] {a.name} x [{k}, {b.rows}] {b.name} on {device}"
    if device.type == "cpu":
        return Explanation(
            operands, "reference", "the CPU has no kernels", "float64 arithmetic of decoded operands", None, {}
        )
    capabilities = gpu.device_capabilities(device)
    chosen = choose(a, b, capabilities) if path == "auto" else path
    refused = {}
    for other in PATHS:
        if other != chosen:
            refused[other] = refusal(other, a, b, capabilities) or _not_chosen(other, a, b, capabilities)
    if chosen == "native":
        folded = native_folds(a, b, capabilities)
        how = ("folded onto FP8" if fold else "as it is" for fold in folded)
        sides = ", ".join(f"{side} {each}" for side, each in zip("ab", how, strict=True))
        return Explanation(operands, chosen, sides, "block-scaled MMA", None, refused)
    if chosen == "fp8":
        carriers = [_carrier(operand) for operand in (a, b)]
        reason = "both operands are exact in FP8 with a power of two a row"
        if any(operand.folded and int(operand.parts[3]) for operand in (a, b)):
            reason = "tried first; but some row's exponents lie too far apart, so the 16-bit path redoes the product"
        config = carrier_config(a.rows, b.rows, k, torch.float8_e5m2, torch.bfloat16, device, turned=False)
        return Explanation(operands, chosen, reason, f"FP8 MMA, {' x '.join(carriers)}", config, refused)
    if streams_weights(a, b):
        reason = f"no more than {MAX_ROWS} rows: 4-bit weights are read once and decoded in registers"
        return Explanation(operands, chosen, reason, "bf16 MMA", small_matmul_config(a.rows, b.rows, k), refused)
    reason = "both sides as bf16"
    if decodes_apart(a, k) and decodes_apart(b, k):
        turned = a.turned or b.turned
        config = carrier_config(a.rows, b.rows, k, torch.bfloat16, torch.bfloat16, device, turned)
    else:
        config = wide_matmul_config(a.rows, b.rows, k, exact=False)
    return Explanation(operands, chosen, reason, "bf16 MMA", config, refused)

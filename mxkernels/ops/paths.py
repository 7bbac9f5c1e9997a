"""Which path serves a matrix product, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

from .. import gpu
from ..folded import window
from ..prepared import MAX_ROWS, preparable
from ..tune import (
    Choice,
    MatmulConfig,
    Problem,
    carrier_config,
    dtype_name,
    find_config,
    small_matmul_config,
    wide_matmul_config,
)
from ..tune.limits import Limits
from .correction import correction_columns, group_width
from .native_operand import native_obstacle, pair_obstacle
from .operand import FP8_DTYPES, Operand

if TYPE_CHECKING:
    from ..tune import Config, HopperConfig, SmallMatmulConfig

Path = Literal["native", "fp8", "wide"]
PATHS: tuple[str, ...] = get_args(Path)
LEAST_FP8_ROWS = 128  # of the smaller side: below, folding the larger one takes longer than it saves
_LEAST_GROUP = 4  # of K, with offsets of its own: below, there is more to correct than to multiply


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
        if ready or (min(a.rows, b.rows) >= LEAST_FP8_ROWS and _correction_pays(a, b)):
            return "fp8"
    return "wide"


def _correction_pays(a: Operand, b: Operand) -> bool:
    """Whether the product that offsets add is smaller than the one that they are added to."""
    return (a.symmetric and b.symmetric) or group_width(a, b) >= _LEAST_GROUP


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
    few = a.spec is None and not a.turned and a.rows <= MAX_ROWS
    return few and x.dtype == torch.bfloat16 and x.stride(-1) == 1


def decodes_apart(operand: Operand, k: int) -> bool:
    """Whether a side is bf16, or can be decoded to it whole, in rows of whole 16 bytes."""
    if operand.parts[0].data_ptr() % 16:
        return False
    if operand.spec is None:
        x = operand.parts[0]
        return x.dtype == torch.bfloat16 and x.stride(1) == 1 and x.stride(0) % 8 == 0 and x.stride(0) >= x.shape[1]
    if operand.folded and operand.parts[0].stride(0) != k:
        return False  # its rows are padded
    return operand.spec.symmetric and (operand.rows if operand.turned else k) % 8 == 0


def carrier_choice(
    m: int, n: int, k: int, carriers: tuple[torch.dtype, torch.dtype], out_dtype: torch.dtype, device: torch.device,
    turned: tuple[bool, bool],
) -> Choice[MatmulConfig | HopperConfig]:  # fmt: skip
    """How a product of FP8, bf16 or tf32 carriers is launched. `turned`: which of them are stored `[K, rows]`."""
    a, b = carriers

    def on_hopper() -> bool:
        found = gpu.device_capabilities(device)
        if any(turned) or not (found.wgmma and found.tma):
            return False
        from .matmul_hopper_kernel import hopper_serves

        return hopper_serves(m, n, k, out_dtype)

    def rule() -> MatmulConfig | HopperConfig:
        return carrier_config(m, n, k, a, out_dtype, on_hopper(), Limits.of(device))

    layout = " * ".join("turned" if each else "straight" for each in turned)
    problem = Problem.of("multiply", f"{dtype_name(a)} * {dtype_name(b)}", out_dtype, layout, m, n, k)
    return find_config(problem, device, rule, lambda config: isinstance(config, MatmulConfig) or on_hopper())


def streaming_choice(
    a: Operand, b: Operand, k: int, out_dtype: torch.dtype, device: torch.device
) -> Choice[SmallMatmulConfig]:
    """How a product of few rows by 4-bit weights is launched."""
    layout = "stored" if b.added is None else "prepared"
    problem = Problem.of("stream", b.spec, out_dtype, layout, a.rows, b.rows, k)
    return find_config(problem, device, lambda: small_matmul_config(a.rows, b.rows, k))


def decoding_choice(
    a: Operand, b: Operand, k: int, out_dtype: torch.dtype, device: torch.device, exact: bool
) -> Choice[MatmulConfig]:
    """How a product is launched that decodes its operands on the way; `exact`: to the fp32 units."""
    layout = "exact" if exact else "parts"
    problem = Problem.of("decode_multiply", f"{a.kind} * {b.kind}", out_dtype, layout, a.rows, b.rows, k)
    return find_config(problem, device, lambda: wide_matmul_config(a.rows, b.rows, k, exact))


def native_choice(
    a: Operand, b: Operand, k: int, out_dtype: torch.dtype, device: torch.device
) -> Choice[MatmulConfig]:  # fmt: skip
    """How a product is launched on block-scaled tensor cores."""
    from .matmul_native_kernel import native_config

    capabilities = gpu.device_capabilities(device)
    elements = []
    for operand, fold in zip((a, b), native_folds(a, b, capabilities), strict=True):
        assert operand.spec is not None
        found = window(operand.spec.element) if fold else None
        elements.append(found.carrier if found else operand.spec.element)
    swizzled = capabilities.ptx
    layout = "swizzled" if swizzled else "plain"
    formats = " * ".join(element.name for element in elements)

    def rule() -> MatmulConfig:
        return native_config(elements[0], elements[1], swizzled, Limits.of(device).shared_bytes)

    return find_config(Problem.of("native", formats, out_dtype, layout, a.rows, b.rows, k), device, rule)


def _not_chosen(path: str, a: Operand, b: Operand, capabilities: gpu.Capabilities) -> str:
    """Why not a path that could serve."""
    if path == choose(a, b, capabilities):
        return 'path="auto" would take it'
    if path == "fp8" and min(a.rows, b.rows) < LEAST_FP8_ROWS:
        return f"fewer than {LEAST_FP8_ROWS} rows: folding takes longer than it saves"
    if path == "fp8" and not _correction_pays(a, b):
        return f"offsets change every {group_width(a, b)} of K: there is more to correct than to multiply"
    return "another is faster"


@dataclass(frozen=True)
class Explanation:
    """What a product will run; `str()` of it reads well.

    Attributes:
        path: native, fp8 or wide.
        reason: why that one.
        instruction: what multiplies.
        config: how it is launched; None on the CPU.
        origin: where the config comes from: see `tune.Choice`.
        refused: the other paths that were considered, with the reason against each.
    """

    operands: str
    path: str
    reason: str
    instruction: str
    config: Config | None
    refused: dict[str, str]
    origin: str = "rule"

    def __str__(self) -> str:
        lines = [
            self.operands,
            f"  path         {self.path}: {self.reason}",
            f"  instruction  {self.instruction}",
        ]
        if self.config is not None:
            lines.append(f"  config       {self.config} (origin: {self.origin})")
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
        found: Choice[Any] = native_choice(a, b, k, torch.bfloat16, device)
        return Explanation(operands, chosen, sides, "block-scaled MMA", found.config, refused, found.origin)
    if chosen == "fp8":
        carriers = [_carrier(operand) for operand in (a, b)]
        reason = "both operands are exact in FP8 with a power of two a row"
        if any(operand.folded and int(operand.parts[3]) for operand in (a, b)):
            reason = "tried first; but some row's exponents lie too far apart, so the 16-bit path redoes the product"
        if not (a.symmetric and b.symmetric):
            small = correction_columns(a, b, k)[0].count(k)
            reason += f"; offsets in a product of tf32 numbers over {small} sums and offsets a row, which is added"
        dtypes = (FP8_DTYPES[carriers[0]], FP8_DTYPES[carriers[1]])
        found = carrier_choice(a.rows, b.rows, k, dtypes, torch.bfloat16, device, (False, False))
        instruction = f"FP8 MMA, {' x '.join(carriers)}"
        return Explanation(operands, chosen, reason, instruction, found.config, refused, found.origin)
    if streams_weights(a, b):
        reason = f"no more than {MAX_ROWS} rows: 4-bit weights are read once and decoded in registers"
        found = streaming_choice(a, b, k, torch.bfloat16, device)
        return Explanation(operands, chosen, reason, "bf16 MMA", found.config, refused, found.origin)
    reason = "both sides as bf16"
    if decodes_apart(a, k) and decodes_apart(b, k):
        bf16 = (torch.bfloat16, torch.bfloat16)
        found = carrier_choice(a.rows, b.rows, k, bf16, torch.bfloat16, device, (a.turned, b.turned))
    else:
        found = decoding_choice(a, b, k, torch.bfloat16, device, exact=False)
    return Explanation(operands, chosen, reason, "bf16 MMA", found.config, refused, found.origin)

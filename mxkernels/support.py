"""What runs how on which GPU: one row an op, asked of its capabilities. A new op adds its row here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from .folded import window
from .formats import FORMATS, ElementFormat
from .gpu import Capabilities
from .ops.native_operand import ELEMENTS as BLOCK_SCALED_ELEMENTS

Kind = Literal["native", "folded", "decoded"]


@dataclass(frozen=True)
class Support:
    """How an op serves a format.

    Attributes:
        kind: native, the hardware knows the format; folded, it is rewritten without loss into one that the
            hardware knows; decoded, its bits are computed by ordinary arithmetic.
        instruction: what does the work.
    """

    kind: Kind
    instruction: str


def _quantize_nearest(element: ElementFormat, capabilities: Capabilities) -> Support:
    small_float = not element.twos_complement
    fp8 = "e4m3" if element.mantissa_bits == 3 else "e5m2"
    if small_float and element.bits == 8 and capabilities.cvt_fp8:
        return Support("native", f"cvt.rn.satfinite.{fp8}x2.f32")
    if small_float and element.bits == 6 and capabilities.cvt_fp8:
        return Support("folded", f"cvt.rn.satfinite.{fp8}x2.f32")
    if element.name == "e2m1" and capabilities.cvt_e2m1:
        return Support("native", "cvt.rn.satfinite.e2m1x2.f32")
    if small_float and element.bits == 4 and capabilities.ptx:
        return Support("decoded", "fma.rn.bf16x2" if element.mantissa_bits else "cvt.rz.f16x2.f32")
    return Support("decoded", _ARITHMETIC)


def _quantize_stochastic(element: ElementFormat, capabilities: Capabilities) -> Support:
    return Support("decoded", "mul.rz.f32" if capabilities.ptx else _ARITHMETIC)


def _dequantize(element: ElementFormat, capabilities: Capabilities) -> Support:
    if element.special != "none" and capabilities.cvt_fp8:
        return Support("native", f"cvt.rn.f16x2.{element.name}x2")
    return Support("decoded", _ARITHMETIC)


def _matmul(element: ElementFormat, capabilities: Capabilities) -> Support:
    """Of two symmetric operands of this format, with blocks of 32 or more along the reduction."""
    found = window(element)
    if capabilities.block_scaled_mma and element.name in BLOCK_SCALED_ELEMENTS:
        return Support("native", f"block-scaled MMA, {element.name}")
    if capabilities.block_scaled_mma and found:
        return Support("folded", f"block-scaled MMA, {found.carrier.name}")
    if capabilities.fp8_mma and found:
        return Support("folded", f"FP8 MMA, {found.carrier.name}")
    return Support("decoded", "bf16 MMA" if capabilities.mma else _ARITHMETIC)


_ARITHMETIC = "integer and fp32 arithmetic"

# What stands behind a comma is the rounding; quantize_pair is quantize.
OPS: dict[str, Callable[[ElementFormat, Capabilities], Support]] = {
    "quantize, rtne": _quantize_nearest,
    "quantize, stochastic": _quantize_stochastic,
    "dequantize": _dequantize,
    "matmul": _matmul,
    "linear": _matmul,
}


def support(op: str, element: ElementFormat, capabilities: Capabilities | None) -> Support:
    """How `op` serves `element` on a GPU with these capabilities; None is the CPU."""
    if capabilities is None:
        return Support("decoded", "the PyTorch reference: tables and search in float64")
    return OPS[op](element, capabilities)


def support_matrix(capabilities: Capabilities | None) -> dict[str, dict[str, Support]]:
    """By op, then by format name."""
    return {op: {name: support(op, element, capabilities) for name, element in FORMATS.items()} for op in OPS}

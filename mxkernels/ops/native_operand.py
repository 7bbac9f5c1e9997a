"""Operands as block-scaled tensor cores take them: which are so as they are, and their scales one for each 32.

The rows of an operand run along the reduction: B is meant transposed, its block turned with it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..formats import ElementFormat
from ..spec import MXSpec
from ..swizzle import swizzle

ELEMENTS = ("e2m1", "e4m3", "e5m2")
SCALED = 32  # elements a scale
STEP = 128  # the reduction is padded to multiples of so many: four scales, and 16 bytes of anything


def native_obstacle(spec: MXSpec) -> str | None:
    """Why an operand must be folded onto FP8 elements for block-scaled tensor cores; None: they take it as it is."""
    if spec.element.name not in ELEMENTS:
        return f"the tensor cores' elements are {', '.join(ELEMENTS)}, not {spec.element.name}"
    if not spec.symmetric:
        return "the tensor cores know no offsets"
    if spec.block.cols % SCALED:
        return f"the tensor cores' scales serve {SCALED} of the reduction each, not {spec.block.cols} ({spec.block})"
    return None


def pair_obstacle(a: ElementFormat, b: ElementFormat, mixed: bool) -> str | None:
    """Why two native operands cannot be multiplied; None: they can.

    `mixed`: e2m1 times FP8 is one instruction. On sm_120 it is none that Triton emits (3.6 to 3.9 multiply in bf16
    there), and folding e2m1 onto FP8 costs no speed of the tensor cores, which run a mixed product at that of FP8.
    """
    if mixed or (a.bits == 4) == (b.bits == 4):
        return None
    return f"this GPU multiplies e2m1 by e2m1 and FP8 by FP8, but not {a.name} by {b.name}"


@dataclass(frozen=True)
class NativeOperand:
    """What the native kernel reads, made by `native_operand`.

    Attributes:
        element: e2m1, e4m3 or e5m2.
        codes: uint8 `[rows, K]`, or `[rows, K/2]` of e2m1; contiguous, K a multiple of 128, padded with zeros.
        scale: uint8, one for each 32 of K: swizzled, or `[rows, K/32]`.
    """

    element: ElementFormat
    codes: torch.Tensor
    scale: torch.Tensor

    @property
    def rows(self) -> int:
        return self.codes.shape[0]

    @property
    def k(self) -> int:
        return self.codes.shape[1] * 8 // self.element.bits

    @property
    def swizzled(self) -> bool:
        return self.scale.dim() == 3


def native_operand(
    codes: torch.Tensor,
    scale: torch.Tensor,
    spec: MXSpec,
    cols: int,
    swizzled: bool,
    reference: torch.Tensor | None = None,
) -> NativeOperand:
    """Pad the codes of a matrix, if need be, and spread its scales.

    Args:
        codes: uint8 `[rows, P]`, packed along the `cols` of the reduction.
        scale: uint8, of blocks.
        spec: one without `native_obstacle`, or, of a folded tensor, that of its FP8 values.
        swizzled: the scales as NVIDIA's tensor cores read them, else row-major, as AMD's do.
        reference: uint8, one for each row of blocks: of a folded tensor, instead of `scale`.

    Raises:
        ValueError: says the obstacle.
    """
    if reference is not None:
        scale, across = reference[:, None], cols
    elif obstacle := native_obstacle(spec):
        raise ValueError(obstacle)
    else:
        across = spec.block.cols
    rows, row_bytes = codes.shape
    padding = -row_bytes % (STEP * spec.element.bits // 8)
    codes = F.pad(codes, (0, padding)) if padding else codes.contiguous()
    if codes.data_ptr() % 32:  # as a view may; the descriptor of e2m1 beside FP8 wants whole 32 bytes
        codes = codes.clone()
    spread = spread_scales(scale, spec.block.rows, across, rows, cols)
    return NativeOperand(spec.element, codes, swizzle(spread) if swizzled else spread)


def spread_scales(scale: torch.Tensor, down: int, across: int, rows: int, cols: int) -> torch.Tensor:
    """Scales of blocks of `down` x `across` (at least 32) elements as one for each 32 of a row: uint8
    `[rows, 4 ceil(cols/128)]`. What pads a row is 0, which scales codes of zero."""
    row = torch.arange(rows, device=scale.device) // down
    col = torch.arange(0, cols, SCALED, device=scale.device) // across
    return F.pad(scale[row[:, None], col], (0, -len(col) % (STEP // SCALED)))


def torch_dtype(element: ElementFormat) -> torch.dtype:
    """That of codes in memory."""
    return {"e2m1": torch.uint8, "e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}[element.name]

"""FoldedTensor: an MX operand rewritten, without loss, so that the FP8 tensor cores multiply it."""

from __future__ import annotations

from dataclasses import dataclass
from math import frexp
from typing import Any, NamedTuple, NoReturn

import torch

from .formats import FORMATS, ElementFormat
from .spec import MXSpec
from .tensor import MXTensor


class Outside(NamedTuple):
    """Flags on the device of what has no place in a window.

    Attributes:
        any: int32 `[1]`; lines: uint8, one for each row of blocks.
    """

    any: torch.Tensor
    lines: torch.Tensor


@dataclass(frozen=True)
class Window:
    """The powers of two times which every value of an element format is exact in an FP8 format.

    Attributes:
        carrier: the FP8 format.
        low, top: the least and the largest exponent.
    """

    carrier: ElementFormat
    low: int
    top: int


def _window(element: ElementFormat) -> Window | None:
    if element.bits == 8:
        return None
    carrier = FORMATS["e4m3" if element.mantissa_bits > FORMATS["e5m2"].mantissa_bits else "e5m2"]
    largest = max(map(abs, element.values))
    top = carrier.max_exponent - (frexp(largest)[1] - 1)
    if largest * 2.0**top > carrier.max:
        top -= 1
    return Window(carrier, frexp(carrier.smallest)[1] - frexp(element.smallest)[1], top)


# Of the formats of 4 and 6 bits: in E5M2, whose window is the widest, unless that lacks mantissa bits. None for
# those of 8 bits: E4M3 and E5M2 fit themselves only at one power of two, and INT8 fits neither.
WINDOWS: dict[str, Window | None] = {name: _window(row) for name, row in FORMATS.items()}


def window(element: ElementFormat) -> Window | None:
    """How a format fits an FP8 format; None where it does not."""
    return WINDOWS[element.name]


def folded_spec(spec: MXSpec) -> MXSpec | None:
    """What a tensor of `spec` folds to: its blocks with FP8 elements; None where it cannot be folded."""
    found = window(spec.element) if spec.symmetric else None
    return None if found is None else MXSpec(found.carrier, spec.block, "rtne", "rceil")


class FoldedTensor:
    """An MX operand of a matrix product as FP8, made by `mxkernels.fold`, with a power of two a row.

    Args:
        values: an MXTensor of E5M2 or E4M3 elements with the blocks of the original. It decodes to the very
            same numbers. The blocks of a row of blocks all have its reference as their scale byte, save those
            that hold NaN (255) and those that no shared power of two can serve.
        reference: uint8 `[ceil(R/r)]`, for each row of blocks: `value = code value * 2**(reference - 127)`.
        outside: int32 `[1]` on the device: not 0 if a block has a scale of its own, since its distance from
            the largest of its row exceeds the FP8 format's range.
        outside_rows: uint8 `[ceil(R/r)]`: which rows of blocks have such a block. The 16-bit path redoes what they
            are multiplied with.
    """

    __slots__ = ("values", "reference", "outside", "outside_rows")

    def __init__(
        self, values: MXTensor, reference: torch.Tensor, outside: torch.Tensor, outside_rows: torch.Tensor
    ) -> None:
        self.values = values
        self.reference = reference
        self.outside = outside
        self.outside_rows = outside_rows

    @property
    def T(self) -> FoldedTensor:
        """The transpose: views. The product's reduction must run along the original's last dimension."""
        return FoldedTensor(self.values.T, self.reference, self.outside, self.outside_rows)

    def dequantize(self, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        """A plain tensor of `shape` and `dtype`: that of the MXTensor that was folded."""
        return self.values.dequantize(dtype)

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def nbytes(self) -> int:
        """Bytes stored: codes, scales, references and flags."""
        return self.values.nbytes + sum(each.nbytes for each in (self.reference, self.outside, self.outside_rows))

    def __repr__(self) -> str:
        shape = "x".join(map(str, self.shape))
        spec = self.values.spec
        return f"FoldedTensor({shape}, {spec.element.name} {spec.block}, {self.nbytes:,} bytes on {self.device})"

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        name = getattr(function, "__name__", str(function))
        raise TypeError(f"{name} does not take a FoldedTensor; call dequantize() on it for a plain tensor")

"""The two sides of a matrix product: what they may be, and how kernels take them.

Both are matrices of rows along the reduction: A is `[M, K]`, B is held transposed, `[N, K]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch

from .. import gpu, reference
from ..folded import FoldedTensor
from ..prepared import PreparedTensor
from ..spec import MXSpec
from ..tensor import MXTensor

PLAIN_DTYPES = (torch.bfloat16, torch.float16)
FP8_DTYPES = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
OUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Operand:
    """One side of a product: a matrix `[rows, K]`.

    Attributes:
        parts: a plain matrix; or codes, scale and, if asymmetric, offset of a packed one; or, of a folded
            one, codes, scale, reference, outside and its rows; or codes and scale of a prepared one.
        spec: of the matrix as stored; None for a plain one.
        turned: what is stored is `[K, rows]`; a plain matrix too, whose columns are contiguous.
        folded: it is a FoldedTensor.
        added: it is a PreparedTensor, whose `added` this is; else None.
    """

    parts: Sequence[torch.Tensor]
    rows: int
    spec: MXSpec | None = None
    turned: bool = False
    folded: bool = False
    added: int | None = None

    @property
    def kind(self) -> str:
        """The text that travels through the op's schema beside the parts."""
        if self.spec is None:
            return "plain turned" if self.turned else "plain"
        if self.added is not None:
            return "prepared " + str(self.added) + " " + str(self.spec)
        state = "folded " if self.folded else "packed "
        return state + ("turned " if self.turned else "straight ") + str(self.spec)

    @classmethod
    def of_kind(cls, parts: Sequence[torch.Tensor], kind: str, rows: int) -> Operand:
        """The inverse of `kind`, for parts that are matrices."""
        if kind.startswith("plain"):
            return cls(parts, rows, turned=kind == "plain turned")
        state, detail, text = kind.split(" ", 2)
        if state == "prepared":
            return cls(parts, rows, MXSpec.parse(text), added=int(detail))
        return cls(parts, rows, MXSpec.parse(text), detail == "turned", state == "folded")

    @property
    def symmetric(self) -> bool:
        return self.spec is None or self.spec.symmetric

    def without_offset(self) -> Operand:
        """A packed operand's S q: itself, if it is symmetric."""
        if self.symmetric:
            return self
        assert self.spec is not None
        return replace(self, parts=self.parts[:2], spec=replace(self.spec, symmetric=True))

    @property
    def fits_bf16(self) -> bool:
        """Whether bf16 holds every element, however small its scale. Values that were folded had 4 or 6 bits."""
        return self.spec is None or self.folded or self.spec.element.special == "none"

    @property
    def name(self) -> str:
        """As a person would say it."""
        if self.spec is None:
            return str(self.parts[0].dtype).removeprefix("torch.")
        block = self.spec.T.block if self.turned else self.spec.block
        asymmetric = "" if self.spec.symmetric else " asymmetric"
        state = " folded" if self.folded else "" if self.added is None else " prepared"
        return f"{self.spec.element.name} {block}{asymmetric}{state}"


def carrier_dtype(spec: MXSpec, device: torch.device) -> torch.dtype:
    """What kernels take the elements of a folded tensor as: bytes, on a GPU that has no type for them."""
    if device.type == "cuda" and not gpu.device_capabilities(device).fp8_mma:
        return torch.uint8
    return FP8_DTYPES[spec.element.name]


def in_shape(x: torch.Tensor, *shape: int) -> torch.Tensor:
    """A tensor that nobody else has in another shape; no view to autograd, so that it may be changed in place."""
    return torch.ops.aten._unsafe_view.default(x, shape)


def as_matrix(x: torch.Tensor) -> torch.Tensor:
    return x if x.dim() == 2 else x.reshape(prod(x.shape[:-1]), x.shape[-1])


def padded(k: int) -> int:
    """Bytes of a row of `k` FP8 codes: descriptors need whole 16."""
    return (k + 15) // 16 * 16


def check_operands(a: Any, b: Any) -> tuple[int, ...]:
    """Raise TypeError or ValueError for what `matmul` does not take; else `[..., M, N, K]`."""
    for name, operand in (("a", a), ("b", b)):
        prepared = name == "b" and isinstance(operand, PreparedTensor)
        if not prepared and not isinstance(operand, (torch.Tensor, MXTensor, FoldedTensor)):
            allowed = "MXTensor, FoldedTensor, or a bfloat16 or float16 tensor; of b, a PreparedTensor too"
            raise TypeError(f"{name} is a {type(operand).__name__}; allowed: {allowed}")
        if isinstance(operand, torch.Tensor) and operand.dtype not in PLAIN_DTYPES:
            raise TypeError(f"{name} is {operand.dtype}; allowed: {', '.join(map(str, PLAIN_DTYPES))}, or an MXTensor")
    if len(a.shape) == 0:
        raise ValueError("a has no dimensions; allowed: [..., K]")
    if len(b.shape) != 2:
        raise ValueError(f"b has {len(b.shape)} dimensions; allowed: two, [K, N]")
    if a.shape[-1] != b.shape[0]:
        raise ValueError(f"a is {list(a.shape)} and b is {list(b.shape)}; a's last dimension must be b's first")
    if a.device != b.device:
        raise ValueError(f"a is on {a.device} and b on {b.device}; allowed: one device")
    if isinstance(a, FoldedTensor) and a.values.transposed:
        raise ValueError("a is a FoldedTensor.T, folded along its rows; allowed: one folded along K, fold(a.T)")
    if isinstance(b, FoldedTensor) and not b.values.transposed:
        raise ValueError("b is folded along its columns, N; allowed: one folded along K, fold(b.T).T")
    return (*a.shape[:-1], b.shape[1], b.shape[0])


def check_bias(bias: Any, n: int, device: torch.device) -> None:
    if bias is None:
        return
    if not isinstance(bias, torch.Tensor) or bias.dtype not in OUT_DTYPES:
        found = bias.dtype if isinstance(bias, torch.Tensor) else type(bias).__name__
        raise TypeError(f"bias is {found}; allowed: {', '.join(map(str, OUT_DTYPES))}")
    if tuple(bias.shape) != (n,) or bias.device != device:
        raise ValueError(f"bias is {list(bias.shape)} on {bias.device}; allowed: [{n}] on {device}")


def operand_a(a: torch.Tensor | MXTensor | FoldedTensor | PreparedTensor) -> Operand:
    rows = prod(a.shape[:-1])
    if isinstance(a, torch.Tensor):
        turned = a.dim() == 2 and a.stride(0) == 1 and a.stride(1) != 1
        a = a.detach() if a.requires_grad else a
        return Operand([a.T if turned else a], rows, turned=turned)
    if isinstance(a, FoldedTensor):
        parts = [a.values.codes, a.values.scale, a.reference, a.outside, a.outside_rows]
        return Operand(parts, rows, a.values.spec, folded=True)
    if isinstance(a, PreparedTensor):
        return Operand([a.codes, a.scale], rows, a.spec, added=a.added)
    stored = a.T if a.transposed else a
    parts = [stored.codes, stored.scale, *([] if stored.offset is None else [stored.offset])]
    return Operand(parts, rows, stored.spec, turned=a.transposed)


def operand_b(b: torch.Tensor | MXTensor | FoldedTensor | PreparedTensor) -> Operand:
    return operand_a(b.T)


def launchable(parts: Sequence[torch.Tensor], kind: str) -> list[torch.Tensor]:
    """An operand's parts as kernels take them: a matrix; its packed rows contiguous, folded ones at whole 16 bytes."""
    if kind.startswith("prepared"):
        return list(parts)
    codes, *rest = parts
    codes = as_matrix(codes)
    if kind.startswith("folded"):
        if codes.stride(1) != 1 or codes.stride(0) % 16 or codes.data_ptr() % 16:
            aligned = codes.new_empty((codes.shape[0], padded(codes.shape[1])))
            aligned[:, : codes.shape[1]] = codes
            codes = aligned
        codes = codes.view(carrier_dtype(MXSpec.parse(kind.split(" ", 2)[2]), codes.device))
    elif kind.startswith("packed") and not codes.is_contiguous():
        codes = codes.contiguous()
    return [codes, *(part if part.is_contiguous() else part.contiguous() for part in rest)]


def decoded(operand: Operand, k: int) -> torch.Tensor:
    """fp32 `[rows, K]` by the reference."""
    codes = as_matrix(operand.parts[0])
    if operand.spec is None:
        return (codes.T if operand.turned else codes).float()
    scale = operand.parts[1]
    offset = None if operand.spec.symmetric else operand.parts[2]
    cols = operand.rows if operand.turned else k
    matrix = reference.dequantize(codes, scale, offset, operand.spec, cols, torch.float32)
    return matrix.T if operand.turned else matrix

"""PreparedTensor: 4-bit weights in the order in which a product of few rows reads them fastest."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch.nn.functional import pad

from .spec import MXSpec
from .tensor import MXTensor

BAND = 128  # rows that are kept together
GROUP = 128  # columns of a row that four threads read at a time, 16 bytes each
_NAN = 255


class PreparedTensor:
    """A matrix of 4-bit elements `[N, K]`, made by `prepare`; its `.T` is the right side of a product.

    Args:
        codes: uint8 `[bands, groups, BAND, 64]`: tiles of BAND rows and GROUP columns, zeros beyond the edge. Of a
            row's 64 bytes, column `32 u + 16 i + 8 j + 2 t + h` (t, u < 4; h, i, j < 2) is code j of byte
            `16 t + 4 u + 2 h + i`: what a thread t of the tensor cores' operand has stands together.
        scale: uint8 `[bands, groups, BAND, GROUP / c]` for blocks of c columns.
        added: what has been added to the scale bytes, save those of NaN. If it is not 0, NaN's codes are zeros.
        spec, shape: of the matrix.
        transposed: this is the transpose of what was prepared.

    It decodes to the same numbers as what was prepared.
    """

    __slots__ = ("codes", "scale", "added", "shape", "transposed", "_stored_spec")

    def __init__(
        self,
        codes: torch.Tensor,
        scale: torch.Tensor,
        added: int,
        spec: MXSpec,
        shape: tuple[int, int],
        transposed: bool = False,
    ) -> None:
        self.codes = codes
        self.scale = scale
        self.added = added
        self.shape = torch.Size(shape)
        self.transposed = transposed
        self._stored_spec = spec.T if transposed else spec

    @property
    def spec(self) -> MXSpec:
        return self._stored_spec.T if self.transposed else self._stored_spec

    @property
    def T(self) -> PreparedTensor:
        """The transpose: nothing moves."""
        shape = (self.shape[1], self.shape[0])
        return PreparedTensor(self.codes, self.scale, self.added, self.spec.T, shape, not self.transposed)

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def nbytes(self) -> int:
        """Bytes stored: codes and scales."""
        return self.codes.nbytes + self.scale.nbytes

    def restore(self) -> MXTensor:
        """The inverse of `prepare`, save that a block of NaN may have lost its codes."""
        n, k = reversed(self.shape) if self.transposed else self.shape
        codes, scale = torch.ops.mxkernels.restore(self.codes, self.scale, self.added, n, k)
        stored = MXTensor.unchecked(codes, scale, None, self._stored_spec, (n, k))
        return stored.T if self.transposed else stored

    def dequantize(self, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        """A plain tensor of `shape` and `dtype`."""
        return self.restore().dequantize(dtype)

    def __repr__(self) -> str:
        shape = "x".join(map(str, self.shape))
        spec = self.spec
        return f"PreparedTensor({shape}, {spec.element.name} {spec.block}, {self.nbytes:,} bytes on {self.device})"

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        name = getattr(function, "__name__", str(function))
        raise TypeError(f"{name} does not take a PreparedTensor; call dequantize() on it for a plain tensor")


MAX_ROWS = 64  # of the left side of a product that reads prepared weights


def preparable(spec: MXSpec) -> bool:
    """Whether weights of `spec` can be prepared: symmetric, of 4 bits, in blocks of one row and 16 columns or more."""
    return spec.element.bits == 4 and spec.symmetric and spec.block.rows == 1 and spec.block.cols >= 16


def prepare(q: MXTensor) -> PreparedTensor:
    """Weights `[N, K]` for products of few rows, `x @ W.T`: `matmul(x, prepare(q).T)`. Looks at the scales, and so
    waits for the device.

    Raises:
        TypeError, ValueError: q is not a matrix of symmetric 4-bit elements, in blocks of one row and 16 columns
            or more.
    """
    if not isinstance(q, MXTensor):
        raise TypeError(f"q is a {type(q).__name__}; allowed: MXTensor")
    spec = q.spec
    if len(q.shape) != 2 or q.transposed or 0 in q.shape:
        transposed = ", transposed" if q.transposed else ""
        raise ValueError(f"q is {list(q.shape)}{transposed}; allowed: a matrix as it was quantised, not empty")
    if not preparable(spec):
        raise ValueError(f"prepare needs symmetric 4-bit elements in blocks of 1x16 to 1x128, not {spec}")
    # Where no scale is too large, that of the elements' bits read as bf16 is joined to it: one multiplication less.
    # Then NaN's byte is infinity's, and infinity times zero is NaN.
    nan = q.scale == _NAN
    joins = not spec.element.twos_complement and not (q.scale.masked_fill(nan, 0) > 127 + spec.element.bias).any()
    added = 127 - spec.element.bias if joins else 0
    scale = (q.scale + added).masked_fill(nan, _NAN)

    rows, groups = -q.shape[0] % BAND, -(-q.shape[1] // GROUP)
    blocks = GROUP // spec.block.cols
    codes = pad(q.codes, (0, groups * GROUP // 2 - q.codes.shape[1], 0, rows))
    scale = pad(scale, (0, groups * blocks - scale.shape[1], 0, rows), value=added)
    if added:
        codes = codes.view(*scale.shape, -1).masked_fill(scale[..., None] == _NAN, 0)
    byte = codes.view(-1, BAND, groups, 4, 2, 2, 4)  # … u, i, j, t
    code = torch.stack([byte & 15, byte >> 4], dim=-1).permute(0, 2, 1, 6, 3, 7, 4, 5)  # … t, u, h, i, j
    codes = (code[..., 0] | code[..., 1] << 4).reshape(-1, groups, BAND, GROUP // 2)
    scale = scale.view(-1, BAND, groups, blocks).transpose(1, 2).contiguous()
    return PreparedTensor(codes, scale, added, spec, (q.shape[0], q.shape[1]))


def restored(codes: torch.Tensor, scale: torch.Tensor, added: int, n: int, k: int) -> list[torch.Tensor]:
    """A PreparedTensor's parts to codes and scale in the contract's order, of a matrix `[n, k]`."""
    groups, blocks = scale.shape[1], scale.shape[3]
    byte = codes.view(-1, groups, BAND, 4, 4, 2, 2)  # … t, u, h, i
    column = torch.stack([byte & 15, byte >> 4], dim=-1).permute(0, 2, 1, 4, 6, 7, 3, 5)  # … u, i, j, t, h
    codes = (column[..., 0] | column[..., 1] << 4).reshape(-1, groups * GROUP // 2)
    bytes_a_row, blocks_a_row = row_sizes(scale, k)
    scale = scale.transpose(1, 2).reshape(-1, groups * blocks)
    scale = torch.where(scale == _NAN, _NAN, scale - added)
    return [codes[:n, :bytes_a_row].contiguous(), scale[:n, :blocks_a_row].contiguous()]


def row_sizes(scale: torch.Tensor, k: int) -> tuple[int, int]:
    """Bytes of codes and of scales in a row of k columns, of a PreparedTensor with that scale."""
    cols = GROUP // scale.shape[3]
    return (k + 1) // 2, (k + cols - 1) // cols

"""MXTensor: a quantised tensor. It holds bytes and a spec, and computes nothing itself."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod
from typing import Any, NoReturn

import torch

from .spec import MXSpec


class MXTensor:
    """Packed codes with one scale per block.

    Args:
        codes: uint8 `[..., P]`, P = `spec.packed_cols(C)` bytes for C columns.
        scale: uint8 `[ceil(R/r), ceil(C/c)]`, E8M0 bytes, for the R x C matrix that `shape` flattens to.
        offset: float16, shaped as `scale`, if and only if `spec` is asymmetric.
        spec: element format, block, roundings and symmetry.
        shape: the shape of the tensor that was quantised.
        transposed: all of the above are transposed (`.T` of such a tensor is as described): the codes are
            packed along the first dimension.

    Raises:
        ValueError: a part whose dtype or shape does not fit `spec` and `shape`.

    It is an operand, not a `torch.Tensor`: torch functions fail on it with a sentence, and
    `dequantize()` gives a plain tensor.
    """

    __slots__ = ("codes", "scale", "offset", "shape", "transposed", "_stored_spec")

    def __init__(
        self,
        codes: torch.Tensor,
        scale: torch.Tensor,
        offset: torch.Tensor | None,
        spec: MXSpec,
        shape: Iterable[int],
        transposed: bool = False,
    ) -> None:
        stored = spec.T if transposed else spec
        self._hold(codes, scale, offset, stored, torch.Size(shape), transposed)
        if transposed:
            check_parts(codes.T, scale.T, None if offset is None else offset.T, stored, self.shape[::-1])
        else:
            check_parts(codes, scale, offset, stored, self.shape)

    def _hold(
        self,
        codes: torch.Tensor,
        scale: torch.Tensor,
        offset: torch.Tensor | None,
        stored_spec: MXSpec,
        shape: torch.Size,
        transposed: bool,
    ) -> None:
        self.codes = codes
        self.scale = scale
        self.offset = offset
        self.shape = shape
        self.transposed = transposed
        self._stored_spec = stored_spec

    @classmethod
    def unchecked(
        cls,
        codes: torch.Tensor,
        scale: torch.Tensor,
        offset: torch.Tensor | None,
        stored_spec: MXSpec,
        shape: Iterable[int],
        transposed: bool = False,
    ) -> MXTensor:
        """The same from parts that are known to fit; `stored_spec` is that of the tensor before any `.T`."""
        tensor = cls.__new__(cls)
        if type(shape) is not torch.Size:
            shape = torch.Size(shape)
        tensor._hold(codes, scale, offset, stored_spec, shape, transposed)
        return tensor

    @property
    def spec(self) -> MXSpec:
        return self._stored_spec.T if self.transposed else self._stored_spec

    @property
    def T(self) -> MXTensor:
        """The transpose of a two-dimensional tensor: views, nothing moves. The block turns with it."""
        if len(self.shape) != 2:
            raise ValueError(f"MXTensor.T needs two dimensions; this one has {len(self.shape)}")
        offset = None if self.offset is None else self.offset.T
        shape = (self.shape[1], self.shape[0])
        return MXTensor.unchecked(self.codes.T, self.scale.T, offset, self._stored_spec, shape, not self.transposed)

    def dequantize(self, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        """A plain tensor of `shape` and `dtype` (bfloat16, float16 or float32): see `mxkernels.dequantize`."""
        if self.transposed:
            return self.T.dequantize(dtype).T
        return torch.ops.mxkernels.dequantize(
            self.codes, self.scale, self.offset, str(self._stored_spec), self.shape[-1], dtype
        )

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> MXTensor:
        """The same tensor on another device."""
        if isinstance(device, torch.dtype):
            raise TypeError(f"MXTensor.to takes a device, not {device}; dequantize({device}) converts")
        codes = self.codes.to(device, non_blocking=non_blocking)
        scale = self.scale.to(device, non_blocking=non_blocking)
        offset = None if self.offset is None else self.offset.to(device, non_blocking=non_blocking)
        return MXTensor(codes, scale, offset, self.spec, self.shape, self.transposed)

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def nbytes(self) -> int:
        """Bytes stored: codes, scales and offsets."""
        return sum(part.nbytes for part in (self.codes, self.scale, self.offset) if part is not None)

    def __repr__(self) -> str:
        shape = "x".join(map(str, self.shape))
        transposed = ", transposed" if self.transposed else ""
        return f"MXTensor({shape}, {self.spec}{transposed}, {self.nbytes:,} bytes on {self.device})"

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        name = getattr(function, "__name__", str(function))
        raise TypeError(f"{name} does not take an MXTensor; call dequantize() on it for a plain tensor")


def check_parts(
    codes: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor | None, spec: MXSpec, shape: Iterable[int]
) -> None:
    """Raise ValueError unless the parts are those of a tensor of `shape` quantised to `spec`."""
    *leading, cols = shape
    _check_part("codes", codes, torch.uint8, (*leading, spec.packed_cols(cols)))
    blocks = spec.scale_shape(prod(leading), cols)
    _check_part("scale", scale, torch.uint8, blocks)
    if spec.symmetric:
        if offset is not None:
            raise ValueError(f"offset is given, but {spec} has none")
    elif offset is None:
        raise ValueError(f"offset is None, but {spec} needs float16 {list(blocks)}")
    else:
        _check_part("offset", offset, torch.float16, blocks)


def _check_part(name: str, part: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if part.dtype != dtype or part.shape != shape:
        raise ValueError(f"{name} is {part.dtype} {list(part.shape)}; allowed here: {dtype} {list(shape)}")

"""The functional ops, registered with `torch.library` as `torch.ops.mxkernels.*`.

CPU tensors go to the reference, CUDA tensors to Triton, which is imported by the first of those. A spec
travels as its text (`str(spec)`), since schemas know no dataclasses.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch

from .. import reference
from ..spec import MXSpec
from ..tensor import MXTensor, check_parts

__all__ = ["dequantize", "quantize", "quantize_pair"]

INPUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

_library = torch.library.Library("mxkernels", "DEF")
_library.define("quantize(Tensor x, str spec, Tensor? seed) -> Tensor[]")
_library.define("quantize_pair(Tensor x, str spec, Tensor? seed) -> Tensor[]")
_library.define(
    "dequantize(Tensor codes, Tensor scale, Tensor? offset, str spec, SymInt cols, ScalarType dtype) -> Tensor"
)


def quantize(x: torch.Tensor, spec: MXSpec, seed: int | torch.Tensor | None = None) -> MXTensor:
    """Quantise a tensor to a microscaling format.

    Args:
        x: bfloat16, float16 or float32, of any shape with at least one dimension and any strides. Its
            leading dimensions flatten into rows, its last one is the columns that blocks and packing follow.
        spec: what to make of it, such as `mxkernels.mxfp4` or `MXSpec("e2m1", "4x4")`.
        seed: for stochastic rounding only: 64 bits as an int, or an int64 tensor with one element on x's
            device. The same seed gives the same bytes on every device. None draws one from torch's
            generator for the device, so `torch.manual_seed` repeats it and a CUDA graph's replays differ.

    Returns:
        An MXTensor of x's shape on x's device. No gradient flows through it.

    Raises:
        TypeError, ValueError: names the argument and what is allowed.

    A block that holds NaN or Inf becomes NaN as a whole. Source: `docs/numerics.md`.
    """
    _check_input(x, spec)
    op = _quantize_cuda if _is_eager(x) else torch.ops.mxkernels.quantize.default
    parts = op(_plain(x), str(spec), _seed_tensor(seed, spec, x.device))
    return _as_tensor(parts, spec, x.shape)


def quantize_pair(x: torch.Tensor, spec: MXSpec, seed: int | torch.Tensor | None = None) -> tuple[MXTensor, MXTensor]:
    """Both orientations from one read: `(quantize(x, spec, seed), quantize(x.T, spec, seed))`.

    Arguments and errors are those of `quantize`; of a tensor with other than two dimensions, `x.T` is the
    transpose of the matrix `[rows, columns]` that it flattens to.
    """
    _check_input(x, spec)
    op = _quantize_pair_cuda if _is_eager(x) else torch.ops.mxkernels.quantize_pair.default
    parts = op(_plain(x), str(spec), _seed_tensor(seed, spec, x.device))
    rows, cols = _matrix_shape(x.shape)
    half = len(parts) // 2
    return _as_tensor(parts[:half], spec, x.shape), _as_tensor(parts[half:], spec, (cols, rows))


def dequantize(q: MXTensor, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Decode: `code value * 2**(scale - 127) + offset`, rounded once to nearest-even.

    Args:
        q: an MXTensor.
        dtype: bfloat16, float16 or float32.

    Returns:
        A tensor of q's shape on q's device. Blocks whose scale byte is 255 are NaN; values beyond `dtype`'s
        largest are infinite.

    Raises:
        TypeError: `q` is no MXTensor, or `dtype` is another.
    """
    if not isinstance(q, MXTensor):
        raise TypeError(f"q is a {type(q).__name__}; allowed: MXTensor")
    return q.dequantize(dtype)


def _check_input(x: torch.Tensor, spec: MXSpec) -> None:
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"x is a {type(x).__name__}; allowed: a torch.Tensor")
    if not isinstance(spec, MXSpec):
        raise TypeError(f"spec is a {type(spec).__name__}; allowed: MXSpec, such as mxkernels.mxfp4")


def _is_eager(x: torch.Tensor) -> bool:
    """Whether nothing but the kernel would come of dispatching an op on `x`, which takes longer than launching it."""
    return (
        not torch.compiler.is_compiling()
        and x.is_cuda
        and type(x) is torch.Tensor
        and torch._C._len_torch_dispatch_stack() == 0
    )


def _plain(x: torch.Tensor) -> torch.Tensor:
    return x.detach() if x.requires_grad else x


def _check_matrix(x: torch.Tensor) -> None:
    if x.dtype not in INPUT_DTYPES:
        raise TypeError(f"x is {x.dtype}; allowed: {', '.join(map(str, INPUT_DTYPES))}")
    if x.dim() == 0:
        raise ValueError("x has no dimensions; allowed: one or more (x.reshape(1) makes a vector of it)")


def _seed_tensor(seed: int | torch.Tensor | None, spec: MXSpec, device: torch.device) -> torch.Tensor | None:
    """The seed on the device, without a synchronisation; None for nearest-even."""
    if not spec.stochastic:
        if seed is not None:
            raise ValueError("seed is given, but rounding is rtne, which draws nothing; allowed: None")
        return None
    if seed is None:
        return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=device)
    if isinstance(seed, torch.Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != device:
            raise ValueError(
                f"seed is {seed.dtype} {list(seed.shape)} on {seed.device}; allowed: one int64 element on {device}"
            )
        return seed
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed is {seed}; allowed: an integer of 64 bits")
    return torch.full((1,), seed - 2**64 if seed >= 2**63 else seed, dtype=torch.int64, device=device)


def _matrix_shape(shape: torch.Size) -> tuple[int, int]:
    return prod(shape[:-1]), shape[-1]


def _as_tensor(parts: list[torch.Tensor], spec: MXSpec, shape: tuple[int, ...]) -> MXTensor:
    return MXTensor.unchecked(parts[0], parts[1], None if spec.symmetric else parts[2], spec, shape)


def _empty_parts(x: torch.Tensor, leading: tuple[int, ...], rows: int, cols: int, spec: MXSpec) -> list[torch.Tensor]:
    blocks = spec.scale_shape(rows, cols)
    parts = [
        x.new_empty((*leading, spec.packed_cols(cols)), dtype=torch.uint8),
        x.new_empty(blocks, dtype=torch.uint8),
    ]
    if not spec.symmetric:
        parts.append(x.new_empty(blocks, dtype=torch.float16))
    return parts


def _quantize_fake(x: torch.Tensor, text: str, seed: torch.Tensor | None) -> list[torch.Tensor]:
    _check_matrix(x)
    rows, cols = _matrix_shape(x.shape)
    return _empty_parts(x, x.shape[:-1], rows, cols, MXSpec.parse(text))


def _quantize_pair_fake(x: torch.Tensor, text: str, seed: torch.Tensor | None) -> list[torch.Tensor]:
    rows, cols = _matrix_shape(x.shape)
    return _quantize_fake(x, text, seed) + _empty_parts(x, (cols,), cols, rows, MXSpec.parse(text))


def _quantize_cpu(x: torch.Tensor, text: str, seed: torch.Tensor | None) -> list[torch.Tensor]:
    _check_matrix(x)
    matrix = x.reshape(_matrix_shape(x.shape))
    codes, scale, offset = reference.quantize(matrix, MXSpec.parse(text), None if seed is None else int(seed))
    codes = codes.reshape(*x.shape[:-1], codes.shape[-1])
    return [codes, scale] if offset is None else [codes, scale, offset]


def _quantize_pair_cpu(x: torch.Tensor, text: str, seed: torch.Tensor | None) -> list[torch.Tensor]:
    straight = _quantize_cpu(x, text, seed)
    return straight + _quantize_cpu(x.reshape(_matrix_shape(x.shape)).T, text, seed)


def _quantize_cuda(x: torch.Tensor, text: str, seed: torch.Tensor | None, pair: bool = False) -> list[torch.Tensor]:
    from .quantize_kernel import quantize_launch, quantize_tensors

    spec = MXSpec.parse(text)
    key = (text, pair, x.dtype, x.shape, x.stride(), x.device, x.data_ptr() % 16, seed is None or seed.data_ptr() % 16)
    known = _relaunches.get(key)
    # A view, or a copy where the leading dimensions do not merge.
    matrix = x if x.dim() == 2 else x.reshape(_matrix_shape(x.shape))
    if known is None:
        parts = (_quantize_pair_fake if pair else _quantize_fake)(x, text, seed)
        relaunch = quantize_launch(matrix, spec, seed, parts).run(x.device)
        _remember(key, relaunch, [(part.shape, part.dtype) for part in parts])
    else:
        relaunch, shapes = known
        parts = [torch.empty(shape, dtype=dtype, device=x.device) for shape, dtype in shapes]
        relaunch.run(*quantize_tensors(matrix, seed, parts, spec))
    return parts


def _quantize_pair_cuda(x: torch.Tensor, text: str, seed: torch.Tensor | None) -> list[torch.Tensor]:
    return _quantize_cuda(x, text, seed, pair=True)


def _dequantize_fake(
    codes: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor | None, text: str, cols: int, dtype: torch.dtype
) -> torch.Tensor:
    if dtype not in INPUT_DTYPES:
        raise TypeError(f"dtype is {dtype}; allowed: {', '.join(map(str, INPUT_DTYPES))}")
    shape = (*codes.shape[:-1], cols)
    check_parts(codes, scale, offset, MXSpec.parse(text), shape)
    return codes.new_empty(shape, dtype=dtype)


def _dequantize_cpu(
    codes: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor | None, text: str, cols: int, dtype: torch.dtype
) -> torch.Tensor:
    out = _dequantize_fake(codes, scale, offset, text, cols, dtype)
    matrix = codes.reshape(_matrix_shape(codes.shape))
    out.view(matrix.shape[0], cols).copy_(reference.dequantize(matrix, scale, offset, MXSpec.parse(text), cols, dtype))
    return out


def _dequantize_cuda(
    codes: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor | None, text: str, cols: int, dtype: torch.dtype
) -> torch.Tensor:
    from .dequantize_kernel import dequantize_launch

    codes, scale = codes.contiguous(), scale.contiguous()
    offset = None if offset is None else offset.contiguous()
    parts = (codes, scale, offset)
    key = (text, cols, dtype, codes.device, *((p.shape, p.dtype, p.data_ptr() % 16) for p in parts if p is not None))
    known = _relaunches.get(key)
    if known is None:
        out = _dequantize_fake(codes, scale, offset, text, cols, dtype)
        matrix = out.view(_matrix_shape(out.shape))
        relaunch = dequantize_launch(*parts, MXSpec.parse(text), matrix).run(codes.device)
        _remember(key, relaunch, [(out.shape, dtype)])
    else:
        relaunch, [(shape, _)] = known
        out = torch.empty(shape, dtype=dtype, device=codes.device)
        relaunch.run(*parts, out)
    return out


# What a kernel's compilation and arguments depend on, to the kernel ready to launch and what it writes.
_relaunches: dict[tuple[Any, ...], tuple[Any, list[tuple[torch.Size, torch.dtype]]]] = {}
_MOST_RELAUNCHES = 4096


def _remember(key: tuple[Any, ...], relaunch: Any, outputs: list[tuple[torch.Size, torch.dtype]]) -> None:
    if len(_relaunches) >= _MOST_RELAUNCHES:
        _relaunches.clear()
    _relaunches[key] = (relaunch, outputs)


for _name, _fake, _cpu, _cuda in (
    ("quantize", _quantize_fake, _quantize_cpu, _quantize_cuda),
    ("quantize_pair", _quantize_pair_fake, _quantize_pair_cpu, _quantize_pair_cuda),
    ("dequantize", _dequantize_fake, _dequantize_cpu, _dequantize_cuda),
):
    _library.impl(_name, _cpu, "CPU")
    _library.impl(_name, _cuda, "CUDA")
    torch.library.register_fake(f"mxkernels::{_name}", _fake, lib=_library)

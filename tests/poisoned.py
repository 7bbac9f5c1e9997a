"""Run the cast kernels into poisoned memory, and compare what they wrote to the byte.

Every output lies between two guards and is full of POISON before the kernel runs, so that what is not written,
or written beside it, shows.
"""

from __future__ import annotations

from math import prod

import torch

from mxkernels import reference
from mxkernels.ops.dequantize_kernel import dequantize_launch
from mxkernels.ops.quantize_kernel import quantize_launch
from mxkernels.ops.quantize_pair_kernel import quantize_pair_launch
from mxkernels.spec import MXSpec
from mxkernels.tune import CastConfig

POISON = 0xAA
GUARD = 64  # bytes on each side; more than one vector store


def poisoned(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A tensor full of POISON between two guards."""
    size = prod(shape) * dtype.itemsize
    memory = torch.full((size + 2 * GUARD,), POISON, dtype=torch.uint8, device=device)
    return memory[GUARD : GUARD + size].view(dtype).view(shape)


def assert_guards_hold(output: torch.Tensor) -> None:
    memory = torch.empty(0, dtype=torch.uint8, device=output.device).set_(output.untyped_storage())
    assert (memory[:GUARD] == POISON).all(), "written before the output"
    assert (memory[-GUARD:] == POISON).all(), "written beyond the output"


def empty_parts(rows: int, cols: int, spec: MXSpec, device: torch.device) -> list[torch.Tensor]:
    """Poisoned codes, scales and, if asymmetric, offsets of a matrix."""
    blocks = spec.scale_shape(rows, cols)
    parts = [
        poisoned((rows, spec.packed_cols(cols)), torch.uint8, device),
        poisoned(blocks, torch.uint8, device),
    ]
    if not spec.symmetric:
        parts.append(poisoned(blocks, torch.float16, device))
    return parts


def quantize(
    matrix: torch.Tensor, spec: MXSpec, seed: int | None = None, pair: bool = False, config: CastConfig | None = None
) -> list[torch.Tensor]:
    """What the kernel makes of a matrix: codes, scale and, if asymmetric, offset; for a pair, those of the
    transpose after them."""
    rows, cols = matrix.shape
    parts = empty_parts(rows, cols, spec, matrix.device)
    if pair:
        parts += empty_parts(cols, rows, spec, matrix.device)
    seed_tensor = None
    if seed is not None:
        seed_tensor = torch.tensor([seed - 2**64 if seed >= 2**63 else seed], device=matrix.device)
    launch = quantize_pair_launch if pair else quantize_launch
    launch(matrix, spec, seed_tensor, parts, config).run(matrix.device)
    for part in parts:
        assert_guards_hold(part)
    return parts


def dequantize(
    parts: list[torch.Tensor], spec: MXSpec, cols: int, dtype: torch.dtype, config: CastConfig | None = None
) -> torch.Tensor:
    """What the kernel makes of codes, scale and, if asymmetric, offset."""
    codes, scale, offset = [*parts, None][:3]
    out = poisoned((codes.shape[0], cols), dtype, codes.device)
    dequantize_launch(codes, scale, offset, spec, out, config).run(codes.device)
    assert_guards_hold(out)
    return out


def expected_parts(matrix: torch.Tensor, spec: MXSpec, seed: int | None = None) -> list[torch.Tensor]:
    """What the reference makes of a matrix."""
    return [part for part in reference.quantize(matrix, spec, seed) if part is not None]


def expected_values(parts: list[torch.Tensor], spec: MXSpec, cols: int, dtype: torch.dtype) -> torch.Tensor:
    codes, scale, offset = [*parts, None][:3]
    return reference.dequantize(codes, scale, offset, spec, cols, dtype)


def assert_same_bytes(got: torch.Tensor, expected: torch.Tensor, what: object = "") -> None:
    """Same shape, dtype and bits; else say where they part."""
    assert (got.shape, got.dtype) == (expected.shape, expected.dtype), what
    differ = (_bits(got) != _bits(expected)).nonzero()
    if len(differ):
        first = tuple(differ[0].tolist())
        raise AssertionError(
            f"{what}: {len(differ)} of {got.numel()} differ, the first at {first}: "
            f"{got[first].item()!r} for {expected[first].item()!r}"
        )


def assert_same_parts(got: list[torch.Tensor], expected: list[torch.Tensor], what: object = "") -> None:
    for name, left, right in zip(("codes", "scale", "offset"), got, expected, strict=False):
        assert_same_bytes(left, right, f"{what}: {name}")
    assert len(got) == len(expected), what


def check_quantize(
    matrix: torch.Tensor, spec: MXSpec, seed: int | None = None, pair: bool = False, config: CastConfig | None = None
) -> list[torch.Tensor]:
    """The kernel's parts (of the straight orientation), once they equal the reference's; those of a pair too."""
    parts = quantize(matrix, spec, seed, pair, config)
    count = 2 if spec.symmetric else 3
    what = f"{spec} of {matrix.dtype} {list(matrix.shape)} strides {matrix.stride()} {config or ''}"
    assert_same_parts(parts[:count], expected_parts(matrix, spec, seed), what)
    if pair:
        assert_same_parts(parts[count:], expected_parts(matrix.T, spec, seed), f"{what}, turned")
    return parts[:count]


def _bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.element_size()])

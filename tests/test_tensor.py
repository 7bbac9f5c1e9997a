"""MXTensor on the CPU: its parts, its transpose, what it refuses."""

from __future__ import annotations

import copy
import operator
import pickle
import re
from typing import Any

import pytest
import torch

import mxkernels as mx

SPECS = [
    mx.mxfp4,
    mx.mxfp8_e5m2,
    mx.MXSpec("e2m3", "4x8", symmetric=False),
    mx.MXSpec("int4", "32x1", scale_rounding="ceil", symmetric=False),
    mx.MXSpec("e3m2", "2x2", "stochastic"),
]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def gaussian(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7))


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bits, so that NaN is itself and -0 is not 0."""
    width = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(width), b.contiguous().view(width))


def same_parts(a: mx.MXTensor, b: mx.MXTensor) -> bool:
    parts = [(a.codes, b.codes), (a.scale, b.scale)]
    if a.offset is not None and b.offset is not None:
        parts.append((a.offset, b.offset))
    described = (a.spec, a.shape, a.transposed, a.offset is None) == (b.spec, b.shape, b.transposed, b.offset is None)
    return described and all(same(x, y) for x, y in parts)


# --- shapes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("shape", [(1,), (70,), (33, 70), (2, 3, 40), (2, 1, 5, 9), (0, 8), (3, 0), (0,), (2, 0, 3)])
def test_parts_have_the_contract_s_shapes(spec: mx.MXSpec, shape: tuple[int, ...]) -> None:
    q = mx.quantize(gaussian(*shape), spec)
    rows = 1
    for extent in shape[:-1]:
        rows *= extent
    assert q.shape == torch.Size(shape)
    assert (q.codes.dtype, tuple(q.codes.shape)) == (torch.uint8, (*shape[:-1], spec.packed_cols(shape[-1])))
    assert (q.scale.dtype, tuple(q.scale.shape)) == (torch.uint8, spec.scale_shape(rows, shape[-1]))
    if spec.symmetric:
        assert q.offset is None
    else:
        assert (q.offset.dtype, q.offset.shape) == (torch.float16, q.scale.shape)
    for dtype in DTYPES:
        decoded = q.dequantize(dtype)
        assert (decoded.dtype, decoded.shape) == (dtype, q.shape)
    assert q.dequantize().dtype == mx.dequantize(q).dtype == torch.bfloat16


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_leading_dimensions_are_rows_and_a_vector_is_one(spec: mx.MXSpec) -> None:
    seed = 3 if spec.stochastic else None
    x = gaussian(2, 3, 40)
    q, matrix = mx.quantize(x, spec, seed), mx.quantize(x.reshape(6, 40), spec, seed)
    assert same(q.codes.reshape(6, -1), matrix.codes)
    assert same(q.scale, matrix.scale)
    assert same(q.dequantize().reshape(6, 40), matrix.dequantize())
    vector, row = mx.quantize(x[0, 0], spec, seed), mx.quantize(x[0, :1], spec, seed)
    assert same(vector.codes[None], row.codes)
    assert same(vector.scale, row.scale)


# --- the transpose -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_the_transpose_moves_nothing(spec: mx.MXSpec) -> None:
    q = mx.quantize(gaussian(33, 70), spec)
    turned = q.T
    assert turned.shape == (70, 33)
    assert turned.spec == spec.T
    for part in ("codes", "scale", "offset"):
        before, after = getattr(q, part), getattr(turned, part)
        if before is not None:
            assert after.data_ptr() == before.data_ptr()
            assert after.shape == before.T.shape
            assert after.stride() == before.T.stride()
    assert turned.transposed
    assert same_parts(turned.T, q)
    assert turned.nbytes == q.nbytes


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_the_transpose_decodes_to_the_transpose(spec: mx.MXSpec, dtype: torch.dtype) -> None:
    q = mx.quantize(gaussian(33, 70), spec)
    assert same(q.T.dequantize(dtype), q.dequantize(dtype).T)
    assert same(mx.dequantize(q.T, dtype), q.dequantize(dtype).T)


@pytest.mark.parametrize("shape", [(5,), (2, 3, 4)])
def test_only_matrices_are_transposed(shape: tuple[int, ...]) -> None:
    q = mx.quantize(gaussian(*shape), mx.mxfp4)
    with pytest.raises(ValueError, match=f"MXTensor.T needs two dimensions; this one has {len(shape)}"):
        _ = q.T


# --- parts that do not fit ---------------------------------------------------------------------------------


def parts_of(q: mx.MXTensor) -> dict[str, Any]:
    return {name: getattr(q, name) for name in ("codes", "scale", "offset", "spec", "shape")}


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("codes", lambda codes: codes[:, :-1], "codes is torch.uint8 [6, 14]; allowed here: torch.uint8 [6, 15]"),
        ("codes", lambda codes: codes[None], "codes is torch.uint8 [1, 6, 15]; allowed here: torch.uint8 [6, 15]"),
        ("codes", lambda codes: codes.to(torch.int8), "codes is torch.int8 [6, 15]; allowed here: torch.uint8 [6, 15]"),
        ("scale", lambda scale: scale[:1], "scale is torch.uint8 [1, 3]; allowed here: torch.uint8 [2, 3]"),
        ("scale", lambda scale: scale.float(), "scale is torch.float32 [2, 3]; allowed here: torch.uint8 [2, 3]"),
        ("offset", lambda offset: offset.float(), "offset is torch.float32 [2, 3]; allowed here: torch.float16 [2, 3]"),
        ("offset", lambda offset: offset[:, :1], "offset is torch.float16 [2, 1]; allowed here: torch.float16 [2, 3]"),
        ("offset", lambda offset: None, "offset is None, but e2m3 4x8 rtne even asymmetric needs float16 [2, 3]"),
    ],
)
def test_parts_that_do_not_fit(part: str, change: Any, message: str) -> None:
    parts = parts_of(mx.quantize(gaussian(6, 20), mx.MXSpec("e2m3", "4x8", symmetric=False)))
    parts[part] = change(parts[part])
    with pytest.raises(ValueError, match=re.escape(message)):
        mx.MXTensor(**parts)


def test_a_symmetric_tensor_has_no_offset() -> None:
    parts = parts_of(mx.quantize(gaussian(6, 20), mx.mxfp4))
    parts["offset"] = torch.zeros(6, 1, dtype=torch.float16)
    with pytest.raises(ValueError, match="offset is given, but e2m1 1x32 rtne even symmetric has none"):
        mx.MXTensor(**parts)


def test_a_transposed_tensor_is_checked_as_stored() -> None:
    turned = mx.quantize(gaussian(6, 20), mx.MXSpec("e2m3", "4x8", symmetric=False)).T
    mx.MXTensor(**parts_of(turned), transposed=True)
    with pytest.raises(ValueError, match=r"^codes is torch\.uint8"):
        mx.MXTensor(**parts_of(turned), transposed=False)


# --- moving, saying, refusing ------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_to_a_device(spec: mx.MXSpec) -> None:
    q = mx.quantize(gaussian(33, 70), spec)
    assert q.device == torch.device("cpu")
    assert same_parts(q.to("cpu"), q)
    meta = q.T.to(torch.device("meta"))
    assert meta.device == torch.device("meta")
    assert (meta.spec, meta.shape, meta.transposed) == (spec.T, (70, 33), True)


def test_to_a_dtype_says_what_to_do() -> None:
    with pytest.raises(TypeError, match=r"takes a device, not torch.bfloat16; dequantize\(torch.bfloat16\) converts"):
        mx.quantize(gaussian(2, 32), mx.mxfp4).to(torch.bfloat16)  # type: ignore[arg-type]


def test_nbytes() -> None:
    x = gaussian(64, 1024)
    assert mx.quantize(x, mx.mxfp4).nbytes == 64 * 1024 * 4.25 / 8
    asymmetric = mx.MXSpec("e2m3", "4x8", symmetric=False)
    assert mx.quantize(x, asymmetric).nbytes == 64 * 1024 * asymmetric.bits_per_element / 8


def test_repr_is_one_readable_line() -> None:
    q = mx.quantize(gaussian(64, 1024), mx.mxfp4)
    assert repr(q) == "MXTensor(64x1024, e2m1 1x32 rtne even symmetric, 34,816 bytes on cpu)"
    assert repr(q.T) == "MXTensor(1024x64, e2m1 32x1 rtne even symmetric, transposed, 34,816 bytes on cpu)"


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_copied_and_pickled(spec: mx.MXSpec) -> None:
    q = mx.quantize(gaussian(6, 40), spec).T
    assert same_parts(copy.deepcopy(q), q)
    assert same_parts(pickle.loads(pickle.dumps(q)), q)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("add", lambda q, x: torch.add(q, x)),
        ("matmul", lambda q, x: torch.matmul(x, q)),
        ("linear", lambda q, x: torch.nn.functional.linear(x, q)),
        ("cat", lambda q, x: torch.cat([x, q])),
        ("zeros_like", lambda q, x: torch.zeros_like(q)),
    ],
)
def test_torch_functions_fail_with_a_sentence(name: str, call: Any) -> None:
    x = gaussian(32, 32)
    with pytest.raises(
        TypeError, match=rf"{name} does not take an MXTensor; call dequantize\(\) on it for a plain tensor"
    ):
        call(mx.quantize(x, mx.mxfp4), x)


@pytest.mark.parametrize("operate", [operator.add, operator.mul, operator.matmul])
def test_operators_fail_by_name(operate: Any) -> None:
    x = gaussian(32, 32)
    q = mx.quantize(x, mx.mxfp4)
    for operands in ((q, x), (x, q), (q, q)):
        with pytest.raises(TypeError, match=r"^unsupported operand type.*'MXTensor'"):
            operate(*operands)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.uint8])
def test_dequantize_to_another_dtype(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=f"dtype is {dtype}; allowed: torch.bfloat16, torch.float16, torch.float32"):
        mx.quantize(gaussian(2, 32), mx.mxfp4).dequantize(dtype)

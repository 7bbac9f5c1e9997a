"""The functional ops, registered with `torch.library` as `torch.ops.mxkernels.*`.

CPU tensors go to the reference, CUDA tensors to Triton, which is imported by the first of those. A spec
travels as its text (`str(spec)`), since schemas know no dataclasses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch

from .. import gpu, reference, tune
from ..folded import FoldedTensor, folded_spec, window
from ..prepared import PreparedTensor
from ..spec import MXSpec
from ..tensor import MXTensor, check_parts
from . import products
from .operand import (
    OUT_DTYPES,
    Operand,
    as_matrix,
    check_bias,
    check_operands,
    decoded,
    in_shape,
    launchable,
    operand_a,
    operand_b,
    padded,
)
from .paths import PATHS, Explanation, choose, explanation, refusal, streams
from .plan import Plan, Tensors, recorded

__all__ = ["dequantize", "explain", "fold", "hadamard", "linear", "matmul", "quantize", "quantize_pair"]

INPUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

_library = torch.library.Library("mxkernels", "DEF")
_library.define("quantize(Tensor x, str spec, Tensor? seed) -> Tensor[]")
_library.define("quantize_pair(Tensor x, str spec, Tensor? seed) -> Tensor[]")
_library.define(
    "dequantize(Tensor codes, Tensor scale, Tensor? offset, str spec, SymInt cols, ScalarType dtype) -> Tensor"
)
_library.define("quantize_fold(Tensor x, str spec, Tensor? seed) -> Tensor[]")
_library.define("fold(Tensor codes, Tensor scale, str kind, SymInt rows, SymInt k) -> Tensor[]")
_library.define(
    "matmul(Tensor[] a, str a_kind, SymInt[] a_rows, Tensor[] b, str b_kind, SymInt n, SymInt k, "
    "Tensor? bias, ScalarType dtype, str path) -> Tensor"
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
    op = _quantize_cuda if is_eager(x) else torch.ops.mxkernels.quantize.default
    parts = op(_plain(x), str(spec), _seed_tensor(seed, spec, x))
    return _as_tensor(parts, spec, x.shape)


def quantize_pair(x: torch.Tensor, spec: MXSpec, seed: int | torch.Tensor | None = None) -> tuple[MXTensor, MXTensor]:
    """Both orientations from one read: `(quantize(x, spec, seed), quantize(x.T, spec, seed))`.

    Arguments and errors are those of `quantize`; of a tensor with other than two dimensions, `x.T` is the
    transpose of the matrix `[rows, columns]` that it flattens to.
    """
    _check_input(x, spec)
    op = _quantize_pair_cuda if is_eager(x) else torch.ops.mxkernels.quantize_pair.default
    parts = op(_plain(x), str(spec), _seed_tensor(seed, spec, x))
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
    if q.transposed or not is_eager(q.codes, q.scale):
        return q.dequantize(dtype)
    return _dequantize_cuda(q.codes, q.scale, q.offset, str(q.spec), q.shape[-1], dtype)


def fold(
    x: MXTensor | torch.Tensor, spec: MXSpec | None = None, seed: int | torch.Tensor | None = None
) -> FoldedTensor:
    """Rewrite an MX operand so that FP8 tensor cores multiply it, without loss: for `matmul`, once for many.

    Args:
        x: a symmetric MXTensor of 4 or 6 bit elements, any block, in either orientation. It is folded along
            its last dimension, which must be the product's reduction: `matmul(fold(a), fold(b.T).T)`. Or a
            plain tensor, which `quantize` would take: it is quantised first, by the same kernel where its
            rows are contiguous and elements have 4 bits.
        spec: what a plain tensor is quantised to.
        seed: as `quantize` takes it.

    Returns:
        A FoldedTensor of x's shape on x's device, a byte an element: `fold(quantize(x, spec, seed))`.

    Raises:
        TypeError, ValueError: names the argument and what is allowed.
    """
    if isinstance(x, MXTensor):
        if spec is not None or seed is not None:
            raise ValueError("spec or seed is given, but x is an MXTensor; allowed with one: neither")
        after = _folded(x.spec, "x")
        operand = operand_a(x)
        fold_codes = _fold_cuda if is_eager(x.codes) else torch.ops.mxkernels.fold.default
        parts = fold_codes(operand.parts[0], operand.parts[1], operand.kind, operand.rows, x.shape[-1])
    else:
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"x is a {type(x).__name__}; allowed: an MXTensor or a torch.Tensor")
        if spec is None:
            raise TypeError("spec is None; allowed with a plain tensor: MXSpec, such as mxkernels.mxfp4")
        _check_input(x, spec)
        after = _folded(spec, "spec")
        _check_matrix(x)
        fold_plain = _quantize_fold_cuda if is_eager(x) else torch.ops.mxkernels.quantize_fold.default
        parts = fold_plain(_plain(x), str(spec), _seed_tensor(seed, spec, x))
    codes = parts[0]
    if codes.shape != x.shape:
        codes = codes.view(*x.shape[:-1], codes.shape[-1])[..., : x.shape[-1]]
    return FoldedTensor(MXTensor.unchecked(codes, parts[1], None, after, x.shape), *parts[2:])


def _folded(spec: MXSpec, name: str) -> MXSpec:
    after = folded_spec(spec)
    if after is None:
        raise ValueError(f"{name} is {spec}; allowed: symmetric, with elements of 4 or 6 bits")
    return after


def matmul(
    a: torch.Tensor | MXTensor | FoldedTensor,
    b: torch.Tensor | MXTensor | FoldedTensor | PreparedTensor,
    *,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    path: str = "auto",
) -> torch.Tensor:
    """The matrix product `a @ b + bias` of what the operands decode to, accumulated in fp32, rounded once.

    Args:
        a: `[..., M, K]`; an MXTensor, a FoldedTensor, or a bfloat16 or float16 tensor. A vector is one row.
        b: `[K, N]`; the same, or the `.T` of a PreparedTensor. For the products of training use `.T`, which
            moves nothing: `matmul(x, w.T)`, `matmul(dy, w)`, `matmul(dy.T, x)`.
        bias: `[N]`, bfloat16, float16 or float32.
        out_dtype: bfloat16, float16 or float32.
        path: "auto"; or "native", "fp8" or "wide" to insist on one (`explain` says which serves).

    Returns:
        `[..., M, N]` on the operands' device. The same bits for the same operands, every time.

    Raises:
        TypeError, ValueError: names the argument and what is allowed, or why the path cannot serve.

    A block that holds NaN makes NaN every output that it enters. Error bound: `docs/numerics.md`.
    """
    *leading, n, k = check_operands(a, b)
    check_bias(bias, n, a.device)
    if out_dtype not in OUT_DTYPES:
        raise TypeError(f"out_dtype is {out_dtype}; allowed: {', '.join(map(str, OUT_DTYPES))}")
    left, right = _sides(a, b)
    if path != "auto":
        _insist(path, left, right, k, a.device)
    bias = None if bias is None else _plain(bias)
    eager = is_eager(*left.parts, *right.parts, bias)
    op = _matmul_cuda if eager else torch.ops.mxkernels.matmul.default
    return op(left.parts, left.kind, leading, right.parts, right.kind, n, k, bias, out_dtype, path)


def explain(
    a: torch.Tensor | MXTensor | FoldedTensor,
    b: torch.Tensor | MXTensor | FoldedTensor | PreparedTensor,
    *,
    path: str = "auto",
) -> Explanation:
    """Which path, instruction and config `matmul(a, b)` takes, and why; `print` it.

    It may wait for the device, to see whether folded operands' exponents fit. Arguments and errors are those
    of `matmul`.
    """
    k = check_operands(a, b)[-1]
    left, right = (Operand.of_kind(launchable(side.parts, side.kind), side.kind, side.rows) for side in _sides(a, b))
    if path != "auto":
        _insist(path, left, right, k, a.device)
    return explanation(left, right, k, a.device, path)


def _sides(a: torch.Tensor | MXTensor | FoldedTensor, b: Any) -> tuple[Operand, Operand]:
    """Both operands of a product. Weights that were prepared for few rows are restored for others."""
    left = operand_a(a)
    if isinstance(b, PreparedTensor) and not (a.device.type == "cuda" and b.transposed and streams(left)):
        b = b.restore()
    return left, operand_b(b)


def _insist(path: str, a: Operand, b: Operand, k: int, device: torch.device) -> None:
    """Raise ValueError where a path by name cannot serve. Looks at the data unless that would break a capture."""
    if path not in PATHS:
        raise ValueError(f"path is {path!r}; allowed: auto, {', '.join(PATHS)}")
    if device.type == "cpu":
        raise ValueError(f"path is {path!r}, but the CPU has none of them; allowed there: auto")
    reason = refusal(path, a, b, gpu.device_capabilities(device))
    if reason is None and path == "fp8" and not torch.compiler.is_compiling():
        if not torch.cuda.is_current_stream_capturing():
            reason = products.outside_window(a, b, k)
    if reason is not None:
        raise ValueError(f"path is {path!r}, which cannot serve: {reason}")


def _check_input(x: torch.Tensor, spec: MXSpec) -> None:
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"x is a {type(x).__name__}; allowed: a torch.Tensor")
    if not isinstance(spec, MXSpec):
        raise TypeError(f"spec is a {type(spec).__name__}; allowed: MXSpec, such as mxkernels.mxfp4")


def is_eager(*tensors: torch.Tensor | None) -> bool:
    """Whether nothing but the kernel would come of dispatching an op on `tensors`, which takes longer than launching
    it."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return False
    for x in tensors:
        if x is not None and not (x.is_cuda and type(x) in _PLAIN_TYPES and not x.is_neg()):
            return False
    return True


_PLAIN_TYPES = (torch.Tensor, torch.nn.Parameter)


def _plain(x: torch.Tensor) -> torch.Tensor:
    return x.detach() if x.requires_grad else x


def _check_matrix(x: torch.Tensor) -> None:
    if x.dtype not in INPUT_DTYPES:
        raise TypeError(f"x is {x.dtype}; allowed: {', '.join(map(str, INPUT_DTYPES))}")
    if x.dim() == 0:
        raise ValueError("x has no dimensions; allowed: one or more (x.reshape(1) makes a vector of it)")


def _seed_tensor(seed: int | torch.Tensor | None, spec: MXSpec, x: torch.Tensor) -> torch.Tensor | None:
    """The seed on x's device, without a synchronisation; None for nearest-even."""
    if not spec.stochastic:
        if seed is not None:
            raise ValueError("seed is given, but rounding is rtne, which draws nothing; allowed: None")
        return None
    device = x.device
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


def _matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    return prod(shape[:-1]), shape[-1]


def _as_tensor(parts: list[torch.Tensor], spec: MXSpec, shape: tuple[int, ...]) -> MXTensor:
    return MXTensor.unchecked(parts[0], parts[1], None if spec.symmetric else parts[2], spec, shape)


def _quantized(
    empty: Callable[..., torch.Tensor], shape: Sequence[int], spec: MXSpec, pair: bool = False
) -> list[torch.Tensor]:
    """Codes, scale and, if asymmetric, offset of a tensor of `shape`, and then of its transpose, from
    `empty(*shape, dtype=dtype)`."""
    rows, cols = _matrix_shape(shape)
    blocks = spec.scale_shape(rows, cols)
    parts = [empty(*shape[:-1], spec.packed_cols(cols), dtype=torch.uint8), empty(*blocks, dtype=torch.uint8)]
    if not spec.symmetric:
        parts.append(empty(*blocks, dtype=torch.float16))
    return parts + _quantized(empty, (cols, rows), spec) if pair else parts


def _quantize_fake(x: torch.Tensor, text: str, seed: torch.Tensor | None) -> list[torch.Tensor]:
    _check_matrix(x)
    return _quantized(x.new_empty, x.shape, MXSpec.parse(text))


def _quantize_pair_fake(x: torch.Tensor, text: str, seed: torch.Tensor | None) -> list[torch.Tensor]:
    _check_matrix(x)
    return _quantized(x.new_empty, x.shape, MXSpec.parse(text), pair=True)


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
    def run(plan: Plan, inputs: Tensors) -> list[torch.Tensor]:
        _check_matrix(x)
        spec = MXSpec.parse(text)
        parts = _quantized(plan.buffer, x.shape, spec, pair)
        if pair:
            from .quantize_pair_kernel import quantize_pair_launch

            plan.launch(quantize_pair_launch(inputs[0], spec, inputs[1], parts))
        else:
            from .quantize_kernel import quantize_launch

            plan.launch(quantize_launch(inputs[0], spec, inputs[1], parts))
        return parts

    def prepare() -> Tensors:
        _check_matrix(x)
        return [as_matrix(x), seed]  # a view, or a copy where the leading dimensions do not merge

    return recorded(("quantize", text, pair), [x, seed], run, None if x.dim() == 2 else prepare)


def _quantize_pair_cuda(x: torch.Tensor, text: str, seed: torch.Tensor | None) -> list[torch.Tensor]:
    return _quantize_cuda(x, text, seed, pair=True)


def _dequantize_fake(
    codes: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor | None, text: str, cols: int, dtype: torch.dtype
) -> torch.Tensor:
    return codes.new_empty(_dequantized_shape(codes, scale, offset, text, cols, dtype), dtype=dtype)


def _dequantized_shape(
    codes: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor | None, text: str, cols: int, dtype: torch.dtype
) -> tuple[int, ...]:
    """Raises TypeError or ValueError for what does not fit."""
    if dtype not in INPUT_DTYPES:
        raise TypeError(f"dtype is {dtype}; allowed: {', '.join(map(str, INPUT_DTYPES))}")
    shape = (*codes.shape[:-1], cols)
    check_parts(codes, scale, offset, MXSpec.parse(text), shape)
    return shape


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
    def prepare() -> Tensors:
        return [part if part is None else part.contiguous() for part in (codes, scale, offset)]

    def run(plan: Plan, inputs: Tensors) -> list[torch.Tensor]:
        from .dequantize_kernel import dequantize_launch

        shape = _dequantized_shape(codes, scale, offset, text, cols, dtype)
        out = plan.buffer(*shape, dtype=dtype)
        matrix = out.view(_matrix_shape(shape))
        plan.launch(dequantize_launch(inputs[0], inputs[1], inputs[2], MXSpec.parse(text), matrix))
        return [out]

    return recorded(("dequantize", text, cols, dtype), [codes, scale, offset], run, prepare)[0]


def _fold_fake(codes: torch.Tensor, scale: torch.Tensor, kind: str, rows: int, k: int) -> list[torch.Tensor]:
    operand = Operand.of_kind([codes, scale], kind, rows)
    assert operand.spec is not None
    return _empty_folded(codes, operand.spec.T if operand.turned else operand.spec, rows, k)


def _empty_folded(like: torch.Tensor, spec: MXSpec, rows: int, k: int) -> list[torch.Tensor]:
    blocks = spec.scale_shape(rows, k)
    return [
        like.new_empty((rows, padded(k)), dtype=torch.uint8),
        like.new_empty(blocks, dtype=torch.uint8),
        like.new_empty(blocks[0], dtype=torch.uint8),
        like.new_empty(1, dtype=torch.int32),
        like.new_empty(blocks[0], dtype=torch.uint8),
    ]


def _quantize_fold_fake(x: torch.Tensor, text: str, seed: torch.Tensor | None) -> list[torch.Tensor]:
    _check_matrix(x)
    rows, cols = _matrix_shape(x.shape)
    return _empty_folded(x, MXSpec.parse(text), rows, cols)


def _quantize_fold_cpu(x: torch.Tensor, text: str, seed: torch.Tensor | None) -> list[torch.Tensor]:
    rows, cols = _matrix_shape(x.shape)
    codes, scale = _quantize_cpu(x.reshape(rows, cols), text, seed)
    return _fold_cpu(codes, scale, "packed straight " + text, rows, cols)


def _quantize_fold_cuda(x: torch.Tensor, text: str, seed: torch.Tensor | None) -> list[torch.Tensor]:
    spec = MXSpec.parse(text)
    if x.numel() == 0:
        return [part.zero_() for part in _quantize_fold_fake(x, text, seed)]

    def run(plan: Plan, inputs: Tensors) -> list[torch.Tensor]:
        codes, *rest = products.plan_quantize_fold(plan, inputs[0], spec, inputs[1])
        return [codes.view(torch.uint8), *rest]

    prepare = None if x.dim() == 2 else lambda: [as_matrix(x), seed]
    return recorded(("quantize_fold", text), [x, seed], run, prepare)


def _fold_cpu(codes: torch.Tensor, scale: torch.Tensor, kind: str, rows: int, k: int) -> list[torch.Tensor]:
    operand = Operand.of_kind([codes, scale], kind, rows)
    assert operand.spec is not None
    found = window(operand.spec.element)
    assert found is not None
    unpacked = reference.unpack(as_matrix(codes), operand.spec.element, rows if operand.turned else k)
    spec = operand.spec
    if operand.turned:
        unpacked, scale, spec = unpacked.T, scale.T, spec.T
    folded, *rest = reference.fold(unpacked, scale, spec, found)
    return [torch.nn.functional.pad(folded, (0, padded(k) - k)), *(part.contiguous() for part in rest)]


def _fold_cuda(codes: torch.Tensor, scale: torch.Tensor, kind: str, rows: int, k: int) -> list[torch.Tensor]:
    if rows == 0 or k == 0:
        return [part.zero_() for part in _fold_fake(codes, scale, kind, rows, k)]

    def prepare() -> Tensors:
        return launchable([codes, scale], kind)

    def run(plan: Plan, inputs: Tensors) -> list[torch.Tensor]:
        folded, *rest = products.plan_fold(plan, Operand.of_kind(inputs, kind, rows), k).parts
        return [folded.view(torch.uint8), *rest]

    return recorded(("fold", kind, rows, k), [codes, scale], run, prepare)


def _matmul_fake(
    a: Sequence[torch.Tensor], a_kind: str, a_rows: list[int], b: Sequence[torch.Tensor], b_kind: str, n: int, k: int,
    bias: torch.Tensor | None, dtype: torch.dtype, path: str,
) -> torch.Tensor:  # fmt: skip
    return a[0].new_empty((*a_rows, n), dtype=dtype)


def _matmul_cpu(
    a: Sequence[torch.Tensor], a_kind: str, a_rows: list[int], b: Sequence[torch.Tensor], b_kind: str, n: int, k: int,
    bias: torch.Tensor | None, dtype: torch.dtype, path: str,
) -> torch.Tensor:  # fmt: skip
    left = decoded(Operand.of_kind(a, a_kind, prod(a_rows)), k)
    right = decoded(Operand.of_kind(b, b_kind, n), k)
    return reference.matmul(left, right.T, bias, dtype).reshape(*a_rows, n)


def _matmul_cuda(
    a: Sequence[torch.Tensor], a_kind: str, a_rows: list[int], b: Sequence[torch.Tensor], b_kind: str, n: int, k: int,
    bias: torch.Tensor | None, dtype: torch.dtype, path: str,
) -> torch.Tensor:  # fmt: skip
    m, device = prod(a_rows), a[0].device
    if m == 0 or n == 0 or k == 0:
        out = torch.zeros((*a_rows, n), dtype=dtype, device=device)
        return out if bias is None else out + bias.to(dtype)

    def sides(inputs: Tensors) -> tuple[Operand, Operand]:
        return Operand.of_kind(inputs[: len(a)], a_kind, m), Operand.of_kind(inputs[len(a) : -1], b_kind, n)

    def prepare() -> Tensors:
        return [*launchable(a, a_kind), *launchable(b, b_kind), None if bias is None else bias.contiguous()]

    if gpu.device_capabilities(device).block_scaled_mma and path in ("auto", "native"):
        ready = prepare()
        left, right = sides(ready)
        if path == "native" or choose(left, right, gpu.device_capabilities(device)) == "native":
            made = tune.first_launch(lambda: products.native_product(left, right, k, ready[-1], dtype, device))
            return made.view(*a_rows, n)

    def run(plan: Plan, inputs: Tensors) -> list[torch.Tensor]:
        left, right = sides(inputs)
        chosen = choose(left, right, gpu.device_capabilities(device)) if path == "auto" else path
        return [in_shape(products.plan_product(plan, left, right, k, inputs[-1], dtype, chosen), *a_rows, n)]

    key = ("matmul", a_kind, b_kind, tuple(a_rows), n, k, dtype, path)
    return recorded(key, [*a, *b, bias], run, prepare)[0]


for _name, _fake, _cpu, _cuda in (
    ("quantize", _quantize_fake, _quantize_cpu, _quantize_cuda),
    ("quantize_pair", _quantize_pair_fake, _quantize_pair_cpu, _quantize_pair_cuda),
    ("dequantize", _dequantize_fake, _dequantize_cpu, _dequantize_cuda),
    ("quantize_fold", _quantize_fold_fake, _quantize_fold_cpu, _quantize_fold_cuda),
    ("fold", _fold_fake, _fold_cpu, _fold_cuda),
    ("matmul", _matmul_fake, _matmul_cpu, _matmul_cuda),
):
    _library.impl(_name, _cpu, "CPU")
    _library.impl(_name, _cuda, "CUDA")
    torch.library.register_fake(f"mxkernels::{_name}", _fake, lib=_library)

# What follows is composed of the ops above.
from . import restoration  # noqa: E402, F401
from .linear_function import linear  # noqa: E402
from .transform import hadamard  # noqa: E402

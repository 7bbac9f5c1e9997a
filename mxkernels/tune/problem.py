"""Problem: what a config is chosen for."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..spec import MXSpec

# What has a config of its own, with what its formats, dtype, layout and shape are.
OPS: dict[str, str] = {
    "quantize": "spec; dtype of the input; rows or columns contiguous; rows x columns",
    "quantize_pair": "spec; dtype of the input; rows or columns contiguous; rows x columns",
    "dequantize": "spec; dtype of the output; rows contiguous; rows x columns",
    "fold": "spec; FP8 format; straight or turned; rows x columns as stored",
    "quantize_fold": "spec; dtype of the input; rows contiguous; rows x columns",
    "multiply": "dtypes of the carriers; dtype of the output; which of them lie turned; M x N x K",
    "stream": "spec of the weights; dtype of the output; prepared or stored; M x N x K",
    "decode_multiply": "both operands; dtype of the output; bf16 parts or exact; M x N x K",
    "native": "both element formats; dtype of the output; scales swizzled or not; M x N x K",
}

_CASTS = ("quantize", "quantize_pair", "dequantize", "fold", "quantize_fold")  # of matrices; the others are products
_FP8_DTYPES = ("float8_e4m3fn", "float8_e5m2")
_SIDES = ("straight", "turned")
# What the public functions take or give; what is folded is bytes on GPUs that have no FP8.
_DTYPES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(OPS, ("bfloat16", "float16", "float32")),
    "fold": (*_FP8_DTYPES, "uint8"),
}
_LAYOUTS: dict[str, tuple[str, ...]] = {
    "quantize": ("rows", "columns"),
    "quantize_pair": ("rows", "columns"),
    "dequantize": ("rows",),
    "fold": _SIDES,
    "quantize_fold": ("rows",),
    "multiply": tuple(f"{a} * {b}" for a in _SIDES for b in _SIDES),
    "stream": ("prepared", "stored"),
    "decode_multiply": ("parts", "exact"),
    "native": ("swizzled", "plain"),
}
_CARRIERS = (*_FP8_DTYPES, "bfloat16", "float32")
_NATIVE_ELEMENTS = ("e2m1", "e4m3", "e5m2")


@dataclass(frozen=True)
class Problem:
    """One op on operands of one kind and shape.

    Attributes:
        op: a name in OPS.
        formats: a spec's text, or those of two operands with ` * ` between them.
        dtype: torch's name of the plain side, without `torch.`.
        layout: what the kernel may take for granted about memory, or how it treats its operands.
        shape: rows and columns; or M, N and K.
    """

    op: str
    formats: str
    dtype: str
    layout: str
    shape: tuple[int, ...]

    @classmethod
    def of(cls, op: str, formats: object, dtype: torch.dtype, layout: str, *shape: int) -> Problem:
        return cls(op, str(formats), dtype_name(dtype), layout, shape)

    @property
    def key(self) -> str:
        """What problems that share a config have in common: the first dimension counts as the next power of two."""
        first, *rest = self.shape
        bucket = 1 << max(first - 1, 0).bit_length()
        return " | ".join((self.op, self.formats, self.dtype, self.layout, "x".join(map(str, (bucket, *rest)))))

    @classmethod
    def of_key(cls, key: str) -> Problem:
        """The largest of the problems that a key stands for.

        Raises:
            ValueError: it is no key.
        """
        try:
            op, formats, dtype, layout, shape = key.split(" | ")
            problem = cls(op, formats, dtype, layout, tuple(map(int, shape.split("x"))))
            is_key = op in OPS and problem.key == key and min(problem.shape) >= 0
        except ValueError:
            is_key = False
        if not is_key:
            raise ValueError(f"{key[:200]!r} is no key; allowed: op | formats | dtype | layout | shape, as Problem.key")
        return problem

    def __str__(self) -> str:
        return " ".join((self.op, self.formats, self.dtype, self.layout, "x".join(map(str, self.shape))))


def impossibility(problem: Problem) -> str | None:
    """What of a problem no call of its op can have, so that no config for it is ever looked up; None if nothing is
    known against it."""
    op, dimensions = problem.op, 2 if problem.op in _CASTS else 3
    if len(problem.shape) != dimensions:
        return f"its shape is {'x'.join(map(str, problem.shape))}; allowed for {op}: {dimensions} dimensions"
    return (
        _not_of("layout", problem.layout, _LAYOUTS[op], op)
        or _not_of("dtype", problem.dtype, _DTYPES[op], op)
        or _wrong_formats(op, problem.formats)
    )


def op_of(key: str) -> str:
    """The op of a `Problem.key`, or what stands in its place."""
    return key.partition(" | ")[0]


def dtype_name(dtype: torch.dtype) -> str:
    """`bfloat16`."""
    return str(dtype).removeprefix("torch.")


def _not_of(name: str, value: str, allowed: tuple[str, ...], op: str) -> str | None:
    return None if value in allowed else f"its {name} is {value!r}; allowed for {op}: {', '.join(allowed)}"


def _wrong_formats(op: str, formats: str) -> str | None:
    if op in _CASTS or op == "stream":
        return _wrong_spec(formats)
    sides = formats.split(" * ")
    if len(sides) != 2:
        return f"its formats are {formats!r}; allowed for {op}: those of two operands, with ' * ' between them"
    return next((wrong for side in sides if (wrong := _wrong_side(op, side))), None)


def _wrong_side(op: str, side: str) -> str | None:
    """Why no operand of a product is so."""
    if op == "multiply":
        return None if side in _CARRIERS else f"{side!r} is no dtype of a carrier; allowed: {', '.join(_CARRIERS)}"
    if op == "native":
        return None if side in _NATIVE_ELEMENTS else f"{side!r} is no element; allowed: {', '.join(_NATIVE_ELEMENTS)}"
    if side in ("plain", "plain turned"):
        return None
    state, lying, spec = (*side.split(" ", 2), "", "")[:3]
    if state in ("packed", "folded") and lying in _SIDES:
        return _wrong_spec(spec)
    return f"{side!r} is no operand; allowed: plain, plain turned, or packed or folded, straight or turned, and a spec"


def _wrong_spec(text: str) -> str | None:
    try:
        spec = MXSpec.parse(text)
    except ValueError as error:
        return str(error)
    return None if str(spec) == text else f"spec {text!r} is written otherwise; allowed: {spec}"

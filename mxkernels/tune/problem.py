"""Problem: what a config is chosen for."""

from __future__ import annotations

from dataclasses import dataclass

import torch

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
        except ValueError:
            problem = None
        if problem is None or op not in OPS or problem.key != key or min(problem.shape) < 0:
            raise ValueError(f"{key[:200]!r} is no key; allowed: op | formats | dtype | layout | shape, as Problem.key")
        return problem

    def __str__(self) -> str:
        return " ".join((self.op, self.formats, self.dtype, self.layout, "x".join(map(str, self.shape))))


def op_of(key: str) -> str:
    """The op of a `Problem.key`, or what stands in its place."""
    return key.partition(" | ")[0]


def dtype_name(dtype: torch.dtype) -> str:
    """`bfloat16`."""
    return str(dtype).removeprefix("torch.")

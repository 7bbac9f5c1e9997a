"""Matrix products as workloads: what they write has to be within the contract's bound."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from ..ops.launch import Launch
from ..ops.matmul_hopper_kernel import hopper_matmul_launch, hopper_serves
from ..ops.matmul_kernel import matmul_launch
from ..ops.matmul_native_kernel import matmul_native_launch, native_config
from ..ops.matmul_small_kernel import matmul_small_launches
from ..ops.matmul_wide_kernel import WideOperand, matmul_wide_launch
from ..ops.native_operand import native_operand
from ..ops.operand import Operand
from ..prepared import BAND, GROUP, prepare
from ..spec import MXSpec
from ..tensor import MXTensor
from ..tune import Config, HopperConfig, Problem, carrier_config, small_matmul_config, wide_matmul_config
from ..tune.limits import Limits
from ..tune.model import Work
from .workload import META, POISON, Draw, Workload, signs, total_bytes, with_offset

CHECKED_ROWS = 512  # drawn at random, and the first and last
PROMOTION = 512  # G in the contract's bound of FP8 products
_SIGNIFICANT_BITS = {torch.bfloat16: 8, torch.float16: 11, torch.float32: 24}
# By carrier, what folds to it.
_FOLDED_FROM = {torch.float8_e5m2: "e2m1", torch.float8_e4m3fn: "e2m3"}


class Product(Workload):
    """A workload whose output `[M, N]` has to be within the contract's bound of the product of decoded operands; and
    of `signs`, that product, which is exact. The bound alone leaves room for much that is wrong in FP8."""

    def __init__(
        self, problem: Problem, device: torch.device, limits: Limits, source: torch.device, draw: Draw
    ) -> None:
        super().__init__(problem, device, limits, source, draw)
        self.m, self.n, self.k = problem.shape
        self.out = self.empty(self.m, self.n, dtype=self.dtype)
        self.prepare()
        self._bounds: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None

    def prepare(self) -> None:
        """Make the operands, and `work`."""
        raise NotImplementedError

    def decoded(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The operands in float64, `[M, K]` and `[N, K]`."""
        raise NotImplementedError

    def magnitudes(self) -> tuple[torch.Tensor, torch.Tensor]:
        """|a| and |b| of the contract's bound."""
        a, b = self.decoded()
        return a.abs(), b.abs()

    @property
    def factor(self) -> float:
        """Of the contract's bound: what the sum of all |a||b| is multiplied by."""
        return self.k * 2.0**-24

    def poison(self) -> None:
        self.out.view(torch.uint8).fill_(POISON)

    def difference(self) -> str | None:
        rows, expected, allowed = self._expected()
        error = (self.out[rows].double() - expected).abs()
        outside = ~(error <= allowed)  # which NaN is too
        if outside.any():
            what = "wrong, in a sum that is exact" if self.draw is signs else "outside of the contract's bound"
            return f"{outside.sum().item()} of {error.numel()} numbers are {what}"
        return None

    def _expected(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Some rows, what they are, and how far off they may be.

        That is the contract's bound, and what rounding the output adds: of p significant bits up to 2^-p of the
        number, or half of the least one, 2^-25 of fp16's.
        """
        if self._bounds is None:
            few = torch.randperm(self.m, generator=torch.Generator().manual_seed(0))[:CHECKED_ROWS]
            rows = torch.cat([few, torch.tensor([0, self.m - 1])]).unique().to(self.device)
            a, b = self.decoded()
            expected = a[rows] @ b.T
            if self.draw is signs:
                self._bounds = rows, expected.to(self.dtype).double(), torch.zeros_like(expected)
                return self._bounds
            a_size, b_size = self.magnitudes()
            allowed = self.factor * (a_size[rows] @ b_size.T) + self.k * 2.0**-149
            rounding = 2.0 ** -_SIGNIFICANT_BITS[self.dtype] * (expected.abs() + allowed)
            if self.dtype == torch.float16:
                rounding += 2.0**-25
            self._bounds = rows, expected, allowed + (0 if self.dtype == torch.float32 else rounding)
        return self._bounds


class Multiply(Product):
    """Carriers: FP8 with a power of two a row, as folding Gaussian values gives them; bf16; or tf32 numbers."""

    @staticmethod
    def rule(problem: Problem, limits: Limits) -> Config:
        m, n, k = problem.shape
        carrier, out_dtype = _carriers(problem)[0], getattr(torch, problem.dtype)
        return carrier_config(m, n, k, carrier, out_dtype, on_hopper(problem, limits), limits)

    def prepare(self) -> None:
        a, b = self.problem.layout.split(" * ")
        self.turned = (a == "turned", b == "turned")
        self.fp8 = _carriers(self.problem)[0].itemsize == 1
        self.sides = [
            self._side(rows, carrier, turned)
            for rows, carrier, turned in zip((self.m, self.n), _carriers(self.problem), self.turned, strict=True)
        ]
        self.work = Work(total_bytes(part for side in self.sides for part in side), self.out.nbytes)

    def _side(self, rows: int, carrier: torch.dtype, turned: bool) -> list[torch.Tensor]:
        """The carrier, and its reference bytes, if it has any."""
        if self.fp8:
            spec = MXSpec(_FOLDED_FROM[carrier])
            parts = torch.ops.mxkernels.quantize_fold(self.drawn(rows, self.k), str(spec), None)
            return [parts[0].view(carrier), parts[2]]
        if turned:
            return [self.drawn(self.k, rows, dtype=carrier)]
        # rows of whole 16 bytes
        x = self.drawn(rows, -(-self.k * carrier.itemsize // 16) * 16 // carrier.itemsize, dtype=carrier)
        return [(x.view(torch.int32) & -0x2000).view(torch.float32) if carrier == torch.float32 else x]

    def launches(self, config: Any) -> list[Launch]:
        (a, *a_reference), (b, *b_reference) = self.sides
        references = (a_reference[0], b_reference[0]) if self.fp8 else None
        if isinstance(config, HopperConfig):
            processors = self.limits.processors
            return [hopper_matmul_launch(a, b, self.k, references, (1, 1), None, self.out, config, processors)]
        return [
            matmul_launch(
                a, b, self.k, references, (1, 1), None, self.out, config, self.turned, capabilities=self.capabilities
            )
        ]

    def decoded(self) -> tuple[torch.Tensor, torch.Tensor]:
        decoded = []
        for (carrier, *reference), turned in zip(self.sides, self.turned, strict=True):
            value = (carrier.T if turned else carrier[:, : self.k]).float().double()
            if reference:
                value = torch.ldexp(value, reference[0].double()[:, None] - 127)
            decoded.append(value)
        return decoded[0], decoded[1]

    @property
    def factor(self) -> float:
        return 33 * PROMOTION / 32 * 2.0**-13 if self.fp8 else super().factor


def _carriers(problem: Problem) -> tuple[torch.dtype, torch.dtype]:
    a, b = (getattr(torch, name) for name in problem.formats.split(" * "))
    return a, b


def on_hopper(problem: Problem, limits: Limits) -> bool:
    m, n, k = problem.shape
    found = limits.capabilities
    if problem.layout != "straight * straight" or not (found.wgmma and found.tma):
        return False
    return hopper_serves(m, n, k, getattr(torch, problem.dtype))


class Stream(Product):
    """Few rows of bf16 by 4-bit weights, as they were quantised or prepared."""

    @staticmethod
    def rule(problem: Problem, limits: Limits) -> Config:
        m, n, k = problem.shape
        return small_matmul_config(m, n, k)

    def prepare(self) -> None:
        self.spec = MXSpec.parse(self.problem.formats)
        self.x = self.drawn(self.m, self.k)
        codes, scale = self.moved(self.quantized(self.spec, self.n, self.k))
        self.weights = MXTensor(codes, scale, None, self.spec, (self.n, self.k))
        self.codes, self.scale = codes, scale
        self.added: int | None = None
        if self.problem.layout == "prepared":
            self._prepare_weights()
        self.work = Work(total_bytes([self.x, self.codes, self.scale]), self.out.nbytes)

    def _prepare_weights(self) -> None:
        if self.device != META:
            ready = prepare(self.weights)
            self.codes, self.scale, self.added = ready.codes, ready.scale, ready.added
            return
        # what it would be of Gaussian values
        bands, groups = -(-self.n // BAND), -(-self.k // GROUP)
        self.codes = self.empty(bands, groups, BAND, GROUP // 2, dtype=torch.uint8)
        self.scale = self.empty(bands, groups, BAND, GROUP // self.spec.block.cols, dtype=torch.uint8)
        self.added = 0 if self.spec.element.twos_complement else 127 - self.spec.element.bias

    def launches(self, config: Any) -> list[Launch]:
        partial = self.empty(config.splits, self.m, self.n, dtype=torch.float32)
        return list(
            matmul_small_launches(
                self.x,
                self.codes,
                self.scale,
                self.spec,
                None,
                partial,
                self.out,
                config,
                self.capabilities,
                self.added,
            )
        )

    def decoded(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.x.double(), self.weights.dequantize(torch.float32).double()


class DecodeMultiply(Product):
    """Operands of any kind, decoded on the way to the tensor cores."""

    @staticmethod
    def rule(problem: Problem, limits: Limits) -> Config:
        m, n, k = problem.shape
        return wide_matmul_config(m, n, k, problem.layout == "exact")

    def prepare(self) -> None:
        kinds = self.problem.formats.split(" * ")
        self.sides = [self._side(kind, rows) for kind, rows in zip(kinds, (self.m, self.n), strict=True)]
        self.work = Work(total_bytes(part for side in self.sides for part in side.parts), self.out.nbytes)
        fits = all(side.fits_bf16 for side in self.sides) or self.problem.layout == "exact"
        self.lost = None if fits else torch.zeros(1, dtype=torch.int32, device=self.device)

    def _side(self, kind: str, rows: int) -> Operand:
        described = Operand.of_kind([], kind, rows)
        shape = (self.k, rows) if described.turned else (rows, self.k)
        parts = [self.drawn(*shape)] if described.spec is None else self.quantized(described.spec, *shape)
        return replace(described, parts=self.moved(parts))

    def launches(self, config: Any) -> list[Launch]:
        a, b = (
            WideOperand(side.parts[0], turned=side.turned)
            if side.spec is None
            else WideOperand(*with_offset(side.parts), side.spec, side.turned)
            for side in self.sides
        )
        exact = self.problem.layout == "exact"
        return [matmul_wide_launch((a, b), self.k, None, self.out, None, self.lost, exact, config, self.capabilities)]

    def decoded(self) -> tuple[torch.Tensor, torch.Tensor]:
        a, b = (self._values(side, elements=True, offsets=True) for side in self.sides)
        return a, b

    def magnitudes(self) -> tuple[torch.Tensor, torch.Tensor]:
        a, b = (
            self._values(side, elements=True, offsets=False).abs()
            + (0 if side.symmetric else self._values(side, elements=False, offsets=True).abs())
            for side in self.sides
        )
        return a, b

    def _values(self, side: Operand, elements: bool, offsets: bool) -> torch.Tensor:
        if side.spec is None:
            matrix = side.parts[0].double()
        else:
            codes, scale, offset = with_offset(side.parts)
            codes = codes if elements else torch.zeros_like(codes)
            offset = offset if offsets or offset is None else torch.zeros_like(offset)
            cols = side.rows if side.turned else self.k
            matrix = torch.ops.mxkernels.dequantize(codes, scale, offset, str(side.spec), cols, torch.float32).double()
        return matrix.T if side.turned else matrix


class Native(Product):
    """Elements with a scale for each 32, by tensor cores that take them."""

    @staticmethod
    def rule(problem: Problem, limits: Limits) -> Config:
        a, b = (MXSpec(name).element for name in problem.formats.split(" * "))
        return native_config(a, b, problem.layout == "swizzled", limits.shared_bytes)

    def prepare(self) -> None:
        self.matrices, self.operands = [], []
        for name, rows in zip(self.problem.formats.split(" * "), (self.m, self.n), strict=True):
            spec = MXSpec(name, scale_rounding="rceil")
            codes, scale = self.moved(self.quantized(spec, rows, self.k))
            self.matrices.append(MXTensor(codes, scale, None, spec, (rows, self.k)))
            self.operands.append(native_operand(codes, scale, spec, self.k, self.problem.layout == "swizzled"))
        self.work = Work(sum(each.codes.nbytes + each.scale.nbytes for each in self.operands), self.out.nbytes)

    def launches(self, config: Any) -> list[Launch]:
        a, b = self.operands
        return [matmul_native_launch(a, b, None, None, self.out, config, self.capabilities, self.limits.processors)]

    def decoded(self) -> tuple[torch.Tensor, torch.Tensor]:
        a, b = (each.dequantize(torch.float32).double() for each in self.matrices)
        return a, b

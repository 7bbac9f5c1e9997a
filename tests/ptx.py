"""Inline PTX on the CPU: Triton's interpreter with an executor of the instructions that the kernels use.

    with ptx.interpreted(gpu.capabilities("sm_90")) as executed:
        ...  # launch kernels on CPU tensors
    assert "cvt.rn.satfinite.e4m3x2.f32" in executed

A register is a uint64 array of bit patterns, one for each element, with nothing above its width. Roundings are
decided exactly: a value is a float64 that is exact, or rounded to odd where it may not be, and is rounded once.
What results are is the PTX ISA's word; a NaN is the one that NVIDIA's GPUs make, all ones without a sign.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, ReduceOps, TensorHandle

from mxkernels import gpu

Word = npt.NDArray[np.uint64]
Values = npt.NDArray[np.float64]


# --- floats ------------------------------------------------------------------------------------------------


class Float(NamedTuple):
    """A float type: `max_code` are the bits of its largest finite value, above which are Inf, if it has one, and
    NaN; `nan` is what NaN becomes."""

    bits: int
    mantissa_bits: int
    bias: int
    max_code: int
    nan: int
    has_infinity: bool = True

    @property
    def sign(self) -> int:
        return 1 << (self.bits - 1)

    @property
    def infinity(self) -> int:
        return self.max_code + 1


F32 = Float(32, 23, 127, 0x7F7FFFFF, 0x7FFFFFFF)
F16 = Float(16, 10, 15, 0x7BFF, 0x7FFF)
BF16 = Float(16, 7, 127, 0x7F7F, 0x7FFF)
E4M3 = Float(8, 3, 7, 0x7E, 0x7F, has_infinity=False)
E5M2 = Float(8, 2, 15, 0x7B, 0x7F)
E2M1 = Float(4, 1, 1, 0x7, 0x7, has_infinity=False)  # and no NaN

ARITHMETIC = {"f32": F32, "f16x2": F16, "bf16x2": BF16}
EXTREMES: tuple[list[str], ...] = ([], ["NaN"], ["xorsign", "abs"], ["NaN", "xorsign", "abs"])
PAIRS = {"f16x2": F16, "bf16x2": BF16, "e4m3x2": E4M3, "e5m2x2": E5M2, "e2m1x2": E2M1}


def decode(code: Word, kind: Float) -> Values:
    magnitude = code & (kind.sign - 1)
    field = (magnitude >> kind.mantissa_bits).astype(np.int64)
    fraction = (magnitude & ((1 << kind.mantissa_bits) - 1)).astype(np.int64)
    significand = fraction + ((field > 0).astype(np.int64) << kind.mantissa_bits)
    value = np.ldexp(significand.astype(np.float64), np.maximum(field, 1) - kind.bias - kind.mantissa_bits)
    special = np.where(kind.has_infinity & (magnitude == kind.infinity), np.inf, np.nan)
    value = np.where(magnitude > kind.max_code, special, value)
    return np.copysign(value, np.where(code & kind.sign, -1.0, 1.0))


def encode(value: Values, kind: Float, rounding: str = "rn", saturate: bool = False) -> Word:
    """`value` rounded to nearest-even (`"rn"`) or towards zero (`"rz"`); `saturate` makes Inf the largest value."""
    finite = np.where(np.isfinite(value), np.abs(value), 0.0)
    lowest = 1 - kind.bias
    exponent = np.where(finite > 0, np.maximum(np.frexp(finite)[1] - 1, lowest), lowest)
    steps = np.ldexp(finite, kind.mantissa_bits - exponent)
    steps = np.rint(steps) if rounding == "rn" else np.trunc(steps)
    # a significand that was rounded up to 2 carries into the exponent
    code = ((exponent - lowest).astype(np.int64) << kind.mantissa_bits) + steps.astype(np.int64)
    infinity = kind.max_code if saturate else kind.infinity
    code = np.minimum(code, infinity if rounding == "rn" else kind.max_code)
    code = np.where(np.isinf(value), infinity, code) | np.where(np.signbit(value), kind.sign, 0)
    return np.where(np.isnan(value), kind.nan, code).astype(np.uint64)


def added(a: Values, b: Values) -> Values:
    """a + b rounded to odd: what is rounded to two bits fewer or less afterwards comes out as if rounded once."""
    total = a + b
    part = total - a
    error = (a - (total - part)) + (b - part)  # exactly what was rounded away (Knuth's TwoSum)
    sticky = np.isfinite(total) & (error != 0) & (total.view(np.int64) % 2 == 0)
    return np.where(sticky, np.nextafter(total, np.copysign(np.inf, error)), total)


def by_lane(name: str, function: Callable[..., Word], *operands: Word) -> Word:
    """A function of one float's bits, on each float of the instruction type `name`."""
    kind = ARITHMETIC[name]
    result = np.zeros_like(operands[0])
    for low in range(0, 32, kind.bits):
        result |= function(*((operand >> low) & (2 * kind.sign - 1) for operand in operands)) << low
    return result


def pair(low: Word, high: Word, bits: int) -> Word:
    return low | (high << bits)


def arithmetic(operation: str, rounding: str, name: str, operands: Sequence[Word]) -> Word:
    """`"add"`, `"mul"` or `"fma"`; a product of two fp32 numbers is exact in float64."""
    kind = ARITHMETIC[name]

    def result(*lanes: Word) -> Word:
        a, b, *c = (decode(lane, kind) for lane in lanes)
        value = added(a, b) if operation == "add" else a * b
        return encode(added(value, *c) if c else value, kind, rounding)

    return by_lane(name, result, *operands)


def extreme(operation: str, modifiers: Sequence[str], name: str, operands: Sequence[Word]) -> Word:
    """`"min"` or `"max"`. With `NaN`, one that is NaN makes the result NaN, else both must be. With `xorsign.abs` it
    is of the magnitudes and gets the product of the signs, unless it is NaN."""
    kind = ARITHMETIC[name]

    def ordered(code: Word) -> npt.NDArray[np.int64]:  # -0 below +0
        magnitude = (code & (kind.sign - 1)).astype(np.int64)
        return np.where(code & kind.sign, ~magnitude, magnitude)

    def result(a: Word, b: Word) -> Word:
        sign = np.zeros_like(a)
        if "xorsign" in modifiers:
            sign = (a ^ b) & kind.sign
            a, b = a & (kind.sign - 1), b & (kind.sign - 1)
        a_nan, b_nan = (each & (kind.sign - 1) > kind.infinity for each in (a, b))
        nan = a_nan | b_nan if "NaN" in modifiers else a_nan & b_nan
        first = ordered(a) > ordered(b) if operation == "max" else ordered(a) < ordered(b)
        number = np.where(b_nan | (first & ~a_nan), a, b)
        return np.where(nan, kind.nan, number | sign).astype(np.uint64)

    return by_lane(name, result, *operands)


# --- instructions ------------------------------------------------------------------------------------------


def look_up(a: Word, b: Word, c: Word, table: Word) -> Word:
    """`lop3`: bit by bit, the table's bit of number 4a + 2b + c."""
    result = np.zeros_like(a)
    for index in range(8):
        here = (a if index & 4 else ~a) & (b if index & 2 else ~b) & (c if index & 1 else ~c)
        result |= here * ((table >> index) & 1)
    return result


def permute(a: Word, b: Word, selectors: Word) -> Word:
    """`prmt`: each byte by a selector of four bits, three for its place, the first of which are `a`'s, and a top one
    that replicates its sign instead."""
    source = pair(a, b, 32)
    result = np.zeros_like(a)
    for byte in range(4):
        selector = (selectors >> (4 * byte)) & 15
        value = (source >> (8 * (selector & 7))) & 255
        result |= np.where(selector & 8, (value >> 7) * 255, value) << (8 * byte)
    return result


def convert(rounding: str, to: str, source: str, operands: Sequence[Word]) -> Word:
    """To a pair of floats: from two fp32, the first of which becomes the high one, or from another pair."""
    if source == "f32":
        high, low = (decode(operand, F32) for operand in operands)
    else:
        bits = PAIRS[source].bits
        (both,) = operands
        low, high = (decode((both >> place) & ((1 << bits) - 1), PAIRS[source]) for place in (0, bits))
    kind = PAIRS[to]
    narrow = kind.bits < 16  # to those, all conversions are `satfinite`
    return pair(encode(low, kind, rounding, narrow), encode(high, kind, rounding, narrow), kind.bits)


def execute(opcode: str, operands: Sequence[Word]) -> Word:
    """The result of an instruction, which may have more bits than its register."""
    match opcode.split("."), operands:
        case ["mov", "b16" | "b32" | "b64" | "f32"] | ["cvt", "u32", "u16"], [a]:
            return a
        case ["not", "b32"], [a]:
            return ~a
        case ["and", "b32"], [a, b]:
            return a & b
        case ["or", "b32"], [a, b]:
            return a | b
        case ["xor", "b32"], [a, b]:
            return a ^ b
        case ["shl", "b32"], [a, b]:
            return np.where(b < 32, a << (b & 31), 0)
        case ["shr", "b32" | "u32"], [a, b]:
            return np.where(b < 32, a >> (b & 31), 0)
        case ["shf", "l", "wrap", "b32"], [a, b, c]:
            return (pair(a, b, 32) << (c & 31)) >> 32
        case ["lop3", "b32"], [a, b, c, table]:
            return look_up(a, b, c, table)
        case ["prmt", "b32"], [a, b, c]:
            return permute(a, b, c)
        case ["add", "u32" | "s32"], [a, b]:
            return a + b
        case ["sub", "u32" | "s32"], [a, b]:
            return a - b
        case ["mul", "lo" | "wide", "u32"], [a, b]:
            return a * b
        case ["mad", "lo" | "wide", "u32"], [a, b, c]:
            return a * b + c
        case ["abs", name], [a] if name in ARITHMETIC:
            return by_lane(name, lambda lane: lane & (ARITHMETIC[name].sign - 1), a)
        case ["add" | "mul" as operation, "f32"], [_, _]:
            return arithmetic(operation, "rn", "f32", operands)
        case ["add" | "mul" as operation, "rn" | "rz" as rounding, "f32"], [_, _]:
            return arithmetic(operation, rounding, "f32", operands)
        case ["fma", "rn" | "rz" as rounding, "f32"], [_, _, _]:
            return arithmetic("fma", rounding, "f32", operands)
        case ["add" | "mul" as operation, "rn", "f16x2" | "bf16x2" as name], [_, _]:
            return arithmetic(operation, "rn", name, operands)
        case ["fma", "rn", "f16x2" | "bf16x2" as name], [_, _, _]:
            return arithmetic("fma", "rn", name, operands)
        case ["min" | "max" as operation, *modifiers, name], [_, _] if name in ARITHMETIC and modifiers in EXTREMES:
            return extreme(operation, modifiers, name, operands)
        case ["cvt", "rn" | "rz" as rounding, "f16x2" | "bf16x2" as to, "f32"], [_, _]:
            return convert(rounding, to, "f32", operands)
        case ["cvt", "rn", "satfinite", "e4m3x2" | "e5m2x2" | "e2m1x2" as to, "f32"], [_, _]:
            return convert("rn", to, "f32", operands)
        case ["cvt", "rn", "f16x2", "e4m3x2" | "e5m2x2" | "e2m1x2" as source], [_]:
            return convert("rn", "f16x2", source, operands)
    raise NotImplementedError(f"PTX {opcode} of {len(operands)} operands")


# --- programs ----------------------------------------------------------------------------------------------


class Registers:
    """The registers of one piece of inline assembly, by name: `$0`, `$1` … and those that it declares.

    It holds the assembly to its constraints: an output without `&` may be in an input's register, so that, once it
    has been written to, inputs are gone.
    """

    def __init__(self, constraints: str, inputs: Sequence[Word]) -> None:
        letters = constraints.replace(" ", "").split(",")
        if not all(re.fullmatch(r"=&?[rf]|[rf]", each) for each in letters):
            raise NotImplementedError(f"the constraints {constraints}")
        self.outputs = [f"${index}" for index, each in enumerate(letters) if each.startswith("=")]
        names = [f"${index}" for index in range(len(letters))]
        self._shape = inputs[0].shape
        self._widths = dict.fromkeys(names, 32)
        self._inputs = dict(zip(names[len(self.outputs) :], inputs, strict=True))
        self._words = dict(self._inputs)
        self._may_share = {name for name, each in zip(names, letters, strict=True) if each in ("=r", "=f")}
        self._shared = ""

    def declare(self, kind: str, names: Sequence[str]) -> None:
        self._widths.update(dict.fromkeys(names, int(kind.lstrip(".bfsu"))))

    def read(self, operand: str) -> Word:
        """A register's bits, those of several in braces, the first one lowest, or a constant's."""
        if operand.startswith("{"):
            word, low = self._constant(0), 0
            for name in _names(operand):
                word, low = word | (self.read(name) << low), low + self._widths[name]
            return word
        if operand[0].isdigit() or operand[0] == "-":
            return self._constant(_bits(operand))
        if operand in self._inputs and self._shared:
            raise ValueError(f"{operand} is read after {self._shared} was written, which may be in its register: =&")
        if operand not in self._words:
            raise ValueError(f"{operand} is read before it is written")
        return self._words[operand]

    def write(self, operand: str, word: Word) -> None:
        for name in _names(operand):
            if name not in self._widths or name in self._inputs:
                raise ValueError(f"{name} is no register to write to")
            width = self._widths[name]
            self._words[name] = word & ((1 << width) - 1)
            word = word >> width if operand.startswith("{") else word
            if name in self._may_share:
                self._shared = name

    def _constant(self, bits: int) -> Word:
        return np.full(self._shape, bits, np.uint64)


def _names(operand: str) -> list[str]:
    return re.findall(r"[^\s,{}]+", operand)


def _bits(constant: str) -> int:
    """Those of `1`, `0x1`, `-1`, and of the fp32 numbers `0f3f800000` and `1.0`."""
    if re.fullmatch(r"0[fF][0-9a-fA-F]{8}", constant):
        return int(constant[2:], 16)
    if "." in constant:
        return int(encode(np.array([float(constant)]), F32)[0])
    return int(constant, 0) & 0xFFFFFFFF


def statements(assembly: str) -> list[list[str]]:
    """Each as its opcode and its operands, of which those in braces are one."""
    text = assembly.strip().removeprefix("{").removesuffix("}")
    return [words for each in text.split(";") if (words := re.findall(r"\{[^}]*\}|[^\s,{}]+", each))]


def run(assembly: str, constraints: str, inputs: Sequence[Word]) -> list[Word]:
    """What assembly makes of 32-bit inputs of one shape: its outputs.

    Raises:
        NotImplementedError: for an instruction, by its name, or a constraint that is not known here.
        ValueError: for registers that are not declared, have no value yet, or may have lost it.
    """
    registers = Registers(constraints, inputs)
    for opcode, target, *sources in statements(assembly):
        if opcode == ".reg":
            registers.declare(target, sources)
        else:
            registers.write(target, execute(opcode, [registers.read(source) for source in sources]))
    return [registers.read(name) for name in registers.outputs]


# --- Triton's interpreter ----------------------------------------------------------------------------------

NUMPY_TYPES = {tl.int32: np.int32, tl.uint32: np.uint32, tl.float32: np.float32}


@contextmanager
def interpreted(capabilities: gpu.Capabilities) -> Iterator[set[str]]:
    """Within it, Triton's interpreter runs kernels as a GPU of these capabilities would, inline assembly included;
    and reductions in a reasonable time. The set is of the instructions that have been executed."""
    executed: set[str] = set()

    def create_inline_asm(builder: InterpreterBuilder, assembly: str, *arguments: Any) -> SimpleNamespace:
        executed.update(opcode for opcode, *_ in statements(assembly) if opcode != ".reg")
        return _inline_asm(assembly, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "device_capabilities", lambda device: capabilities)
        patch.setattr(InterpreterBuilder, "create_inline_asm", create_inline_asm)
        patch.setattr(ReduceOps, "generic_reduce", _reduce_by_slices)
        yield executed


def _inline_asm(
    assembly: str,
    constraints: str,
    values: Sequence[TensorHandle],
    types: Sequence[tl.dtype],
    is_pure: bool,
    pack: int,
) -> SimpleNamespace:
    scalars = [each.scalar for each in types]
    if pack != 1 or not all(value.data.itemsize == 4 for value in values) or not set(scalars) <= NUMPY_TYPES.keys():
        raise NotImplementedError("inline assembly of anything but one element of 32 bits at a time")
    outputs = run(assembly, constraints, [value.data.view(np.uint32).astype(np.uint64) for value in values])
    handles = [
        TensorHandle(word.astype(np.uint32).view(NUMPY_TYPES[scalar]), scalar)
        for word, scalar in zip(outputs, scalars, strict=True)
    ]
    return SimpleNamespace(get_result=handles.__getitem__)


def _reduce_by_slices(reduction: Any, tensors: tuple[tl.tensor, ...]) -> list[tl.tensor]:
    """`ReduceOps.generic_reduce`, along an axis, which takes an element at a time instead of a slice."""
    axis = reduction.axis

    def tensor(data: npt.NDArray[Any], like: tl.tensor) -> tl.tensor:
        return reduction.to_tensor(data, like.dtype)

    total: Any = None
    for index in range(tensors[0].handle.data.shape[axis]):
        part = tuple(tensor(each.handle.data.take(index, axis), each) for each in tensors)
        total = part if total is None else reduction.combine_fn.fn(*total, *part)
        total = total if isinstance(total, tuple) else (total,)
    if reduction.keep_dims:
        return [tensor(np.expand_dims(each.handle.data, axis), each) for each in total]
    return list(total)

"""Element formats: how one element is coded. Each is a row of facts; everything else is derived.

A format's magnitudes are those of a small float, `exponent_bits` and `mantissa_bits` on a `bias`:

    value(code) = (code / 2**mantissa_bits) * 2**(1 - bias)                        in the lowest binade
    value(code) = (1 + fraction / 2**mantissa_bits) * 2**(field - bias)            in the others

Integers are such floats too: 0…127 is one exponent bit and six mantissa bits on a bias of -5, whose codes
are the integers themselves. So one formula encodes and decodes every format; only the sign differs.

This module says nothing about blocks, scales or storage, and imports nothing.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from functools import cached_property
from typing import Literal


@dataclass(frozen=True)
class ElementFormat:
    """The facts of one element format.

    `emax` and `scale_mantissa_bits` are the constants of the scale rules (`docs/numerics.md`), which for
    `int4` are not those of its grid. `special` says which codes above `max` mean something: none, NaN in
    the top code only (OCP's "fn" form), or Inf and NaN as in IEEE 754. They are decoded, never produced.
    """

    name: str
    bits: int
    exponent_bits: int
    mantissa_bits: int
    bias: int
    max: float
    emax: int
    scale_mantissa_bits: int
    twos_complement: bool = False
    special: Literal["none", "nan", "ieee"] = "none"

    def __post_init__(self) -> None:
        if self.emax < 1 or self.max < 2:
            raise ValueError(f"{self.name}: the scale rules need emax >= 1 and max >= 2 (choose the bias so)")

    @cached_property
    def magnitudes(self) -> tuple[float, ...]:
        """The finite non-negative values, ascending: `magnitudes[k]` is the value of magnitude code k."""
        values = (self._magnitude(code) for code in range(1 << (self.bits - 1)))
        return tuple(value for value in values if value <= self.max)

    @cached_property
    def values(self) -> tuple[float, ...]:
        """The value of every code, 0 … 2**bits - 1, special codes included."""
        return tuple(self._value(code) for code in range(1 << self.bits))

    @property
    def max_code(self) -> int:
        """The magnitude code of `max`."""
        return len(self.magnitudes) - 1

    @property
    def sign_bit(self) -> int:
        return 1 << (self.bits - 1)

    @property
    def smallest(self) -> float:
        """The smallest positive value, which is also the distance between the smallest ones."""
        return self.magnitudes[1]

    @property
    def dropped_bits(self) -> int:
        """How many of fp32's mantissa bits the format lacks."""
        return 23 - self.mantissa_bits

    @property
    def max_exponent(self) -> int:
        """floor(log2(max)), which for `int4` is not `emax`."""
        return math.frexp(self.max)[1] - 1

    @property
    def max_fp32_mantissa(self) -> int:
        """The mantissa bits of `max` as fp32."""
        return struct.unpack("<I", struct.pack("<f", self.max))[0] & 0x7FFFFF

    @property
    def group(self) -> int:
        """How many elements fill whole bytes: 2 of 4 bits, 4 of 6, 1 of 8."""
        return {4: 2, 6: 4, 8: 1}[self.bits]

    @property
    def group_bytes(self) -> int:
        return self.group * self.bits // 8

    def _magnitude(self, code: int) -> float:
        field, fraction = divmod(code, 1 << self.mantissa_bits)
        significand = fraction / (1 << self.mantissa_bits) + (field > 0)
        return math.ldexp(significand, max(field, 1) - self.bias)

    def _value(self, code: int) -> float:
        if self.twos_complement:
            return float(code - 2 * self.sign_bit if code & self.sign_bit else code)
        magnitude_code = code & (self.sign_bit - 1)
        sign = -1.0 if code & self.sign_bit else 1.0
        if magnitude_code > self.max_code:
            infinite = self.special == "ieee" and magnitude_code == self.max_code + 1
            return sign * math.inf if infinite else math.nan
        return sign * self._magnitude(magnitude_code)


_ROWS = (
    #             name  bits e  m bias     max emax scale_m
    ElementFormat("e2m1", 4, 2, 1, 1, 6.0, 2, 1),
    ElementFormat("e3m0", 4, 3, 0, 3, 16.0, 4, 0),
    ElementFormat("int4", 4, 1, 2, -1, 7.0, 3, 0, twos_complement=True),
    ElementFormat("e2m3", 6, 2, 3, 1, 7.5, 2, 3),
    ElementFormat("e3m2", 6, 3, 2, 3, 28.0, 4, 2),
    ElementFormat("e4m3", 8, 4, 3, 7, 448.0, 8, 3, special="nan"),
    ElementFormat("e5m2", 8, 5, 2, 15, 57344.0, 15, 2, special="ieee"),
    ElementFormat("int8", 8, 1, 6, -5, 127.0, 6, 6, twos_complement=True),
)

FORMATS: dict[str, ElementFormat] = {row.name: row for row in _ROWS}

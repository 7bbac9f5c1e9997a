"""Element formats: the codes of every format, and what is derived from a row of facts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import exact
import ml_dtypes
import numpy as np
import pytest

from mxkernels.formats import FORMATS, ElementFormat

FACTS = {
    #        bits max    emax scale_m smallest special
    "e2m1": (4, 6.0, 2, 1, 0.5, "none"),
    "e3m0": (4, 16.0, 4, 0, 0.25, "none"),
    "int4": (4, 7.0, 3, 0, 1.0, "none"),
    "e2m3": (6, 7.5, 2, 3, 0.125, "none"),
    "e3m2": (6, 28.0, 4, 2, 0.0625, "none"),
    "e4m3": (8, 448.0, 8, 3, 2.0**-9, "nan"),
    "e5m2": (8, 57344.0, 15, 2, 2.0**-16, "ieee"),
    "int8": (8, 127.0, 6, 6, 1.0, "none"),
}


def bits_of(values: Sequence[float]) -> list[int]:
    """float64 bits, so that -0 is not 0; every NaN the same."""
    values = np.asarray(values, np.float64)
    return np.where(np.isnan(values), -1, values.view(np.int64)).tolist()


def test_the_formats_are_those_of_the_contract() -> None:
    assert tuple(FORMATS) == exact.NAMES
    assert all(name == element.name for name, element in FORMATS.items())


@pytest.mark.parametrize("name", exact.NAMES)
def test_values_of_all_codes(name: str) -> None:
    # ml_dtypes' where it has the format, written out otherwise (see exact.py)
    assert bits_of(FORMATS[name].values) == bits_of(exact.code_values(name))


def test_values_by_hand() -> None:
    e2m1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert bits_of(FORMATS["e2m1"].values) == bits_of(e2m1 + [-value for value in map(float, e2m1)])
    assert FORMATS["e3m0"].values[8:] == (0, -0.25, -0.5, -1, -2, -4, -8, -16)
    assert math.copysign(1, FORMATS["e3m0"].values[8]) == -1
    assert FORMATS["int4"].values == (0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1)
    assert FORMATS["int8"].values == (*range(128), *range(-128, 0))
    assert FORMATS["e2m3"].values[:10] == (0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1, 1.125)
    assert FORMATS["e3m2"].values[1:9] == (0.0625, 0.125, 0.1875, 0.25, 0.3125, 0.375, 0.4375, 0.5)


def test_integers_against_other_libraries() -> None:
    assert FORMATS["int4"].values == tuple(np.arange(16, dtype=np.uint8).view(ml_dtypes.int4).astype(float))
    assert FORMATS["int8"].values == tuple(np.arange(256, dtype=np.uint8).view(np.int8).astype(float))


@pytest.mark.parametrize("name", exact.NAMES)
def test_facts(name: str) -> None:
    element = FORMATS[name]
    bits, largest, emax, scale_mantissa_bits, smallest, special = FACTS[name]
    assert (element.bits, element.max, element.emax, element.special) == (bits, largest, emax, special)
    assert element.scale_mantissa_bits == scale_mantissa_bits
    assert element.smallest == smallest
    assert element.twos_complement == name.startswith("int")


@pytest.mark.parametrize("name", exact.NAMES)
def test_derived_facts(name: str) -> None:
    element = FORMATS[name]
    assert element.magnitudes == tuple(map(float, exact.GRID[name]))
    assert element.magnitudes[element.max_code] == element.max == max(element.magnitudes)
    assert element.sign_bit == 2 ** (element.bits - 1)
    assert element.dropped_bits == 23 - element.mantissa_bits
    assert element.max_exponent == exact.floor_log2(exact.GRID[name][-1])
    significand = exact.GRID[name][-1] / 2**element.max_exponent
    assert element.max_fp32_mantissa == (significand - 1) * 2**23
    assert (element.group, element.group_bytes) == {4: (2, 1), 6: (4, 3), 8: (1, 1)}[element.bits]


@pytest.mark.parametrize("name", exact.NAMES)
def test_one_formula_gives_every_magnitude(name: str) -> None:
    """The facts that the kernels work from (exponent bits, mantissa bits, bias) are those of the grid."""
    element = FORMATS[name]
    for code, value in enumerate(element.magnitudes):
        field, fraction = code >> element.mantissa_bits, code % (1 << element.mantissa_bits)
        significand = fraction if field == 0 else fraction + (1 << element.mantissa_bits)
        assert value == significand * 2.0 ** (max(field, 1) - element.bias - element.mantissa_bits)
    assert 1 + element.exponent_bits + element.mantissa_bits == element.bits


def test_special_codes() -> None:
    assert [code for code, value in enumerate(FORMATS["e4m3"].values) if math.isnan(value)] == [0x7F, 0xFF]
    e5m2 = FORMATS["e5m2"].values
    assert (e5m2[0x7C], e5m2[0xFC]) == (math.inf, -math.inf)
    assert [code for code, value in enumerate(e5m2) if math.isnan(value)] == [0x7D, 0x7E, 0x7F, 0xFD, 0xFE, 0xFF]


def test_a_format_is_one_row() -> None:
    e1m2 = ElementFormat("e1m2", 4, 1, 2, 0, 3.5, 1, 2)
    assert e1m2.magnitudes == (0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5)
    assert (e1m2.max_code, e1m2.smallest, e1m2.group) == (7, 0.5, 2)


def test_frozen_and_hashable() -> None:
    element = FORMATS["e2m1"]
    assert hash(element) == hash(dataclasses.replace(element))
    assert len(set(FORMATS.values())) == len(FORMATS)
    with pytest.raises(dataclasses.FrozenInstanceError):
        element.max = 7.0


@pytest.mark.parametrize("facts", [{"emax": 0}, {"max": 1.75}])
def test_rows_that_the_scale_rules_cannot_serve(facts: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"e2m1.*emax >= 1 and max >= 2"):
        dataclasses.replace(FORMATS["e2m1"], **facts)

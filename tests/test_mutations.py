"""Every rule of the contract has a test that fails when that rule alone is changed in the reference.

Each row is one changed rule: the text in `reference.py`, what it becomes, and the test that must notice. Left out
is what no input can show: the clamp of exponents at 127 (emax >= 1 keeps them below), how (max + min) / 2 is halved,
and torch's casts from float64, which pass through fp32 by themselves.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import exact
import pytest
import test_formats
import test_reference
import test_stochastic_reference
import torch

from mxkernels import reference
from mxkernels.formats import FORMATS

SOURCE = Path(reference.__file__).read_text(encoding="utf-8")

FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32


def scales(name: str, rule: str) -> Callable[[], None]:
    return partial(test_reference.test_scales_by_hand, name, rule)


def not_finite(bits: int) -> Callable[[], None]:
    return partial(test_reference.test_every_kind_of_nan_and_inf_counts, bits)


def nan_block(symmetric: bool) -> Callable[[], None]:
    test = test_reference.test_a_value_that_is_not_finite_makes_its_block_nan_and_no_other
    return partial(test, "e2m1", symmetric, "rtne")


def offsets() -> None:
    for row in test_reference.OFFSETS:
        test_reference.test_offsets_by_hand(*row)


def philox() -> None:
    for row in test_stochastic_reference.KNOWN_ANSWERS:
        test_stochastic_reference.test_philox_known_answers(*row)


def bands() -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        test_reference.test_bands_of_rows_do_not_show(monkeypatch)


ties = partial(test_reference.test_ties_by_hand, "e3m0")
midpoints = partial(test_reference.test_every_midpoint_and_its_fp32_neighbours, "e2m3")
zeros = partial(test_reference.test_blocks_of_zeros, "e2m1", "rtne", FP32)
signs = partial(test_reference.test_signs, "e2m1")
beyond_max = partial(test_reference.test_beyond_max_is_max, "int4", "rtne")
clamp = test_reference.test_the_scale_exponent_is_clamped_at_minus_127
asymmetric = test_reference.test_asymmetric_is_symmetric_of_what_is_left
edges = test_reference.test_elements_outside_the_tensor_take_no_part
probabilities = partial(test_stochastic_reference.test_probabilities_exactly, "e2m1")
index = partial(test_stochastic_reference.test_the_index_rule, 8)
far_index = test_stochastic_reference.test_indices_beyond_32_bits
random_bits = test_stochastic_reference.test_random_bits_by_hand
packing = test_reference.test_packing_by_hand
unpacking = partial(test_reference.test_packing_against_large_integers, "e2m3", 5)
decoding = test_reference.test_decoding_by_hand
casts = partial(test_reference.test_round_to_by_ml_dtypes, BF16)
decoding_with_offsets = partial(test_reference.test_every_code_with_offsets, "e2m1", FP32)

P = "s, p = 2 * half_s, exponent - 1"
KEY = "seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF"
NAN_DECODED = ".masked_fill(scale[blocks] == NAN_BYTE, torch.nan)"

MUTATIONS = [
    # 1. NaN and Inf
    ("Inf counts", "x.isfinite()", "~x.isnan()", not_finite(0x7F800000)),
    ("NaN counts", "x.isfinite()", "~x.isinf()", not_finite(0x7FFFFFFF)),
    ("their scale is 255", "NAN_BYTE = 255", "NAN_BYTE = 254", not_finite(0x7F800000)),
    ("their codes are 0", ".masked_fill(_spread(bad, spec, rows, cols), 0)", "", nan_block(True)),
    ("their offset is 0", "bad | (middle == 0)", "middle == 0", nan_block(False)),
    # 2. asymmetric
    ("offset is the middle", "largest / 2 + least / 2", "largest / 2 + largest / 2", offsets),
    ("offset within 65504", ".clamp(-65504, 65504)", "", offsets),
    ("offset is fp16", "65504).half()", "65504).bfloat16()", offsets),
    ("offset zero is +0", "bad | (middle == 0)", "bad", offsets),
    ("offset is subtracted", "x = x - _spread", "x = x + _spread", asymmetric),
    (
        "x - O is rounded to fp32",
        "x = x - _spread(offset",
        "x = x.double() - _spread(offset",
        test_reference.test_the_difference_from_the_offset_is_rounded_to_fp32,
    ),
    ("edge: not in the maximum", "fill=-torch.inf", "fill=0.0", edges),
    ("edge: not in the minimum", "fill=torch.inf", "fill=0.0", edges),
    # 3. the largest value
    ("absolute values", "x.double().abs()", "x.double()", scales("e2m1", "floor")),
    ("all zero: byte 0", "masked_fill(amax == 0, -127)", "masked_fill(amax == 0, 0)", zeros),
    ("inputs are exact in fp32", "x = x.float()", "x = x.bfloat16().float()", midpoints),
    ("fp32 subnormals count", "masked_fill(~finite, 0.0)", "masked_fill(~finite | (x.abs() < 2.0**-126), 0.0)", clamp),
    # 4. the scale's exponent
    (
        "p is exact",
        P,
        "p = amax.float().log2().floor().int(); s = amax * power_of_two(-p.clamp(-200, 200))",
        scales("e2m1", "floor"),
    ),
    ("floor", "return p - element.emax", "return p + 1 - element.emax", scales("e2m1", "floor")),
    (
        "floor: emax, not max's exponent",
        "return p - element.emax",
        "return p - element.max_exponent",
        scales("int4", "floor"),
    ),
    ("ceil: a power of two stays", "(s > 1)", "(s >= 1)", scales("e2m1", "ceil")),
    ("ceil: all else goes up", "(s > 1)", "(s > 1 + 2.0**-23)", scales("e2m1", "ceil")),
    ("ceil is not rceil", "(s > 1)", "(s * 2.0**element.max_exponent > element.max)", scales("e2m1", "ceil")),
    ("even: ties go up", "(s >= 2 - 2.0", "(s > 2 - 2.0", scales("e2m1", "even")),
    (
        "even: rounds to m bits",
        "(element.scale_mantissa_bits + 1)",
        "(element.scale_mantissa_bits + 2)",
        scales("e2m1", "even"),
    ),
    ("even: int4 has m = 0", "element.scale_mantissa_bits", "element.mantissa_bits", scales("int4", "even")),
    ("rceil: max itself fits", "> element.max\n", ">= element.max\n", scales("e2m1", "rceil")),
    ("rceil: up to max", "> element.max\n", "> 2.0**element.emax\n", scales("e2m1", "rceil")),
    # 5. the scale's byte
    ("e >= -127", ".clamp(-127, 127)", ".clamp(-126, 127)", clamp),
    ("e clamps, not wraps", ".clamp(-127, 127)", ".clamp(-1000, 127)", clamp),
    ("byte is e + 127", "(exponent + 127)", "(exponent + 126)", scales("e2m1", "floor")),
    # 6. elements
    ("nearest", "position > 0.5", "position > 0.51", midpoints),
    ("ties: to even, not odd", "lower % 2 == 1", "lower % 2 == 0", ties),
    ("ties: to even, not up", "(lower % 2 == 1)", "True", ties),
    ("ties: to even, not down", "(lower % 2 == 1)", "False", ties),
    (
        "beyond max: max",
        "torch.where(up, upper, lower)",
        "torch.where(up, upper, lower) * (magnitude <= element.max)",
        beyond_max,
    ),
    ("never -8", "v < 0, -code,", "v < 0, -code - (magnitude > element.max).int(),", beyond_max),
    ("sign of zero", "v.signbit()", "(v < 0)", signs),
    ("sign of what rounds to zero", "v.signbit()", "(v.signbit() & (code > 0))", signs),
    ("stochastic: the half", "2 * random + 1 >=", "2 * random >=", probabilities),
    ("stochastic: at 2**16, up", "+ 1 >= 2**17", "+ 1 > 2**17", probabilities),
    ("stochastic: exact position", "(position * 2**17).floor()", "(position * 2**17).round()", probabilities),
    ("stochastic: 16 bits", "2 * random + 1", "2 * (random & 0xFFF0) + 1", probabilities),
    # randomness
    ("Philox: ten rounds", "range(10)", "range(9)", philox),
    ("Philox: first multiplier", "0xD2511F53", "0xD2511F55", philox),
    ("Philox: second multiplier", "0xCD9E8D57", "0xCD9E8D59", philox),
    ("Philox: first key step", "0x9E3779B9", "0x9E3779BB", philox),
    ("Philox: second key step", "0xBB67AE85", "0xBB67AE87", philox),
    ("key: low, high", KEY, "(seed >> 32) & 0xFFFFFFFF, seed & 0xFFFFFFFF", index),
    ("counter: low, high", "counter & 0xFFFFFFFF, counter >> 32, zero", "counter & 0xFFFFFFFF, zero, zero", far_index),
    ("low half first", "(word & 0xFFFF, word >> 16)", "(word >> 16, word & 0xFFFF)", random_bits),
    ("words in order", "for word in words for", "for word in words[::-1] for", random_bits),
    ("rows begin at whole groups", "groups = (cols + 7) // 8", "groups = cols // 8 + 1", index),
    ("rows count from the matrix's first", "spec, seed, first)", "spec, seed, 0)", bands),
    # decoding
    ("the exponent's bias", "scale[blocks].int() - 127", "scale[blocks].int() - 126", decoding),
    ("byte 255 is NaN", NAN_DECODED, "", partial(test_reference.test_nan_bits, BF16, 0x7FC0)),
    ("byte 0 is 2**-127", NAN_DECODED, NAN_DECODED + ".masked_fill(scale[blocks] == 0, 0)", decoding),
    ("offset is added", "(decoded + _spread", "(decoded - _spread", decoding_with_offsets),
    ("rounded to nearest", "x.float().to(", "(x.float().view(torch.int32) & -65536).view(torch.float32).to(", casts),
    ("NaN in bf16", "0x7FC0)", "0x7FC1)", partial(test_reference.test_nan_bits, BF16, 0x7FC0)),
    ("NaN in fp16", "0x7E00)", "0x7E01)", partial(test_reference.test_nan_bits, FP16, 0x7E00)),
    ("NaN in fp32", "0x7FC00000)", "0x7FC00001)", partial(test_reference.test_nan_bits, FP32, 0x7FC00000)),
    # storage
    (
        "the first code is lowest",
        "shifts = element.bits * ",
        "shifts = element.bits * (element.group - 1) - element.bits * ",
        packing,
    ),
    ("and so it is unpacked", "shifts = 8 * ", "shifts = 8 * (element.group_bytes - 1) - 8 * ", unpacking),
    ("the first byte is lowest", "stream >> (8 * byte)", "stream >> (8 * (element.group_bytes - 1 - byte))", packing),
    ("filled up with zero codes", "-cols % element.group)", "-cols % element.group), value=1", packing),
]


@contextmanager
def mutated(old: str, new: str) -> Iterator[None]:
    """The reference with `old`, which it has once, replaced by `new`."""
    assert SOURCE.count(old) == 1, f"reference.py has {SOURCE.count(old)} times: {old}"
    original = dict(vars(reference))
    try:
        exec(compile(SOURCE.replace(old, new), reference.__file__, "exec"), vars(reference))
        yield
    finally:
        vars(reference).update(original)


@pytest.mark.parametrize(
    ("old", "new", "test"), [row[1:] for row in MUTATIONS], ids=[row[0].replace(" ", "-") for row in MUTATIONS]
)
def test_a_changed_rule_is_noticed(old: str, new: str, test: Callable[[], None]) -> None:
    test()
    with mutated(old, new), pytest.raises(AssertionError):
        test()


FACTS: list[tuple[str, Callable[[Any], Any], Callable[[str], None]]] = [
    ("bits", lambda bits: bits + 2, test_formats.test_facts),
    ("exponent_bits", lambda bits: bits + 1, test_formats.test_one_formula_gives_every_magnitude),
    ("mantissa_bits", lambda bits: bits + 1, test_formats.test_derived_facts),
    ("bias", lambda bias: bias + 1, test_formats.test_derived_facts),
    ("max", lambda largest: largest / 2, test_formats.test_facts),
    ("emax", lambda emax: emax + 1, lambda name: test_reference.test_scales_by_hand(name, "floor")),
    ("emax", lambda emax: emax + 1, lambda name: test_reference.test_scales_by_hand(name, "ceil")),
    ("scale_mantissa_bits", lambda bits: bits + 1, lambda name: test_reference.test_scales_by_hand(name, "even")),
    ("max", lambda largest: largest / 2, lambda name: test_reference.test_scales_by_hand(name, "rceil")),
    ("twos_complement", lambda truth: not truth, test_formats.test_values_of_all_codes),
]


@pytest.mark.parametrize("name", exact.NAMES)
def test_a_changed_fact_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    element = FORMATS[name]
    for fact, change, test in FACTS:
        test(name)
        with monkeypatch.context() as patch:
            patch.setitem(FORMATS, name, dataclasses.replace(element, **{fact: change(getattr(element, fact))}))
            with pytest.raises(AssertionError):
                test(name)
    for special in {"none", "nan", "ieee"} - {element.special}:
        with monkeypatch.context() as patch:
            patch.setitem(FORMATS, name, dataclasses.replace(element, special=special))
            with pytest.raises(AssertionError):
                test_formats.test_facts(name)

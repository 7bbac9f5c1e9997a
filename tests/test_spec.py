"""Blocks, specs and presets: what they accept, what they say, and that their text is their inverse."""

from __future__ import annotations

import dataclasses
import itertools
import pickle
from typing import Any

import exact
import pytest

import mxkernels as mx
from mxkernels.formats import FORMATS
from mxkernels.spec import Block, MXSpec

SIDES = (1, 2, 4, 8, 16, 32, 64, 128)
ALL_BLOCKS = [Block(rows, cols) for rows, cols in itertools.product(SIDES, SIDES) if rows * cols > 1]


# --- blocks ------------------------------------------------------------------------------------------------


def test_every_allowed_block() -> None:
    assert len(ALL_BLOCKS) == 63
    for block in ALL_BLOCKS:
        assert Block.parse(str(block)) == block
        assert block.T.T == block
        assert (block.T.rows, block.T.cols) == (block.cols, block.rows)


def test_blocks_are_read_as_the_command_line_spells_them() -> None:
    assert Block.parse("4x4") == Block.parse(" 4X4 ") == Block(4, 4)
    assert str(Block(1, 32)) == "1x32"


@pytest.mark.parametrize("text", ["", "4", "x", "4x", "x4", "4x4x4", "4*4", "-4x4", "4.0x4", "axb", "1 x 32"])
def test_text_that_is_no_block(text: str) -> None:
    with pytest.raises(ValueError, match=r"^block .*: write rows x columns, such as 1x32, 32x1 or 4x4$"):
        Block.parse(text)


@pytest.mark.parametrize("sides", [(3, 5), (0, 32), (-4, 4), (1, 256), (256, 1), (4.0, 4), (24, 32), ("4", "4")])
def test_sides_that_are_not_allowed(sides: tuple[Any, Any]) -> None:
    with pytest.raises(ValueError, match=r"^block .*: each side must be a power of two from 1 to 128$"):
        Block(*sides)


def test_a_block_of_one_element_is_none() -> None:
    with pytest.raises(ValueError, match="block 1x1: a block has at least two elements"):
        Block(1, 1)


# --- specs -------------------------------------------------------------------------------------------------


def test_defaults() -> None:
    spec = MXSpec("e2m1")
    assert spec == MXSpec(FORMATS["e2m1"], block=Block(1, 32), rounding="rtne", scale_rounding="even", symmetric=True)
    assert (spec.rounding, spec.stochastic, spec.scale_rounding, spec.symmetric) == ("rtne", False, "even", True)


def test_the_ways_to_give_a_block() -> None:
    specs = {MXSpec("e2m1", block) for block in ("4x8", (4, 8), [4, 8], Block(4, 8))}
    assert len(specs) == 1
    assert specs.pop().block == Block(4, 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"element": "e2m2"}, "element is 'e2m2'; allowed: e2m1, e3m0, int4, e2m3, e3m2, e4m3, e5m2, int8"),
        ({"element": "E2M1"}, "element is 'E2M1'; allowed: "),
        ({"element": None}, "element is None; allowed: "),
        ({"rounding": "sr"}, "rounding is 'sr'; allowed: rtne, stochastic"),
        ({"rounding": True}, "rounding is True; allowed: rtne, stochastic"),
        ({"scale_rounding": "up"}, "scale_rounding is 'up'; allowed: floor, ceil, even, rceil"),
        ({"symmetric": 0}, "symmetric is 0; allowed: True, False"),
        ({"symmetric": "asymmetric"}, "symmetric is 'asymmetric'; allowed: True, False"),
        ({"block": "3x5"}, "block 3x5: each side must be a power of two from 1 to 128"),
        ({"block": "32"}, "block '32': write rows x columns, such as 1x32, 32x1 or 4x4"),
        ({"block": (32,)}, "block (32,): give rows and columns, such as (1, 32)"),
        ({"block": (1, 4, 8)}, "block (1, 4, 8): give rows and columns, such as (1, 32)"),
        ({"block": 32}, "block 32: give rows and columns, such as (1, 32)"),
        ({"block": None}, "block None: give rows and columns, such as (1, 32)"),
    ],
)
def test_errors_name_the_argument_and_what_is_allowed(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011  (the message is compared whole below)
        MXSpec(**{"element": "e2m1", **arguments})
    assert str(error.value).startswith(message)


def test_text_and_spec_are_each_other_s_inverse() -> None:
    seen = set()
    for element, block, rounding, rule, symmetric in itertools.product(
        exact.NAMES, ALL_BLOCKS, ("rtne", "stochastic"), exact.RULES, (True, False)
    ):
        spec = MXSpec(element, block, rounding, rule, symmetric)
        text = str(spec)
        assert text == f"{element} {block} {rounding} {rule} {'symmetric' if symmetric else 'asymmetric'}"
        assert MXSpec.parse(text) == spec
        assert spec.T.T == spec
        seen.add(spec)
    assert len(seen) == 8 * 63 * 2 * 4 * 2  # equality and hash tell them all apart


@pytest.mark.parametrize(
    "text", ["", "e2m1", "e2m1 1x32 rtne even", "e2m1 1x32 rtne even maybe", "e2m1 1x32 rtne even symmetric more"]
)
def test_text_that_is_no_spec(text: str) -> None:
    with pytest.raises(ValueError, match=r"write 'e2m1 1x32 rtne even symmetric' \(or 'asymmetric'\)"):
        MXSpec.parse(text)


@pytest.mark.parametrize(
    ("text", "argument"),
    [
        ("e9m9 1x32 rtne even symmetric", "element is 'e9m9'"),
        ("e2m1 5x32 rtne even symmetric", "block 5x32"),
        ("e2m1 1x32 up even symmetric", "rounding is 'up'"),
        ("e2m1 1x32 rtne odd symmetric", "scale_rounding is 'odd'"),
    ],
)
def test_text_with_a_wrong_word(text: str, argument: str) -> None:
    with pytest.raises(ValueError, match=argument):
        MXSpec.parse(text)


def test_frozen_hashable_copied_and_pickled() -> None:
    spec = MXSpec("int4", "4x4", "stochastic", "ceil", False)
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.rounding = "rtne"  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.block.rows = 8  # type: ignore[misc]
    assert hash(spec) == hash(MXSpec.parse(str(spec)))
    assert pickle.loads(pickle.dumps(spec)) == spec
    assert dataclasses.replace(spec, rounding="rtne") == MXSpec("int4", "4x4", "rtne", "ceil", False)


def test_transposing_turns_the_block_and_nothing_else() -> None:
    spec = MXSpec("e2m3", "4x8", "stochastic", "rceil", False)
    assert spec.T == MXSpec("e2m3", "8x4", "stochastic", "rceil", False)


# --- sizes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "bits"),
    [
        (MXSpec("e2m1"), 4.25),
        (MXSpec("e2m1", "1x16"), 4.5),
        (MXSpec("e2m1", "4x4"), 4.5),
        (MXSpec("e2m1", "1x16", symmetric=False), 5.5),
        (MXSpec("e2m3"), 6.25),
        (MXSpec("e4m3", "128x128"), 8 + 8 / 16384),
        (MXSpec("int8", "1x2", symmetric=False), 20.0),
    ],
    ids=str,
)
def test_bits_per_element(spec: MXSpec, bits: float) -> None:
    assert spec.bits_per_element == bits


def test_e2m1_is_3_7647_times_smaller_than_bf16() -> None:
    assert round(16 / mx.mxfp4.bits_per_element, 4) == 3.7647


def test_packed_cols() -> None:
    assert [MXSpec("e2m1").packed_cols(cols) for cols in range(6)] == [0, 1, 1, 2, 2, 3]
    assert [MXSpec("e2m3").packed_cols(cols) for cols in range(10)] == [0, 3, 3, 3, 3, 6, 6, 6, 6, 9]
    assert [MXSpec("int8").packed_cols(cols) for cols in range(4)] == [0, 1, 2, 3]


def test_scale_shape() -> None:
    assert MXSpec("e2m1").scale_shape(3, 33) == (3, 2)
    assert MXSpec("e2m1", "4x8").scale_shape(8, 16) == (2, 2)
    assert MXSpec("e2m1", "4x8").scale_shape(9, 17) == (3, 3)
    assert MXSpec("e2m1", "32x1").scale_shape(0, 5) == (0, 5)
    assert MXSpec("e2m1", "32x1").scale_shape(5, 0) == (1, 0)


# --- presets -----------------------------------------------------------------------------------------------


def test_presets() -> None:
    def facts(element: str, rule: str) -> MXSpec:
        return MXSpec(element, (1, 32), "rtne", rule, True)

    assert mx.PRESETS == {
        "mxfp4": facts("e2m1", "even"),
        "mxfp6_e2m3": facts("e2m3", "even"),
        "mxfp6_e3m2": facts("e3m2", "even"),
        "mxfp8_e4m3": facts("e4m3", "rceil"),
        "mxfp8_e5m2": facts("e5m2", "rceil"),
        "mxint8": facts("int8", "floor"),
        "mxint4": facts("int4", "ceil"),
    }
    assert all(getattr(mx, name) is preset for name, preset in mx.PRESETS.items())

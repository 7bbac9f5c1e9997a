"""Stochastic rounding in the reference: which random bits, what they do, and that they are fair."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import exact
import pytest
import torch

from mxkernels import reference
from mxkernels.formats import FORMATS
from mxkernels.spec import MXSpec

ALL_BITS = torch.arange(2**16)
SEEDS = (0, 1, 2**32, 2**64 - 1, 0x0123456789ABCDEF)

# Random123's published vectors for philox4x32, ten rounds: counter, key, output.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


# --- the random bits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_known_answers(counter: tuple[int, ...], key: tuple[int, int], expected: tuple[int, ...]) -> None:
    words = reference.philox(tuple(torch.tensor([word]) for word in counter), *key)
    assert tuple(word.item() for word in words) == expected
    assert tuple(exact.philox(counter, key)) == expected


def test_random_bits_by_hand() -> None:
    """Seed 0: the words of counter 0 are the first known answer; each gives its low half, then its high one."""
    halves = [0xE8D5, 0x6627, 0xC58D, 0xE169, 0xAC4C, 0xBC57, 0xDBD8, 0x9B00]
    assert reference.random_bits(1, 8, 0).tolist() == [halves]
    # rows begin at whole groups of eight: of nine columns, the second row has counters 2 and 3
    nine = reference.random_bits(2, 9, 0)
    assert nine[0, :8].tolist() == halves
    assert torch.equal(nine[1:, :8], reference.random_bits(3, 8, 0)[2:])


@pytest.mark.parametrize("cols", [1, 2, 7, 8, 9, 17, 40])
def test_the_index_rule(cols: int) -> None:
    for seed in SEEDS:
        expected = [[exact.random16(row, col, cols, seed) for col in range(cols)] for row in range(3)]
        assert reference.random_bits(3, cols, seed).tolist() == expected


def test_indices_beyond_32_bits() -> None:
    """The counter's second word is its high half: above 2**35 elements, but also on the way there."""
    for first_row in (2**31 - 1, 2**32 - 1, 2**33 + 5):
        rows = range(first_row, first_row + 3)
        expected = [[exact.random16(row, col, 9, 7) for col in range(9)] for row in rows]
        assert reference.random_bits(3, 9, 7, first_row).tolist() == expected


def test_a_negative_seed_is_its_64_bits() -> None:
    assert torch.equal(reference.random_bits(2, 9, -1), reference.random_bits(2, 9, 2**64 - 1))


def test_the_seed_is_needed_if_and_only_if_rounding_is_stochastic() -> None:
    x = torch.ones(1, 32)
    with pytest.raises(ValueError, match="seed is None"):
        reference.quantize(x, MXSpec("e2m1", rounding="stochastic"))
    reference.quantize(x, MXSpec("e2m1"))


def test_bits_belong_to_the_place_in_the_matrix_given() -> None:
    """Block, element and scale rule do not enter; the transpose is a matrix of its own."""
    x = torch.full((16, 24), 0.3)
    x[0, 0] = 6.0  # one scale for the whole matrix

    def up(x: torch.Tensor, name: str, rule: str) -> torch.Tensor:
        spec = MXSpec(name, (32, 32), "stochastic", rule)
        codes, scale, _ = reference.quantize(x, spec, 5)
        decoded = reference.dequantize(codes, scale, None, spec, x.shape[1], torch.float32)
        return decoded > 0.3

    expected = torch.tensor([[exact.random16(i, j, 24, 5) for j in range(24)] for i in range(16)])
    turned = torch.tensor([[exact.random16(j, i, 16, 5) for i in range(16)] for j in range(24)])
    for name, rule, smallest in (("e2m1", "floor", 0.5), ("e2m1", "rceil", 0.5), ("int4", "rceil", 1.0)):
        position = Fraction(float(torch.tensor(0.3))) / Fraction(smallest)
        first = math.ceil(2**16 - Fraction(1, 2) - position * 2**16)
        inside = torch.ones(16, 24, dtype=torch.bool)
        inside[0, 0] = False
        assert torch.equal(up(x, name, rule)[inside], (expected >= first)[inside])
        assert torch.equal(up(x.T, name, rule)[inside.T], (turned >= first)[inside.T])


# --- what they do ------------------------------------------------------------------------------------------


def first_up(position: Fraction) -> int:
    """The smallest R that takes the upper neighbour: position * 2**16 + R + 1/2 >= 2**16."""
    return math.ceil(2**16 - Fraction(1, 2) - position * 2**16)


POSITIONS = [
    Fraction(0),
    Fraction(1, 2**40),
    Fraction(1, 2**17) - Fraction(1, 2**40),
    Fraction(1, 2**17),  # half a unit of R: from here on, R = 65535 goes up
    Fraction(1, 2**16),
    Fraction(3, 2**17),
    Fraction(1, 4) + Fraction(1, 2**25),
    Fraction(float(torch.tensor(1 / 3))),
    Fraction(1, 2),
    Fraction(1, 2) + Fraction(1, 2**24),
    1 - Fraction(1, 2**17) - Fraction(1, 2**30),
    1 - Fraction(1, 2**17),
    1 - Fraction(1, 2**24),
]


@pytest.mark.parametrize("name", exact.NAMES)
def test_probabilities_exactly(name: str) -> None:
    """All 65 536 values of R at each position: below the smallest value, in the middle and below max."""
    grid, element = exact.GRID[name], FORMATS[name]
    for lower in (0, len(grid) // 2, len(grid) - 2):
        for position in POSITIONS:
            v = grid[lower] + position * (grid[lower + 1] - grid[lower])
            assert Fraction(float(v)) == v
            codes = reference.encode(torch.full((2**16,), float(v), dtype=torch.float64), element, ALL_BITS)
            first = first_up(position)
            assert torch.equal(codes.long(), lower + (first <= ALL_BITS).long())
            assert abs(Fraction(2**16 - first, 2**16) - position) <= Fraction(1, 2**17)


def test_positions_that_a_careless_sum_rounds_up() -> None:
    def code(v: float, random: int) -> int:
        return reference.encode(torch.tensor([v], dtype=torch.float64), FORMATS["e2m1"], torch.tensor([random])).item()

    # 3.755e-6 of 0.5 is 0.4922 units of R: with the half, 65535 stays below 2**16
    assert code(3.755e-6, 65535) == 0
    assert code(3.83e-6, 65535) == 1  # 0.5020 units
    # 0.25 + 2**-25 is 2**15 + 2**-8 units, which one more R makes up
    assert code(0.25 + 2.0**-25, 32767) == 0
    assert code(0.25 + 2.0**-25, 32768) == 1


@pytest.mark.parametrize("name", exact.NAMES)
def test_what_is_on_the_grid_stays_there(name: str) -> None:
    table = torch.tensor(FORMATS[name].magnitudes, dtype=torch.float64)
    for random in (0, 32768, 65535):
        codes = reference.encode(table, FORMATS[name], torch.full((len(table),), random))
        assert codes.tolist() == list(range(len(table)))
        beyond = reference.encode(table[-1:] * torch.tensor([1.1, 1.9, 4.0]), FORMATS[name], torch.tensor([random] * 3))
        assert beyond.tolist() == [len(table) - 1] * 3


@pytest.mark.parametrize("name", exact.NAMES)
def test_negative_values_mirror_positive_ones(name: str) -> None:
    v = torch.linspace(0, float(exact.MAX[name]), 4096, dtype=torch.float64)
    random = torch.randint(0, 2**16, v.shape, generator=torch.Generator().manual_seed(3))
    positive = reference.encode(v, FORMATS[name], random)
    negative = reference.encode(-v, FORMATS[name], random)
    values = torch.tensor(FORMATS[name].values, dtype=torch.float64)
    assert torch.equal(values[negative.long()], -values[positive.long()])


@pytest.mark.parametrize("name", exact.NAMES)
def test_the_mean_is_the_value(name: str) -> None:
    """At many magnitudes, far below the smallest value too, the mean error is what chance and 16 bits allow.

    Each row is one value throughout, beside the format's max, under which rceil has the scale 1. The standard
    error of the mean is that of the position's coin, sqrt(f (1 - f) / n) steps; 16 bits add up to 2**-17.
    """
    columns, grid = 2**15, exact.GRID[name]
    smallest = float(grid[1])
    low = [smallest * fraction for fraction in (2.0**-12, 0.001, 0.03, 0.1, 0.3, 0.5, 0.77, 0.99)]
    steps = itertools.pairwise(map(float, grid[1 :: max(len(grid) // 6, 1)]))
    high = [
        a + fraction * (b - a) for (a, b), fraction in zip(steps, (0.03, 0.31, 0.62, 0.87, 0.13, 0.45), strict=False)
    ]
    values = torch.tensor(low + high, dtype=torch.float32)
    values = torch.cat([values, -values])
    x = values[:, None].repeat(1, columns)
    x[:, ::128] = float(exact.MAX[name])

    spec = MXSpec(name, (1, 128), "stochastic", "rceil")
    codes, scale, _ = reference.quantize(x, spec, seed=11)
    assert scale.unique().tolist() == [127]
    decoded = reference.dequantize(codes, scale, None, spec, columns, torch.float32).double()
    counted = torch.arange(columns) % 128 != 0
    mean = decoded[:, counted].mean(dim=1)

    for value, average in zip(values.tolist(), mean.tolist(), strict=True):
        lower, position = exact.neighbours(Fraction(abs(value)), name)
        step, f = float(grid[lower + 1] - grid[lower]), float(position)
        standard_error = math.sqrt(f * (1 - f) / int(counted.sum()))
        assert abs(average - value) <= (4 * standard_error + 2.0**-17) * step

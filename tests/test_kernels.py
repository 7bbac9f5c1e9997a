"""The cast kernels in Triton's interpreter, equal to the reference to the byte."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator

import pytest

pytest.importorskip("triton", reason="kernels need Triton")

import exact
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from poisoned import (
    assert_guards_hold,
    assert_same_bytes,
    assert_same_parts,
    check_quantize,
    dequantize,
    empty_parts,
    expected_parts,
    expected_values,
    quantize,
)
from triton.runtime.interpreter import interpreter_builder

from mxkernels import reference
from mxkernels.formats import FORMATS, ElementFormat
from mxkernels.ops.dequantize_kernel import dequantize_launch
from mxkernels.ops.launch import Launch
from mxkernels.ops.quantize_kernel import quantize_launch
from mxkernels.spec import Block, MXSpec
from mxkernels.tune import CastConfig

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.filterwarnings("ignore:invalid value encountered", "ignore:overflow encountered"),
]

ROW_BLOCKS = ("1x2", "1x16", "1x32", "1x128")
COLUMN_BLOCKS = ("2x1", "16x1", "32x1", "128x1")
BLOCKS = (*ROW_BLOCKS, *COLUMN_BLOCKS, "2x2", "4x4", "8x4", "16x16", "32x32", "128x128")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ROUNDINGS = ("rtne", "stochastic")
SCALE_ROUNDINGS = ("floor", "ceil", "even", "rceil")
CPU = torch.device("cpu")
SEED = 0x9E3779B97F4A7C15  # beyond int64, both key words in use


# --- inputs ------------------------------------------------------------------------------------------------


def random_float_bits(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Any finite value of a dtype, each exponent as likely as another."""
    bits = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    limits = torch.iinfo(bits)
    x = torch.randint(limits.min, limits.max, shape, generator=generator, dtype=torch.int64).to(bits).view(dtype)
    return torch.where(x.isfinite(), x, torch.ones_like(x))


def adversarial(block: Block, rows: int, cols: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """A matrix whose blocks are, in turn: ordinary; spread over 120 binades; ties and grid points; zeros of both
    signs; subnormal; huge; any bits at all; far from zero; all the same; with a NaN; with an Inf."""
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, cols)
    normal = torch.randn(shape, generator=generator)
    sign = torch.randint(0, 2, shape, generator=generator) * 2 - 1.0
    limits = torch.finfo(dtype)
    far = 2.0 ** (torch.randint(-60, 61, shape, generator=generator).double() * (0.25 if dtype == torch.float16 else 1))
    integers = torch.randint(-64, 65, shape, generator=generator)
    kinds = [
        normal,
        (normal * far).clamp(limits.min, limits.max),
        integers / 8,
        sign * 0.0,
        sign * limits.tiny * torch.rand(shape, generator=generator),
        sign * limits.max * (torch.rand(shape, generator=generator) > 0.5),
        random_float_bits(shape, dtype, generator),
        1000 + normal,
        torch.full(shape, -3.125),
        torch.where(integers == integers[-1, -1], torch.nan, normal),
        torch.where(integers == integers[-1, -1], sign * torch.inf, normal),
    ]
    i, j = torch.arange(rows)[:, None] // block.rows, torch.arange(cols)[None, :] // block.cols
    kind = (i * (-(-cols // block.cols)) + j + seed) % len(kinds)
    out = torch.zeros(shape, dtype=dtype)
    for index, values in enumerate(kinds):
        out = torch.where(kind == index, values.to(dtype), out)
    return out


def cut_shape(block: Block) -> tuple[int, int]:
    """Rows and columns of a few blocks, the last ones cut, in one tile of at most 256 x 256."""

    def extent(side: int) -> int:
        return 19 if side <= 4 else side + side // 2 + 1 if side > 32 else 2 * side + side // 2 + 1

    return extent(block.rows), extent(block.cols)


def one_tile(block: Block, rows: int, cols: int, pair: bool = False) -> CastConfig:
    """A tile for the whole matrix: the interpreter's time goes with the programs."""
    least_rows = max(block.rows, block.cols, 16) if pair else max(block.rows, 16)
    least_cols = max(block.rows, block.cols, 16) if pair else max(block.cols, 16)
    return CastConfig(max(least_rows, power_of_two_above(rows)), max(least_cols, power_of_two_above(cols)), num_warps=1)


def power_of_two_above(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def seed_of(spec: MXSpec, seed: int = SEED) -> int | None:
    return seed if spec.stochastic else None


# --- the full product --------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("name", FORMATS)
def test_every_spec(name: str, block: str) -> None:
    """Formats x roundings x scale roundings x symmetry x blocks, the dtypes in turn."""
    choices = itertools.product(ROUNDINGS, SCALE_ROUNDINGS, (True, False))
    for index, (rounding, scale_rounding, symmetric) in enumerate(choices):
        spec = MXSpec(name, block, rounding, scale_rounding, symmetric)
        rows, cols = cut_shape(spec.block)
        dtype = DTYPES[(index + BLOCKS.index(block)) % 3]
        matrix = adversarial(spec.block, rows, cols, dtype, seed=index)
        check_quantize(matrix, spec, seed_of(spec), config=one_tile(spec.block, rows, cols))


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("name", FORMATS)
def test_dequantize_every_block(name: str, symmetric: bool) -> None:
    for block, dtype in itertools.product(BLOCKS, DTYPES):
        spec = MXSpec(name, block, scale_rounding="floor", symmetric=symmetric)
        rows, cols = cut_shape(spec.block)
        parts = expected_parts(adversarial(spec.block, rows, cols, dtype), spec)
        got = dequantize(parts, spec, cols, dtype, one_tile(spec.block, rows, cols))
        assert_same_bytes(got, expected_values(parts, spec, cols, dtype), f"{spec} to {dtype}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_every_code_under_every_scale(name: str, dtype: torch.dtype) -> None:
    """A row for each scale byte with every code in it: infinities, subnormals and the contract's NaN included;
    and with offsets, a NaN among them."""
    element = FORMATS[name]
    count = 1 << element.bits
    everywhere = (torch.arange(256)[:, None] + torch.arange(count)[None, :]).remainder(count)
    codes = reference.pack(everywhere.to(torch.uint8), element)
    for symmetric in (True, False):
        spec = MXSpec(element, (1, min(count, 128)), symmetric=symmetric)
        scale = torch.arange(256, dtype=torch.uint8)[:, None].repeat(1, count // spec.block.cols)
        parts = [codes, scale]
        if not symmetric:
            offsets = [0.0, -0.0, 1.0, -65504.0, 2.0**-24, 0.1, -2.5, 0.5, torch.nan]
            parts.append(torch.tensor(offsets, dtype=torch.float16)[torch.arange(scale.numel()) % 9].view(scale.shape))
        got = dequantize(parts, spec, count, dtype, CastConfig(256, count, 1))
        assert_same_bytes(got, expected_values(parts, spec, count, dtype), f"{spec} to {dtype}")


@pytest.mark.parametrize("block", BLOCKS)
def test_pair_is_both_quantisations(block: str) -> None:
    """Formats, roundings and symmetry in turn; the block is not turned with the matrix."""
    turn = BLOCKS.index(block)
    for index, name in enumerate(FORMATS, start=turn):
        rounding = ROUNDINGS[(index + turn // 2) % 2]
        spec = MXSpec(name, block, rounding, SCALE_ROUNDINGS[index % 4], symmetric=index % 3 > 0)
        rows, cols = cut_shape(spec.block)
        matrix = adversarial(spec.block, rows, cols, DTYPES[index % 3], seed=index)
        check_quantize(matrix, spec, seed_of(spec), pair=True, config=one_tile(spec.block, rows, cols, pair=True))


# --- shapes, strides, tiles --------------------------------------------------------------------------------


def strided(rows: int, cols: int, row_stride: int, col_stride: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """A matrix of any non-negative strides over ordinary numbers and a few others, from an odd place in memory."""
    size = max(rows - 1, 0) * row_stride + max(cols - 1, 0) * col_stride + 8
    memory = adversarial(Block(1, 32), 1, size, dtype, seed)[0]
    return memory.as_strided((rows, cols), (row_stride, col_stride), storage_offset=3)


LAYOUTS: dict[str, Callable[[int, int], tuple[int, int]]] = {
    "contiguous": lambda rows, cols: (max(cols, 1), 1),
    "transposed": lambda rows, cols: (1, max(rows, 1)),
    "every other row": lambda rows, cols: (2 * max(cols, 1), 1),
    "every third column": lambda rows, cols: (3 * max(cols, 1), 3),
    "a slice of wider rows": lambda rows, cols: (cols + 5, 1),
    "one row, expanded": lambda rows, cols: (0, 1),
    "one column, expanded": lambda rows, cols: (1, 0),
    "one element, expanded": lambda rows, cols: (0, 0),
    "overlapping": lambda rows, cols: (1, 1),
}
SHAPES = ((1, 1), (1, 100), (100, 1), (7, 3), (31, 33), (2, 67), (40, 48), (64, 64), (33, 32), (5, 16))


def pairwise(*factors: tuple) -> Iterator[tuple]:
    """Rows in which every two values of every two factors meet: greedy, each row starting from a missing pair."""
    pairs = list(itertools.combinations(range(len(factors)), 2))
    missing = {(a, b, x, y): None for a, b in pairs for x in range(len(factors[a])) for y in range(len(factors[b]))}
    while missing:
        a, b, x, y = next(iter(missing))
        row = {a: x, b: y}
        for factor in range(len(factors)):
            if factor not in row:
                met = [0] * len(factors[factor])
                for value in range(len(met)):
                    for other, chosen in row.items():
                        key = (other, factor, chosen, value) if other < factor else (factor, other, value, chosen)
                        met[value] += key in missing
                row[factor] = met.index(max(met))
        for a, b in pairs:
            missing.pop((a, b, row[a], row[b]), None)
        yield tuple(values[row[index]] for index, values in enumerate(factors))


CASES = list(
    pairwise(
        BLOCKS, SHAPES, tuple(LAYOUTS), tuple(FORMATS), SCALE_ROUNDINGS, DTYPES, ROUNDINGS, (True, False), (True, False)
    )
)


@pytest.mark.parametrize("part", range(8))
def test_pairwise(part: int) -> None:
    """Every two of: block, shape, layout, format, scale rounding, dtype, rounding, symmetry, and one orientation
    or both."""
    for case in CASES[part::8]:
        block, (rows, cols), layout, name, scale_rounding, dtype, rounding, symmetric, pair = case
        spec = MXSpec(name, block, rounding, scale_rounding, symmetric)
        matrix = strided(rows, cols, *LAYOUTS[layout](rows, cols), dtype)
        config = one_tile(spec.block, rows, cols, pair)
        parts = check_quantize(matrix, spec, seed_of(spec), pair, config)
        got = dequantize(parts, spec, cols, dtype, config)
        assert_same_bytes(got, expected_values(parts, spec, cols, dtype), f"{spec} to {dtype}")


@pytest.mark.parametrize("block", BLOCKS)
def test_the_library_s_own_configs(block: str) -> None:
    for index, (name, pair) in enumerate(itertools.product(("e2m1", "e3m2", "int8"), (False, True))):
        spec = MXSpec(name, block, symmetric=index % 4 > 1)
        for view in (
            adversarial(spec.block, 3, 37, DTYPES[index % 3]),
            adversarial(spec.block, 5, 6, DTYPES[index % 3]).T,
        ):
            parts = check_quantize(view, spec, pair=pair)
            got = dequantize(parts, spec, view.shape[1], view.dtype)
            assert_same_bytes(got, expected_values(parts, spec, view.shape[1], view.dtype), f"{spec} to {view.dtype}")


def test_pairwise_meets_every_pair() -> None:
    factors = ("ab", "cde", "fg", "hijk")
    rows = list(pairwise(*map(tuple, factors)))
    for (a, left), (b, right) in itertools.combinations(enumerate(factors), 2):
        assert {(row[a], row[b]) for row in rows} == set(itertools.product(left, right))


@st.composite
def launches(draw: st.DrawFn) -> tuple[MXSpec, torch.Tensor, int | None, bool, CastConfig]:
    spec = MXSpec(
        draw(st.sampled_from(tuple(FORMATS))),
        draw(st.sampled_from(BLOCKS)),
        draw(st.sampled_from(ROUNDINGS)),
        draw(st.sampled_from(SCALE_ROUNDINGS)),
        draw(st.booleans()),
    )
    rows, cols = draw(st.integers(0, 70)), draw(st.integers(0, 70))
    strides = draw(st.integers(0, 80)), draw(st.integers(0, 80))
    matrix = strided(rows, cols, *strides, draw(st.sampled_from(DTYPES)), draw(st.integers(0, 99)))
    pair = draw(st.booleans())
    tile = one_tile(spec.block, *(draw(st.sampled_from([extent, -(-extent // 2)])) for extent in (rows, cols)), pair)
    config = draw(st.sampled_from(list(configs_of((tile.tile_rows, tile.tile_cols)))))
    seed = draw(st.integers(0, 2**64 - 1)) if spec.stochastic else None
    return spec, matrix, seed, pair, config


@settings(max_examples=100)
@given(launches())
def test_any_launch(launch: tuple[MXSpec, torch.Tensor, int | None, bool, CastConfig]) -> None:
    spec, matrix, seed, pair, config = launch
    parts = check_quantize(matrix, spec, seed, pair, config)
    got = dequantize(parts, spec, matrix.shape[1], torch.float32, config)
    assert_same_bytes(got, expected_values(parts, spec, matrix.shape[1], torch.float32), spec)


@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (5, 0)], ids=str)
def test_nothing_to_do(shape: tuple[int, int]) -> None:
    for name, symmetric in itertools.product(("e2m1", "e2m3", "int8"), (True, False)):
        spec = MXSpec(name, "4x4", symmetric=symmetric)
        parts = check_quantize(torch.empty(shape), spec, pair=True)
        assert dequantize(parts, spec, shape[1], torch.bfloat16).shape == shape


def configs_of(tile: tuple[int, int]) -> Iterator[CastConfig]:
    """A tile with every switch of a config by itself."""
    plain = CastConfig(*tile, num_warps=4)
    yield plain
    for field in dataclasses.fields(CastConfig):
        if field.type == "bool":
            yield dataclasses.replace(plain, **{field.name: True})
    if tile[1] >= 32:
        yield CastConfig(*tile, num_warps=1, wide=True, run=4)


@pytest.mark.parametrize(("block", "symmetric"), [("1x16", True), ("16x1", True), ("4x4", False)])
@pytest.mark.parametrize(("name", "rounding"), [("e2m1", "stochastic"), ("e3m2", "rtne"), ("int8", "stochastic")])
def test_tiles_do_not_show(name: str, rounding: str, block: str, symmetric: bool) -> None:
    """The same bytes from tiles of every form: many or one, cut or filled exactly."""
    spec = MXSpec(name, block, rounding, "even", symmetric)
    for (rows, cols), tiles in {
        (37, 50): ((64, 64), (64, 16)),
        (32, 64): ((32, 64), (16, 32)),
    }.items():
        matrix = adversarial(spec.block, rows, cols, torch.bfloat16)
        expected = expected_parts(matrix, spec, seed_of(spec))
        values = expected_values(expected, spec, cols, torch.float32)
        for config in itertools.chain.from_iterable(map(configs_of, tiles)):
            assert_same_parts(quantize(matrix, spec, seed_of(spec), config=config), expected, config)
            assert_same_bytes(dequantize(expected, spec, cols, torch.float32, config), values, config)
        check_quantize(matrix, spec, seed_of(spec), pair=True, config=CastConfig(16, 32, 1))
        for view in (matrix, matrix.T.contiguous().T):
            check_quantize(view, spec, seed_of(spec), pair=True, config=CastConfig(32, 64, 1, wide=True, run=4))


@pytest.mark.parametrize("name", ["e2m1", "e2m3", "e4m3", "int8"])
def test_random_bits_belong_to_places(name: str) -> None:
    """Not to memory, tiles or the number of orientations; and other seeds give other bytes."""
    spec = MXSpec(name, "1x16", "stochastic", "even")
    matrix = torch.randn((33, 40), generator=torch.Generator().manual_seed(1))
    expected = expected_parts(matrix, spec, SEED)
    for view in (matrix, matrix.T.contiguous().T, matrix.repeat(2, 1)[33:], torch.stack([matrix] * 2, -1)[..., 1]):
        assert_same_parts(quantize(view, spec, SEED, config=CastConfig(16, 64, 1)), expected)
        both = one_tile(spec.block, 33, 40, pair=True)
        assert_same_parts(quantize(view, spec, SEED, pair=True, config=both)[:2], expected)
        assert_same_parts(quantize(view.T, spec, SEED, pair=True, config=both)[2:], expected)
    for other in (SEED + 1, SEED ^ (1 << 63), SEED ^ (1 << 32)):
        assert not torch.equal(quantize(matrix, spec, other, config=CastConfig(64, 64, 1))[0], expected[0])


@pytest.mark.parametrize("name", ["e2m1", "e2m3", "int8"])
@pytest.mark.parametrize("start", [0, 1, 2, 4, 8])
def test_codes_from_anywhere_in_memory(name: str, start: int) -> None:
    """Rows of whole words, in a view that is not aligned to them."""
    spec = MXSpec(name)
    parts = expected_parts(adversarial(spec.block, 8, 128, torch.bfloat16), spec)
    moved = torch.zeros(parts[0].numel() + start, dtype=torch.uint8)[start:].view(parts[0].shape)
    moved.copy_(parts[0])
    got = dequantize([moved, parts[1]], spec, 128, torch.bfloat16)
    assert_same_bytes(got, expected_values(parts, spec, 128, torch.bfloat16))
    # the interpreter does not mind what a GPU would: that the launch promises more alignment than there is
    out = torch.empty((8, 128), dtype=torch.bfloat16)
    for config in configs_of((8, 128)):
        layout = dequantize_launch(moved, parts[1], None, spec, out, config).arguments["LAYOUT"]
        assert moved.data_ptr() % layout.alignment == 0


# --- beyond 32 bits ----------------------------------------------------------------------------------------


def untouched(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Memory that costs nothing until it is written."""
    try:
        return torch.empty(shape, dtype=dtype)
    except RuntimeError as error:
        pytest.skip(f"no address space for {list(shape)} of {dtype}: {error}")


def untouched_parts(rows: int, cols: int, spec: MXSpec) -> list[torch.Tensor]:
    """Codes, scales and offsets of a matrix."""
    blocks = spec.scale_shape(rows, cols)
    return [
        untouched(rows, spec.packed_cols(cols), dtype=torch.uint8),
        untouched(*blocks, dtype=torch.uint8),
        untouched(*blocks, dtype=torch.float16),
    ]


def expected_with_draws(
    matrix: torch.Tensor, spec: MXSpec, draws: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> list[torch.Tensor]:
    """What the reference makes of a piece of a larger matrix, whose places have these random bits."""
    with monkeypatch.context() as patch:
        patch.setattr(reference, "random_bits", lambda *arguments: draws)
        return expected_parts(matrix, spec, seed=0)


def run_program(launch: Launch, program: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run one program of a launch that has too many for the interpreter."""
    assert 0 <= program < launch.programs

    def start_there(x: int, y: int, z: int) -> None:
        interpreter_builder.grid_idx = (x + program, y, z)

    with monkeypatch.context() as patch:
        patch.setattr(interpreter_builder, "set_grid_idx", start_there)
        dataclasses.replace(launch, programs=1).run(CPU)


@pytest.mark.parametrize("turned", [False, True], ids=["far rows", "far columns"])
def test_inputs_beyond_2_to_31_elements(turned: bool) -> None:
    """The second row, or column, lies 2**31 elements after the first."""
    far = 2**31 + 16
    memory = untouched(far + 64, dtype=torch.bfloat16)
    values = adversarial(Block(1, 16), 2, 48, torch.bfloat16)
    view = memory.as_strided((2, 48), (far, 1))
    view.copy_(values)
    spec = MXSpec("e2m1", "1x16", symmetric=False)
    got = quantize(view.T if turned else view, spec, pair=True)
    expected = expected_parts(values, spec), expected_parts(values.T, spec)
    assert_same_parts(got, [*expected[turned], *expected[not turned]])


@pytest.mark.parametrize("name", ["e2m1", "e2m3", "e4m3"])
def test_outputs_beyond_2_to_31_bytes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last tile of a matrix whose codes, scales and decoded values all end beyond 2**31 elements, which is
    all that is run of it: the columns all are one column, and the rest of the output is never touched."""
    spec = MXSpec(name, "2x1", "stochastic", symmetric=False)
    rows, cols, tile = (1 << 17) + 7, (1 << 15) + 5, CastConfig(16, 64, 1)
    last_rows, last_cols = rows % tile.tile_rows, cols % tile.tile_cols
    column = adversarial(Block(2, 1), rows, 1, torch.bfloat16)
    parts = untouched_parts(rows, cols, spec)
    assert all(part.numel() > 2**31 for part in parts)
    launch = quantize_launch(column.expand(rows, cols), spec, torch.tensor([7]), parts, tile)
    run_program(launch, launch.programs - 1, monkeypatch)

    end = column[-last_rows:].expand(last_rows, last_cols)
    draws = reference.random_bits(last_rows, cols, 7, rows - last_rows)[:, -last_cols:]
    expected = expected_with_draws(end, spec, draws, monkeypatch)
    blocks = spec.scale_shape(*end.shape)
    got = [parts[0][-last_rows:, -expected[0].shape[1] :], *(part[-blocks[0] :, -blocks[1] :] for part in parts[1:])]
    assert_same_parts(got, expected)

    out = untouched(rows, cols, dtype=torch.bfloat16)
    launch = dequantize_launch(*parts, spec, out, tile)
    run_program(launch, launch.programs - 1, monkeypatch)
    values = expected_values(expected, spec, last_cols, torch.bfloat16)
    assert_same_bytes(out[-last_rows:, -last_cols:], values)


@pytest.mark.parametrize("name", ["e2m1", "e2m3", "e4m3"])
def test_rows_of_2_to_31_elements(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The longest rows whose length fits 32 bits: rounding it up to tiles, blocks or groups must not overflow."""
    spec = MXSpec(name, "1x32", "stochastic", symmetric=False)
    cols, tile = 2**31 - 1, CastConfig(1, 128, 1)
    last_cols = cols % tile.tile_cols
    memory = untouched(1, cols, dtype=torch.bfloat16)
    memory[:, -last_cols:] = adversarial(spec.block, 1, last_cols, torch.bfloat16)
    parts = untouched_parts(2, cols, spec)
    launch = quantize_launch(memory.expand(2, cols), spec, torch.tensor([7]), parts, tile)
    run_program(launch, launch.programs - 1, monkeypatch)
    draws = torch.tensor([[exact.random16(1, col, cols, 7) for col in range(cols - last_cols, cols)]])
    expected = expected_with_draws(memory[:, -last_cols:], spec, draws, monkeypatch)
    assert_same_parts([part[1:, -right.shape[1] :] for part, right in zip(parts, expected, strict=True)], expected)

    out = untouched(2, cols, dtype=torch.bfloat16)
    launch = dequantize_launch(*parts, spec, out, tile)
    run_program(launch, launch.programs - 1, monkeypatch)
    assert_same_bytes(out[1:, -last_cols:], expected_values(expected, spec, last_cols, torch.bfloat16))


# --- the rest ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_a_new_format_is_a_row(rounding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FORMATS, "e1m2", ElementFormat("e1m2", 4, 1, 2, 0, 3.5, 1, 2))
    assert FORMATS["e1m2"].magnitudes == (0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5)
    for scale_rounding, block, symmetric in itertools.product(SCALE_ROUNDINGS, ("1x32", "4x4"), (True, False)):
        spec = MXSpec("e1m2", block, rounding, scale_rounding, symmetric)
        matrix = adversarial(spec.block, 33, 50, torch.bfloat16)
        config = one_tile(spec.block, 33, 50)
        parts = check_quantize(matrix, spec, seed_of(spec), config=config)
        got = dequantize(parts, spec, 50, torch.float32, config)
        assert_same_bytes(got, expected_values(parts, spec, 50, torch.float32), spec)


def test_poison_shows() -> None:
    """What these tests lean on: a byte beside an output, or one that is not written, is noticed."""
    part = empty_parts(3, 5, MXSpec("e2m1"), CPU)[0]
    assert (part == 0xAA).all()
    assert_guards_hold(part)
    for place in (part.storage_offset() - 1, part.storage_offset() + part.numel()):
        other = empty_parts(3, 5, MXSpec("e2m1"), CPU)[0]
        other.as_strided((1,), (1,), place).fill_(0)
        with pytest.raises(AssertionError, match="written"):
            assert_guards_hold(other)

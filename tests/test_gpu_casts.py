"""Every cast on the GPU, to the byte: the kernels against the reference, which runs there too.

Compiling is what takes time, so it is done by worker processes. A case is one compiled kernel: a worker runs it
into poisoned memory and says what differs.
"""

from __future__ import annotations

import itertools
import math
import os
import traceback
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import get_args

import pytest

pytest.importorskip("triton", reason="kernels need Triton")

import torch
from poisoned import assert_guards_hold, poisoned

import mxkernels as mx
from mxkernels import gpu, reference
from mxkernels.formats import FORMATS, ElementFormat
from mxkernels.ops.dequantize_kernel import dequantize_launch
from mxkernels.ops.quantize_kernel import quantize_launch
from mxkernels.ops.quantize_pair_kernel import quantize_pair_launch
from mxkernels.spec import MXSpec, Rounding, ScaleRounding
from mxkernels.tune import CastConfig, PairConfig, Problem, obstacle

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
SEED = -0x0FEDCBA912345678  # both of its words have their top bits set
INTEGERS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}
DTYPES = tuple(INTEGERS)

Differences = list[str]
Shape = tuple[int, int]


# --- inputs ------------------------------------------------------------------------------------------------


def adversarial(rows: int, cols: int, dtype: torch.dtype) -> torch.Tensor:
    """Two bands of rows each of Gaussians, of blocks apart by powers of two, of values on and beside ties, of
    random bits; and a row each of what is special."""
    generator = torch.Generator(DEVICE).manual_seed(rows * cols)

    def integers(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator, device=DEVICE)

    band = (torch.arange(rows, device=DEVICE) * 8 // rows % 4)[:, None]
    x = torch.randn(rows, cols, generator=generator, device=DEVICE)
    spread = 4 if dtype == torch.float16 else 100
    apart = x * torch.exp2((integers(-spread, spread, rows, 1) + integers(-8, 8, rows, cols)).float())
    x = torch.where(band == 1, apart, torch.where(band == 2, (x * 16).round() / 16, x)).to(dtype)
    bits = x.view(INTEGERS[dtype])
    beside = bits + integers(-1, 2, rows, cols).to(bits.dtype)
    bits = torch.where((band == 2) & (x != 0), beside, bits)
    width = 8 * dtype.itemsize - 1
    x = torch.where(band == 3, integers(-(2**width), 2**width, rows, cols).to(bits.dtype), bits).view(dtype)
    x = torch.where(x.isfinite(), x, torch.ones_like(x))
    if rows >= 16:
        largest, smallest_normal = torch.finfo(dtype).max, torch.finfo(dtype).tiny
        x[0, 0], x[1, cols // 2], x[2, -1] = math.nan, math.inf, -math.inf
        x[3], x[4], x[5, ::2], x[6], x[7, 1::2] = 0.0, -0.0, largest, -smallest_normal / 8, -largest
        x[8] = x[8] / 16 + 1000  # of one sign, far from 0
    return x


def decisive(element: ElementFormat, random: torch.Tensor) -> torch.Tensor:
    """Within two ulps in fp32 of what decides: ties, values of the grid, and where, with these random bits, rounding
    up begins; and some random bits."""
    generator = torch.Generator(DEVICE).manual_seed(1)

    def integers(low: int, high: int) -> torch.Tensor:
        return torch.randint(low, high, random.shape, generator=generator, device=DEVICE)

    grid = torch.tensor(element.magnitudes, dtype=torch.float64, device=DEVICE)
    steps = torch.cat([grid[1:], 2 * grid[-1:]]) - grid  # what is beyond the largest saturates
    places = torch.tensor([0.0, 2.0**-26, 0.25, 0.5, 0.75], dtype=torch.float64, device=DEVICE)
    position = torch.where(integers(0, 2) == 0, places[integers(0, len(places))], (2**16 - 0.5 - random) / 2**16)
    lower = integers(0, len(grid))
    bits = (grid[lower] + position * steps[lower]).float().view(torch.int32) + integers(-2, 3) + (integers(-1, 1) << 31)
    return torch.where(integers(0, 8) == 0, integers(-(2**31), 2**31), bits).to(torch.int32).view(torch.float32)


# By name, a tensor of some rows, columns and dtype that lies in memory in this way.
LAYOUTS = {
    "contiguous": adversarial,
    "transposed": lambda r, c, dtype: adversarial(c, r, dtype).T,
    "rows apart": lambda r, c, dtype: adversarial(r, c + 16, dtype)[:, :c],
    "sliced": lambda r, c, dtype: adversarial(2 * r + 1, 3 * c + 2, dtype)[1::2, 2::3],
    "a row expanded": lambda r, c, dtype: adversarial(r, c, dtype)[-1:].expand(r, c),
    "a column expanded": lambda r, c, dtype: adversarial(r, c, dtype)[:, -1:].expand(r, c),
    "unaligned": lambda r, c, dtype: adversarial(r + 1, c, dtype).flatten()[1 : 1 + r * c].view(r, c),
}


# --- comparing ---------------------------------------------------------------------------------------------


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


def difference(name: str, actual: torch.Tensor, expected: torch.Tensor) -> Differences:
    wrong = bytes_of(actual) != bytes_of(expected)
    if not wrong.any():
        return []
    return [f"{name}: {int(wrong.sum())} of {wrong.numel()} bytes, one at {int(wrong.byte().argmax())}"]


def poisoned_like(part: torch.Tensor) -> torch.Tensor:
    return poisoned(tuple(part.shape), part.dtype, part.device)


def written(name: str, output: torch.Tensor, expected: torch.Tensor) -> Differences:
    """What differs in an output, once what lies around it is known to be left alone."""
    assert_guards_hold(output)
    return difference(name, output, expected)


def narrow(spec: MXSpec, cols: int) -> int:
    """How many columns to give to the reference, which takes whole rows at a time: rows of billions, cut at the
    edges of one-row blocks, are more rows of the same blocks and the same random bits."""
    return cols if cols < 2**24 else spec.block.cols


def expected_parts(x: torch.Tensor, spec: MXSpec) -> list[torch.Tensor]:
    """The reference's codes, scale and, if asymmetric, offset."""
    cols = narrow(spec, x.shape[1])
    parts = reference.quantize(x if cols == x.shape[1] else x.view(-1, cols), spec, SEED)
    return [part.view(-1, part.shape[1] * (x.shape[1] // cols)) for part in parts if part is not None]


def check_quantize(
    x: torch.Tensor,
    spec: MXSpec,
    pair: bool = False,
    config: CastConfig | PairConfig | None = None,
    capabilities: gpu.Capabilities | None = None,
) -> tuple[Differences, list[torch.Tensor]]:
    """What differs, and what is right."""
    expected = expected_parts(x, spec) + (expected_parts(x.T, spec) if pair else [])
    outputs = [poisoned_like(part) for part in expected]
    seed = torch.tensor([SEED], device=DEVICE) if spec.stochastic else None
    launch = quantize_pair_launch if pair else quantize_launch
    launch(x, spec, seed, outputs, config, capabilities).run(DEVICE)
    names = ("codes", "scale", "offset")[: 2 if spec.symmetric else 3]
    names += tuple(f"turned {name}" for name in names) if pair else ()
    parts = zip(names, outputs, expected, strict=True)
    return [text for part in parts for text in written(*part)], expected


def check_dequantize(
    parts: list[torch.Tensor],
    spec: MXSpec,
    cols: int,
    dtype: torch.dtype,
    config: CastConfig | None = None,
    capabilities: gpu.Capabilities | None = None,
) -> Differences:
    codes, scale, offset = [*parts, None][:3]
    few = narrow(spec, cols)
    cut = [part if few == cols else part.view(-1, part.shape[1] // (cols // few)) for part in parts]
    expected = reference.dequantize(*[*cut, None][:3], spec, few, dtype).view(-1, cols)
    output = poisoned_like(expected)
    dequantize_launch(codes, scale, offset, spec, output, config, capabilities).run(DEVICE)
    return written("decoded", output, expected)


# --- cases -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Quantize:
    spec: str
    dtype: torch.dtype
    shape: Shape
    layout: str = "contiguous"
    pair: bool = False
    config: CastConfig | PairConfig | None = None
    capabilities: gpu.Capabilities | None = None

    def differences(self) -> Differences:
        x = LAYOUTS[self.layout](*self.shape, self.dtype)
        return check_quantize(x, MXSpec.parse(self.spec), self.pair, self.config, self.capabilities)[0]


@dataclass(frozen=True)
class Dequantize:
    """Of random bytes."""

    spec: str
    dtype: torch.dtype
    shape: Shape
    start: int = 0  # bytes by which the codes are out of alignment
    config: CastConfig | None = None

    def differences(self) -> Differences:
        spec, (rows, cols) = MXSpec.parse(self.spec), self.shape
        generator = torch.Generator(DEVICE).manual_seed(rows * cols)
        row_bytes, blocks = spec.packed_cols(cols), spec.scale_shape(rows, cols)
        codes = torch.empty(self.start + rows * row_bytes, dtype=torch.uint8, device=DEVICE)
        codes = codes.random_(0, 256, generator=generator)[self.start :].view(rows, row_bytes)
        parts = [codes, torch.empty(blocks, dtype=torch.uint8, device=DEVICE).random_(0, 256, generator=generator)]
        if not spec.symmetric:
            bits = torch.empty(blocks, dtype=torch.int16, device=DEVICE).random_(-(2**15), 2**15, generator=generator)
            offset = bits.view(torch.float16)
            parts.append(torch.where(offset.isfinite(), offset, torch.ones_like(offset)))
        return check_dequantize(parts, spec, cols, self.dtype, self.config)


@dataclass(frozen=True)
class Decode:
    """Every code under every scale byte, and, if asymmetric, each with some offsets."""

    spec: str
    dtype: torch.dtype
    capabilities: gpu.Capabilities | None

    def differences(self) -> Differences:
        spec = MXSpec.parse(self.spec)
        codes_there_are = 1 << spec.element.bits
        offsets = [0.0] if spec.symmetric else [0.0, 2.0**-24, 0.1, -1.5, 300.0, 65504.0, -65504.0]
        codes = torch.arange(codes_there_are, device=DEVICE).to(torch.uint8)[None]
        codes = reference.pack(codes, spec.element).repeat(256 * len(offsets), 1)
        scale = torch.arange(256, device=DEVICE).to(torch.uint8)[:, None]
        parts = [codes, scale.repeat(len(offsets), codes_there_are // spec.block.cols)]
        if not spec.symmetric:
            offset = torch.tensor(offsets, dtype=torch.float16, device=DEVICE).repeat_interleave(256)[:, None]
            parts.append(offset.repeat(1, codes_there_are // spec.block.cols))
        return check_dequantize(parts, spec, codes_there_are, self.dtype, capabilities=self.capabilities)


@dataclass(frozen=True)
class Encode:
    """Every 16-bit float, or fp32 values on and beside what decides, under the scale 1."""

    spec: str
    dtype: torch.dtype
    capabilities: gpu.Capabilities | None

    def differences(self) -> Differences:
        spec = MXSpec.parse(self.spec)
        element, rows, cols = spec.element, 2**15, spec.block.cols
        random = reference.random_bits(rows, cols, SEED, device=DEVICE)
        if self.dtype == torch.float32:
            x = decisive(element, random)
        else:
            place = torch.arange(rows * cols, device=DEVICE)  # each round starts a column later
            x = (place + (place >> 16)).to(torch.int16).view(self.dtype).view(rows, cols)
        if spec.scale_rounding == "floor":  # then 2**emax makes the scale 1; under `rceil`, max does
            plant, reachable = 2.0**element.emax, x.abs() < 2.0 ** (element.emax + 1)
        else:
            plant, reachable = element.max, x.abs() <= element.max
        x = torch.where(reachable, x, torch.zeros_like(x))
        x[:, 0] = plant
        differences, (_, scale) = check_quantize(x, spec, capabilities=self.capabilities)
        assert (scale == 127).all()
        return differences


SHAPES = ((1024, 2048), (509, 1023))
# Seven inputs, so that no axis of a product keeps step with them.
INPUTS = [*itertools.product(DTYPES, SHAPES), (torch.bfloat16, (4096, 520))]
ROUNDINGS, RULES, SYMMETRIES = get_args(Rounding), get_args(ScaleRounding), ("symmetric", "asymmetric")
CAPABILITIES = (None, gpu.NONE)  # the GPU's own, and what stands in for them on others
SIDES = [1 << n for n in range(8)]
BLOCKS = [f"{rows}x{cols}" for rows, cols in itertools.product(SIDES, SIDES) if rows * cols > 1]
TWO_BLOCKS = ("1x32", "4x4")
FOUR_SPECS = (
    "e2m1 {} rtne even symmetric",
    "e4m3 {} rtne rceil asymmetric",
    "e3m2 {} stochastic ceil asymmetric",
    "int8 {} stochastic floor symmetric",
)
VARIED_SPECS = (
    "e2m1 1x32 rtne even symmetric",
    "e5m2 32x1 rtne floor symmetric",
    "e2m3 4x8 stochastic rceil asymmetric",
    "int4 2x2 stochastic ceil symmetric",
)
ROW_SPECS = ("e2m1 1x16 stochastic even symmetric", "e2m3 1x8 rtne ceil asymmetric")  # that fill any tile
CONFIGS = [CastConfig(*sizes) for sizes in ((4, 1024, 8), (1, 4096, 4), (16, 16, 1), (64, 64, 2), (128, 32, 4))]
CONFIGS += [CastConfig(*sizes, wide=True, run=4) for sizes in ((2, 1024, 1), (64, 64, 2), (128, 128, 4))]
# Seven inputs, so that no axis of a product keeps step with them.
PAIR_INPUTS = [
    (dtype, layout, PairConfig(*sizes))
    for dtype, layout, sizes in (
        (torch.bfloat16, "contiguous", (128, 128, 4, 1)),
        (torch.bfloat16, "transposed", (128, 512, 8, 3)),
        (torch.bfloat16, "rows apart", (256, 256, 8, 2)),
        (torch.float16, "contiguous", (128, 512, 4, 4)),
        (torch.float16, "transposed", (256, 128, 4, 1)),
        (torch.bfloat16, "contiguous", (512, 512, 8, 3)),
        (torch.float16, "rows apart", (128, 128, 8, 1)),
    )
]
PAIR_BLOCKS = ("1x2", "1x16", "1x32", "1x128", "4x4", "8x64", "16x16", "32x32", "128x2")


def fitting(spec: str, config: PairConfig) -> PairConfig:
    """Of one cell, where the scales of more do not fit into shared memory."""
    problem = Problem("quantize_pair", spec, "bfloat16", "rows", (512, 1024))
    if "stages take" in str(obstacle(problem, config)):
        config = PairConfig(128, 128, config.num_warps, 1)
    assert obstacle(problem, config) is None, (spec, config)
    return config


EDGES = ((1, 1), (1, 4097), (4097, 1), (3, 7), (129, 31))


def specs(*axes: Iterable[str]) -> list[str]:
    return [" ".join(names) for names in itertools.product(*axes)]


def rotated(names: Iterable[str]) -> Iterator[tuple[str, torch.dtype, Shape]]:
    """Each spec with the next of INPUTS."""
    return ((name, *given) for name, given in zip(names, itertools.cycle(INPUTS), strict=False))


def every_block(templates: Iterable[str]) -> list[str]:
    return [template.format(block) for block in BLOCKS for template in templates]


Case = Quantize | Dequantize | Decode | Encode
GROUPS: dict[str, list[Case]] = {
    "every value encoded": [
        Encode(*axes)
        for axes in itertools.product(
            specs(FORMATS, ["1x32"], ROUNDINGS, ["floor", "rceil"], ["symmetric"]), DTYPES, CAPABILITIES
        )
        if axes[1:] != (torch.float16, gpu.NONE)  # which is computed as bfloat16 is
    ],
    "every code decoded": [
        Decode(*axes)
        for axes in itertools.product(specs(FORMATS, ["1x16 rtne even"], SYMMETRIES), DTYPES, CAPABILITIES)
    ],
    "the product, quantised": [
        Quantize(*given) for given in rotated(specs(FORMATS, TWO_BLOCKS, ROUNDINGS, RULES, SYMMETRIES))
    ],
    "the product, decoded": [
        Dequantize(spec, dtype, shape)
        for (spec, dtype), shape in zip(
            itertools.product(specs(FORMATS, TWO_BLOCKS, ["rtne even"], SYMMETRIES), DTYPES),
            itertools.cycle(SHAPES),
            strict=False,
        )
    ],
    "every block, quantised": [Quantize(*given) for given in rotated(every_block(FOUR_SPECS))],
    "every block, decoded": [Dequantize(*given) for given in rotated(every_block(FOUR_SPECS[:2]))],
    "layouts": [
        Quantize(spec, dtype, shape, layout)
        for (spec, shape, layout), dtype in zip(
            itertools.product(VARIED_SPECS, SHAPES, LAYOUTS), itertools.cycle(DTYPES), strict=False
        )
    ],
    "both orientations": [
        Quantize(*given, layout, pair=True)
        for layout in ("contiguous", "transposed")
        for given in rotated([*VARIED_SPECS, *VARIED_SPECS, "e4m3 128x128 rtne even asymmetric"])
    ],
    "configs": [
        *(
            Quantize(spec, torch.bfloat16, shape, pair=pair, config=config)
            for spec, shape, config, pair in itertools.product(ROW_SPECS, SHAPES, CONFIGS, (False, True))
            if not pair or config.tile_rows >= 16
        ),
        *(
            Dequantize(spec, torch.bfloat16, shape, config=config)
            for spec, shape, config in itertools.product(ROW_SPECS, SHAPES, CONFIGS)
        ),
    ],
    "pairs by shared memory": [
        Quantize(spec, dtype, (512, 1024), layout, pair=True, config=fitting(spec, config))
        for spec, (dtype, layout, config) in zip(
            specs([name for name in FORMATS if FORMATS[name].bits != 6], PAIR_BLOCKS, ROUNDINGS, ["even"], SYMMETRIES),
            itertools.cycle(PAIR_INPUTS),
            strict=False,
        )
    ]
    + [  # nine tiles one below the other, of which programs work on eight before the next column
        Quantize("e2m1 1x32 rtne even symmetric", torch.bfloat16, shape, layout, pair=True)
        for shape, layout in (((1152, 256), "contiguous"), ((256, 1152), "transposed"))
    ],
    "edges": [
        case
        for spec, shape in itertools.product(VARIED_SPECS, EDGES)
        for case in (
            Quantize(spec, torch.bfloat16, shape),
            Quantize(spec, torch.bfloat16, shape, pair=True),
            Dequantize(spec, torch.bfloat16, shape),
        )
    ],
    "codes out of alignment": [
        Dequantize(spec, torch.bfloat16, (512, 1024), start)
        for spec, start in itertools.product(VARIED_SPECS, (1, 2, 4, 8))
    ],
    "without conversions": [
        Quantize(*given, capabilities=gpu.NONE)
        for given in rotated(specs(FORMATS, ["1x32"], ROUNDINGS, ["even"], SYMMETRIES))
    ],
}


# --- tests -------------------------------------------------------------------------------------------------


def outcome(case: Case) -> Differences:
    try:
        return case.differences()
    except Exception:
        return [traceback.format_exc()[-1000:]]


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest) -> Iterator[dict[str, list[tuple[Case, Future[Differences]]]]]:
    """What comes of the cases, by group: of all the groups that were chosen, so that no worker waits for a test."""
    chosen = {item.callspec.params["group"] for item in request.session.items if "group" in item.fixturenames}
    if "PYTEST_XDIST_WORKER" in os.environ:
        pytest.fail("these tests have processes of their own, and each of xdist's would start as many; run without -n")
    workers = min(max((os.cpu_count() or 1) - 2, 1), 14)
    with ProcessPoolExecutor(workers, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        yield {
            name: [(case, pool.submit(outcome, case)) for case in cases]
            for name, cases in GROUPS.items()
            if name in chosen
        }
        pool.shutdown(cancel_futures=True)


# The first of the tests, since it leaves the processor to the workers.
@pytest.mark.usefixtures("outcomes")
@pytest.mark.parametrize(
    ("text", "stored", "transposed", "pair"),
    [
        ("e4m3 1x32 rtne rceil symmetric", (2, 2**30 + 32), False, False),  # as many bytes of codes
        ("e2m1 1x32 stochastic even asymmetric", (1, 2**31 + 32), False, False),  # more columns than an int32 counts
        ("int4 2x4 stochastic floor symmetric", (2**27 + 3, 16), False, False),
        ("e2m3 4x4 rtne even symmetric", (46400, 46404), True, False),
        ("e2m1 1x32 stochastic even symmetric", (128, 2**24 + 128), False, True),
    ],
)
def test_more_than_two_to_the_31_elements(text: str, stored: Shape, transposed: bool, pair: bool) -> None:
    if torch.cuda.get_device_properties(DEVICE).total_memory < 2**36:
        pytest.skip("needs 64 GiB of GPU memory")
    torch.cuda.empty_cache()
    spec = MXSpec.parse(text)
    x = torch.randn(stored, dtype=torch.bfloat16, device=DEVICE)
    x = x.T if transposed else x
    x[-1, -1] = math.inf
    assert x.numel() > 2**31
    differences, parts = check_quantize(x, spec, pair)
    assert differences == []
    assert pair or check_dequantize(parts, spec, x.shape[1], torch.bfloat16) == []


@pytest.mark.parametrize("group", GROUPS)
def test_equals_the_reference(group: str, outcomes: dict[str, list[tuple[Case, Future[Differences]]]]) -> None:
    found = [(case, future.result()) for case, future in outcomes[group]]
    wrong = [f"{case}: {'; '.join(differences)}" for case, differences in found if differences]
    assert not wrong, "\n".join([f"{len(wrong)} of {len(found)} cases", *wrong[:10]])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("text", [*VARIED_SPECS, "e3m2 4x4 rtne rceil asymmetric", "int8 1x32 rtne floor symmetric"])
def test_the_reference_is_the_same_on_the_gpu(text: str, dtype: torch.dtype) -> None:
    spec, x = MXSpec.parse(text), adversarial(96, 200, dtype)
    here, there = reference.quantize(x.cpu(), spec, SEED), reference.quantize(x, spec, SEED)
    decoded = (reference.dequantize(*parts, spec, 200, dtype) for parts in (here, there))
    for on_cpu, on_gpu in zip((*here, next(decoded)), (*there, next(decoded)), strict=True):
        assert on_cpu is on_gpu is None or difference("reference", on_gpu.cpu(), on_cpu) == []


@pytest.mark.parametrize("name", FORMATS)
def test_the_mean_of_stochastic_rounding_is_the_value(name: str) -> None:
    """At many magnitudes and scales the mean error is what chance and 16 bits allow.

    A row is one value throughout, but for the plants that give every block the row's scale. The standard error of
    the mean is that of the position's coin, sqrt(f (1 - f) / n) steps; 16 bits add up to 2**-17.
    """
    element, cols = FORMATS[name], 2**22
    grid = torch.tensor(element.magnitudes, dtype=torch.float64)
    # below the smallest code, then between others
    positions = torch.tensor([2.0**-12, 0.001, 0.03, 0.1, 0.3, 0.5, 0.77, 0.99, 0.03, 0.31, 0.62, 0.87, 0.13, 0.45])
    lower = torch.cat([torch.zeros(8), torch.linspace(1, element.max_code - 1, 6)]).long()
    step = grid[lower + 1] - grid[lower]
    sign = torch.tensor([1.0, -1.0]).repeat(7)
    scale = torch.exp2(torch.linspace(-78, 78, 14).round().double())
    values = (sign * (grid[lower] + positions * step)).float()
    rows = (values * scale).float()
    x = rows[:, None].to(DEVICE).repeat(1, cols)
    x[:, ::128] = (element.max * scale).float()[:, None].to(DEVICE)

    q = mx.quantize(x, MXSpec(name, (1, 128), "stochastic", "rceil"), seed=11)
    decoded = q.dequantize(torch.float32).view(14, -1, 128)[:, :, 1:]
    mean = decoded.double().mean(dim=(1, 2)).cpu() / scale

    f = (values.double().abs() - grid[lower]) / step
    allowed = 4 * (f * (1 - f) / (cols * 127 / 128)).sqrt() + 2.0**-17
    error = (mean - values.double()).abs() / step
    assert (error <= allowed).all(), f"{error / allowed}"

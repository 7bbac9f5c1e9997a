"""Both orientations by way of shared memory, as far as a machine without a GPU can say: which launches it takes, and
that its threads and banks are what they are said to be. Its bytes are compared on a GPU (`test_gpu_casts`)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("triton", reason="kernels need Triton")

import torch
from ahead_of_time import META, empty_parts

from mxkernels import gpu, tune
from mxkernels.ops.launch import Launch
from mxkernels.ops.quantize_pair_kernel import cell_layout, quantize_pair_launch, thread_layout
from mxkernels.spec import MXSpec
from mxkernels.tune import CastConfig, PairConfig, Problem
from mxkernels.tune.limits import Limits
from mxkernels.tune.search import BREADTHS, shortlist
from mxkernels.tuner import task

SPEC = "e2m1 1x32 rtne even symmetric"
H100 = gpu.capabilities("sm_90")
PAIR = PairConfig(128, 256, 4, 2)

# --- which launches ------------------------------------------------------------------------------------------


def launch(x: torch.Tensor, config: PairConfig | None = PAIR, capabilities: gpu.Capabilities = H100) -> Launch:
    spec = MXSpec.parse(SPEC)
    parts = empty_parts(*x.shape, spec) + empty_parts(*x.T.shape, spec)
    return quantize_pair_launch(x, spec, None, parts, config, capabilities)


def empty(rows: int, cols: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty((rows, cols), dtype=dtype, device=META)


def test_a_program_for_each_group_of_tiles() -> None:
    found = launch(empty(256, 1024))
    assert found.kernel.__name__ == "quantize_pair_kernel"
    assert (found.programs, found.scalars["rows"], found.scalars["cols"]) == (8, 256, 1024)


def test_columns_are_the_rows_of_the_transpose() -> None:
    """Outputs change places, and the sides of a program's tiles too."""
    straight, turned = launch(empty(1024, 256)), launch(empty(256, 1024).T)
    names = ("codes_ptr", "scale_ptr", "offset_ptr")
    for name in names:
        for one, other in ((name, f"turned_{name}"), (f"turned_{name}", name)):
            left, right = straight.tensors[one], turned.tensors[other]
            assert (left is None) == (right is None)
            assert left is None or left.shape == right.shape  # type: ignore[union-attr]
    assert turned.scalars["CONFIG"] == PairConfig(256, 128, 4, 2)
    assert [turned.scalars[name] for name in ("rows", "cols", "row_stride")] == [256, 1024, 1024]


@pytest.mark.parametrize(
    "x",
    [
        torch.empty((128, 264), dtype=torch.bfloat16, device=META)[:, :256],  # rows of 528 bytes
        torch.empty((128, 512), dtype=torch.bfloat16, device=META)[:, ::2],
    ],
    ids=["rows out of alignment", "gaps"],
)
def test_what_is_not_loaded_by_16_bytes_goes_the_other_way(x: torch.Tensor) -> None:
    found = launch(x)
    assert found.kernel.__name__ == "quantize_kernel"
    assert isinstance(found.scalars["CONFIG"], CastConfig)


@pytest.mark.parametrize(
    ("x", "capabilities", "serves"),
    [
        (empty(256, 512), H100, True),
        (empty(256, 512).T, H100, False),  # 512 x 256, in tiles of 256 x 512 of memory
        (empty(256, 384), H100, False),
        (empty(300, 512), H100, False),
        (empty(256, 512, torch.float32), H100, False),
        (empty(256, 512), gpu.capabilities("gfx950"), False),
    ],
    ids=["whole", "its transpose", "columns", "rows", "fp32", "no PTX"],
)
def test_where_it_serves(x: torch.Tensor, capabilities: gpu.Capabilities, serves: bool) -> None:
    with tune.pinned("quantize_pair", PairConfig(256, 512, 4, 2)):
        if serves:
            assert launch(x, None, capabilities).kernel.__name__ == "quantize_pair_kernel"
        else:
            with pytest.raises(ValueError, match="which cannot serve"):
                launch(x, None, capabilities)


@pytest.mark.parametrize(
    ("formats", "dtype", "config", "words"),
    [
        (SPEC, "bfloat16", PAIR, None),
        (SPEC, "float32", PAIR, "it reads float32; allowed: bfloat16, float16"),
        ("e2m3 1x32 rtne even symmetric", "bfloat16", PAIR, "it packs e2m3; allowed: elements of 4 or 8 bits"),
        ("e2m1 32x1 rtne even symmetric", "bfloat16", PAIR, "its blocks are 32x1; allowed: two columns or more"),
        ("e2m1 128x128 rtne even symmetric", "bfloat16", PAIR, "its blocks are 128x128"),
        (SPEC, "bfloat16", PairConfig(64, 128, 4, 1), "tile_rows is 64; allowed: powers of two from 128"),
        (SPEC, "bfloat16", PairConfig(128, 384, 4, 1), "tile_cols is 384"),
        (SPEC, "bfloat16", PairConfig(128, 128, 16, 1), "num_warps is 16; allowed: 4, 8"),
        (SPEC, "bfloat16", PairConfig(128, 256, 4, 0), "stages is 0; allowed: 1 to 2"),
        (SPEC, "bfloat16", PairConfig(128, 256, 4, 3), "stages is 3; allowed: 1 to 2"),
        (SPEC, "bfloat16", PairConfig(512, 512, 4, 7), "its stages take 245760 bytes; allowed: 232448"),
    ],
)
def test_obstacles(formats: str, dtype: str, config: PairConfig, words: str | None) -> None:
    found = tune.obstacle(Problem("quantize_pair", formats, dtype, "rows", (4096, 4096)), config)
    assert found is None if words is None else words in str(found)


def test_it_is_for_pairs_alone() -> None:
    problem = Problem("quantize", SPEC, "bfloat16", "rows", (4096, 4096))
    assert tune.obstacle(problem, PAIR) == "it is a PairConfig; allowed for quantize: CastConfig"


@pytest.mark.parametrize("shape", [(16384, 16384), (4096, 4096)])
@pytest.mark.parametrize("name", ["e2m1", "e4m3", "e5m2", "int8"])
def test_the_kernels_that_are_searched(name: str, shape: tuple[int, int]) -> None:
    """Both, from the narrowest search on; most are of the one that takes fewer instructions."""
    rows, squares = (shortlisted(f"{name} {block} rtne even symmetric", shape) for block in ("1x32", "16x16"))
    by_registers = [config for config in rows if isinstance(config, CastConfig)]
    assert by_registers[0].square  # as the rule has it there
    assert len(by_registers) < len(rows) / 2
    assert 1 <= [type(config) for config in squares].count(PairConfig) < len(squares) / 2


def shortlisted(formats: str, shape: tuple[int, int]) -> list[tune.Config]:
    limits = Limits("sm_90")
    searched = task(Problem("quantize_pair", formats, "bfloat16", "rows", shape), limits)
    return shortlist(searched, limits, BREADTHS[0].compiled)


@pytest.mark.parametrize(
    ("formats", "x", "capabilities", "config"),
    [
        ("e2m1 1x32 rtne even symmetric", empty(256, 384), H100, PairConfig(128, 128, 4, 1)),
        ("e4m3 1x16 rtne even asymmetric", empty(384, 256).T, H100, PairConfig(128, 128, 4, 1)),
        ("e4m3 1x16 rtne even asymmetric", empty(384, 256), gpu.capabilities("sm_80"), PairConfig(128, 128, 8, 1)),
        ("int8 1x32 rtne even asymmetric", empty(256, 384), gpu.capabilities("sm_80"), PairConfig(128, 128, 4, 1)),
        ("int8 1x128 stochastic even symmetric", empty(128, 128, torch.float16), H100, PairConfig(128, 128, 8, 1)),
        ("e2m1 4x4 rtne even symmetric", empty(256, 384), H100, None),
        ("e2m1 32x1 rtne even symmetric", empty(256, 384), H100, None),
        ("e2m1 1x8 rtne even symmetric", empty(256, 384), H100, None),
        ("e2m3 1x32 rtne even symmetric", empty(256, 384), H100, None),
        ("e2m1 1x32 rtne even symmetric", empty(256, 384, torch.float32), H100, None),
        ("e2m1 1x32 rtne even symmetric", empty(256, 416), H100, None),
        ("e2m1 1x32 rtne even symmetric", empty(224, 384), H100, None),
        ("e2m1 1x32 rtne even symmetric", empty(256, 384), gpu.capabilities("gfx950"), None),
        ("e2m1 1x32 rtne even symmetric", empty(256, 400)[:, :384], H100, PairConfig(128, 128, 4, 1)),
        ("e2m1 1x32 rtne even symmetric", empty(256, 396)[:, :384], H100, None),
    ],
    ids=["rows", "columns", "no FP8", "nor needed", "random", "squares", "columns of blocks", "short rows", "6 bits",
         "fp32", "cut columns", "cut rows", "no PTX", "rows apart", "rows out of alignment"],
)  # fmt: skip
def test_the_rule(formats: str, x: torch.Tensor, capabilities: gpu.Capabilities, config: PairConfig | None) -> None:
    """Blocks are rows, tiles fill the matrix, memory is read 16 bytes at a time; None: by the other kernel."""
    spec = MXSpec.parse(formats)
    parts = empty_parts(*x.shape, spec) + empty_parts(*x.T.shape, spec)
    seed = torch.empty(1, dtype=torch.int64, device=META) if spec.stochastic else None
    found = quantize_pair_launch(x, spec, seed, parts, None, capabilities)
    assert found.kernel.__name__ == ("quantize_pair_kernel" if config else "quantize_kernel")
    assert not config or found.scalars["CONFIG"] == config


# --- threads and banks ---------------------------------------------------------------------------------------

Place = tuple[int, int]  # row and column


def combined(bases: Any, number: int) -> Place:
    """What a layout has at `number`: the sum, bit by bit, of the bases of its bits."""
    row = col = 0
    for bit, (down, across) in enumerate(bases):
        if number >> bit & 1:
            row, col = row ^ down, col ^ across
    return row, col


def offsets() -> dict[Place, int]:
    """Where each element of a cell stands in shared memory."""
    bases = value(cell_layout()).offset_bases
    return {combined(bases, offset): offset for offset in range(1 << len(bases))}


def value(found: Any) -> Any:
    return getattr(found, "value", found)


@pytest.mark.parametrize("num_warps", [4, 8])
def test_threads_have_whole_blocks_and_all_of_a_cell(num_warps: int) -> None:
    layout = value(thread_layout(num_warps))
    everywhere = []
    for lane, warp in itertools.product(range(32), range(num_warps)):
        row, col = (
            a ^ b for a, b in zip(combined(layout.lane_bases, lane), combined(layout.warp_bases, warp), strict=True)
        )
        its = [combined(layout.reg_bases, register) for register in range(1 << len(layout.reg_bases))]
        places = [(row ^ down, col ^ across) for down, across in its]
        assert places[:32] == [(places[0][0], places[0][1] + step) for step in range(32)]
        assert places[0][1] % 32 == 0
        everywhere += places
    assert sorted(everywhere) == list(itertools.product(range(128), range(128)))


def eights(num_warps: int) -> Iterator[tuple[str, list[Place]]]:
    """Eights of 16-byte pieces that eight threads load, or that the eight rows of a matrix of `ldmatrix` are."""
    for row, col in itertools.product(range(128), range(0, 128, 64)):
        yield "loaded", [(row, col + 8 * thread) for thread in range(8)]
    layout = value(thread_layout(num_warps))
    bases = [*layout.reg_bases, *layout.lane_bases, *layout.warp_bases]
    registers = len(layout.reg_bases)
    for number in range(0, 1 << len(bases), 8):
        if number >> registers & 7 == 0:  # the first of eight threads, at each eighth register
            yield "along rows", [combined(bases, number + (thread << registers)) for thread in range(8)]
    for number in range(0, 1 << len(bases), 2):
        if number >> registers & 31 == 0:  # of a matrix, four threads have two elements in each of eight columns
            its = [number + register + (thread << registers) for thread in range(4) for register in range(2)]
            yield "down columns", [combined(bases, each)[::-1] for each in its]


@pytest.mark.parametrize("num_warps", [4, 8])
def test_no_two_of_eight_threads_meet_in_a_bank(num_warps: int) -> None:
    offset = offsets()
    assert sorted(offset) == list(itertools.product(range(128), range(128)))
    for what, pieces in eights(num_warps):
        starts = [offset[piece] for piece in pieces]
        assert all(start % 8 == 0 for start in starts)  # 16 bytes in one piece
        assert len({start // 8 % 8 for start in starts}) == 8, (what, pieces)
    for row, col in itertools.product(range(128), range(0, 128, 8)):
        start = offset[row, col]
        assert [offset[row, col + step] for step in range(8)] == list(range(start, start + 8))

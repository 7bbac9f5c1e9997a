"""The configs that a problem may have: grids of their fields, without what cannot serve."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import astuple
from itertools import product
from math import log2

import torch

from ..spec import MXSpec
from .config import CastConfig, Config, HopperConfig, MatmulConfig, PairConfig, SmallMatmulConfig
from .constraints import obstacle
from .limits import Limits
from .problem import Problem
from .rule import ceil_div, hopper_tile_config, power_of_two_above, quantize_config

_HOPPER_TILES = ((64, 1), (64, 2), (128, 1), (128, 2), (256, 1))  # columns of a piece, pieces
_PAIR_TILES = ((128, 128), (128, 256), (256, 128), (256, 256), (128, 512), (512, 128), (256, 512))
_GROUPS = (4, 8, 16, 32)  # rows of tiles that go together


def candidates(
    problem: Problem, rule: Config, limits: Limits, serves: Callable[[Config], bool] = lambda config: True
) -> list[Config]:
    """Every config worth trying, the rule's first, then the nearer to it the earlier. Those of another kernel come
    last: of pairs by registers, the nearer the earlier to what the rule would have there.

    Args:
        serves: whether a config serves, where more than the problem and the config decides that.
    """
    found = {rule}
    for config in _GRIDS[problem.op](problem, rule):
        if config not in found and serves(config) and obstacle(problem, config, limits.shared_bytes) is None:
            found.add(config)
    middles: dict[type[Config], Config] = {type(rule): rule}
    if problem.op == "quantize_pair":
        middles.setdefault(CastConfig, _pair_by_registers(problem))

    def place(config: Config) -> tuple[float, float, str]:
        return steps(config, rule), steps(config, middles.get(type(config), rule)), str(config)

    return sorted(found, key=place)


def _pair_by_registers(problem: Problem) -> CastConfig:
    spec, (rows, cols) = MXSpec.parse(problem.formats), problem.shape
    item_bytes = getattr(torch, problem.dtype).itemsize
    return quantize_config(spec, rows, cols, item_bytes, problem.layout == "rows", pair=True)


def steps(config: Config, other: Config) -> float:
    """How far apart two configs are: their fields' doublings and switches, added up."""
    if type(config) is not type(other):
        return 8.0
    return sum(
        float(a != b) if isinstance(a, bool) else abs(log2(max(a, 0.5) / max(b, 0.5)))
        for a, b in zip(astuple(config), astuple(other), strict=True)
    )


def _casts(problem: Problem, rule: Config) -> Iterator[Config]:
    """Tiles of 16 to 128 elements a thread: long where blocks and memory run along the rows, else nearer to square. Of
    them a thread has what one load gives it, a square, or a run along a row."""
    block = MXSpec.parse(problem.formats).block
    along = block.rows <= 4 and problem.op != "quantize_pair" and problem.layout in _ALONG
    simple, square, run = (False, True, 1), (True, True, 1), (False, True, 4)  # square, wide, run
    if problem.op in ("dequantize", "fold"):
        ways: tuple[tuple[bool, bool, int], ...] = (simple, (False, False, 1))
    elif along:
        ways = (simple, run)
    else:
        ways = (square, run) if problem.op == "quantize_pair" or problem.layout == "columns" else (square, run, simple)
    (least_rows, most_rows), (least_cols, most_cols), least = (
        ((1, 32), (128, 4096), 16) if along else ((16, 128), (16, 512), 32)
    )
    largest_rows, largest_cols = (max(2 * side, 32) for side in problem.shape)  # far larger, and tiles stay empty
    for tile_rows, tile_cols, num_warps, way in product(
        _doublings(least_rows, min(most_rows, largest_rows)),
        _doublings(least_cols, min(most_cols, max(largest_cols, least_cols))),
        (1, 2, 4, 8),
        ways,
    ):
        if least <= tile_rows * tile_cols // (32 * num_warps) <= 128:
            yield CastConfig(tile_rows, tile_cols, num_warps, *way)


_ALONG = ("rows", "straight")


def _pairs(problem: Problem, rule: Config) -> Iterator[Config]:
    """As casts do it, and by way of shared memory: there with all of a tile's cells under way at first, or three."""
    yield from _casts(problem, rule)
    for (tile_rows, tile_cols), num_warps in product(_PAIR_TILES, (4, 8)):
        yield PairConfig(tile_rows, tile_cols, num_warps, min(tile_rows * tile_cols // PairConfig.SIDE**2, 3))


def _bands(problem: Problem, rule: Config) -> Iterator[Config]:
    """Tiles of whole rows, or of pieces of them."""
    widest = power_of_two_above(problem.shape[1])
    for tile_cols, tile_rows, num_warps, wide in product(
        _doublings(min(512, widest), widest), _doublings(1, 32), (1, 2, 4, 8, 16), (False, True)
    ):
        if 512 * num_warps <= tile_rows * tile_cols <= min(32 * 128 * num_warps, 32768):
            yield CastConfig(tile_rows, tile_cols, num_warps, wide=wide)


def _carriers(problem: Problem, rule: Config) -> Iterator[Config]:
    """For Hopper's kernel and for the other. Partial sums are promoted as often as by the rule, so that bits stay."""
    assert isinstance(rule, HopperConfig | MatmulConfig)
    carrier = getattr(torch, problem.formats.split(" * ")[0])
    out_dtype = getattr(torch, problem.dtype)
    block = 128 // carrier.itemsize
    promote = rule.promote * block if isinstance(rule, HopperConfig) else rule.promote
    for (cols, pieces), group_m in product(_HOPPER_TILES, _GROUPS):
        most = hopper_tile_config(cols, pieces, carrier, out_dtype).stages
        for stages in range(max(most - 3, 3), most + 1):
            yield HopperConfig(cols, pieces, stages, promote // block, group_m)
    few = problem.shape[0] <= 256
    if isinstance(rule, HopperConfig) and not few:
        return  # where its tiles are filled, nothing else comes near it
    for block_m, block_n, block_k, num_warps, num_stages, group_m in product(
        (64,) if problem.shape[0] <= 64 else (64, 128) if few else (128, 256),
        (32, 64, 128, 256),
        (block, 2 * block),
        (4, 8),
        (2, 3, 4, 6, 8),
        (8,) if few else (8, 16),
    ):
        # registers of a thread that hold sums, twice where they are promoted
        if (block_m * block_n * (2 if promote else 1)) // (32 * num_warps) <= 192:
            yield MatmulConfig(block_m, block_n, block_k, num_warps, num_stages, group_m, promote)


def _few_rows(problem: Problem, rule: Config) -> Iterator[Config]:
    """Splits of K around the number that makes a power of two of programs."""
    _, n, k = problem.shape
    for rows, cols, num_warps, num_stages, programs in product(
        (64, 128, 256), (128, 256), (4, 8), (2, 3, 4, 5), (128, 256, 512, 1024)
    ):
        splits = max(min(programs // ceil_div(n, rows), ceil_div(k, 2 * cols)), 1)
        yield SmallMatmulConfig(rows, cols, splits, num_warps, num_stages)


def _decoding(problem: Problem, rule: Config) -> Iterator[Config]:
    """Nothing but the rule's for the fp32 units, which no product that can be waited for takes."""
    if problem.layout == "exact":
        return
    few = problem.shape[0] <= 64
    for block_m, block_n, block_k, num_warps, num_stages in product(
        (16, 32, 64) if few else (64, 128), (64, 128, 256), (32, 64, 128), (4, 8), (2, 3, 4)
    ):
        if block_m * block_n // (32 * num_warps) <= 128:
            yield MatmulConfig(block_m, block_n, block_k, num_warps, num_stages)


def _block_scaled(problem: Problem, rule: Config) -> Iterator[Config]:
    for block_m, block_n, block_k, num_warps, num_stages, group_m in product(
        (128,), (64, 128, 256), (128, 256), (4, 8), (2, 3, 4, 5), (4, 8, 16)
    ):
        yield MatmulConfig(block_m, block_n, block_k, num_warps, num_stages, group_m)


_GRIDS: dict[str, Callable[[Problem, Config], Iterable[Config]]] = {
    "quantize": _casts,
    "quantize_pair": _pairs,
    "dequantize": _casts,
    "fold": _casts,
    "quantize_fold": _bands,
    "multiply": _carriers,
    "stream": _few_rows,
    "decode_multiply": _decoding,
    "native": _block_scaled,
}


def _doublings(least: int, most: int) -> list[int]:
    """The powers of two from `least`, one itself, to `most`."""
    return [least << i for i in range((most // least).bit_length())]

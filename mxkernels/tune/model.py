"""How long a problem should take under a config: a model that ranks configs, and nothing more.

A kernel takes the longest of three: moving its bytes, at the rate that the bytes which its programs have under way at
a time allow; issuing its instructions; and multiplying tile after tile. Programs that all run at once take as long as
the processor that has the most of them; of W waves of programs, the last leaves processors idle for a good half.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..spec import MXSpec
from .config import CastConfig, Config, HopperConfig, MatmulConfig, PairConfig, SmallMatmulConfig
from .limits import Footprint, Limits, resident, threads
from .problem import Problem
from .rule import ceil_div

_LATENCY_NS = 800  # of a load under load
_ISSUE = 1.3  # cycles for an instruction: many run at half rate
_TILE_OVERHEAD = 16  # columns that a tile's epilogue and its loads are worth
_PLAIN = 1.25  # a kernel that drains the tensor cores at every step, against the persistent one
_ITEM_BITS = {"native": 8, "decode_multiply": 16}


@dataclass(frozen=True)
class Work:
    """What a problem has to do at least: bytes read and written."""

    read_bytes: int
    written_bytes: int


def predicted_us(
    problem: Problem, work: Work, config: Config, limits: Limits, footprint: Footprint | None = None
) -> float:
    """Microseconds; `footprint` is guessed where it is not known."""
    if isinstance(config, CastConfig | PairConfig):
        return _cast_us(problem, work, config, limits, footprint)
    if isinstance(config, SmallMatmulConfig):
        return _stream_us(problem, work, config, limits, footprint)
    return _product_us(problem, work, config, limits, footprint)


def _cast_us(
    problem: Problem, work: Work, config: CastConfig | PairConfig, limits: Limits, footprint: Footprint | None
) -> float:
    rows, cols = problem.shape
    programs = ceil_div(rows, config.tile_rows) * ceil_div(cols, config.tile_cols)
    elements = config.tile_rows * config.tile_cols // threads(config)
    under_way = work.read_bytes / programs
    blocks_are_rows = MXSpec.parse(problem.formats).block.rows == 1
    if isinstance(config, PairConfig):
        cell = elements // config.cells
        footprint = footprint or Footprint(0, min(64 + cell, 255), config.stages * 2 * config.SIDE**2)
        instructions = footprint.instructions or (60 + (14 if blocks_are_rows else 25) * cell) * config.cells
        under_way *= config.stages / config.cells
    else:
        footprint = footprint or Footprint(0, min(32 + elements, 255), 0)
        both = 20 if blocks_are_rows else 17
        each = both if problem.op == "quantize_pair" else 12
        instructions = footprint.instructions or 60 + each * elements
    together = resident(config, limits, footprint)
    issue_us = programs * config.num_warps * instructions * _ISSUE / (4 * limits.processors * limits.ghz) / 1e3
    memory_us = _memory_us(work, under_way * together, limits)
    return max(issue_us, memory_us) * _tail(programs, together, limits)


def _stream_us(
    problem: Problem, work: Work, config: SmallMatmulConfig, limits: Limits, footprint: Footprint | None
) -> float:
    m, n, _ = problem.shape
    programs = ceil_div(n, config.rows) * config.splits
    stage_bytes = config.rows * config.cols // 2
    footprint = footprint or Footprint(0, 128, config.num_stages * stage_bytes)
    together = min(resident(config, limits, footprint), ceil_div(programs, limits.processors))
    partial_us = 2 * 4 * config.splits * m * n / limits.gbps / 1e3
    memory_us = _memory_us(work, (config.num_stages - 1) * stage_bytes * together, limits)
    # a program's first loads are waited for with nothing else under way
    starts_us = ceil_div(programs, limits.processors * together) * _LATENCY_NS / 1e3
    return memory_us * _tail(programs, together, limits) + starts_us + partial_us


def _product_us(problem: Problem, work: Work, config: Config, limits: Limits, footprint: Footprint | None) -> float:
    m, n, k = problem.shape
    if isinstance(config, HopperConfig):
        block_m, block_n, stages, depth_bytes, slower = 128, config.cols * config.pieces, config.stages, 128, 1.0
    else:
        assert isinstance(config, MatmulConfig)
        block_m, block_n, stages, slower = config.block_m, config.block_n, config.num_stages, _PLAIN
        depth_bytes = config.block_k * _item_bits(problem) // 8
    tiles = ceil_div(m, block_m) * ceil_div(n, block_n)
    stage_bytes = (block_m + block_n) * depth_bytes
    together = 1 if footprint is None or isinstance(config, HopperConfig) else resident(config, limits, footprint)
    rate = 8192 * 8 / _item_bits(problem)  # operations of a processor in a cycle
    tile_cycles = 2 * (block_m + _TILE_OVERHEAD) * (block_n + _TILE_OVERHEAD) * k / rate * slower
    waves = ceil_div(tiles, limits.processors)
    multiply_us = waves * tile_cycles / limits.ghz / 1e3
    under_way = (stages - 1) * stage_bytes * min(together, waves)
    return max(multiply_us, _memory_us(work, under_way * min(tiles / limits.processors, 1.0), limits))


def _item_bits(problem: Problem) -> int:
    if problem.op != "multiply":
        return _ITEM_BITS[problem.op]
    return {"float32": 32, "bfloat16": 16}.get(problem.formats.split(" * ")[0], 8)


def _memory_us(work: Work, under_way: float, limits: Limits) -> float:
    """`under_way`: the bytes of loads that a processor has at a time."""
    needed = limits.gbps * _LATENCY_NS / limits.processors
    return (work.read_bytes + work.written_bytes) / limits.gbps / 1e3 * max(1.0, needed / under_way)


def _tail(programs: int, together: int, limits: Limits) -> float:
    """How much longer it takes since processors are not all busy to the end."""
    waves = programs / (limits.processors * together)
    if waves > 1:
        return 1 + 0.6 / waves
    return ceil_div(programs, limits.processors) * limits.processors / programs

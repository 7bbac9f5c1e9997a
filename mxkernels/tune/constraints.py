"""Why a config cannot serve a problem: what kernels take for granted, whoever wrote the config."""

from __future__ import annotations

from dataclasses import fields

import torch

from ..prepared import GROUP
from ..spec import MXSpec
from .config import CastConfig, Config, HopperConfig, MatmulConfig, PairConfig, SmallMatmulConfig
from .problem import Problem
from .rule import ceil_div, hopper_tile_config, power_of_two_above

CONFIG_TYPES: dict[str, tuple[type[Config], ...]] = {
    "quantize": (CastConfig,),
    "quantize_pair": (CastConfig, PairConfig),
    "dequantize": (CastConfig,),
    "fold": (CastConfig,),
    "quantize_fold": (CastConfig,),
    "multiply": (MatmulConfig, HopperConfig),
    "stream": (SmallMatmulConfig,),
    "decode_multiply": (MatmulConfig,),
    "native": (MatmulConfig,),
}

LARGEST_SHARED_BYTES = 232448  # that a program has on any GPU

_WARPS = (1, 2, 4, 8, 16)
_STAGES = range(1, 11)
_LARGEST_PROMOTION = 512  # of K, between promotions to fp32 of FP8's partial sums: docs/numerics.md
_LARGEST_TILE = 512  # elements a thread
_HOPPER_ACCUMULATORS = 384  # columns of sums, and of the partial sums beside them, that registers hold


def obstacle(problem: Problem, config: Config, shared_bytes: int = LARGEST_SHARED_BYTES) -> str | None:
    """Why a config cannot serve a problem on a GPU whose programs have `shared_bytes` of shared memory; None if
    nothing is known against it. Problems of one key have the same.

    Raises:
        ValueError: the problem's formats or dtype are none.
    """
    if not isinstance(config, CONFIG_TYPES[problem.op]):
        allowed = " or ".join(each.__name__ for each in CONFIG_TYPES[problem.op])
        return f"it is a {type(config).__name__}; allowed for {problem.op}: {allowed}"
    wrong_type = _wrong_type(config)
    if wrong_type:
        return wrong_type
    if isinstance(config, CastConfig):
        return _cast_obstacle(problem, config)
    if isinstance(config, PairConfig):
        return _pair_obstacle(problem, config, shared_bytes)
    if isinstance(config, HopperConfig):
        return _hopper_obstacle(problem, config)
    if isinstance(config, SmallMatmulConfig):
        return _stream_obstacle(problem, config, shared_bytes)
    return _matmul_obstacle(problem, config, shared_bytes)


def _wrong_type(config: Config) -> str | None:
    """A field that is none of the type that the class declares."""
    for field in fields(config):
        value = getattr(config, field.name)
        if type(value).__name__ != field.type:
            return f"{field.name} is {value!r}; allowed: {field.type}"
    return None


def _cast_obstacle(problem: Problem, config: CastConfig) -> str | None:
    block = MXSpec.parse(problem.formats).block
    least_rows, least_cols = block.rows, max(block.cols, 16)  # whole words of packed codes
    if problem.op == "quantize_pair":
        least_rows = least_cols = max(block.rows, block.cols, 16)
    if config.square:
        least_rows = max(least_rows, 16)
    if config.run > 1:
        least_cols = max(least_cols, 32)
        least_rows = max(least_rows, 32) if problem.op == "quantize_pair" else least_rows
    if problem.op == "quantize_fold":
        least_cols = max(least_cols, 64)
    runs: tuple[int, ...] = (1,)
    if problem.op in ("quantize", "quantize_pair") and not config.square:
        runs = (1, 4) if config.fills_runs(_dtype(problem.dtype).itemsize) else (1,)
    return (
        _not_one_of("num_warps", config.num_warps, _WARPS)
        or _not_one_of("run", config.run, runs)
        or _no_side("tile_rows", config.tile_rows, least_rows, 1 << 15)
        or _no_side("tile_cols", config.tile_cols, least_cols, 1 << 15)
        or _too_large("tile_rows * tile_cols", config.tile_rows * config.tile_cols, config.num_warps)
    )


def _pair_obstacle(problem: Problem, config: PairConfig, shared_bytes: int) -> str | None:
    spec = MXSpec.parse(problem.formats)
    if _dtype(problem.dtype).itemsize != 2:
        return f"it reads {problem.dtype}; allowed: bfloat16, float16"
    if spec.element.bits == 6:
        return f"it packs {spec.element.name}; allowed: elements of 4 or 8 bits"
    if spec.block.cols == 1 or spec.block.rows == spec.block.cols == 128:
        return f"its blocks are {spec.block}; allowed: two columns or more, and less than 128x128"
    blocks = 2 * config.tile_rows * config.tile_cols // (spec.block.rows * spec.block.cols)
    needed = config.stages * 2 * config.SIDE**2 + blocks * (1 if spec.symmetric else 3)
    return (
        _not_one_of("num_warps", config.num_warps, (4, 8))
        or _no_side("tile_rows", config.tile_rows, config.SIDE, 1 << 12)
        or _no_side("tile_cols", config.tile_cols, config.SIDE, 1 << 12)
        or _not_one_of("stages", config.stages, range(1, config.cells + 1))
        or (f"its stages take {needed} bytes; allowed: {shared_bytes}" if needed > shared_bytes else None)
    )


def _matmul_obstacle(problem: Problem, config: MatmulConfig, shared_bytes: int) -> str | None:
    least, least_k, bits = 16, 16, 16
    if problem.op == "multiply":
        bits = 8 * _carrier(problem).itemsize
        least_k = 32 if bits == 8 else 16  # of a tensor core's instruction
    elif problem.op == "native":
        least, least_k = (128 if problem.layout == "swizzled" else 16), 128
        bits = 4 if problem.formats == "e2m1 * e2m1" else 8
    needed = config.num_stages * (config.block_m + config.block_n) * config.block_k * bits // 8
    return (
        _not_one_of("num_warps", config.num_warps, _WARPS)
        or _not_one_of("num_stages", config.num_stages, _STAGES)
        or _not_one_of("group_m", config.group_m, range(1, 65))
        or _no_side("block_m", config.block_m, least, 256)
        or _no_side("block_n", config.block_n, least, 256)
        or _no_side("block_k", config.block_k, least_k, 256)
        or _too_large("block_m * block_n", config.block_m * config.block_n, config.num_warps)
        or _promotion_obstacle(problem, config.promote, config.block_k)
        or (f"its stages take {needed} bytes; allowed: {shared_bytes}" if needed > shared_bytes else None)
    )


def _hopper_obstacle(problem: Problem, config: HopperConfig) -> str | None:
    carrier, out_dtype = _carrier(problem), _dtype(problem.dtype)
    side = _no_side("cols", config.cols, 64, 256) or _not_one_of("pieces", config.pieces, (1, 2))
    if side:
        return side
    # block after block is in flight while the one before is freed; a group waits for its pieces in shared memory
    least = max(2, config.promote)
    most = hopper_tile_config(config.cols, config.pieces, carrier, out_dtype).stages
    columns = config.cols * (config.pieces + (config.promote > 0))
    if columns > _HOPPER_ACCUMULATORS:
        return f"its sums take {columns} columns; allowed: {_HOPPER_ACCUMULATORS}"
    return (
        _not_one_of("stages", config.stages, range(least, most + 1))
        or _not_one_of("group_m", config.group_m, range(1, 65))
        or _promotion_obstacle(problem, config.promote * 128 // carrier.itemsize, 128 // carrier.itemsize)
    )


def _stream_obstacle(problem: Problem, config: SmallMatmulConfig, shared_bytes: int) -> str | None:
    k = problem.shape[-1]
    needed = stream_bytes(problem, config)
    return (
        _not_one_of("num_warps", config.num_warps, _WARPS)
        or _not_one_of("num_stages", config.num_stages, _STAGES)
        or _no_side("rows", config.rows, 16 * config.num_warps, 1024)
        or _no_side("cols", config.cols, GROUP, 1024)
        or _not_one_of("splits", config.splits, range(1, min(ceil_div(k, config.cols), 512) + 1))
        or _too_large("rows * cols", config.rows * config.cols, config.num_warps)
        or (f"its stages take {needed} bytes; allowed: {shared_bytes}" if needed > shared_bytes else None)
    )


def stream_bytes(problem: Problem, config: SmallMatmulConfig) -> int:
    """Of shared memory, that the kernel for few rows takes at least.

    A stage has a tile's codes, columns of x and, if they are a word a thread, scale bytes; the last of them has only
    what the tensor cores wait for: x where they read it from there, as Hopper's do; else the decoded weights, on their
    way from some registers to others.
    """
    x_rows = max(power_of_two_above(problem.shape[0]), 16)
    x_bytes, decoded_bytes = 2 * x_rows * config.cols, 2 * config.rows * config.cols
    scale_bytes = config.rows * config.cols // MXSpec.parse(problem.formats).block.cols
    stage_bytes = decoded_bytes // 4 + x_bytes + (scale_bytes if scale_bytes >= 4 * 32 * config.num_warps else 0)
    return (config.num_stages - 1) * stage_bytes + min(x_bytes, decoded_bytes)


def _carrier(problem: Problem) -> torch.dtype:
    """Of the left operand of a product of carriers, which are of one size."""
    return _dtype(problem.formats.split(" * ")[0])


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name!r} is no dtype; allowed: torch's names, such as bfloat16")
    return dtype


def _promotion_obstacle(problem: Problem, promote: int, block_k: int) -> str | None:
    """`promote`: of K, as `block_k`."""
    if problem.op != "multiply":
        return f"promote is {promote}; allowed for {problem.op}: 0" if promote else None
    if promote == 0 and _carrier(problem).itemsize > 1:
        return None
    if promote % block_k or not 0 < promote <= _LARGEST_PROMOTION:
        return f"promote is every {promote} of K; allowed: multiples of {block_k} up to {_LARGEST_PROMOTION}"
    return None


def _no_side(name: str, value: int, least: int, most: int) -> str | None:
    if least <= value <= most and value & (value - 1) == 0:
        return None
    return f"{name} is {value}; allowed: powers of two from {least} to {most}"


def _not_one_of(name: str, value: int, allowed: range | tuple[int, ...]) -> str | None:
    if value in allowed:
        return None
    words = f"{allowed[0]} to {allowed[-1]}" if isinstance(allowed, range) and allowed else ", ".join(map(str, allowed))
    return f"{name} is {value}; allowed: {words or 'none'}"


def _too_large(name: str, elements: int, num_warps: int) -> str | None:
    most = 32 * num_warps * _LARGEST_TILE
    return None if elements <= most else f"{name} is {elements}; allowed with {num_warps} warps: {most}"

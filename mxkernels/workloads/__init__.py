"""Problems made runnable: operands, the launches that a config makes of them, and what these have to write.

For the tuner. On the meta device, where nothing is computed, a workload serves to compile its launches. Imports
Triton.
"""

from __future__ import annotations

from dataclasses import replace
from math import lcm

import torch

from ..ops.quantize_pair_kernel import pair_serves
from ..tune import CastConfig, Config, HopperConfig, PairConfig, Problem
from ..tune.limits import Limits
from .casts import Dequantize, Fold, Quantize, QuantizeFold
from .products import DecodeMultiply, Multiply, Native, Stream, on_hopper
from .workload import META, Workload, gaussian, signs

__all__ = ["META", "Workload", "proof", "proof_problem", "rule_config", "serves", "workload"]

_WORKLOADS: dict[str, type[Workload]] = {
    "quantize": Quantize,
    "quantize_pair": Quantize,
    "dequantize": Dequantize,
    "fold": Fold,
    "quantize_fold": QuantizeFold,
    "multiply": Multiply,
    "stream": Stream,
    "decode_multiply": DecodeMultiply,
    "native": Native,
}


def workload(problem: Problem, device: torch.device, limits: Limits) -> Workload:
    """The workload of a problem: Gaussian operands, on the device.

    Args:
        device: where it runs; or meta, to compile it for a GPU with `limits`.

    Raises:
        ValueError: of a problem that can be none.
    """
    return _WORKLOADS[problem.op](problem, device, limits, device, gaussian)


def proof(problem: Problem, device: torch.device, limits: Limits) -> Workload:
    """A workload that knows better what has to come of it: a cast from the reference, and so one of a small problem;
    a product since its sums are exact."""
    if len(problem.shape) == 2:
        return _WORKLOADS[problem.op](problem, device, limits, torch.device("cpu"), gaussian)
    return _WORKLOADS[problem.op](problem, device, limits, device, signs)


def proof_problem(problem: Problem, config: Config) -> Problem:
    """Of a cast one on a matrix so small that the reference is quick, for which the launches of `config` are compiled
    to the same kernels; of a product itself."""
    if not isinstance(config, CastConfig | PairConfig):
        return problem
    rows, cols = problem.shape
    tile_rows, tile_cols = lcm(config.tile_rows, 16), lcm(config.tile_cols, 128)
    whole_rows = problem.op == "quantize_fold"
    return replace(problem, shape=(_shrunk(rows, tile_rows), cols if whole_rows else _shrunk(cols, tile_cols)))


def rule_config(problem: Problem, limits: Limits) -> Config:
    """What the deterministic rule has for a problem."""
    return _WORKLOADS[problem.op].rule(problem, limits)


def serves(problem: Problem, config: Config, limits: Limits) -> bool:
    """Whether a config serves as far as only `ops` knows."""
    if isinstance(config, PairConfig):
        rows, cols = problem.shape
        return pair_serves(config, rows, cols, limits.capabilities)
    return not isinstance(config, HopperConfig) or on_hopper(problem, limits)


def _shrunk(extent: int, tile: int) -> int:
    """A tile, or a tile and what the last one has: what compilers know of `extent` holds for it too."""
    return extent if extent < 2 * tile else tile + extent % tile

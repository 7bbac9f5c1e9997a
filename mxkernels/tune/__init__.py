"""How fast: configs, which decide speed and never a byte."""

from .config import CastConfig, Config, HopperConfig, MatmulConfig, PairConfig, SmallMatmulConfig
from .constraints import CONFIG_TYPES, obstacle
from .events import on_change
from .location import cache_directory, tables_in
from .lookup import Choice, find_config, first_launch, recording
from .pin import pinned
from .problem import OPS, Problem, dtype_name
from .ranks import share
from .rule import (
    carrier_config,
    dequantize_config,
    fold_config,
    guarded_matmul_config,
    hopper_config,
    hopper_tile_config,
    quantize_config,
    quantize_fold_config,
    quantize_pair_config,
    small_matmul_config,
    wide_matmul_config,
)
from .source import Source, left_out, serving, sources
from .stamp import Stamp
from .table import BrokenTable, Entry, Table, TableError, cache_path, load, remove, store

__all__ = [
    "CONFIG_TYPES",
    "OPS",
    "BrokenTable",
    "CastConfig",
    "Choice",
    "Config",
    "Entry",
    "HopperConfig",
    "MatmulConfig",
    "PairConfig",
    "Problem",
    "SmallMatmulConfig",
    "Source",
    "Stamp",
    "Table",
    "TableError",
    "cache_directory",
    "cache_path",
    "carrier_config",
    "dequantize_config",
    "dtype_name",
    "find_config",
    "first_launch",
    "fold_config",
    "guarded_matmul_config",
    "hopper_config",
    "hopper_tile_config",
    "left_out",
    "load",
    "obstacle",
    "on_change",
    "pinned",
    "quantize_config",
    "quantize_fold_config",
    "quantize_pair_config",
    "recording",
    "remove",
    "serving",
    "share",
    "small_matmul_config",
    "sources",
    "store",
    "tables_in",
    "wide_matmul_config",
]

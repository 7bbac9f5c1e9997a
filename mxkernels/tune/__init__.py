"""How fast: configs, which decide speed and never a byte."""

from .rule import (
    FEW_ROWS,
    CastConfig,
    MatmulConfig,
    SmallMatmulConfig,
    bf16_matmul_config,
    dequantize_config,
    fold_config,
    folded_matmul_config,
    quantize_config,
    quantize_fold_config,
    small_matmul_config,
    wide_matmul_config,
)

__all__ = [
    "FEW_ROWS",
    "CastConfig",
    "MatmulConfig",
    "SmallMatmulConfig",
    "bf16_matmul_config",
    "dequantize_config",
    "fold_config",
    "folded_matmul_config",
    "quantize_config",
    "quantize_fold_config",
    "small_matmul_config",
    "wide_matmul_config",
]

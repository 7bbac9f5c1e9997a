"""How fast: configs, which decide speed and never a byte."""

from .rule import CastConfig, dequantize_config, quantize_config

__all__ = ["CastConfig", "dequantize_config", "quantize_config"]

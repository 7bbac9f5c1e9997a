"""How fast: configs, which decide speed and never a byte."""

from .rule import CastConfig, cast_config

__all__ = ["CastConfig", "cast_config"]

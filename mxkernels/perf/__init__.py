"""How fast: timing, ceilings, peers, and the one list of shapes. Nothing here can change a byte."""

from .cases import DEFAULT_SHAPE, DEFAULT_WEIGHT, ROWS, SHAPES, Shape
from .ceilings import Ceiling, Ceilings
from .peers import bf16_product, dot_scaled_product, fp8_product
from .timing import ColdTimer, Timing, time_call, time_host

__all__ = [
    "DEFAULT_SHAPE",
    "DEFAULT_WEIGHT",
    "ROWS",
    "SHAPES",
    "Ceiling",
    "Ceilings",
    "ColdTimer",
    "Shape",
    "Timing",
    "bf16_product",
    "dot_scaled_product",
    "fp8_product",
    "time_call",
    "time_host",
]

"""How fast: timing, ceilings, and the one list of shapes. Nothing here can change a byte."""

from .cases import DEFAULT_SHAPE, SHAPES, Shape
from .ceilings import Ceiling, Ceilings
from .timing import Timing, time_call, time_host

__all__ = ["DEFAULT_SHAPE", "SHAPES", "Ceiling", "Ceilings", "Shape", "Timing", "time_call", "time_host"]
